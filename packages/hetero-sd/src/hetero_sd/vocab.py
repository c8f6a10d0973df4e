"""Which tokens two vocabularies share, byte for byte, and a report for users."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ._bytes import token_bytes


@dataclass(frozen=True)
class VocabMap:
    """The tokens that a drafter may propose, and what they are for the target.

    Attributes:
        keep: Drafter ids that have a target token, ascending. Shape `(kept,)`.
        to_target: The target id of each. Shape `(kept,)`. Several may be equal: their
            probabilities add.
        target_bytes: Bytes of each target id; None for special tokens.
        drafter_bytes: Bytes of each drafter id; None for special tokens.
        special: Drafter id for each special target id that has a counterpart.
    """

    keep: Tensor
    to_target: Tensor
    target_bytes: list[bytes | None]
    drafter_bytes: list[bytes | None]
    special: dict[int, int]


def _contents(tokenizer: Any) -> dict[str, int]:
    """Return the id of each special token by its string."""
    return {
        entry.content: index
        for index, entry in tokenizer.added_tokens_decoder.items()
        if entry.special
    }


def _canonical(tokenizer: Any, table: list[bytes | None]) -> dict[bytes, int]:
    """Return one id for each byte string; a byte-fallback token only where there is no other."""
    chosen: dict[bytes, int] = {}
    fallbacks = []
    for index, spelled in enumerate(table):
        if spelled is None:
            continue
        if len(spelled) == 1 and tokenizer.convert_ids_to_tokens(index) == f"<0x{spelled[0]:02X}>":
            fallbacks.append((spelled, index))
        else:
            chosen.setdefault(spelled, index)
    for spelled, index in fallbacks:
        chosen.setdefault(spelled, index)
    return chosen


def map_vocabularies(
    target_tokenizer: Any,
    drafter_tokenizer: Any,
    *,
    target_eos: Iterable[int] = (),
    drafter_eos: Iterable[int] = (),
    target_size: int | None = None,
    drafter_size: int | None = None,
) -> VocabMap:
    """Return the byte-exact map from drafter tokens to target tokens.

    Tokens match if they stand for the same bytes, however their tokenizers write them. Special
    tokens match by role: every end token of the drafter is the target's first end token, and
    special tokens with the same string are the same.

    Args:
        target_tokenizer: A fast tokenizer.
        drafter_tokenizer: A fast tokenizer.
        target_eos: End tokens of the target; the first one is drafted.
        drafter_eos: End tokens of the drafter.
        target_size: Rows of the target's head; target ids from there on are left out.
        drafter_size: Rows of the drafter's head; drafter ids from there on are left out.

    Raises:
        TypeError: A tokenizer has no backend of the `tokenizers` library.

    Source: TLI, Timor et al. 2025, algorithm 4; the byte rule is our own.
    """
    target_table, drafter_table = token_bytes(target_tokenizer), token_bytes(drafter_tokenizer)
    target_size = len(target_table) if target_size is None else target_size
    drafter_size = len(drafter_table) if drafter_size is None else drafter_size
    target_eos, drafter_eos = list(target_eos), list(drafter_eos)
    by_bytes = _canonical(target_tokenizer, target_table)
    pairs = {
        index: by_bytes[spelled]
        for index, spelled in enumerate(drafter_table)
        if spelled is not None and spelled in by_bytes
    }
    target_special, drafter_special = _contents(target_tokenizer), _contents(drafter_tokenizer)
    back: dict[int, int] = {}
    for text, index in drafter_special.items():
        if text in target_special:
            pairs[index] = target_special[text]
            back[target_special[text]] = index
    if target_eos and drafter_eos:
        pairs.update(dict.fromkeys(drafter_eos, target_eos[0]))
        for index in target_eos:
            back.setdefault(index, drafter_eos[0])
    # A start token is context, never a proposal.
    start = drafter_tokenizer.bos_token_id, target_tokenizer.bos_token_id
    if None not in start and start[1] not in target_eos:
        back.setdefault(start[1], start[0])
    kept = sorted((d, t) for d, t in pairs.items() if d < drafter_size and t < target_size)
    keep, to_target = zip(*kept, strict=True) if kept else ((), ())
    return VocabMap(
        torch.tensor(keep, dtype=torch.long),
        torch.tensor(to_target, dtype=torch.long),
        target_table,
        drafter_table,
        {t: d for t, d in back.items() if d < drafter_size},
    )
