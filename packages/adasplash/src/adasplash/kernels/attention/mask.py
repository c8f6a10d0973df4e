"""A key padding mask as the kernels read it: which blocks of keys it hides, and which it does not.

A block of keys that are all visible needs no question for any of them, and one that is hidden as a
whole is never listed: what a mask costs are the blocks where some keys are hidden. One program for
each sequence of the batch goes through its mask once, and writes int32 numbers, `n` blocks of keys
to the block:

    the mask itself, up to the end of the last block    n * block numbers, 0 for hidden keys
    of every block: 0 nothing is visible, 1 some is, 2 all of it is    n numbers
    the first visible key, and the one behind the last                 2 numbers

Keys behind the last one of the sequence count as visible: the kernels ask for these anyway.
"""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl

from ..launch import launch

_ONCE = 4096  # keys


@triton.jit(
    do_not_specialize=["stride", "seq_k", "n_blocks", "pitch"],
    do_not_specialize_on_alignment=["mask_ptr"],
)
@no_type_check
def _mask_kernel(
    mask_ptr, found_ptr, stride, seq_k, n_blocks, pitch,
    BLOCK_N: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Write what is to be known of one mask."""
    batch = tl.program_id(0).to(tl.int64)
    mask_ptr += batch * stride
    found_ptr += batch * pitch
    states = found_ptr + n_blocks * BLOCK_N
    begin, end = seq_k, seq_k * 0
    for chunk in range(0, n_blocks, CHUNK):
        blocks = chunk + tl.arange(0, CHUNK)
        keys = blocks[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        inside = keys < seq_k
        seen = (tl.load(mask_ptr + keys, mask=inside, other=0) != 0).to(tl.int32)
        tl.store(found_ptr + keys, seen, mask=keys < n_blocks * BLOCK_N)
        state = tl.max(seen, 1) + tl.min(tl.where(inside, seen, 1), 1)
        tl.store(states + blocks, state, mask=blocks < n_blocks)
        begin = tl.minimum(begin, tl.min(tl.min(tl.where(seen > 0, keys, seq_k), 1), 0))
        end = tl.maximum(end, tl.max(tl.max(tl.where(seen > 0, keys + 1, 0), 1), 0))
    tl.store(states + n_blocks, begin)
    tl.store(states + n_blocks + 1, end)


def summarize(key_mask: torch.Tensor, block: int) -> torch.Tensor:
    """Return what the kernels are to know of a mask, int32 `[batch, n (block + 1) + 2]`.

    Args:
        key_mask: True for visible keys, `[batch, seq_k]`, last stride 1.
        block: Keys of a block.
    """
    batch, seq_k = key_mask.shape
    n_blocks = -(-seq_k // block)
    found = torch.empty(
        (batch, n_blocks * (block + 1) + 2), dtype=torch.int32, device=key_mask.device
    )
    launch(
        _mask_kernel, batch, (key_mask.device.index,),
        key_mask.view(torch.uint8), found, key_mask.stride(0), seq_k, n_blocks, found.shape[1],
        BLOCK_N=block, CHUNK=max(1, _ONCE // block), num_warps=8,
    )  # fmt: skip
    return found


@triton.jit
@no_type_check
def visible_range(mask_ptr, seq_k, BLOCK_N: tl.constexpr):
    """Return the first visible key of a sequence, and the one behind the last."""
    place = mask_ptr + tl.cdiv(seq_k, BLOCK_N) * (BLOCK_N + 1)
    return tl.load(place), tl.load(place + 1)


@triton.jit
@no_type_check
def some_hidden(mask_ptr, start, seq_k, BLOCK_N: tl.constexpr, TILE_N: tl.constexpr):
    """Return whether any of TILE_N keys from `start` on is hidden; `start` begins a block."""
    n_blocks = tl.cdiv(seq_k, BLOCK_N)
    states = mask_ptr + n_blocks * BLOCK_N + start // BLOCK_N
    least = tl.load(states)
    for part in tl.static_range(1, TILE_N // BLOCK_N):
        there = start + part * BLOCK_N < seq_k
        least = tl.minimum(least, tl.load(states + part, mask=there, other=2))
    return least < 2
