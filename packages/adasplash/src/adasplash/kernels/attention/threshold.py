"""The threshold tau of every row, over the blocks that can hold weight.

Each pass over their scores gives the sums that a step of `solver.py` needs. The first t is a guess
from the maxima of the blocks, or the bound that they prove. In float32, and for other alphas, steps
go on until tau is certain to the last digit.

QUICK, half formats at alpha 1.5: a pass adds up p and u at two t and no more, by parts of rows that
a thread holds alone, and x takes one saturating multiply-add, as it is at most 1. It is over once a
step is sure to end near enough for `forward.py`, which divides the weights by their sum.

Scores and layout as in `forward.py`. Source: AdaSplash (arXiv 2502.12082), section 3.1; what is
quick is our own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, no_type_check

import torch
import triton
import triton.language as tl

from ..launch import interpreted, launch
from .scores import factor_of, load_part, scores, sequence_of, terms_of
from .screen import is_dense
from .solver import MAX_PASSES, NEAR, TOLERANCE, approach, further, improve
from .tiles import SIZES, UNALIGNED, Problem, excess, hold, partial_sums

if TYPE_CHECKING:
    from .screen import Candidates


@triton.jit
@no_type_check
def _sums(
    s, factor, t, power,
    HALF: tl.constexpr, QUICK: tl.constexpr, SATURATE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Return the sums of p and u, and the number of positive x (not QUICK), of parts of the rows.

    For other alphas the last is the sum of u once more.
    """
    x, u = excess(s, factor, t[:, None], power, HALF, SATURATE)
    b0 = partial_sums(x * u, BLOCK_M, BLOCK_N, QUICK)
    b1 = partial_sums(u, BLOCK_M, BLOCK_N, QUICK)
    if HALF and not QUICK:
        return b0, b1, partial_sums((x > 0.0).to(tl.float32), BLOCK_M, BLOCK_N, QUICK)
    else:
        return b0, b1, b1


