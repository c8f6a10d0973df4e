"""Decoding: a few queries, many keys, in four kernels whose programs share the keys (split-K).

1. *Scores*: every key is read once, by the split that owns its block. The maximum of every row in
   every block goes to memory, and z where a row rises above `maximum so far - 1`: other blocks
   hold no weight. Blocks that `bounds.py` proved empty are not read at all.
2. *List*: one program for the rows of a key head. The maxima give `top - 1 <= tau`; blocks above
   that in any row are listed.
3. *Threshold*: one program for each row solves for tau over the listed scores as in
   `attention/threshold.py`.
4. *Output*: each split adds up `p v` over its share of the listed blocks, reading no other values.
   The sums of the splits are added in a fixed order: the same input gives the same bits.

Layout: q [batch, heads_kv, rows, dim], rows being the query heads that share a key head times the
new tokens; k, v [batch or pages, heads_kv, places, dim]; z [batch, heads_kv, rows, blocks * BLOCK]
and the maxima float32. Source: own.
"""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl

from ..attention.solver import MAX_PASSES, TOLERANCE, improve
from ..attention.tiles import padded, roots

# Programs in all, for a large GPU; those of the output also write as many partial sums.
_SCORE_SPLITS = 2112
_OUTPUT_SPLITS = 264


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
def load_alpha(alpha_ptr, lines, real, HALF: tl.constexpr):
    """Return alpha of some rows, 1.5 for HALF."""
    if HALF:
        return tl.where(real, 1.5, 1.5)
    else:
        return tl.load(alpha_ptr + lines, mask=real, other=1.5)


