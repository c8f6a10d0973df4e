"""Which pages cannot hold weight, from the smallest and largest value of every feature in them.

    q . k <= sum_d max(q_d low_d, q_d high_d)        for every key k of a page

The page with the largest bound is read for real, row by row. Whatever stays at or below its maximum
minus 1 in every row holds no weight, as `tau >= max - 1`. Bounds are raised by 4e-3 of the sizes
that went into them, twice what their products in TF32 round by, and maxima lowered by 1e-4.

Layout as in `kernel.py`; low and high [batch or pages, heads_kv, blocks or 1, dim], float32.
Source: own; the bound is that of Quest (arXiv 2406.10774), which drops pages by rank.
"""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..attention.tiles import padded
from .kernel import load_alpha

_SLACK, _SEED_SLACK = tl.constexpr(4e-3), tl.constexpr(1e-4)
_CHUNK = 32


@triton.jit
@no_type_check
def _bounds_kernel(
    q_ptr, low_ptr, high_ptr, table_ptr, alpha_ptr, bound_ptr, stride_sb, stride_sh, stride_table,
    heads, n_rows, n_blocks, dim, scale,
    PAGED: tl.constexpr, HALF: tl.constexpr,
    ROWS: tl.constexpr, CHUNK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write the upper bounds of some blocks, `[rows, blocks]` of one key head."""
    plane = tl.program_id(0)
    batch, head = plane // heads, plane % heads
    rows, dims = tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    blocks = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    real = blocks < n_blocks
    if PAGED:  # entries behind the last page may be anything
        slabs = tl.load(table_ptr + batch * stride_table + blocks, mask=real, other=0).to(tl.int64)
        real = real & (slabs >= 0)
        offsets = slabs * stride_sb + head * stride_sh
    else:
        offsets = batch.to(tl.int64) * stride_sb + head * stride_sh + blocks * dim
    inside = real[:, None] & (dims < dim)[None, :]
    low = tl.load(low_ptr + offsets[:, None] + dims[None, :], mask=inside, other=0.0)
    high = tl.load(high_ptr + offsets[:, None] + dims[None, :], mask=inside, other=0.0)
    q = tl.load(
        q_ptr + (plane.to(tl.int64) * n_rows + rows[:, None]) * dim + dims[None, :],
        mask=(rows[:, None] < n_rows) & (dims[None, :] < dim), other=0.0,
    ).to(tl.float32)  # fmt: skip
    alpha = load_alpha(alpha_ptr, plane.to(tl.int64) * n_rows + rows, rows < n_rows, HALF)
    q = q * (scale * (alpha - 1.0))[:, None]
    bound = tl.dot(tl.maximum(q, 0.0), high.T, input_precision="tf32")
    bound = tl.dot(tl.minimum(q, 0.0), low.T, bound, input_precision="tf32")
    size = tl.dot(
        tl.abs(q), tl.maximum(tl.abs(low), tl.abs(high)).T, input_precision="tf32"
    )  # fmt: skip
    line = (plane.to(tl.int64) * n_rows + rows) * n_blocks
    tl.store(
        bound_ptr + line[:, None] + blocks[None, :], bound + _SLACK * size,
        mask=(rows < n_rows)[:, None] & (blocks < n_blocks)[None, :],
    )  # fmt: skip


@triton.jit
@no_type_check
def _seed_kernel(
    q_ptr, k_ptr, table_ptr, length_ptr, mask_ptr, alpha_ptr, bound_ptr, seed_ptr,
    stride_kb, stride_kh, stride_ks, stride_table, stride_mask,
    heads, n_rows, seq_q, n_blocks, dim, scale,
    PAGED: tl.constexpr, HAS_MASK: tl.constexpr, HALF: tl.constexpr,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write the largest score of one row in the block of its largest bound, lowered a little."""
    line = tl.program_id(0).to(tl.int64)
    plane = line // n_rows
    batch, head = plane // heads, plane % heads
    # Every row sees all keys of these blocks.
    whole = tl.maximum(tl.load(length_ptr + batch) - seq_q + 1, 0) // BLOCK
    best = tl.full([CHUNK], float("-inf"), tl.float32)
    where = tl.zeros([CHUNK], tl.int32)
    for start in range(0, whole, CHUNK):
        blocks = start + tl.arange(0, CHUNK)
        bound = tl.load(
            bound_ptr + line * n_blocks + blocks, mask=blocks < whole, other=float("-inf")
        )
        where = tl.where(bound > best, blocks, where)
        best = tl.maximum(best, bound)
    chosen = tl.argmax(best, 0)
    block = tl.sum(tl.where(tl.arange(0, CHUNK) == chosen, where, 0), 0)
    seed = float("-inf")
    if whole > 0:
        slab, inner = batch, block
        if PAGED:
            slab, inner = tl.load(table_ptr + batch * stride_table + block).to(tl.int64), 0
        keys, dims = inner * BLOCK + tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
        visible = keys >= 0
        if HAS_MASK:  # a hidden key proves nothing about the maximum
            places = batch.to(tl.int64) * stride_mask + block * BLOCK + tl.arange(0, BLOCK)
            visible = tl.load(mask_ptr + places) != 0
        k = tl.load(
            k_ptr + slab.to(tl.int64) * stride_kb + head * stride_kh
            + keys[:, None].to(tl.int64) * stride_ks + dims[None, :],
            mask=visible[:, None] & (dims < dim)[None, :], other=0.0,
        ).to(tl.float32)  # fmt: skip
        factor = scale * (load_alpha(alpha_ptr, line, line >= 0, HALF) - 1.0)
        q = tl.load(q_ptr + line * dim + dims, mask=dims < dim, other=0.0).to(tl.float32) * factor
        z = tl.sum(k * q[None, :], 1)
        slack = _SEED_SLACK * tl.max(tl.sum(tl.abs(k * q[None, :]), 1), 0)
        seed = tl.max(tl.where(visible, z, float("-inf")), 0) - slack
    tl.store(seed_ptr + line, seed)


@triton.jit
@no_type_check
def _keep_kernel(
    bound_ptr, seed_ptr, length_ptr, kept_ptr, count_ptr, heads, n_rows, n_blocks,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """List the blocks of one key head that a row cannot refute."""
    plane = tl.program_id(0).to(tl.int64)
    used = tl.cdiv(tl.load(length_ptr + plane // heads), BLOCK)
    rows = tl.arange(0, ROWS)
    lines, real = plane * n_rows + rows, rows < n_rows
    seed = tl.load(seed_ptr + lines, mask=real, other=float("inf"))
    count = 0
    for start in range(0, used, CHUNK):
        blocks = start + tl.arange(0, CHUNK)
        bound = tl.load(
            bound_ptr + lines[:, None] * n_blocks + blocks[None, :],
            mask=real[:, None] & (blocks < used)[None, :], other=float("-inf"),
        )  # fmt: skip
        keep = tl.max(((bound <= (seed - 1.0)[:, None]) == 0).to(tl.int32), 0)  # 1 for NaN
        place = plane * n_blocks + count + tl.cumsum(keep, 0) - keep
        tl.store(kept_ptr + place, blocks, mask=keep != 0)
        count += tl.sum(keep, 0)
    tl.store(count_ptr + plane, count)


def launch_keep(
    q: Tensor,
    k: Tensor,
    low: Tensor,
    high: Tensor,
    lengths: Tensor,
    table: Tensor | None,
    seq_q: int,
    block: int,
    n_blocks: int,
    alpha: Tensor | None,
    scale: float,
    key_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the blocks that may hold weight, int32 `[batch, heads_kv, n_blocks]`, and how many.

    Args:
        q: `[batch, heads_kv, rows, dim]`, contiguous.
        k: The cache, last stride 1.
        low: Smallest values, contiguous; `high` the largest.
        high: As `low`.
        lengths: int32 `[batch]`.
        table: int32 `[batch, pages]`, contiguous, or None.
        seq_q: Number of new tokens.
        block: Keys of a block; the size of a page if there is a table.
        n_blocks: Blocks of the longest sequence there can be.
        alpha: As for `launch_decode`.
        scale: z is `scale (alpha - 1) q . k`.
        key_mask: As for `launch_decode`.
    """
    batch, heads, n_rows, dim = q.shape
    planes, rows = batch * heads, max(16, padded(n_rows))
    bound = torch.empty((planes, n_rows, n_blocks), dtype=torch.float32, device=q.device)
    seed = torch.empty((planes, n_rows), dtype=torch.float32, device=q.device)
    kept = torch.empty((batch, heads, n_blocks), dtype=torch.int32, device=q.device)
    count = torch.empty((batch, heads), dtype=torch.int32, device=q.device)
    pages = lengths if table is None else table
    stride_table = 0 if table is None else table.stride(0)
    sizes = {"PAGED": table is not None, "HALF": alpha is None, "BLOCK_D": max(16, padded(dim))}
    alphas = seed if alpha is None else alpha
    mask, stride_mask = (lengths, 0) if key_mask is None else (key_mask, key_mask.stride(0))
    _bounds_kernel[(planes, triton.cdiv(n_blocks, _CHUNK))](
        q, low, high, pages, alphas, bound, *low.stride()[:2], stride_table,
        heads, n_rows, n_blocks, dim, scale, ROWS=rows, CHUNK=_CHUNK, num_warps=4, **sizes,
    )  # fmt: skip
    _seed_kernel[(planes * n_rows,)](
        q, k, pages, lengths, mask, alphas, bound, seed, *k.stride()[:3], stride_table, stride_mask,
        heads, n_rows, seq_q, n_blocks, dim, scale, HAS_MASK=key_mask is not None,
        BLOCK=block, CHUNK=512, num_warps=4, **sizes,
    )  # fmt: skip
    _keep_kernel[(planes,)](
        bound, seed, lengths, kept, count, heads, n_rows, n_blocks,
        ROWS=rows, BLOCK=block, CHUNK=max(16, 8192 // rows), num_warps=8,
    )  # fmt: skip
    return kept, count


def reference_keep(
    q: Tensor,
    k: Tensor,
    low: Tensor,
    high: Tensor,
    lengths: Tensor,
    seq_q: int,
    block: int,
    factor: float,
) -> Tensor:
    """Return which blocks `launch_keep` lists, bool, for a cache of one slab per sequence."""
    z = q.float() * factor
    up, down = z.clamp_min(0), z.clamp_max(0)
    size = z.abs() @ torch.maximum(low.abs(), high.abs()).mT
    bound = up @ high.mT + down @ low.mT + 4e-3 * size  # [batch, heads_kv, rows, blocks]
    starts = block * torch.arange(bound.shape[-1], device=q.device)
    whole = starts + block <= (lengths - seq_q + 1)[:, None]
    best = bound.masked_fill(~whole[:, None, None], -torch.inf).argmax(-1)
    keys = k.float().unflatten(2, (-1, block))  # [batch, heads_kv, blocks, block, dim]
    batches, heads = torch.arange(q.shape[0])[:, None, None], torch.arange(q.shape[1])[:, None]
    products = keys[batches, heads, best] * z[..., None, :]  # [batch, heads_kv, rows, block, dim]
    seed = products.sum(-1).amax(-1) - 1e-4 * products.abs().sum(-1).amax(-1)
    seed = seed.masked_fill(~whole.any(-1)[:, None, None], -torch.inf)
    refuted: Tensor = (bound <= seed[..., None] - 1).all(2)
    return ~refuted & (starts < lengths[:, None])[:, None]
