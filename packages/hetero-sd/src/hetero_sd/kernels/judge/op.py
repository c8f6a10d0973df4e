"""Drawing and judging: which code computes them on a device."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch

from fourfold_common import triton_status

from . import reference


class Rules(NamedTuple):
    """How proposals are drawn and judged; see `reference`.

    Attributes:
        name: `"triton"` or `"reference"`.
        cut: Which tokens top-k, top-p and min-p leave.
        pick: A column of the drafter's logits, the likeliest or drawn.
        pack: Target tokens of the columns picked.
        spread: The law of each of these tokens.
        judge: Which proposals are accepted, and the token after them.
        advance: What the next round begins with.
    """

    name: str
    cut: Callable[..., reference.Cut]
    pick: Callable[..., None]
    pack: Callable[..., None]
    spread: Callable[..., None]
    judge: Callable[..., None]
    advance: Callable[..., None]


REFERENCE = Rules(
    "reference",
    reference.cut,
    reference.pick,
    reference.pack,
    reference.spread,
    reference.judge,
    reference.advance,
)


def pick_rules(device: torch.device, backend: str = "auto") -> Rules:
    """Return the rules for a device: Triton's for CUDA devices where it can run.

    Args:
        device: Where the models are.
        backend: `"triton"`, `"reference"` or `"auto"`.
    """
    status = triton_status()
    if backend == "reference" or not status.importable:
        return REFERENCE
    if device.type == "cuda" or (backend == "triton" and status.interpreting):
        return _triton_rules()
    return REFERENCE


@cache
def _triton_rules() -> Rules:
    from . import advance, cut, kernel, verdict

    return Rules(
        "triton",
        cut.launch_cut,
        kernel.launch_pick,
        kernel.launch_pack,
        kernel.launch_spread,
        verdict.launch_judge,
        advance.launch_advance,
    )