@triton.jit
@no_type_check
def _scores_kernel(
    q_ptr, k_ptr, table_ptr, length_ptr, mask_ptr, alpha_ptr, kept_ptr, kept_count_ptr, z_ptr,
    peak_ptr, stride_kb, stride_kh, stride_ks, stride_table, stride_mask,
    heads, n_rows, seq_q, n_blocks, dim, scale,
    PAGED: tl.constexpr, HAS_MASK: tl.constexpr, HALF: tl.constexpr, LISTED: tl.constexpr,
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
    alpha = load_alpha(alpha_ptr, plane.to(tl.int64) * n_rows + rows, rows < n_rows, HALF)
    factor = scale * (alpha - 1.0)
    mask_ptr += batch.to(tl.int64) * stride_mask
    last = length - seq_q + rows % seq_q  # the last key that a row sees
    line = (plane.to(tl.int64) * n_rows + rows[:, None]) * n_blocks * BLOCK
    real = rows < n_rows
    top = tl.full([ROWS], float("-inf"), tl.float32)
    count = tl.cdiv(length, BLOCK)
    if LISTED:
        count = tl.load(kept_count_ptr + plane)
    per_split = tl.cdiv(count, tl.num_programs(1))
    # Nothing in the loop waits for a branch: loads run ahead.
    for index in range(split * per_split, tl.minimum((split + 1) * per_split, count)):
        block = index
        if LISTED:
            block = tl.load(kept_ptr + plane.to(tl.int64) * n_blocks + index)
        slab, inner = _place(table_ptr, batch, block, stride_table, PAGED)
        places = block * BLOCK + tl.arange(0, BLOCK)
        keys = inner * BLOCK + tl.arange(0, BLOCK)
        filled = places < length
        if HAS_MASK:
            filled = filled & (tl.load(mask_ptr + places, mask=filled, other=0) != 0)
        k = tl.load(
            k_ptr + slab * stride_kb + head.to(tl.int64) * stride_kh
            + keys[:, None].to(tl.int64) * stride_ks + dims[None, :],
            mask=filled[:, None] & (dims[None, :] < dim), other=0.0,
        )  # fmt: skip
        z = tl.dot(q, k.T, input_precision="ieee") * factor[:, None]
        z = tl.where(filled[None, :] & (places[None, :] <= last[:, None]), z, float("-inf"))
        poisoned = tl.max((z != z).to(tl.int32), 1) != 0
        highest = tl.max(z, 1)
        needed = real & (poisoned | (highest > top - 1.0))
        some = tl.max(needed.to(tl.int32), 0) != 0
        tl.store(z_ptr + line + places[None, :], z, mask=real[:, None] & some)
        top = tl.where(poisoned, top, tl.maximum(top, highest))
        peak = tl.where(poisoned, float("nan"), highest)
        tl.store(
            peak_ptr + (plane.to(tl.int64) * n_rows + rows) * n_blocks + index, peak, mask=real
        )


@triton.jit
@no_type_check
def _list_kernel(
    peak_ptr, top_ptr, list_ptr, count_ptr, length_ptr, kept_ptr, kept_count_ptr,
    heads, n_rows, n_blocks, LISTED: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """List the blocks in which a row of one key head may hold weight; write the rows' maxima."""
    plane = tl.program_id(0).to(tl.int64)
    used = tl.cdiv(tl.load(length_ptr + plane // heads), BLOCK)
    if LISTED:
        used = tl.load(kept_count_ptr + plane)
    rows = tl.arange(0, ROWS)
    lines, real = plane * n_rows + rows, (rows < n_rows)[:, None]
    list_ptr += plane * n_blocks
    highest = tl.full([ROWS, CHUNK], float("-inf"), tl.float32)
    broken = tl.zeros([ROWS, CHUNK], tl.int32)
    for start in range(0, used, CHUNK):
        blocks = start + tl.arange(0, CHUNK)[None, :]
        peaks = tl.load(
            peak_ptr + lines[:, None] * n_blocks + blocks,
            mask=real & (blocks < used), other=float("-inf"),
        )  # fmt: skip
        highest = tl.maximum(highest, tl.where(peaks == peaks, peaks, float("-inf")))
        broken = tl.maximum(broken, (peaks != peaks).to(tl.int32))
    top = tl.max(highest, 1)
    poisoned = tl.max(broken, 1) != 0
    tl.store(top_ptr + lines, tl.where(poisoned, float("nan"), top), mask=rows < n_rows)
    count = 0
    for start in range(0, used, CHUNK):
        blocks = start + tl.arange(0, CHUNK)
        peaks = tl.load(
            peak_ptr + lines[:, None] * n_blocks + blocks[None, :],
            mask=real & (blocks < used)[None, :], other=float("-inf"),
        )  # fmt: skip
        # Nothing at all rises above -inf; where there is a NaN its own blocks are enough.
        above = ((peaks > (top - 1.0)[:, None]) & (poisoned == 0)[:, None]) | (peaks != peaks)
        needed = tl.max(above.to(tl.int32), 0)
        if LISTED:
            blocks = tl.load(kept_ptr + plane * n_blocks + blocks, mask=needed != 0, other=0)
        tl.store(list_ptr + count + tl.cumsum(needed, 0) - needed, blocks, mask=needed != 0)
        count += tl.sum(needed, 0)
    tl.store(count_ptr + plane, count)


@triton.jit
@no_type_check
def _threshold_kernel(
    z_ptr, top_ptr, alpha_ptr, list_ptr, count_ptr, tau_ptr, n_rows, n_blocks, tolerance,
    max_passes, HALF: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Write tau of one row."""
    line = tl.program_id(0).to(tl.int64)
    plane = line // n_rows
    z_ptr += line * n_blocks * BLOCK
    list_ptr += plane * n_blocks
    count = tl.load(count_ptr + plane)
    top = tl.load(top_ptr + line)
    empty = top == float("-inf")
    power = 1.0 / (load_alpha(alpha_ptr, line, line >= 0, HALF) - 1.0)
    if not HALF:  # a high power of x has fewer digits
        tolerance = tolerance * (1.0 + power)
    upper = tl.where(empty, 0.0, top)
    lower = upper - 1.0
    t = lower
    passes, unsolved = 0, tl.where(empty | (top != top), 0, 1)
    while (passes < max_passes) & (unsolved > 0):
        p = tl.zeros([PARTS, BLOCK], tl.float32)
        slope = tl.zeros([PARTS, BLOCK], tl.float32)
        support = tl.zeros([PARTS, BLOCK], tl.float32)
        for start in range(0, count, PARTS):
            place = start + tl.arange(0, PARTS)
            blocks = tl.load(list_ptr + place, mask=place < count, other=0)
            z = tl.load(
                z_ptr + blocks[:, None].to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[None, :],
                mask=(place < count)[:, None], other=float("-inf"),
            )  # fmt: skip
            x, u = roots(z, t, power, HALF)
            p, slope, support = p + x * u, slope + u, support + (x > 0.0).to(tl.float32)
        a0 = tl.sum(tl.sum(p, 1), 0)
        a1 = tl.sum(tl.sum(slope, 1), 0)
        a2 = tl.sum(tl.sum(support, 1), 0)
        t, lower, upper, done = improve(t, a0, a1, a2, power, lower, upper, tolerance, 0.0, HALF)
        unsolved = tl.where(done, 0, 1)
        passes += 1
    t = tl.where(empty, float("inf"), t)
    tl.store(tau_ptr + line, tl.where(top != top, float("nan"), t))


@triton.jit
@no_type_check
def _output_kernel(
    v_ptr, table_ptr, length_ptr, z_ptr, alpha_ptr, list_ptr, count_ptr, tau_ptr, part_ptr,
    stride_vb, stride_vh, stride_vs, stride_table, heads, n_rows, n_blocks, n_splits, dim,
    PAGED: tl.constexpr, HALF: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write one split's sum of weighted values."""
    plane, split = tl.program_id(0), tl.program_id(1)
    batch, head = plane // heads, plane % heads
    length = tl.load(length_ptr + batch)
    rows, dims = tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    lines, real = plane.to(tl.int64) * n_rows + rows, rows < n_rows
    tau = tl.load(tau_ptr + lines, mask=real, other=float("inf"))
    power = 1.0 / (load_alpha(alpha_ptr, lines, real, HALF) - 1.0)
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
        z = tl.load(
            z_ptr + lines[:, None] * n_blocks * BLOCK + places[None, :],
            mask=real[:, None], other=float("-inf"),
        )  # fmt: skip
        x, u = roots(z, tau[:, None], power[:, None], HALF)
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
    kept: tuple[torch.Tensor, torch.Tensor] | None,
    seq_q: int,
    block: int,
    n_blocks: int,
    alpha: torch.Tensor | None,
    scale: float,
    key_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the output `[batch, heads_kv, rows, dim_value]`, float32.

    Args:
        q: `[batch, heads_kv, rows, dim]`, contiguous; row `g * seq_q + i` is token i of head g.
        k: `[batch or pages, heads_kv, places, dim]`, last stride 1.
        v: `[batch or pages, heads_kv, places, dim_value]`, last stride 1.
        lengths: int32 `[batch]`.
        table: int32 `[batch, pages]`, contiguous, or None.
        kept: Blocks that may hold weight, int32 `[batch, heads_kv, n_blocks]`, and how many they
            are; or None for all.
        seq_q: Number of new tokens.
        block: Keys of a block; the size of a page if there is a table.
        n_blocks: Blocks of the longest sequence there can be.
        alpha: Float32 `[batch, heads_kv, rows]`, contiguous; None means 1.5.
        scale: Factor of the scores.
        key_mask: Bytes, not 0 for visible keys, `[batch, n_blocks * block or fewer]`, last stride
            1; or None.
    """
    batch, heads, n_rows, dim = q.shape
    planes, rows, dim_value = batch * heads, max(16, padded(n_rows)), v.shape[-1]
    score_splits = max(1, min(n_blocks, triton.cdiv(_SCORE_SPLITS, planes)))
    splits = max(1, min(n_blocks, triton.cdiv(_OUTPUT_SPLITS, planes)))
    options = {"dtype": torch.float32, "device": q.device}
    z = torch.empty((planes, n_rows, n_blocks * block), **options)
    peaks = torch.empty((planes, n_rows, n_blocks), **options)
    top = torch.empty((planes, n_rows), **options)
    tau = torch.empty((planes, n_rows), **options)
    part = torch.empty((planes, splits, rows, dim_value), **options)
    listed = torch.empty((planes, n_blocks), dtype=torch.int32, device=q.device)
    count = torch.empty((planes,), dtype=torch.int32, device=q.device)
    pages = lengths if table is None else table
    stride_table = 0 if table is None else table.stride(0)
    half = alpha is None
    alphas = top if alpha is None else alpha
    mask, stride_mask = (lengths, 0) if key_mask is None else (key_mask, key_mask.stride(0))
    lists = (lengths, lengths) if kept is None else kept
    _scores_kernel[(planes, score_splits)](
        q, k, pages, lengths, mask, alphas, *lists, z, peaks,
        *k.stride()[:3], stride_table, stride_mask, heads, n_rows, seq_q, n_blocks, dim, scale,
        PAGED=table is not None, HAS_MASK=key_mask is not None, HALF=half, LISTED=kept is not None,
        ROWS=rows, BLOCK=block, BLOCK_D=max(16, padded(dim)), num_warps=4,
    )  # fmt: skip
    _list_kernel[(planes,)](
        peaks, top, listed, count, lengths, *lists, heads, n_rows, n_blocks,
        LISTED=kept is not None, ROWS=rows, BLOCK=block, CHUNK=max(16, 4096 // rows), num_warps=8,
    )  # fmt: skip
    _threshold_kernel[(planes * n_rows,)](
        z, top, alphas, listed, count, tau, n_rows, n_blocks, TOLERANCE[v.dtype], MAX_PASSES,
        HALF=half, BLOCK=block, PARTS=max(1, 8192 // block), num_warps=8,
    )  # fmt: skip
    _output_kernel[(planes, splits)](
        v, pages, lengths, z, alphas, listed, count, tau, part,
        *v.stride()[:3], stride_table, heads, n_rows, n_blocks, splits, dim_value,
        PAGED=table is not None, HALF=half,
        ROWS=rows, BLOCK=block, BLOCK_D=max(16, padded(dim_value)), num_warps=4,
    )  # fmt: skip
    return part.sum(1)[:, :n_rows].view(batch, heads, n_rows, dim_value)
