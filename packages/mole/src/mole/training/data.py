"""Training data from local files: text, or ids that were computed before."""

import gzip
import json
import lzma
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from tqdm.auto import tqdm

_OPENERS: dict[str, Any] = {".gz": gzip.open, ".xz": lzma.open}


def texts(path: Path) -> Iterator[str]:
    """Yield the texts of a file: a `.jsonl` file has one in the field `text` of every line.

    Files that end in `.gz` or `.xz` are unpacked; any other file is one text. Empty lines are
    passed over.

    Raises:
        ValueError: A line is no JSON object with a text.
    """
    packed = path.suffix in _OPENERS
    opener = _OPENERS.get(path.suffix, open)
    name = path.stem if packed else path.name
    with opener(path, "rt", encoding="utf-8") as lines:
        if not name.endswith(".jsonl"):
            yield lines.read()
            return
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                text = json.loads(line)["text"]
            except (ValueError, KeyError, TypeError):
                text = None
            if not isinstance(text, str):
                raise ValueError(
                    f"{path}, line {number}: must be a JSON object with a field `text`."
                )
            yield text


def load_tokens(
    paths: list[Path], vocab: int, tokenizer: Any = None, *, progress: bool = False
) -> Int[Tensor, " total"]:
    """Return the ids of all files in one row; every text is followed by the end-of-text id.

    Args:
        paths: Text files (see `texts`), or `.npy` files of ids.
        vocab: Number of ids of the model.
        tokenizer: A transformers tokenizer; only `.npy` files do without.
        progress: Show how many characters were turned into ids.

    Raises:
        ValueError: A file holds no ids, ids that are not in the vocabulary, or text without a
            tokenizer.
        OSError: A file cannot be read.
    """
    parts = []
    bar = tqdm(desc="reading text", unit="char", unit_scale=True, delay=1, disable=not progress)
    for path in paths:
        if path.suffix == ".npy":
            import numpy

            ids: Any = numpy.load(path).ravel()
            if ids.dtype.kind not in "iu":
                raise ValueError(f"{path} must hold integers; got {ids.dtype}.")
        elif tokenizer is None:
            raise ValueError(f"`tokenizer` must be given to read text; {path} is no .npy file.")
        else:
            end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
            rows = []
            for text in texts(path):
                found = tokenizer(text, add_special_tokens=False).input_ids + end
                rows.append(torch.tensor(found, dtype=torch.int32))
                bar.update(len(text))
            ids = torch.cat(rows) if rows else torch.empty(0, dtype=torch.int32)
        if not len(ids):
            raise ValueError(f"{path} holds no tokens.")
        low, high = int(ids.min()), int(ids.max())
        if not 0 <= low <= high < vocab:
            raise ValueError(
                f"{path}: ids must be between 0 and {vocab - 1}, the model's last id; "
                f"got {low} to {high}. Is the tokenizer the model's?"
            )
        parts.append(ids if isinstance(ids, Tensor) else torch.from_numpy(ids.astype("int32")))
    bar.close()
    if not parts:
        raise ValueError("`paths` must name at least one file.")
    return torch.cat(parts)


__all__ = ["load_tokens", "texts"]
