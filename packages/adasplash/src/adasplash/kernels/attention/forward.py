"""Forward of alpha-entmax attention; the formulas are those of alpha 1.5.

    z_ij = scale / 2 * q_i . k_j        p_ij = relu(z_ij - tau_i) ** 2        o_i = sum_j p_ij v_j

with `tau_i` such that the row sums to 1. Three steps, of which only the first sees all scores:

1. `screen.py` lists, for every tile of queries, the blocks of keys that may hold weight.
2. `threshold.py` solves for tau over those.
3. `output.py` adds up `p v` over them, and marks the blocks that hold any weight for the backward.

In half formats at alpha 1.5 tau is as exact as the format: weights are divided by their sum.

For another alpha, `z = (alpha - 1) s` and `p = x ** (1 / (alpha - 1))`. What else shapes z is in
`scores.py`. Dropout leaves tau and the marks as they are: it takes weights out of the last sum.

Layout: q [batch, heads, seq_q, dim_head], k and v [batch, heads_kv, seq_k, ...], strides as
`tiles.aligned` leaves them. Sums and tau are float32. Rows without a visible key give zeros and
`tau = +inf`; a NaN stays in its row. Source: AdaSplash (arXiv 2502.12082), section 3.
"""

from __future__ import annotations

import torch

from ..launch import SideBySide
from .output import weighted_sum
from .screen import screen
from .terms import PLAIN, Terms
from .threshold import threshold
from .tiles import pose


def launch_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_mask: torch.Tensor | None,
    alpha: torch.Tensor | None,
    scale: float,
    is_causal: bool,
    window: tuple[int, int] | None,
    terms: Terms = PLAIN,
    *,
    skip: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return output, tau and the blocks that hold weight.

    The latter are uint8 `[batch, heads, tiles of queries, blocks of keys / 8]`, a bit for each
    block, the first one in the lowest bit.

    Args:
        q: `[batch, heads, seq_q, dim_head]`.
        k: `[batch, heads_kv, seq_k, dim_head]`.
        v: `[batch, heads_kv, seq_k, dim_value]`.
        key_mask: True for visible keys, `[batch, seq_k]`.
        alpha: Float32 `[batch, heads]`, contiguous; None means 1.5.
        scale: Factor of the scores, at least 0.
        is_causal: Row i sees keys up to `i + seq_k - seq_q`.
        window: How far a row sees to the left and to the right; None for all.
        terms: What else there is.
        skip: False visits every block; in float32 the output is the same, bit for bit.
    """
    problem = pose(q, k, v, key_mask, alpha, scale, is_causal, window, terms)
    with SideBySide():
        candidates = screen(problem, skip=skip)
        tau, slope = threshold(problem, candidates)
        output, active = weighted_sum(problem, candidates, tau, slope)
    return output, tau, active
