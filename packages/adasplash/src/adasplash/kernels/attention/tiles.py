"""Tile sizes, and the device code that forward and backward share: one tile of half scores.

Half scores are `z = (alpha - 1) s = scale / 2 * q k^T`, scaled in float32 after the product; hidden
keys are `-inf`. Every kernel computes them by the same product over tiles of the same shape, so
forward and backward see the same numbers.

Device functions are marked `no_type_check`: the type checker of the test suite would wrap them, and
the interpreter would no longer find the helpers that they call.
"""

from __future__ import annotations

from typing import NamedTuple, no_type_check

import torch
import triton
import triton.language as tl


class Tiles(NamedTuple):
    """Launch parameters of the attention kernels."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


# By the padded head size; float32 products need twice the room.
_HALF = {
    64: Tiles(64, 64, 4, 3),
    128: Tiles(64, 64, 4, 2),  # more stages spill
    256: Tiles(64, 32, 8, 2),  # 64 keys do not fit shared memory in the backward
}
_FULL = {
    64: Tiles(64, 32, 4, 2),
    128: Tiles(32, 32, 4, 2),
    256: Tiles(32, 16, 4, 1),
}


def padded(dim: int) -> int:
    """Return the size that a head of `dim` channels is padded to in the kernels."""
    return max(16, 1 << (dim - 1).bit_length())


def tiles_for(q: torch.Tensor, v: torch.Tensor) -> Tiles:
    """Return the tile sizes for queries and values of these shapes and dtypes."""
    size = max(64, padded(q.shape[-1]), padded(v.shape[-1]))
    return (_FULL if q.dtype == torch.float32 else _HALF)[size]


@triton.jit
@no_type_check
def load_rows(x_ptr, stride_row, rows, n_rows, n_dim, BLOCK_D: tl.constexpr):
    """Load rows of a matrix whose last stride is 1; what lies outside is 0."""
    dims = tl.arange(0, BLOCK_D)
    inside = (rows[:, None] < n_rows) & (dims[None, :] < n_dim)
    offsets = rows[:, None].to(tl.int64) * stride_row + dims[None, :]
    return tl.load(x_ptr + offsets, mask=inside, other=0.0)  # [BLOCK_ROWS, BLOCK_D]


@triton.jit
@no_type_check
def store_rows(x_ptr, x, stride_row, rows, n_rows, n_dim, BLOCK_D: tl.constexpr):
    """Store rows of a matrix whose last stride is 1."""
    dims = tl.arange(0, BLOCK_D)
    inside = (rows[:, None] < n_rows) & (dims[None, :] < n_dim)
    offsets = rows[:, None].to(tl.int64) * stride_row + dims[None, :]
    tl.store(x_ptr + offsets, x.to(x_ptr.dtype.element_ty), mask=inside)


@triton.jit
@no_type_check
def half_scores(
    q, k, half_scale, rows, keys, seq_q, seq_k, mask_ptr,
    IS_CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr,
):  # fmt: skip
    """Return `z` of one tile, -inf where the key is hidden, or row or key lies outside."""
    z = tl.dot(q, tl.trans(k), input_precision="ieee") * half_scale  # [BLOCK_M, BLOCK_N]
    visible = (keys < seq_k)[None, :] & (rows < seq_q)[:, None]
    if IS_CAUSAL:
        visible = visible & (keys[None, :] <= rows[:, None] + (seq_k - seq_q))
    if HAS_MASK:
        kept = tl.load(mask_ptr + keys, mask=keys < seq_k, other=0)
        visible = visible & (kept != 0)[None, :]
    return tl.where(visible, z, float("-inf"))
