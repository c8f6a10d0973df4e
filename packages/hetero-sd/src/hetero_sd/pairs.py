"""Models and prompts for the command line: from local folders, or those of this package."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .demo import smollm2


@dataclass(frozen=True)
class Pair:
    """Two models and their tokenizers.

    Attributes:
        name: What the target is called in reports.
        target: The target.
        drafter: The drafter.
        target_tokenizer: Its tokenizer.
        drafter_tokenizer: Its tokenizer.
        notes: What the user should know.
    """

    name: str
    target: Any
    drafter: Any
    target_tokenizer: Any
    drafter_tokenizer: Any
    notes: list[str] = field(default_factory=list)

    @property
    def parts(self) -> tuple[Any, Any, Any, Any]:
        """The arguments of `HeteroSpeculativeDecoder`."""
        return self.target, self.drafter, self.target_tokenizer, self.drafter_tokenizer


def load_tokenizer(place: Path) -> Any:
    """Return the tokenizer of a local folder or GGUF file."""
    from transformers import AutoTokenizer

    if _is_smollm(place):
        return smollm2.load_tokenizer(place)
    return AutoTokenizer.from_pretrained(**_where(place))


def load_side(place: Path) -> tuple[Any, Any]:
    """Return the model of a local folder or GGUF file, in evaluation mode, and its tokenizer."""
    from transformers import AutoModelForCausalLM

    if _is_smollm(place):
        return smollm2.load(place)
    model = AutoModelForCausalLM.from_pretrained(**_where(place))
    return model.eval(), load_tokenizer(place)


def _is_smollm(place: Path) -> bool:
    """Return whether it is a file whose tokenizer transformers would not read as it is."""
    return place.is_file() and smollm2.is_smollm(place)


def _where(place: Path) -> dict[str, Any]:
    """Return the arguments that make `from_pretrained` read a local folder or GGUF file."""
    if place.is_file():
        here = {"pretrained_model_name_or_path": place.parent, "gguf_file": place.name}
    else:
        here = {"pretrained_model_name_or_path": place}
    return {**here, "local_files_only": True}


def load_pair(
    target: Path | None,
    drafter: Path | None,
    *,
    dtype: str = "auto",
    device: str = "auto",
    small: bool = False,
    size: int | float | None = None,
) -> Pair:
    """Return a pair from folders or GGUF files, or the package's own where none is given.

    Args:
        target: Folder of the target, as `save_pretrained` writes it, or GGUF file.
        drafter: The same of the drafter; it may be given alone.
        dtype: A type, or `"auto"`: bfloat16 on CUDA devices, else float32.
        device: A device, or `"auto"`.
        small: Of the package's own, use the small target even where SmolLM2 is installed.
        size: Parameters that the target is to have: a model that says the same, at the cost of a
            larger one; see `demo.inflate`.

    Raises:
        ValueError: A target is given without a drafter, the type or device is not there, or the
            target cannot be made that large.
    """
    from fourfold_common import pick_device, pick_dtype

    if drafter is None and target is not None:
        raise ValueError(
            "give `--drafter` with `--target`; the demo's drafter knows SmolLM2 alone."
        )
    try:
        place, _ = pick_device(device)
    except ValueError as error:
        raise ValueError(str(error).replace("`request`", "`device`")) from None
    try:
        kind = pick_dtype(dtype, place)[0] if dtype != "auto" else torch.float32
    except ValueError as error:
        raise ValueError(str(error).replace("`request`", "`dtype`")) from None
    if dtype == "auto" and place.type == "cuda":
        kind = torch.bfloat16
    if target is None:
        from .demo.run import load_target

        name, model, tokenizer, notes = load_target(small)
    else:
        name, notes = target.resolve().stem if target.is_file() else target.resolve().name, []
        model, tokenizer = load_side(target)
    if drafter is None:
        from .demo.run import load_model

        other, other_tokenizer = load_model("drafter")
    else:
        other, other_tokenizer = load_side(drafter)
    other = _cast(other, place, kind)
    if size is None:
        model = _cast(model, place, kind)
    else:
        from .demo.inflate import inflate, shape_for

        factor, layers = shape_for(model, size)
        model = inflate(model, factor, layers, dtype=kind, device=place)
        name += f", inflated to {sum(p.numel() for p in model.parameters()) / 1e9:.2f} B"
    return Pair(name, model, other, tokenizer, other_tokenizer, notes)


def _cast(model: Any, place: torch.device, kind: torch.dtype) -> Any:
    """Return a model on a device with weights of a type, as if it had been read so.

    Tables that are no weights, such as those of rotary positions, stay as exact as they are.
    """
    for weight in model.parameters():
        weight.data = weight.data.to(place, kind)
    return model.to(place)


def prompt_ids(tokenizer: Any, text: str, chat: bool, most: int | None = None) -> torch.Tensor:
    """Return a prompt's ids, shape `(1, length)`.

    Args:
        tokenizer: The target's.
        text: The prompt.
        chat: Whether to ask it in the tokenizer's chat template.
        most: Tokens of the text to keep, from its beginning; all if missing.
    """
    if most is not None:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) > most:
            text = tokenizer.decode(ids[:most]).rstrip("\ufffd")
    if chat:
        from .demo.run import chat_ids

        return chat_ids(tokenizer, text)
    return torch.tensor([tokenizer(text)["input_ids"]])


def read_lines(path: Path) -> list[str]:
    """Return the lines of a text file, plain or .gz, that are not empty.

    Raises:
        ValueError: It is no such file, or not in UTF-8.
    """
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            return [line.rstrip("\n") for line in file if line.strip()]
    except (UnicodeDecodeError, gzip.BadGzipFile, EOFError) as error:
        raise ValueError(f"{path.name} is no text in UTF-8, plain or gzipped: {error}.") from None


_FIELDS = ("prompt", "turns", "question", "text")


def read_prompts(path: Path, limit: int | None = None, categories: Sequence[str] = ()) -> list[str]:
    """Return the prompts of a file of JSON lines (plain or .gz), or of text lines.

    A line is an object with `prompt` as in HumanEval, with `turns`, of which the first is taken, as
    in Spec-Bench, with `question`, or with `text`.

    Args:
        path: The file.
        limit: Most prompts to take, spread evenly over the file.
        categories: Of objects that have a `category`, take these only; all if empty.

    Raises:
        ValueError: There is none, or a line has none of these fields.
    """
    prompts = []
    for number, line in enumerate(read_lines(path), 1):
        if ".jsonl" not in path.name:
            prompts.append(line)
            continue
        try:
            entry = json.loads(line)
            field = next(name for name in _FIELDS if name in entry)
            prompt = entry[field][0] if field == "turns" else entry[field]
            wanted = not categories or entry.get("category") in (None, *categories)
        except (ValueError, KeyError, TypeError, IndexError, StopIteration):
            prompt, wanted = None, True
        if not isinstance(prompt, str):
            names = ", ".join(f"`{name}`" for name in _FIELDS[:-1])
            raise ValueError(
                f"line {number} of {path.name} must be an object with {names} or `{_FIELDS[-1]}`."
            )
        if wanted:
            prompts.append(prompt)
    if not prompts:
        raise ValueError(f"{path.name} holds no prompt{' of these categories' * bool(categories)}.")
    if limit is not None and limit < len(prompts):
        prompts = [prompts[i * len(prompts) // limit] for i in range(limit)]
    return prompts
