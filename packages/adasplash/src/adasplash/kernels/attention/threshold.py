"""The threshold tau of every row, over the blocks that can hold weight.

With A0, A1, A2 the sums of x^2, x and 1 over `x = relu(z - t)`, f(t) = A0 - 1 is decreasing and
convex, so each pass over the scores yields certified bounds of tau: Newton's step is a lower bound
(B1), the root for the support of t bounds tau from above where f > 0 and from below where f < 0
(B2). The step in between is weighted by how far the row is from both. The first t is the bound of
the screening, mostly within some hundredths of tau: two or three passes suffice.

For another alpha `p = x ** (1 / (alpha - 1))`. The norm of x to that power is convex in t as well,
and Newton's step on it a lower bound; it alone is taken, from the left.

As `max - 1 <= t`, x is at most 1: for half formats one saturating multiply-add gives x, and another
counts it, where a maximum or a comparison would take twice as long.

Scores and layout as in `forward.py`. Source: AdaSplash (arXiv 2502.12082), section 3.1; bounds,
first guess, stopping rule and saturation are our own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, no_type_check

import torch
import triton
import triton.language as tl

from ..launch import interpreted, launch
from .scores import factor_of, load_part, scores, sequence_of, terms_of
from .tiles import SIZES, UNALIGNED, Problem, roots, saturated

if TYPE_CHECKING:
    from .screen import Candidates

MAX_PASSES = 20  # this bounds the loop where ties slow it down
# On the sum of a row: a few units in the last place of one, or far below the step of half formats.
TOLERANCE = {torch.float32: 2e-7, torch.float16: 1e-5, torch.bfloat16: 1e-4}


@triton.jit
@no_type_check
def newton(t, a0, goal, a1, power, HALF: tl.constexpr):
    """Return Newton's step for a0 = goal: left of the root, if t is; `a1` is not 0.

    For other alphas it is taken on the p-norm of x, whose slope is -a1 / a0^(1 - 1 / power).
    """
    if HALF:
        return t + 0.5 * (a0 - goal) / tl.where(a1 > 0.0, a1, 1.0)
    else:
        norm = tl.exp2(tl.log2(tl.where(a0 > 0.0, a0, 1.0)) * (1.0 - 1.0 / power))
        return t + (a0 - tl.exp2(tl.log2(goal) / power) * norm) / tl.where(a1 > 0.0, a1, 1.0)


@triton.jit
@no_type_check
def step_left(t, a0, goal, a1, a2, power, HALF: tl.constexpr):
    """Return a step that lands left of the root of a0 - goal, a lower and an upper bound of it.

    HALF: with g = a2 f / a1^2, the weight that keeps the step left of the root for evenly spread
    scores is g / 2. Where the support of t has no root (g > 1), Halley's step is taken, and the
    upper bound is infinite.
    """
    below = newton(t, a0, goal, a1, power, HALF)
    if HALF:
        f = a0 - goal
        slope = tl.where(a1 > 0.0, a1, 1.0)
        square = a1 * a1 - a2 * f
        root = t + f / (slope + tl.sqrt(tl.maximum(square, 0.0)))
        halley = t + 2.0 * f * slope / (4.0 * slope * slope - f * a2)
        back = tl.minimum(tl.maximum(0.5 * a2 * f / (slope * slope), 0.0), 1.0)
        step = tl.where(square > 0.0, root - back * (root - below), halley)
        step = tl.where(f < 0.0, root, step)
        lower = tl.where(f < 0.0, root, below)
        return step, lower, tl.where((f > 0.0) & (square > 0.0), root, float("inf"))
    else:
        return below, below, tl.full(t.shape, float("inf"), tl.float32)


@triton.jit
@no_type_check
def improve(t, a0, a1, a2, power, lower, upper, tolerance, HALF: tl.constexpr):
    """Return the next t of every row, its bounds, and whether it is as good as it has to be."""
    f = a0 - 1.0
    t_next, below, above = step_left(t, a0, 1.0, a1, a2, power, HALF)
    known = a1 > 0.0
    lower = tl.where(known, tl.maximum(lower, tl.minimum(below, upper)), lower)
    lower = tl.where(f > 0.0, tl.maximum(lower, t), lower)
    upper = tl.where(known, tl.minimum(upper, above), upper)
    upper = tl.maximum(tl.where(f < 0.0, tl.minimum(upper, t), upper), lower)
    # Bounds included: near the root they agree to the last digit, and halving would start anew.
    within = known & (t_next >= lower) & (t_next <= upper)
    t_next = tl.where(within, t_next, 0.5 * (lower + upper))
    # f' shrinks to the right: between the bounds the sum of the row changes by this at most.
    close = known & (f >= 0.0) & (power * a1 * (upper - lower) <= tolerance)
    done = close | (upper - lower <= 1.2e-7 * tl.abs(upper)) | (t_next == t)
    exact = (tl.abs(f) <= tolerance) | (f != f)
    return tl.where(exact, t, t_next), lower, upper, done | exact


@triton.jit
@no_type_check
def _sums(s, factor, t, power, HALF: tl.constexpr, SATURATE: tl.constexpr):
    """Return the sums of p and u, and the number of positive x, of every row (HALF only)."""
    if SATURATE:
        x = saturated(s, factor, -t[:, None])
        return tl.sum(x * x, 1), tl.sum(x, 1), tl.sum(saturated(x, 1e30, 0.0), 1)
    x, u = roots(s * factor, t[:, None], power, HALF)
    total = tl.sum(u, 1)
    return tl.sum(x * u, 1), total, tl.sum((x > 0.0).to(tl.float32), 1) if HALF else total


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=UNALIGNED)
@no_type_check
def _threshold_kernel(
    q_desc, k_desc, mask_ptr, alpha_ptr, top_ptr, bound_ptr, list_ptr, count_ptr, tau_ptr,
    slopes_ptr, bias_ptr, bounds_q_ptr, bounds_k_ptr, n_seq, cap,
    bias_batch, bias_head, bias_row, bias_key,
    stride_mask, left, right, heads, group, seq_q, seq_k, n_tiles, n_blocks, scale,
    tolerance, max_passes,
    IS_CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr, HAS_WINDOW: tl.constexpr,
    HALF: tl.constexpr, FORM: tl.constexpr, SATURATE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write tau of one tile of queries; +inf for rows without a key."""
    place = tl.program_id(0)
    plane, tile = place // n_tiles, n_tiles - 1 - place % n_tiles
    line = (plane * n_tiles + tile).to(tl.int64)
    batch, head = plane // heads, plane % heads
    head_kv = head // group
    mask_ptr += batch.to(tl.int64) * stride_mask
    list_ptr += line * n_blocks
    count = tl.load(count_ptr + line)
    row_base = plane.to(tl.int64) * seq_q
    tile, row_at, seq_q, key_at, seq_k, sequence = sequence_of(
        tile, bounds_q_ptr, bounds_q_ptr, bounds_k_ptr, n_seq, seq_q, seq_k, FORM, BLOCK_M
    )
    first = tile * BLOCK_M
    rows = first + tl.arange(0, BLOCK_M)
    row_base += row_at
    q = load_part(q_desc, batch, head, row_at, first, seq_q, FORM, BLOCK_M, BLOCK_D)
    top = tl.load(top_ptr + row_base + rows, mask=rows < seq_q, other=float("-inf"))
    lower = tl.load(bound_ptr + row_base + rows, mask=rows < seq_q, other=0.0)
    alpha = 1.5 if HALF else tl.load(alpha_ptr + plane)
    power = 1.0 / (alpha - 1.0)
    factor = factor_of(scale, alpha, FORM)
    terms = terms_of(
        plane, batch, head, scale, alpha, cap, slopes_ptr, bias_ptr,
        bias_batch, bias_head, bias_row, bias_key, FORM,
    )  # fmt: skip
    if not HALF:  # a high power of x has fewer digits
        tolerance = tolerance * (1.0 + power)
    empty = top == float("-inf")
    settled = empty | (top != top)
    t, upper = lower, tl.where(empty, 0.0, top)  # f(lower) >= 0 > f(upper)

    passes, unsolved = 0, 1
    while (passes < max_passes) & (unsolved > 0):
        a0 = tl.zeros([BLOCK_M], tl.float32)
        a1 = tl.zeros([BLOCK_M], tl.float32)
        a2 = tl.zeros([BLOCK_M], tl.float32)
        for index in range(0, count):
            start = tl.load(list_ptr + index) * BLOCK_N
            k = load_part(k_desc, batch, head_kv, key_at, start, seq_k, FORM, BLOCK_N, BLOCK_D)
            s, gate = scores(
                q, k, mask_ptr, terms, first, start, seq_q, seq_k, left, right,
                IS_CAUSAL, HAS_MASK, HAS_WINDOW, FORM, BLOCK_M, BLOCK_N,
            )  # fmt: skip
            b0, b1, b2 = _sums(s, factor, t, power, HALF, SATURATE)
            a0, a1, a2 = a0 + b0, a1 + b1, a2 + b2
        t_next, lower, upper, done = improve(t, a0, a1, a2, power, lower, upper, tolerance, HALF)
        done = done | settled
        # A row that is done keeps its t, whatever its neighbours still need.
        t = t_next
        lower, upper = tl.where(done, t, lower), tl.where(done, t, upper)
        unsolved = tl.max(tl.where(done, 0, 1), 0)
        passes += 1
    tl.store(tau_ptr + row_base + rows, tl.where(empty, float("inf"), t), mask=rows < seq_q)


def threshold(problem: Problem, candidates: Candidates) -> torch.Tensor:
    """Return tau, float32 `[batch, heads, seq_q]`."""
    tau = torch.empty_like(candidates.top)
    dtype, tiles = problem.q.dtype, problem.tiles
    fast = dtype != torch.float32 and not interpreted(_threshold_kernel)
    launch(
        _threshold_kernel, problem.grid[0] * problem.planes, problem.kind,
        *problem.descriptors[:2], problem.mask, problem.alpha, *candidates, tau, *problem.added,
        *problem.sizes, problem.scale, TOLERANCE[dtype], MAX_PASSES, **problem.switches,
        SATURATE=fast and problem.switches["HALF"],
        num_warps=tiles.num_warps, num_stages=tiles.num_stages,
    )  # fmt: skip
    return tau
