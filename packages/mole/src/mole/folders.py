"""Models and tokenizers in folders, as the commands take them.

What needs torch is imported where it is used: a command's help comes at once.
"""

import json
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any


def quiet() -> None:
    """Keep transformers' own bars off the screen: ours show what takes time."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def load_lookup(folder: Path, dtype: str = "float32") -> Any:
    """Return the lookup model in a folder, its weights in the type `dtype`, or as they are."""
    from .modeling import MoleForCausalLM

    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except OSError:
        unfinished = ": its training is not finished" if (folder / "checkpoint").is_dir() else ""
        raise ValueError(
            f"`{folder}` must be the folder of a model; it has no config.json{unfinished}."
        ) from None
    if _theirs(config):
        return load_any(folder, dtype)
    # Another model's weights would load, with experts as they are before training.
    if config.get("model_type") != "mole":
        raise ValueError(
            f"`{folder}` must hold a lookup model (type 'mole'); its type is "
            f"{config.get('model_type')!r}. `mole upcycle` adds lookup experts to a dense model."
        )
    return MoleForCausalLM.from_pretrained(folder, dtype=dtype)


def load_any(folder: Path, dtype: str = "float32") -> Any:
    """Return the causal language model in a folder, also in the authors' layout."""
    import torch
    from transformers import AutoModelForCausalLM

    from .upstream import from_upstream

    file = folder / "config.json"
    if file.is_file() and _theirs(json.loads(file.read_text(encoding="utf-8"))):
        return from_upstream(folder, None if dtype == "auto" else getattr(torch, dtype))
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def check_new(folder: Path) -> None:
    """Raise an error if writing a model to the folder would replace another."""
    if (folder / "config.json").exists():
        raise ValueError(f"`OUTPUT` must be a new folder; {folder} holds a model.")


def _theirs(config: dict[str, Any]) -> bool:
    """Return whether a configuration is that of a lookup model as its authors publish it."""
    return config.get("model_type") == "llama" and "num_experts" in config


def load_tokenizer(folder: Path) -> Any:
    """Return the tokenizer in a folder."""
    from transformers import AutoTokenizer

    if not any(folder.glob("tokenizer*")):
        raise ValueError(
            f"`{folder}` must hold a tokenizer; it has no tokenizer.json. Copy it from the model "
            "that this one was made from."
        )
    return AutoTokenizer.from_pretrained(folder)


def chat_prompt(tokenizer: Any, prompt: str) -> str:
    """Return a user's words as the model was taught to read them.

    Raises:
        ValueError: The tokenizer has no chat template.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        raise ValueError("`--chat` needs a tokenizer with a chat template; this one has none.")
    words = [{"role": "user", "content": prompt}]
    text: str = tokenizer.apply_chat_template(words, tokenize=False, add_generation_prompt=True)
    return text


def find_device(name: str) -> Any:
    """Return the device that `--device` names."""
    from fourfold_common import pick_device

    try:
        return pick_device(name)[0]
    except ValueError as error:
        raise ValueError(str(error).replace("`request`", "`--device`")) from None


def place(model: Any, store: str, cache: int, device: str) -> Any:
    """Return a model on a device, a table's rows kept as asked for."""
    where = find_device(device)
    model = model.to(where).eval()
    if getattr(model, "lut", None) is not None:
        folder = Path(model.name_or_path) / model.config.lut["path"]
        if (store, cache, where.type) != ("mmap", 0, "cpu"):
            model.open_lut(folder, store, cache)
    elif (store, cache) != ("mmap", 0):
        raise ValueError("`--store` and `--cache` need a model in table form; convert it first.")
    return model


def copy_tokenizer(source: Path, gguf: str | None, target: Path) -> None:
    """Copy the tokenizer's files where there are any, or write what a GGUF file has."""
    if gguf is not None:
        from transformers import AutoTokenizer

        with suppress(ValueError):  # there is none in it
            AutoTokenizer.from_pretrained(source, gguf_file=gguf).save_pretrained(target)
        return
    for pattern in (
        "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt",
        "chat_template*",
    ):  # fmt: skip
        for file in filter(Path.is_file, source.glob(pattern)):
            shutil.copyfile(file, target / file.name)


__all__ = [
    "chat_prompt",
    "check_new",
    "copy_tokenizer",
    "find_device",
    "load_any",
    "load_lookup",
    "load_tokenizer",
    "place",
    "quiet",
]
