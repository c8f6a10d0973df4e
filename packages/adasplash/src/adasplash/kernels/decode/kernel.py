"""Decoding: a few queries, many keys, in three kernels whose programs share the keys (split-K).

1. *Scores*: every key is read once, by the split that owns its block; z goes to memory, and with
   it the maximum of every row in every block. Blocks that were proved empty are not read at all.
2. *Threshold*: one program for the rows of a key head. The maxima give `top - 1 <= tau`; blocks
   above that in any row are listed, and tau is solved for over their scores as in
   `attention/forward.py`.
3. *Output*: each split adds up `p v` over its share of the listed blocks, reading no other values.
   The sums of the splits are added in a fixed order: the same input gives the same bits.

Layout: q [batch, heads_kv, rows, dim], rows being the query heads that share a key head times the
new tokens; k, v [batch or pages, heads_kv, places, dim]; z [batch, heads_kv, ROWS, blocks * BLOCK]
and the maxima float32. Source: own.
"""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl

from ..attention.forward import _MAX_PASSES, _TOLERANCE, _improve, _sums
from ..attention.tiles import padded, roots

_SPLITS = 264  # programs for two on each multiprocessor of a large GPU


@triton.jit
@no_type_check
def _place(table_ptr, batch, block, stride_table, PAGED: tl.constexpr):
    """Return which slab holds a block, and the block's number inside it."""
    if PAGED:
        return tl.load(table_ptr + batch * stride_table + block).to(tl.int64), 0
    else:
        return batch.to(tl.int64), block


