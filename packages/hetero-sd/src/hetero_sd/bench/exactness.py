"""Whether what a contender writes is the target's own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..testing import warpers
from ..verify import fits_law, gap_at_difference, rounding
from .contenders import Contender

EXACT, NEAR, WRONG = "exact", "exact but for ties", "NOT EXACT"
_ROWS = 16  # Rows drawn at once.


def judge_greedy(
    target: Any, rows: Sequence[Tensor], found: list[list[int]], wanted: list[list[int]]
) -> tuple[str, int]:
    """Return the verdict on greedy rows, and how many are token for token those wanted.

    Where half precision rounds a near tie otherwise, texts may part: such a row passes if the
    target finds both tokens of the first difference equally good up to its rounding.

    Args:
        target: The target.
        rows: Prompt of each row, shape `(1, length)`.
        found: New tokens of each row.
        wanted: New tokens of plain decoding.
    """
    same = ties = 0
    for ids, ours, theirs in zip(rows, found, wanted, strict=True):
        if ours == theirs:
            same += 1
        else:
            ties += gap_at_difference(target, ids, ours, theirs) < rounding(target)
    if same == len(wanted):
        return EXACT, same
    return (NEAR if same + ties == len(wanted) else WRONG), same


@torch.no_grad()
def _laws(target: Any, ids: Tensor, first: int, options: dict[str, Any]) -> Tensor:
    """Return the laws of the tokens after place `first` of a text and after all later places."""
    logits = target(ids.to(target.device)).logits[0, first:].double().cpu()
    for process in warpers(temperature=options["temperature"], top_p=options["top_p"]):
        logits = process(ids, logits)
    laws: Tensor = logits.softmax(-1)
    return laws


def openest(target: Any, ids: Tensor, new: list[int], options: dict[str, Any]) -> Tensor:
    """Return a prompt with some of its text, up to where the next token is least certain.

    Where one token is almost sure, samples could not tell a wrong law from the right one.

    Args:
        target: The target.
        ids: The prompt, shape `(1, length)`.
        new: Tokens after it.
        options: Options of `generate`.
    """
    text = torch.cat([ids, torch.tensor([new[:-1]], dtype=ids.dtype)], dim=1)
    laws = _laws(target, text, ids.shape[1] - 1, options)
    entropies = torch.special.entr(laws).sum(dim=1)
    return text[:, : ids.shape[1] + int(entropies.argmax())]


@torch.no_grad()
def judge_sampled(
    target: Any,
    contender: Contender,
    ids: Tensor,
    options: dict[str, Any],
    draws: int,
    one_by_one: bool,
) -> tuple[str, str]:
    """Return the verdict on the first sampled token after a prompt, and what was found.

    Args:
        target: The target.
        contender: Who draws.
        ids: The prompt, shape `(1, length)`.
        options: Options of `generate`.
        draws: How often to draw.
        one_by_one: Whether it takes one row at a time only.
    """
    law = _laws(target, ids, ids.shape[1] - 1, options)[0]
    counts = torch.zeros_like(law)
    left = draws
    while left > 0:
        rows = 1 if one_by_one else _ROWS  # Always as many: a GPU's graphs are for so many rows.
        batch = ids.expand(rows, -1)
        made = contender.run(batch, torch.ones_like(batch), {**options, "max_new_tokens": 2})
        for row in made.rows[:left]:
            counts[row[0]] += 1
        left -= rows
    fits, detail = fits_law(counts, law, slack=1e-2 if rounding(target) > 1e-3 else 0.0)
    return (EXACT if fits else WRONG), detail
