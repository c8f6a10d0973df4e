"""Tau and output of pairs of tiles of queries that see most of their keys.

Where nearly every block holds weight, lists save nothing. Here one program goes through all blocks
of keys one after another, twice: for tau and for the output. Pairs that are not dense end at once;
which are the device finds by the lengths of their lists, and nothing waits for it.

For half formats at alpha 1.5 without a window, dropout or what else shapes scores. Scores and
layout as in `forward.py`. Source: own.
"""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl

from ..launch import interpreted, launch
from .output import MAX_TRIES, weigh
from .screen import Candidates, blocks_of, is_dense
from .solver import MAX_PASSES, NEAR, SLACK
from .threshold import solve
from .tiles import SIZES, UNALIGNED, Problem, describe, hold, load_tile, padded, store_rows


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=UNALIGNED)
@no_type_check
def _pairs_kernel(
    q_desc, k_desc, v_desc, mask_ptr, top_ptr, bound_ptr, start_ptr, count_ptr, tau_ptr, out_ptr,
    active_ptr, stride_mask, left, right, heads, group, seq_q, seq_k, n_tiles, n_blocks, scale,
    dim_value, near, tolerance, max_passes, max_tries,
    IS_CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr, SATURATE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, HELD: tl.constexpr,
):  # fmt: skip
    """Write output and tau of ROWS rows of a pair of tiles, and mark blocks that hold weight."""
    PARTS: tl.constexpr = 2 * BLOCK_M // ROWS
    n_parts = n_tiles // 2 * PARTS
    place = tl.program_id(0)
    plane, part = place // n_parts, n_parts - 1 - place % n_parts
    tile = part * ROWS // BLOCK_M
    line = (plane * n_tiles + tile).to(tl.int64)
    batch, head = plane // heads, plane % heads
    mask_ptr += batch.to(tl.int64) * stride_mask
    if is_dense(
        count_ptr + line, tile, n_tiles, seq_q, seq_k, mask_ptr,
        IS_CAUSAL, HAS_MASK, BLOCK_M, BLOCK_N,
    ):  # fmt: skip
        first = part * ROWS
        rows = first + tl.arange(0, ROWS)
        places = plane.to(tl.int64) * seq_q + rows
        begin, count = blocks_of(
            first, ROWS, seq_q, seq_k, mask_ptr, IS_CAUSAL, HAS_MASK, BLOCK_N, KEYS
        )
        q = load_tile(q_desc, batch, head, first, ROWS, BLOCK_D)
        q = hold(q, BLOCK_D, HELD)
        top = tl.load(top_ptr + places, mask=rows < seq_q, other=float("-inf"))
        lower = tl.load(bound_ptr + places, mask=rows < seq_q, other=0.0)
        t = tl.load(start_ptr + places, mask=rows < seq_q, other=0.0)
        factor = scale * 0.5
        tau, slope = solve(
            q, t, lower, top, k_desc, mask_ptr, count_ptr, 0, batch, head // group, 0, first, begin,
            count, seq_q, seq_k, left, right, factor, 2.0, near, max_passes,
            IS_CAUSAL, HAS_MASK, False, True, 0, False, True, SATURATE,
            BLOCK_N, ROWS, KEYS, BLOCK_D,
        )  # fmt: skip
        output, tau, last = weigh(
            q, tau, slope, k_desc, v_desc, mask_ptr, count_ptr, active_ptr + line * n_blocks,
            count_ptr, 0, plane, batch, head // group, 0, 0, first, begin, count, seq_q, seq_k,
            left, right, factor, 2.0, n_blocks, 0, tolerance, max_tries,
            IS_CAUSAL, HAS_MASK, False, True, 0, False, False, True, SATURATE, BLOCK_M, BLOCK_N,
            ROWS, KEYS, BLOCK_D, BLOCK_DV,
        )  # fmt: skip
        tl.store(tau_ptr + places, tau, mask=rows < last)
        out_ptr += plane.to(tl.int64) * seq_q * dim_value
        store_rows(out_ptr, output, rows, last, dim_value, BLOCK_DV)


def dense_pairs(
    problem: Problem,
    candidates: Candidates,
    tau: torch.Tensor,
    output: torch.Tensor,
    active: torch.Tensor,
) -> None:
    """Write what the other kernels have left out: output, tau, and which blocks hold weight."""
    tiles, switches, dtype = problem.tiles, problem.switches, output.dtype
    top, bound, start, _, length = candidates
    sources = (
        describe(x, rows) for x, rows in
        ((problem.q, tiles.pair_m), (problem.k, tiles.pair_n), (problem.v, tiles.pair_n))
    )  # fmt: skip
    interpreting = interpreted(_pairs_kernel)
    launch(
        _pairs_kernel, problem.grid[0] // 2 * (2 * tiles.block_m // tiles.pair_m) * problem.planes,
        problem.kind, *sources, problem.mask,
        top, bound, start, length, tau, output, active, *problem.sizes, problem.scale,
        output.shape[-1], NEAR[dtype], SLACK[dtype], MAX_PASSES, MAX_TRIES,
        IS_CAUSAL=switches["IS_CAUSAL"], HAS_MASK=switches["HAS_MASK"], SATURATE=not interpreting,
        BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n, BLOCK_D=switches["BLOCK_D"],
        BLOCK_DV=padded(output.shape[-1]), ROWS=tiles.pair_m, KEYS=tiles.pair_n,
        HELD=tiles.held.pairs and not interpreting,
        num_warps=tiles.pair_warps, num_stages=tiles.pair_stages, maxnreg=tiles.most.pairs,
    )  # fmt: skip