@triton.jit
@no_type_check
def solve(
    q, t, lower, top, k_desc, mask_ptr, list_ptr, terms, batch, head_kv, key_at, first, begin,
    count, seq_q, seq_k, left, right, factor, power, tolerance, max_passes,
    IS_CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr, HAS_WINDOW: tl.constexpr,
    HALF: tl.constexpr, FORM: tl.constexpr, LISTED: tl.constexpr,
    QUICK: tl.constexpr, SATURATE: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Return tau of a tile of rows and, where QUICK, the slope of the sum of p over -2.

    Over `count` blocks of keys: those of the list, or else those from `begin` on. `t` is the first
    guess, `lower` a lower bound, `top` the largest z; rows without a key have tau = +inf.
    """
    PARTS: tl.constexpr = 4 if QUICK else 1
    empty = top == float("-inf")
    settled = empty | (top != top)
    # f(lower) >= 0 > f(upper)
    upper, slope = tl.where(empty, 0.0, top), lower
    if QUICK:  # what tau is for so many keys, all alike
        upper -= tl.where(settled, 0.0, tl.rsqrt((count * BLOCK_N).to(tl.float32)))
    passes, unsolved = 0, 1
    while (passes < max_passes) & (unsolved > 0):
        a0 = tl.zeros([BLOCK_M, PARTS], tl.float32)
        a1 = tl.zeros([BLOCK_M, PARTS], tl.float32)
        a2 = tl.zeros([BLOCK_M, PARTS], tl.float32)
        a3 = tl.zeros([BLOCK_M, PARTS], tl.float32)
        beyond = further(t, top, passes) if QUICK else t
        for index in range(0, count):
            block = tl.load(list_ptr + index) if LISTED else begin + index
            start = block * BLOCK_N
            k = load_part(k_desc, batch, head_kv, key_at, start, seq_k, FORM, BLOCK_N, BLOCK_D)
            s, _gate = scores(
                q, k, mask_ptr, terms, first, start, seq_q, seq_k, left, right,
                IS_CAUSAL, HAS_MASK, HAS_WINDOW, FORM, BLOCK, BLOCK_M, BLOCK_N,
            )  # fmt: skip
            b0, b1, b2 = _sums(s, factor, t, power, HALF, QUICK, SATURATE, BLOCK_M, BLOCK_N)
            a0, a1 = a0 + b0, a1 + b1
            if QUICK:
                b2, b3, _ = _sums(s, factor, beyond, power, HALF, QUICK, SATURATE, BLOCK_M, BLOCK_N)
                a3 += b3
            a2 += b2
        b0, b1 = tl.sum(a0, 1), tl.sum(a1, 1)
        if QUICK:
            t, slope, lower, upper, done = approach(
                t, b0, b1, beyond, tl.sum(a2, 1), tl.sum(a3, 1), lower, upper, tolerance
            )
            done = done | settled
        else:
            t, lower, upper, done = improve(
                t, b0, b1, tl.sum(a2, 1), power, lower, upper, tolerance, HALF
            )
            done = done | settled
            # A row that is done keeps its t, whatever its neighbours still need.
            lower, upper = tl.where(done, t, lower), tl.where(done, t, upper)
        unsolved = tl.max(tl.where(done, 0, 1), 0)
        passes += 1
    # NaN where the largest is.
    tau = tl.where(empty, float("inf"), tl.where(settled, top, t))
    return tau, tl.where(settled, 1.0, slope)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=UNALIGNED)
@no_type_check
def _threshold_kernel(
    q_desc, k_desc, mask_ptr, alpha_ptr, top_ptr, bound_ptr, start_ptr, list_ptr, count_ptr,
    tau_ptr, slope_ptr,
    slopes_ptr, bias_ptr, bounds_q_ptr, bounds_k_ptr, n_seq, cap,
    bias_batch, bias_head, bias_row, bias_key,
    stride_mask, left, right, heads, group, seq_q, seq_k, n_tiles, n_blocks, scale,
    tolerance, max_passes,
    IS_CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr, HAS_WINDOW: tl.constexpr,
    HALF: tl.constexpr, FORM: tl.constexpr, PAIRED: tl.constexpr,
    QUICK: tl.constexpr, SATURATE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, HELD: tl.constexpr,
):  # fmt: skip
    """Write tau of one tile of queries; +inf for rows without a key.

    QUICK: it is a step away from the last sums, and the slope that the sum of p has there goes
    beside it, but for a factor of -2. PAIRED: tiles that `pairs.py` takes are left to it.
    """
    place = tl.program_id(0)
    plane, tile = place // n_tiles, n_tiles - 1 - place % n_tiles
    line = (plane * n_tiles + tile).to(tl.int64)
    batch, head = plane // heads, plane % heads
    head_kv = head // group
    mask_ptr += batch.to(tl.int64) * stride_mask
    list_ptr += line * n_blocks
    count = tl.load(count_ptr + line)
    if PAIRED and is_dense(
        count_ptr + line, tile, n_tiles, seq_q, seq_k, mask_ptr,
        IS_CAUSAL, HAS_MASK, BLOCK_M, BLOCK_N,
    ):  # fmt: skip
        return
    row_base = plane.to(tl.int64) * seq_q
    tile, row_at, seq_q, key_at, seq_k, _sequence = sequence_of(
        tile, bounds_q_ptr, bounds_q_ptr, bounds_k_ptr, n_seq, seq_q, seq_k, FORM, BLOCK_M
    )
    first = tile * BLOCK_M
    rows = first + tl.arange(0, BLOCK_M)
    row_base += row_at
    q = load_part(q_desc, batch, head, row_at, first, seq_q, FORM, BLOCK_M, BLOCK_D)
    q = hold(q, BLOCK_D, HELD)
    top = tl.load(top_ptr + row_base + rows, mask=rows < seq_q, other=float("-inf"))
    lower = tl.load(bound_ptr + row_base + rows, mask=rows < seq_q, other=0.0)
    t = lower
    if QUICK:
        t = tl.load(start_ptr + row_base + rows, mask=rows < seq_q, other=0.0)
    alpha = 1.5 if HALF else tl.load(alpha_ptr + plane)
    power = 1.0 / (alpha - 1.0)
    factor = factor_of(scale, alpha, FORM)
    terms = terms_of(
        plane, batch, head, scale, alpha, cap, slopes_ptr, bias_ptr,
        bias_batch, bias_head, bias_row, bias_key, FORM,
    )  # fmt: skip
    if not HALF:  # a high power of x has fewer digits
        tolerance = tolerance * (1.0 + power)
    tau, slope = solve(
        q, t, lower, top, k_desc, mask_ptr, list_ptr, terms, batch, head_kv, key_at, first, 0,
        count, seq_q, seq_k, left, right, factor, power, tolerance, max_passes,
        IS_CAUSAL, HAS_MASK, HAS_WINDOW, HALF, FORM, True, QUICK, SATURATE,
        BLOCK_N, BLOCK_M, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    tl.store(tau_ptr + row_base + rows, tau, mask=rows < seq_q)
    if QUICK:
        tl.store(slope_ptr + row_base + rows, slope, mask=rows < seq_q)


def threshold(problem: Problem, candidates: Candidates) -> tuple[torch.Tensor, torch.Tensor]:
    """Return tau, float32 `[batch, heads, seq_q]`, and its slope as large where it is quick."""
    like = candidates.top
    tau, slope = (torch.empty(like.shape, dtype=like.dtype, device=like.device) for _ in range(2))
    tiles, quick = problem.tiles, problem.quick
    tolerance = (NEAR if quick else TOLERANCE)[problem.q.dtype]
    launch(
        _threshold_kernel, problem.grid[0] * problem.planes, problem.kind,
        *problem.descriptors[:2], problem.mask, problem.alpha, *candidates, tau, slope,
        *problem.added, *problem.sizes, problem.scale, tolerance, MAX_PASSES, **problem.switches,
        PAIRED=problem.paired, QUICK=quick, SATURATE=quick and not interpreted(_threshold_kernel),
        HELD=tiles.held.threshold and not interpreted(_threshold_kernel),
        num_warps=tiles.num_warps, num_stages=tiles.num_stages,
        maxnreg=tiles.most.threshold,
    )  # fmt: skip
    return tau, slope
