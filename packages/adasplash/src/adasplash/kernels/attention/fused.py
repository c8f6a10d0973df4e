"""Tau and output in one kernel, for alpha 1.5 in half formats, where rounding leaves room for it.

A row is solved when its sum can change by no more than the tolerance. That holds for the step from
t to tau = t + d as soon as n d^2 is below it, n being the weights above zero, and then

    sum (x - d)^2 v = sum x^2 v - 2 d sum x v + O(n d^2),        x = relu(z - t)

so a pass that certifies tau can add up both sums over v as well, and none has to follow it. As d is
not negative, no block that holds weight at tau lacks a mark at t. Passes in which d may still be
too large, as the bounds of the one before tell, add up no values.

Scores and layout as in `forward.py`. Source: own.
"""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl

from ..launch import interpreted, launch
from .screen import Candidates
from .threshold import MAX_PASSES, TOLERANCE, _sums, improve
from .tiles import (
    SIZES,
    UNALIGNED,
    Problem,
    load_tile,
    padded,
    products,
    saturated,
    store_rows,
)

_MOST = 128  # channels of a head: two sums over larger values do not fit the registers
_REGISTERS = {64: 128}  # of a thread, at most, by the padded head size: four programs share a core


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=UNALIGNED)
@no_type_check
def _fused_kernel(
    q_desc, k_desc, v_desc, mask_ptr, alpha_ptr, top_ptr, bound_ptr, list_ptr, count_ptr, tau_ptr,
    out_ptr, active_ptr,
    stride_mask, left, right, heads, group, seq_q, seq_k, n_tiles, n_blocks, scale,
    tolerance, max_passes, dim_value,
    IS_CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr, HAS_WINDOW: tl.constexpr,
    HALF: tl.constexpr, FORM: tl.constexpr, SATURATE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Write tau and output of one tile of queries, and mark the blocks that hold weight."""
    place = tl.program_id(0)
    plane, tile = place // n_tiles, n_tiles - 1 - place % n_tiles
    line = (plane * n_tiles + tile).to(tl.int64)
    batch, head = plane // heads, plane % heads
    head_kv = head // group
    mask_ptr += batch.to(tl.int64) * stride_mask
    list_ptr += line * n_blocks
    active_ptr += line * n_blocks
    count = tl.load(count_ptr + line)
    first = tile * BLOCK_M
    rows = first + tl.arange(0, BLOCK_M)
    row_base = plane.to(tl.int64) * seq_q
    q = load_tile(q_desc, batch, head, first, BLOCK_M, BLOCK_D)
    top = tl.load(top_ptr + row_base + rows, mask=rows < seq_q, other=float("-inf"))
    t = tl.load(bound_ptr + row_base + rows, mask=rows < seq_q, other=0.0)
    factor = scale * 0.5
    empty = top == float("-inf")
    settled = empty | (top != top)
    lower, upper = t, tl.where(empty, 0.0, top)  # f(lower) >= 0 > f(upper)
    # Before the counters: Triton 3.6 confuses what a while loop carries behind one that ends it.
    output = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    passes, near, unsolved = 0, 0, 1
    while (passes < max_passes) & (unsolved > 0):
        a0 = tl.zeros([BLOCK_M], tl.float32)
        a1 = tl.zeros([BLOCK_M], tl.float32)
        a2 = tl.zeros([BLOCK_M], tl.float32)
        linear = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
        if near > 0:
            output = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
            for index in range(0, count):
                block = tl.load(list_ptr + index)
                start = block * BLOCK_N
                k = load_tile(k_desc, batch, head_kv, start, BLOCK_N, BLOCK_D)
                v = load_tile(v_desc, batch, head_kv, start, BLOCK_N, BLOCK_DV)
                s = products(
                    q, k, mask_ptr, first, start, seq_q, seq_k, left, right,
                    IS_CAUSAL, HAS_MASK, HAS_WINDOW, BLOCK_M, BLOCK_N,
                )  # fmt: skip
                if SATURATE:  # x is at most 1, as t is at least the maximum - 1
                    x = saturated(s, factor, -t[:, None])
                    a2 += tl.sum(saturated(x, 1e30, 0.0), 1)
                else:
                    x = tl.maximum(s * factor - t[:, None], 0.0)
                    a2 += tl.sum((x > 0.0).to(tl.float32), 1)
                linear = tl.dot(x.to(v.dtype), v, linear, input_precision="ieee")
                output = tl.dot((x * x).to(v.dtype), v, output, input_precision="ieee")
                weight = tl.sum(x, 1)
                a0, a1 = a0 + tl.sum(x * x, 1), a1 + weight
                tl.store(active_ptr + block + rows * 0, 1, mask=weight > 0.0)
        else:
            for index in range(0, count):
                start = tl.load(list_ptr + index) * BLOCK_N
                k = load_tile(k_desc, batch, head_kv, start, BLOCK_N, BLOCK_D)
                s = products(
                    q, k, mask_ptr, first, start, seq_q, seq_k, left, right,
                    IS_CAUSAL, HAS_MASK, HAS_WINDOW, BLOCK_M, BLOCK_N,
                )  # fmt: skip
                b0, b1, b2 = _sums(s, factor, t, 2.0, HALF, SATURATE)
                a0, a1, a2 = a0 + b0, a1 + b1, a2 + b2
        before = t
        t_next, lower, upper, done = improve(t, a0, a1, a2, 2.0, lower, upper, tolerance, HALF)
        t = tl.where(settled, t, t_next)
        # A row that is done keeps its t, whatever its neighbours still need.
        lower, upper = tl.where(done | settled, t, lower), tl.where(done | settled, t, upper)
        output -= (2.0 * (t - before))[:, None] * linear
        # From the right of tau weights are missed: another pass, but for what rounding moves.
        good = (done & (t - before >= -1e-6)) | settled
        unsolved = tl.max(tl.where(good, 0, 1), 0)
        unsolved = tl.where(near > 0, unsolved, 1)
        # The next step is no longer than the bounds are apart.
        gap = tl.where(settled, 0.0, upper - lower)
        passes += 1
        near = tl.where(tl.max(a2 * gap * gap, 0) <= tolerance, 1, 0)
        near = tl.where(passes + 1 == max_passes, 1, near)
    output = tl.where((top != top)[:, None], float("nan"), output)
    output = tl.where(empty[:, None], 0.0, output)
    tl.store(tau_ptr + row_base + rows, tl.where(empty, float("inf"), t), mask=rows < seq_q)
    store_rows(out_ptr + row_base * dim_value, output, rows, seq_q, dim_value, BLOCK_DV)


def fits(problem: Problem) -> bool:
    """Return whether `solve` covers a problem."""
    plain = problem.switches["HALF"] and problem.terms.form == 0 and not problem.terms.dropout
    size = max(problem.q.shape[-1], problem.v.shape[-1])
    return bool(plain) and problem.q.element_size() == 2 and size <= _MOST


def solve(
    problem: Problem, candidates: Candidates
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return output, tau, and the blocks that hold weight (int8)."""
    q, v, tiles = problem.q, problem.v, problem.tiles
    dim_value = v.shape[-1]
    interpreting = interpreted(_fused_kernel)
    limit = None if interpreting else _REGISTERS.get(max(64, padded(max(q.shape[-1], dim_value))))
    tau = torch.empty_like(candidates.top)
    output = torch.empty((*q.shape[:3], dim_value), dtype=q.dtype, device=q.device)
    active = torch.zeros(candidates.listed.shape, dtype=torch.int8, device=q.device)
    launch(
        _fused_kernel, problem.grid[0] * problem.planes, problem.kind,
        *problem.descriptors, problem.mask, problem.alpha, *candidates, tau, output, active,
        *problem.sizes, problem.scale, TOLERANCE[q.dtype], MAX_PASSES, dim_value,
        **problem.switches, SATURATE=not interpreting, BLOCK_DV=padded(dim_value),
        num_warps=tiles.num_warps, num_stages=tiles.num_stages,
        **({} if limit is None else {"maxnreg": limit}),
    )  # fmt: skip
    return output, tau, active
