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
from .solver import SLACK
from .tiles import (
    SIZES,
    UNALIGNED,
    Problem,
    excess,
    pack_marks,
    padded,
    partial_sums,
    store_rows,
)

if TYPE_CHECKING:
    from .screen import Candidates

MAX_TRIES = 8


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=UNALIGNED)
@no_type_check
def _output_kernel(
    q_desc, k_desc, v_desc, mask_ptr, alpha_ptr, list_ptr, count_ptr, tau_ptr, slope_ptr, out_ptr,
    marks_ptr, active_ptr,
    slopes_ptr, bias_ptr, bounds_q_ptr, bounds_k_ptr, n_seq, cap,
    bias_batch, bias_head, bias_row, bias_key,
    stride_mask, left, right, heads, group, seq_q, seq_k, n_tiles, n_blocks, scale,
    seed_ptr, drop_below, keep_scale, dim_value, tolerance, max_tries,
    IS_CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr, HAS_WINDOW: tl.constexpr,
    HALF: tl.constexpr, FORM: tl.constexpr, DROPOUT: tl.constexpr,
    QUICK: tl.constexpr, SATURATE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Write the output of one tile of queries, and mark the blocks that hold weight.

    QUICK: weights are divided by their sum. Where that is not near 1 all is done again for another
    tau; the last one is stored.
    """
    PARTS: tl.constexpr = 4 if QUICK else 1
    place = tl.program_id(0)
    plane, tile = place // n_tiles, n_tiles - 1 - place % n_tiles
    line = (plane * n_tiles + tile).to(tl.int64)
    batch, head = plane // heads, plane % heads
    head_kv = head // group
    mask_ptr += batch.to(tl.int64) * stride_mask
    list_ptr += line * n_blocks
    marks_ptr += line * n_blocks
    count = tl.load(count_ptr + line)
    row_base = plane.to(tl.int64) * seq_q
    tile, row_at, seq_q, key_at, seq_k, _sequence = sequence_of(
        tile, bounds_q_ptr, bounds_q_ptr, bounds_k_ptr, n_seq, seq_q, seq_k, FORM, BLOCK_M
    )
    first = tile * BLOCK_M
    rows = first + tl.arange(0, BLOCK_M)
    row_base += row_at
    q = load_part(q_desc, batch, head, row_at, first, seq_q, FORM, BLOCK_M, BLOCK_D)
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
    lane = tl.arange(0, PARTS)[None, :]
    before, step = tau, tau
    tries, open_rows = 0, 1
    output = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    while (tries < max_tries) & (open_rows > 0):
        output = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
        total = tl.zeros([BLOCK_M, PARTS], tl.float32)
        for index in range(0, count):
            block = tl.load(list_ptr + index)
            start = block * BLOCK_N
            k = load_part(k_desc, batch, head_kv, key_at, start, seq_k, FORM, BLOCK_N, BLOCK_D)
            v = load_part(v_desc, batch, head_kv, key_at, start, seq_k, FORM, BLOCK_N, BLOCK_DV)
            s, _gate = scores(
                q, k, mask_ptr, terms, first, start, seq_q, seq_k, left, right,
                IS_CAUSAL, HAS_MASK, HAS_WINDOW, FORM, BLOCK_M, BLOCK_N,
            )  # fmt: skip
            x, u = excess(s, factor, tau[:, None], power, HALF, SATURATE)
            p = x * u
            its = partial_sums(p, BLOCK_M, BLOCK_N, QUICK)
            if DROPOUT:
                drawn = words(tl.load(seed_ptr), plane, row_at + first, start, BLOCK_M, BLOCK_N)
                p = tl.where(drawn >= drop_below, p, 0.0)
            output = tl.dot(p.to(v.dtype), v, output, input_precision="ieee")
            tl.store(marks_ptr + block + rows[:, None] * 0 + lane * 0, 1, mask=its != 0.0)
            total += its
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
    # Triton 3.6 fails where what a loop carries is not asked for behind it.
    last = seq_q + tl.minimum(tries + open_rows, 0)
    if QUICK:
        tl.store(tau_ptr + row_base + rows, tau, mask=rows < last)
        output = tl.where((tau != tau)[:, None], float("nan"), output)
    if DROPOUT:
        output = output * keep_scale
    pack_marks(marks_ptr, active_ptr + line * tl.cdiv(n_blocks, 8), n_blocks)
    store_rows(out_ptr + row_base * dim_value, output, rows, last, dim_value, BLOCK_DV)


def weighted_sum(
    problem: Problem,
    candidates: Candidates,
    tau: torch.Tensor,
    slope: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the output, and the blocks that hold weight, as in `forward.py`; improve tau."""
    q = problem.q
    output = problem.new(*q.shape[:3], problem.v.shape[-1], dtype=q.dtype)
    marks = torch.zeros(candidates.listed.shape, dtype=torch.int8, device=q.device)
    shape = *marks.shape[:3], -(-marks.shape[3] // 8)
    active = torch.empty(shape, dtype=torch.uint8, device=q.device)
    tiles, quick, dim_value = problem.tiles, problem.quick, output.shape[-1]
    launch(
        _output_kernel, problem.grid[0] * problem.planes, problem.kind,
        *problem.descriptors, problem.mask, problem.alpha, *candidates[3:], tau, slope,
        output, marks, active, *problem.added, *problem.sizes, problem.scale, *problem.drop,
        dim_value, SLACK.get(output.dtype, 0.0), MAX_TRIES, **problem.switches,
        DROPOUT=problem.terms.dropout > 0.0,
        QUICK=quick, SATURATE=quick and not interpreted(_output_kernel),
        BLOCK_DV=padded(dim_value), num_warps=tiles.num_warps, num_stages=tiles.output_stages,
        maxnreg=tiles.most.output,
    )  # fmt: skip
    return output, active
