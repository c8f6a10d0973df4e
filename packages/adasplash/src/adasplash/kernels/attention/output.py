"""The output, over the blocks that can hold weight, and which of them do.

QUICK, half formats at alpha 1.5: weights are divided by their sum, and what that lacks to 1
improves the tau that the backward gets.

Scores and layout as in `forward.py`. Source: AdaSplash (arXiv 2502.12082), section 3.2; what is
quick is our own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, no_type_check

import torch
import triton
import triton.language as tl

from ..launch import interpreted, launch
from .philox import words
from .scores import factor_of, load_part, scores, sequence_of, terms_of
from .screen import is_dense
from .solver import SLACK
from .tiles import SIZES, UNALIGNED, Problem, excess, hold, padded, partial_sums, store_rows

if TYPE_CHECKING:
    from .screen import Candidates

MAX_TRIES = 8


@triton.jit
@no_type_check
def weigh(
    q, tau, slope, k_desc, v_desc, mask_ptr, list_ptr, active_ptr, seed_ptr, terms, plane, batch,
    head_kv, row_at, key_at, first, begin, count, seq_q, seq_k, left, right, factor, power,
    n_blocks, drop_below, tolerance, max_tries,
    IS_CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr, HAS_WINDOW: tl.constexpr,
    HALF: tl.constexpr, FORM: tl.constexpr, LISTED: tl.constexpr, DROPOUT: tl.constexpr,
    QUICK: tl.constexpr, SATURATE: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Return the output of BLOCK_M rows, tau, and the number of rows; mark blocks that hold weight.

    Over blocks of keys as in `threshold.solve`. Marks are those of tiles of TILE rows and blocks of
    BLOCK keys, of which one of BLOCK_N may hold some. QUICK: weights are divided by their sum.
    Where that is not near 1 all is done again for another tau.
    """
    PARTS: tl.constexpr = 4 if QUICK else 1
    inner = tl.arange(0, BLOCK_M)
    rows = first + inner
    BLOCKS: tl.constexpr = BLOCK_N // BLOCK
    marks = (inner // TILE)[:, None] * n_blocks + tl.arange(0, PARTS)[None, :] * 0
    if BLOCKS > 1:
        marks = marks[:, None, :] + tl.arange(0, BLOCKS)[None, :, None]
    before, step = tau, tau
    tries, open_rows = 0, 1
    output = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    while (tries < max_tries) & (open_rows > 0):
        output = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
        total = tl.zeros([BLOCK_M, PARTS], tl.float32)
        for index in range(0, count):
            block = tl.load(list_ptr + index) if LISTED else begin + index
            start = block * BLOCK_N
            k = load_part(k_desc, batch, head_kv, key_at, start, seq_k, FORM, BLOCK_N, BLOCK_D)
            v = load_part(v_desc, batch, head_kv, key_at, start, seq_k, FORM, BLOCK_N, BLOCK_DV)
            s, _gate = scores(
                q, k, mask_ptr, terms, first, start, seq_q, seq_k, left, right,
                IS_CAUSAL, HAS_MASK, HAS_WINDOW, FORM, BLOCK, BLOCK_M, BLOCK_N,
            )  # fmt: skip
            x, u = excess(s, factor, tau[:, None], power, HALF, SATURATE)
            p = x * u
            if BLOCKS > 1:
                its = tl.sum(tl.reshape(p, [BLOCK_M, BLOCKS, BLOCK // 8, 4, 2]), 4)
                its = tl.sum(its, 2)
            else:
                its = partial_sums(p, BLOCK_M, BLOCK_N, QUICK)
            if DROPOUT:
                drawn = words(tl.load(seed_ptr), plane, row_at + first, start, BLOCK_M, BLOCK_N)
                p = tl.where(drawn >= drop_below, p, 0.0)
            output = tl.dot(p.to(v.dtype), v, output, input_precision="ieee")
            tl.store(active_ptr + block * BLOCKS + marks, 1, mask=its != 0.0)
            total += tl.sum(its, 1) if BLOCKS > 1 else its
        if QUICK:
            whole = tl.sum(total, 1)
            fine = (tl.abs(whole - 1.0) <= tolerance) | (tau == float("inf")) | (tau != tau)
            secant = 0.5 * (before - whole) / step  # NaN where nothing has moved
            slope = tl.where((tries > 0) & (fine == 0) & (secant > 0.0), secant, slope)
            before, step = whole, 0.5 * (whole - 1.0) / slope
            tau = tl.where(rows < seq_q, tau + step, tau)
            output = output * (1.0 / tl.where(whole > 0.0, whole, 1.0))[:, None]
            open_rows = tl.max(tl.where(fine, 0, 1), 0)
        else:
            open_rows = 0
        tries += 1
    if QUICK:
        output = tl.where((tau != tau)[:, None], float("nan"), output)
    # Triton 3.6 fails where what a loop carries is not asked for behind it.
    return output, tau, seq_q + tl.minimum(tries + open_rows, 0)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=UNALIGNED)
@no_type_check
def _output_kernel(
    q_desc, k_desc, v_desc, mask_ptr, alpha_ptr, list_ptr, count_ptr, tau_ptr, slope_ptr, out_ptr,
    active_ptr,
    slopes_ptr, bias_ptr, bounds_q_ptr, bounds_k_ptr, n_seq, cap,
    bias_batch, bias_head, bias_row, bias_key,
    stride_mask, left, right, heads, group, seq_q, seq_k, n_tiles, n_blocks, scale,
    seed_ptr, drop_below, keep_scale, dim_value, tolerance, max_tries,
    IS_CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr, HAS_WINDOW: tl.constexpr,
    HALF: tl.constexpr, FORM: tl.constexpr, PAIRED: tl.constexpr, DROPOUT: tl.constexpr,
    QUICK: tl.constexpr, SATURATE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    HELD: tl.constexpr,
):  # fmt: skip
    """Write the output of one tile of queries, and mark the blocks that hold weight.

    QUICK: the last tau is stored, too. PAIRED: tiles that `pairs.py` takes are left to it.
    """
    place = tl.program_id(0)
    plane, tile = place // n_tiles, n_tiles - 1 - place % n_tiles
    line = (plane * n_tiles + tile).to(tl.int64)
    batch, head = plane // heads, plane % heads
    head_kv = head // group
    mask_ptr += batch.to(tl.int64) * stride_mask
    list_ptr += line * n_blocks
    active_ptr += line * n_blocks
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
    tau = tl.load(tau_ptr + row_base + rows, mask=rows < seq_q, other=float("inf"))
    slope = tau
    if QUICK:
        slope = tl.load(slope_ptr + row_base + rows, mask=rows < seq_q, other=1.0)
    alpha = 1.5 if HALF else tl.load(alpha_ptr + plane)
    power = 1.0 / (alpha - 1.0)
    factor = factor_of(scale, alpha, FORM)
    terms = terms_of(
        plane, batch, head, scale, alpha, cap, slopes_ptr, bias_ptr,
        bias_batch, bias_head, bias_row, bias_key, FORM,
    )  # fmt: skip
    output, tau, last = weigh(
        q, tau, slope, k_desc, v_desc, mask_ptr, list_ptr, active_ptr, seed_ptr, terms, plane,
        batch, head_kv, row_at, key_at, first, 0, count, seq_q, seq_k, left, right, factor, power,
        n_blocks, drop_below, tolerance, max_tries,
        IS_CAUSAL, HAS_MASK, HAS_WINDOW, HALF, FORM, True, DROPOUT, QUICK, SATURATE, BLOCK_M,
        BLOCK_N, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV,
    )  # fmt: skip
    if QUICK:
        tl.store(tau_ptr + row_base + rows, tau, mask=rows < last)
    if DROPOUT:
        output = output * keep_scale
    store_rows(out_ptr + row_base * dim_value, output, rows, last, dim_value, BLOCK_DV)


def weighted_sum(
    problem: Problem,
    candidates: Candidates,
    tau: torch.Tensor,
    slope: torch.Tensor,
    output: torch.Tensor,
    active: torch.Tensor,
) -> None:
    """Write the output, and which blocks hold weight."""
    tiles, quick, dim_value = problem.tiles, problem.quick, output.shape[-1]
    launch(
        _output_kernel, problem.grid[0] * problem.planes, problem.kind,
        *problem.descriptors, problem.mask, problem.alpha, *candidates[3:], tau, slope,
        output, active, *problem.added, *problem.sizes, problem.scale, *problem.drop, dim_value,
        SLACK.get(output.dtype, 0.0), MAX_TRIES, **problem.switches,
        PAIRED=problem.paired, DROPOUT=problem.terms.dropout > 0.0,
        QUICK=quick, SATURATE=quick and not interpreted(_output_kernel),
        HELD=tiles.held.output and not interpreted(_output_kernel),
        BLOCK_DV=padded(dim_value), num_warps=tiles.num_warps, num_stages=tiles.num_stages,
        maxnreg=tiles.most.output,
    )  # fmt: skip