@triton.jit
@no_type_check
def _scores_kernel(
    q_ptr, k_ptr, table_ptr, length_ptr, keep_ptr, z_ptr, peak_ptr,
    stride_kb, stride_kh, stride_ks, stride_table, heads, n_rows, seq_q, n_blocks, dim, factor,
    per_split,
    PAGED: tl.constexpr, HAS_KEEP: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write the scores of one split's blocks and their maxima."""
    plane, split = tl.program_id(0), tl.program_id(1)
    batch, head = plane // heads, plane % heads
    length = tl.load(length_ptr + batch)
    rows, dims = tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    q = tl.load(
        q_ptr + (plane.to(tl.int64) * n_rows + rows[:, None]) * dim + dims[None, :],
        mask=(rows[:, None] < n_rows) & (dims[None, :] < dim), other=0.0,
    )  # fmt: skip
    last = length - seq_q + rows % seq_q  # the last key that a row sees
    for block in range(split * per_split, tl.minimum((split + 1) * per_split, n_blocks)):
        wanted = block * BLOCK < length
        if HAS_KEEP:
            wanted = wanted & (tl.load(keep_ptr + plane * n_blocks + block) != 0)
        peak = tl.full([ROWS], float("-inf"), tl.float32)
        if wanted:
            slab, inner = _place(table_ptr, batch, block, stride_table, PAGED)
            places = block * BLOCK + tl.arange(0, BLOCK)
            keys = inner * BLOCK + tl.arange(0, BLOCK)
            k = tl.load(
                k_ptr + slab * stride_kb + head.to(tl.int64) * stride_kh
                + keys[:, None].to(tl.int64) * stride_ks + dims[None, :],
                mask=(places[:, None] < length) & (dims[None, :] < dim), other=0.0,
            )  # fmt: skip
            z = tl.dot(q, k.T, input_precision="ieee") * factor
            seen = (places[None, :] <= last[:, None]) & (rows[:, None] < n_rows)
            z = tl.where(seen, z, float("-inf"))
            line = (plane.to(tl.int64) * ROWS + rows[:, None]) * n_blocks * BLOCK
            tl.store(z_ptr + line + places[None, :], z)
            poisoned = tl.max((z != z).to(tl.int32), 1) != 0
            peak = tl.where(poisoned, float("nan"), tl.max(z, 1))
        tl.store(peak_ptr + (plane.to(tl.int64) * ROWS + rows) * n_blocks + block, peak)


@triton.jit
@no_type_check
def _threshold_kernel(
    z_ptr, peak_ptr, list_ptr, count_ptr, tau_ptr, n_blocks, alpha, tolerance, max_passes,
    HALF: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Write tau of every row of one key head, and the blocks that may hold weight."""
    plane = tl.program_id(0)
    rows = tl.arange(0, ROWS)
    lines = plane.to(tl.int64) * ROWS + rows
    list_ptr += plane.to(tl.int64) * n_blocks
    top = tl.full([ROWS], float("-inf"), tl.float32)
    poisoned = tl.zeros([ROWS], tl.int32)
    for start in range(0, n_blocks, CHUNK):
        blocks = start + tl.arange(0, CHUNK)
        peaks = tl.load(
            peak_ptr + lines[:, None] * n_blocks + blocks[None, :],
            mask=blocks[None, :] < n_blocks, other=float("-inf"),
        )  # fmt: skip
        top = tl.maximum(top, tl.max(peaks, 1))
        poisoned = tl.maximum(poisoned, tl.max((peaks != peaks).to(tl.int32), 1))
    empty = top == float("-inf")
    top = tl.where(empty, 0.0, top)
    count = 0
    for start in range(0, n_blocks, CHUNK):
        blocks = start + tl.arange(0, CHUNK)
        peaks = tl.load(
            peak_ptr + lines[:, None] * n_blocks + blocks[None, :],
            mask=blocks[None, :] < n_blocks, other=float("-inf"),
        )  # fmt: skip
        needed = tl.max(((peaks <= (top - 1.0)[:, None]) == 0).to(tl.int32), 0)  # true for NaN
        tl.store(list_ptr + count + tl.cumsum(needed, 0) - needed, blocks, mask=needed != 0)
        count += tl.sum(needed, 0)
    tl.store(count_ptr + plane, count)
    tl.debug_barrier()  # other threads read the list

    power = 1.0 / (alpha - 1.0)
    lower, upper, t = top - 1.0, top, top - 1.0
    passes, unsolved = 0, 1
    while (passes < max_passes) & (unsolved > 0):
        a0 = tl.zeros([ROWS], tl.float32)
        a1 = tl.zeros([ROWS], tl.float32)
        a2 = tl.zeros([ROWS], tl.float32)
        for index in range(0, count):
            block = tl.load(list_ptr + index)
            places = block * BLOCK + tl.arange(0, BLOCK)
            z = tl.load(z_ptr + lines[:, None] * n_blocks * BLOCK + places[None, :])
            b0, b1, b2 = _sums(z, t, power, HALF)
            a0, a1, a2 = a0 + b0, a1 + b1, a2 + b2
        t, lower, upper, done = _improve(t, a0, a1, a2, power, lower, upper, tolerance, HALF)
        done = done | empty | (poisoned != 0)
        lower, upper = tl.where(done, t, lower), tl.where(done, t, upper)
        unsolved = tl.max(tl.where(done, 0, 1), 0)
        passes += 1
    t = tl.where(poisoned != 0, float("nan"), t)
    tl.store(tau_ptr + lines, tl.where(empty, float("inf"), t))


@triton.jit
@no_type_check
def _output_kernel(
    v_ptr, table_ptr, length_ptr, z_ptr, list_ptr, count_ptr, tau_ptr, part_ptr,
    stride_vb, stride_vh, stride_vs, stride_table, heads, n_blocks, n_splits, dim, alpha,
    PAGED: tl.constexpr, HALF: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write one split's sum of weighted values."""
    plane, split = tl.program_id(0), tl.program_id(1)
    batch, head = plane // heads, plane % heads
    length = tl.load(length_ptr + batch)
    rows, dims = tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    lines = plane.to(tl.int64) * ROWS + rows
    tau = tl.load(tau_ptr + lines)
    power = 1.0 / (alpha - 1.0)
    output = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for index in range(split, tl.load(count_ptr + plane), n_splits):
        block = tl.load(list_ptr + plane.to(tl.int64) * n_blocks + index)
        slab, inner = _place(table_ptr, batch, block, stride_table, PAGED)
        places = block * BLOCK + tl.arange(0, BLOCK)
        keys = inner * BLOCK + tl.arange(0, BLOCK)
        v = tl.load(
            v_ptr + slab * stride_vb + head.to(tl.int64) * stride_vh
            + keys[:, None].to(tl.int64) * stride_vs + dims[None, :],
            mask=(places[:, None] < length) & (dims[None, :] < dim), other=0.0,
        )  # fmt: skip
        z = tl.load(z_ptr + lines[:, None] * n_blocks * BLOCK + places[None, :])
        x, u = roots(z, tau[:, None], power, HALF)
        output = tl.dot((x * u).to(v.dtype), v, output, input_precision="ieee")
    offset = (plane.to(tl.int64) * n_splits + split) * ROWS
    tl.store(
        part_ptr + (offset + rows[:, None]) * dim + dims[None, :], output, mask=dims[None, :] < dim
    )


def launch_decode(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lengths: torch.Tensor,
    table: torch.Tensor | None,
    keep: torch.Tensor | None,
    seq_q: int,
    block: int,
    n_blocks: int,
    alpha: float,
    scale: float,
) -> torch.Tensor:
    """Return the output `[batch, heads_kv, rows, dim_value]`, float32.

    Args:
        q: `[batch, heads_kv, rows, dim]`, contiguous; row `g * seq_q + i` is token i of head g.
        k: `[batch or pages, heads_kv, places, dim]`, last stride 1.
        v: `[batch or pages, heads_kv, places, dim_value]`, last stride 1.
        lengths: int32 `[batch]`.
        table: int32 `[batch, pages]`, contiguous, or None.
        keep: int8 `[batch, heads_kv, n_blocks]`, 0 for blocks that hold no weight; or None.
        seq_q: Number of new tokens.
        block: Keys of a block; the size of a page if there is a table.
        n_blocks: Blocks of the longest sequence there can be.
        alpha: Above 1, up to 2.
        scale: Factor of the scores.
    """
    batch, heads, n_rows, dim = q.shape
    planes, rows, dim_value = batch * heads, max(16, padded(n_rows)), v.shape[-1]
    splits = max(1, min(n_blocks, triton.cdiv(_SPLITS, planes)))
    per_split = triton.cdiv(n_blocks, splits)
    options = {"dtype": torch.float32, "device": q.device}
    z = torch.empty((planes, rows, n_blocks * block), **options)
    peaks = torch.empty((planes, rows, n_blocks), **options)
    tau = torch.empty((planes, rows), **options)
    part = torch.empty((planes, splits, rows, dim_value), **options)
    listed = torch.empty((planes, n_blocks), dtype=torch.int32, device=q.device)
    count = torch.empty((planes,), dtype=torch.int32, device=q.device)
    pages = lengths if table is None else table
    stride_table = 0 if table is None else table.stride(0)
    half = alpha == 1.5
    _scores_kernel[(planes, splits)](
        q, k, pages, lengths, lengths if keep is None else keep, z, peaks,
        *k.stride()[:3], stride_table, heads, n_rows, seq_q, n_blocks, dim,
        scale * (alpha - 1), per_split,
        PAGED=table is not None, HAS_KEEP=keep is not None,
        ROWS=rows, BLOCK=block, BLOCK_D=max(16, padded(dim)), num_warps=4,
    )  # fmt: skip
    tolerance = _TOLERANCE[v.dtype] * (1 if half else 1 + 1 / (alpha - 1))
    _threshold_kernel[(planes,)](
        z, peaks, listed, count, tau, n_blocks, alpha, tolerance, _MAX_PASSES,
        HALF=half, ROWS=rows, BLOCK=block, CHUNK=128, num_warps=8,
    )  # fmt: skip
    _output_kernel[(planes, splits)](
        v, pages, lengths, z, listed, count, tau, part,
        *v.stride()[:3], stride_table, heads, n_blocks, splits, dim_value, alpha,
        PAGED=table is not None, HALF=half,
        ROWS=rows, BLOCK=block, BLOCK_D=max(16, padded(dim_value)), num_warps=4,
    )  # fmt: skip
    return part.sum(1)[:, :n_rows].view(batch, heads, n_rows, dim_value)
