"""Models and prompts for the command line: from folders, files or the hub, or this package's."""

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


Place = Path | str  # A folder or a GGUF file; a text is a name on the hub, `owner/name`.


def find_place(name: str) -> Place:
    """Return the folder or file of that name, or the name itself where it may be one on the hub.

    Raises:
        ValueError: There is no such folder or file, and it is no name like `owner/name`.
    """
    path = Path(name)
    if path.exists():
        return path
    # A folder's name that is no folder is a slip of the pen, not the name of something to download.
    if name.count("/") != 1 or name[0] in "./~" or name.endswith((".gguf", "/")):
        raise ValueError(f"{name!r} does not exist, and is no name on the hub like owner/name.")
    return name


def load_tokenizer(place: Place) -> Any:
    """Return the tokenizer of a folder, GGUF file, or name on the hub.

    Raises:
        ValueError: It holds none that transformers can read.
    """
    from transformers import AutoTokenizer

    if _is_smollm(place):
        return smollm2.load_tokenizer(place)
    return _read(AutoTokenizer, "tokenizer", place)


def load_side(place: Place) -> tuple[Any, Any]:
    """Return the model in a folder, GGUF file, or on the hub, to evaluate, and its tokenizer.

    Raises:
        ValueError: It holds none that transformers can read.
    """
    from transformers import AutoModelForCausalLM

    if _is_smollm(place):
        return smollm2.load(place)
    model = _read(AutoModelForCausalLM, "model", place)
    return model.eval(), load_tokenizer(place)


def _is_smollm(place: Place) -> bool:
    """Return whether it is a file whose tokenizer transformers would not read as it is."""
    return isinstance(place, Path) and place.is_file() and smollm2.is_smollm(place)


def _read(kind: Any, what: str, place: Place) -> Any:
    """Return what transformers reads from a place; its error, with the place, where it cannot."""
    where: dict[str, Any] = {"pretrained_model_name_or_path": place}
    if isinstance(place, Path):
        where["local_files_only"] = True
        if place.is_file():
            where |= {"pretrained_model_name_or_path": place.parent, "gguf_file": place.name}
    try:
        return kind.from_pretrained(**where)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"no {what} could be read from {str(place)!r}: {error}") from error


def load_pair(
    target: Place | None,
    drafter: Place | None,
    *,
    dtype: str = "auto",
    device: str = "auto",
    small: bool = False,
    size: int | float | None = None,
) -> Pair:
    """Return a pair from folders, GGUF files or the hub, or the package's own where none is given.

    Args:
        target: Folder of the target, as `save_pretrained` writes it, GGUF file, or name on the hub.
        drafter: The same of the drafter; it may be given alone.
        dtype: A type, or `"auto"`: bfloat16 on CUDA devices, else float32.
        device: A device, or `"auto"`.
        small: Of the package's own, use the small target even where SmolLM2 is installed.
        size: Parameters that the target is to have: a model that says the same, at the cost of a
            larger one; see `demo.inflate`.

    Raises:
        ValueError: A target is given without a drafter, a model cannot be read, the type or device
            is not there, or the target cannot be made that large.
    """
    from fourfold_common import pick_device, pick_dtype

    _check_drafter(target, drafter)
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
        from .demo.models import load_target

        name, model, tokenizer, notes = load_target(small)
    else:
        name, notes = _title(target), []
        model, tokenizer = load_side(target)
    if drafter is None:
        from .demo.models import load_model

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


def load_tokenizers(
    target: Place | None, drafter: Place | None, *, small: bool = False
) -> tuple[Any, Any]:
    """Return the tokenizers of a pair alone; see `load_pair`."""
    from .demo.models import load_model

    _check_drafter(target, drafter)
    file = None if small else smollm2.find_gguf()
    if target is not None:
        ours = load_tokenizer(target)
    else:
        ours = load_model("target")[1] if file is None else smollm2.load_tokenizer(file)
    return ours, load_model("drafter")[1] if drafter is None else load_tokenizer(drafter)


def _check_drafter(target: Place | None, drafter: Place | None) -> None:
    if drafter is None and target is not None:
        raise ValueError(
            "give `--drafter` with `--target`; the demo's drafter knows SmolLM2 alone."
        )


def _title(place: Place) -> str:
    """Return what a model from there is called."""
    if isinstance(place, str):
        return place
    return place.resolve().stem if place.is_file() else place.resolve().name


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
        from .demo.models import chat_ids

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
