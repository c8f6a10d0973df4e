"""The gradient of an additive bias: dS, summed over what the bias was repeated for.

One program for every block of the bias. Where that was repeated over the batch, heads or rows it
goes through all of them in order, so there are no atomics, no gradient as large as all scores, and
the same bits in every run; scores are computed anew, and blocks without weight left out. A bias
that is the same for all keys shifts whole rows, which no weight follows: its gradient is zero.

Notation and layout as in `backward.py`. Source: own.
"""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl

from ..launch import launch
from .philox import words
from .scores import factor_of, scores, terms_of
from .tiles import SIZES, UNALIGNED, Problem, describe, load_numbers, load_tile, padded, roots


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=UNALIGNED)
@no_type_check
def _bias_kernel(
    q_desc, k_desc, v_desc, do_desc, mask_ptr, alpha_ptr, active_ptr, rows_ptr, dbias_ptr,
    slopes_ptr, bias_ptr, bounds_q_ptr, bounds_k_ptr, n_seq, cap,
    bias_batch, bias_head, bias_row, bias_key,
    stride_mask, left, right, heads, group, seq_q, seq_k, n_tiles, n_blocks, scale,
    seed_ptr, drop_below, keep_scale, its_heads, batches, n_heads,
    IS_CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr, HAS_WINDOW: tl.constexpr,
    HALF: tl.constexpr, FORM: tl.constexpr, DROPOUT: tl.constexpr, ALL_ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Write one block; `batches` and `n_heads` are how many of each share it."""
    block, rest = tl.program_id(0) % n_blocks, tl.program_id(0) // n_blocks
    if ALL_ROWS:
        tile, its_tiles, its_plane = rest * 0, n_tiles, rest
    else:
        tile, its_tiles, its_plane = rest % n_tiles, 1, rest // n_tiles
    first_batch, first_head = its_plane // its_heads, its_plane % its_heads
    keys = block * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for member in range(0, batches * n_heads * its_tiles):
        batch = first_batch + member // (n_heads * its_tiles)
        head = first_head + member // its_tiles % n_heads
        this = tile + member % its_tiles
        plane = batch * heads + head
        line = plane.to(tl.int64) * n_tiles + this
        marks = tl.load(active_ptr + line * tl.cdiv(n_blocks, 8) + block // 8).to(tl.int32)
        if (marks >> (block % 8)) & 1 != 0:
            first = this * BLOCK_M
            alpha = 1.5 if HALF else tl.load(alpha_ptr + plane)
            terms = terms_of(
                plane, batch, head, scale, alpha, cap, slopes_ptr, bias_ptr,
                bias_batch, bias_head, bias_row, bias_key, FORM,
            )  # fmt: skip
            q = load_tile(q_desc, batch, head, first, BLOCK_M, BLOCK_D)
            do = load_tile(do_desc, batch, head, first, BLOCK_M, BLOCK_DV)
            k = load_tile(k_desc, batch, head // group, block * BLOCK_N, BLOCK_N, BLOCK_D)
            v = load_tile(v_desc, batch, head // group, block * BLOCK_N, BLOCK_N, BLOCK_DV)
            tau, delta = load_numbers(rows_ptr, line, BLOCK_M)
            its_mask = mask_ptr + batch.to(tl.int64) * stride_mask
            s, _gate = scores(
                q, k, its_mask, terms, first, block * BLOCK_N, seq_q, seq_k, left, right,
                IS_CAUSAL, HAS_MASK, HAS_WINDOW, FORM, BLOCK_M, BLOCK_N,
            )  # fmt: skip
            factor = factor_of(scale, alpha, FORM)
            _x, u = roots(s * factor, tau[:, None], 1.0 / (alpha - 1.0), HALF)
            dp = tl.dot(do, v.T, input_precision="ieee")
            if DROPOUT:
                drawn = words(tl.load(seed_ptr), plane, first, block * BLOCK_N, BLOCK_M, BLOCK_N)
                dp = tl.where(drawn >= drop_below, dp * keep_scale, 0.0)
            total += u * (dp - delta[:, None])
    if ALL_ROWS:
        places = dbias_ptr + its_plane.to(tl.int64) * seq_k + keys
        tl.store(places, tl.sum(total, 0).to(dbias_ptr.dtype.element_ty), mask=keys < seq_k)
    else:
        rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        lines = (its_plane.to(tl.int64) * seq_q + rows) * seq_k
        inside = (rows < seq_q)[:, None] & (keys < seq_k)[None, :]
        places = dbias_ptr + lines[:, None] + keys[None, :]
        tl.store(places, total.to(dbias_ptr.dtype.element_ty), mask=inside)


def bias_gradient(
    problem: Problem,
    grad: torch.Tensor,
    active: torch.Tensor,
    rows: torch.Tensor,
) -> torch.Tensor:
    """Return the gradient of the bias, in its shape and dtype.

    Args:
        problem: With a bias.
        grad: Gradient of the output, aligned.
        active: From the forward.
        rows: Tau and delta of all rows, from the kernel of the queries.
    """
    q, bias, tiles = problem.q, problem.terms.bias, problem.tiles
    assert bias is not None  # who calls this has looked
    dbias = torch.zeros(bias.shape, dtype=bias.dtype, device=bias.device)
    if bias.shape[3] != problem.k.shape[2]:
        return dbias
    all_rows = bias.shape[2] != q.shape[2]
    n_tiles, n_blocks = problem.grid
    its_planes = bias.shape[0] * bias.shape[1]
    sharing = q.shape[0] // bias.shape[0], q.shape[1] // bias.shape[1]
    launch(
        _bias_kernel, its_planes * (1 if all_rows else n_tiles) * n_blocks,
        (*problem.kind, active.data_ptr() % 16),
        *problem.descriptors, describe(grad, tiles.block_m), problem.mask, problem.alpha,
        active, rows, dbias, *problem.added, *problem.sizes, problem.scale, *problem.drop,
        bias.shape[1], *sharing,
        **problem.switches, DROPOUT=problem.terms.dropout > 0.0, ALL_ROWS=all_rows,
        BLOCK_DV=padded(problem.v.shape[-1]),
        num_warps=tiles.num_warps, num_stages=tiles.queries_stages,
    )  # fmt: skip
    return dbias
