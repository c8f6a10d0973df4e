"""The threshold tau of every row, over the blocks that can hold weight.

Each pass over their scores gives the sums that a step of `solver.py` needs. The first t is a guess
from the maxima of the blocks, or the bound that they prove. In float32, and for other alphas, steps
go on until tau is certain to the last digit.

QUICK, half formats at alpha 1.5: a pass adds up p and u and no more, by parts of rows that a thread
holds alone, and x takes one saturating multiply-add, as it is at most 1. It does so at two t,
unless nearly all blocks are listed: then the first guess is good for every row. It is over once a
step is sure to end near enough for `output.py`, which divides the weights by their sum.

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
from .screen import key_range
from .solver import MAX_PASSES, NEAR, TOLERANCE, TRUST, approach, further, hand_over, improve
from .tiles import SIZES, UNALIGNED, Problem, excess, partial_sums

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


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=UNALIGNED)
@no_type_check
def _threshold_kernel(
    q_desc, k_desc, mask_ptr, alpha_ptr, top_ptr, bound_ptr, start_ptr, list_ptr, count_ptr,
    tau_ptr, slope_ptr,
    slopes_ptr, bias_ptr, bounds_q_ptr, bounds_k_ptr, n_seq, cap,
    bias_batch, bias_head, bias_row, bias_key,
    stride_mask, left, right, heads, group, seq_q, seq_k, n_tiles, n_blocks, scale,
    tolerance, near, max_passes,
    IS_CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr, HAS_WINDOW: tl.constexpr,
    HALF: tl.constexpr, FORM: tl.constexpr,
    QUICK: tl.constexpr, SATURATE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write tau of one tile of queries; +inf for rows without a key.

    QUICK: it is a step away from the last sums, and the slope that the sum of p has there goes
    beside it, but for a factor of -2.
    """
    PARTS: tl.constexpr = 4 if QUICK else 1
    place = tl.program_id(0)
    plane, tile = place // n_tiles, n_tiles - 1 - place % n_tiles
    line = (plane * n_tiles + tile).to(tl.int64)
    batch, head = plane // heads, plane % heads
    head_kv = head // group
    mask_ptr += batch.to(tl.int64) * stride_mask
    list_ptr += line * n_blocks
    count = tl.load(count_ptr + line)
    row_base = plane.to(tl.int64) * seq_q
    tile, row_at, seq_q, key_at, seq_k, _sequence = sequence_of(
        tile, bounds_q_ptr, bounds_q_ptr, bounds_k_ptr, n_seq, seq_q, seq_k, FORM, BLOCK_M
    )
    first = tile * BLOCK_M
    rows = first + tl.arange(0, BLOCK_M)
    row_base += row_at
    q = load_part(q_desc, batch, head, row_at, first, seq_q, FORM, BLOCK_M, BLOCK_D)
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
    empty = top == float("-inf")
    settled = empty | (top != top)
    # f(lower) >= 0 > f(upper)
    upper, slope = tl.where(empty, 0.0, top), lower
    keys = (count * BLOCK_N).to(tl.float32)
    twice = 0
    if QUICK:
        upper -= tl.where(settled, 0.0, tl.rsqrt(keys))  # tau for so many keys, all alike
        begin, end = key_range(
            first, BLOCK_M, seq_q, seq_k, mask_ptr, left, right,
            IS_CAUSAL, HAS_MASK, HAS_WINDOW, BLOCK_N,
        )  # fmt: skip
        twice = 4 * count * BLOCK_N < 3 * (end - begin)

    passes, unsolved = 0, 1
    while (passes < max_passes) & (unsolved > 0):
        a0 = tl.zeros([BLOCK_M, PARTS], tl.float32)
        a1 = tl.zeros([BLOCK_M, PARTS], tl.float32)
        a2 = tl.zeros([BLOCK_M, PARTS], tl.float32)
        a3 = tl.zeros([BLOCK_M, PARTS], tl.float32)
        beyond = further(t, top, passes) if QUICK else t
        for index in range(0, count):
            start = tl.load(list_ptr + index) * BLOCK_N
            k = load_part(k_desc, batch, head_kv, key_at, start, seq_k, FORM, BLOCK_N, BLOCK_D)
            s, _gate = scores(
                q, k, mask_ptr, terms, first, start, seq_q, seq_k, left, right,
                IS_CAUSAL, HAS_MASK, HAS_WINDOW, FORM, BLOCK_M, BLOCK_N,
            )  # fmt: skip
            b0, b1, b2 = _sums(s, factor, t, power, HALF, QUICK, SATURATE, BLOCK_M, BLOCK_N)
            a0, a1 = a0 + b0, a1 + b1
            if not QUICK:
                a2 += b2
            elif twice:
                b0, b1, _ = _sums(s, factor, beyond, power, HALF, QUICK, SATURATE, BLOCK_M, BLOCK_N)
                a2, a3 = a2 + b0, a3 + b1
        b0, b1, b2 = tl.sum(a0, 1), tl.sum(a1, 1), tl.sum(a2, 1)
        if QUICK:
            t, slope, lower, upper, done = approach(
                t, b0, b1, beyond, b2, tl.sum(a3, 1), keys, lower, upper, tolerance, near
            )
            done = done | settled
        else:
            t, lower, upper, done = improve(
                t, b0, b1, b2, power, lower, upper, tolerance, near, HALF
            )
            done = done | settled
            # A row that is done keeps its t, whatever its neighbours still need.
            lower, upper = tl.where(done, t, lower), tl.where(done, t, upper)
        unsolved = tl.max(tl.where(done, 0, 1), 0)
        passes += 1
    # NaN where the largest is.
    tau = tl.where(empty, float("inf"), tl.where(settled, top, t))
    tl.store(tau_ptr + row_base + rows, tau, mask=rows < seq_q)
    if QUICK:
        slope = tl.where(settled, 1.0, slope)
        tl.store(slope_ptr + row_base + rows, slope, mask=rows < seq_q)


def threshold(problem: Problem, candidates: Candidates) -> tuple[torch.Tensor, torch.Tensor]:
    """Return tau, float32 `[batch, heads, seq_q]`, and its slope as large where it is quick."""
    like = candidates.top
    tau, slope = (torch.empty(like.shape, dtype=like.dtype, device=like.device) for _ in range(2))
    tiles, quick, dtype = problem.tiles, problem.quick, problem.q.dtype
    tolerance = hand_over(dtype) if quick else TOLERANCE[dtype]
    near = (NEAR if quick else TRUST).get(dtype, 0.0)
    launch(
        _threshold_kernel, problem.grid[0] * problem.planes, problem.kind,
        *problem.descriptors[:2], problem.mask, problem.alpha, *candidates, tau, slope,
        *problem.added, *problem.sizes, problem.scale, tolerance, near, MAX_PASSES,
        **problem.switches, QUICK=quick, SATURATE=quick and not interpreted(_threshold_kernel),
        num_warps=tiles.num_warps, num_stages=tiles.num_stages, maxnreg=tiles.most.threshold,
    )  # fmt: skip
    return tau, slope
