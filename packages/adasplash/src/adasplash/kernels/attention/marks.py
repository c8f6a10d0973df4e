"""Which blocks hold weight, a bit each: what the backward keeps of them.

The kernels mark and ask blocks by a byte each, `[batch, heads, tiles, blocks]`. Kept is

    bits[..., b] = sum_i 2 ** i  marks[..., 8 b + i]

which is N ** 2 / 32768 bytes for a head of N rows and keys in blocks of 64.
"""

from __future__ import annotations

from typing import Any, no_type_check

import torch
import triton
import triton.language as tl

from ..launch import launch

_AT_ONCE = 1024
_SIZES = ["total", "n_blocks", "width"]


@triton.jit(do_not_specialize=_SIZES)
@no_type_check
def _pack_kernel(marks_ptr, bits_ptr, total, n_blocks, width, SIZE: tl.constexpr):
    """Write bytes of bits, of which a line of blocks takes `width`."""
    place = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    line, byte = place // width, place % width
    found = tl.zeros([SIZE], tl.int32)
    for bit in tl.static_range(8):
        block = 8 * byte + bit
        mark = tl.load(
            marks_ptr + line * n_blocks + block, mask=(place < total) & (block < n_blocks), other=0
        )
        found |= (mark != 0).to(tl.int32) << bit
    tl.store(bits_ptr + place, found.to(tl.uint8), mask=place < total)


@triton.jit(do_not_specialize=_SIZES)
@no_type_check
def _unpack_kernel(bits_ptr, marks_ptr, total, n_blocks, width, SIZE: tl.constexpr):
    """Write marks, of which a line has `n_blocks`."""
    place = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    line, block = place // n_blocks, place % n_blocks
    byte = tl.load(bits_ptr + line * width + block // 8, mask=place < total, other=0)
    mark = (byte.to(tl.int32) >> (block % 8).to(tl.int32)) & 1
    tl.store(marks_ptr + place, mark.to(tl.int8), mask=place < total)


def width_of(n_blocks: int) -> int:
    """Return how many bytes the bits of a line of blocks take."""
    return -(-n_blocks // 8)


def packed(marks: torch.Tensor) -> torch.Tensor:
    """Return the bits of marks, uint8 `[batch, heads, tiles, width_of(blocks)]`.

    Args:
        marks: int8 `[batch, heads, tiles, blocks]`, contiguous; 0 for blocks without weight.
    """
    n_blocks = marks.shape[-1]
    width = width_of(n_blocks)
    bits = torch.empty((*marks.shape[:-1], width), dtype=torch.uint8, device=marks.device)
    _launch(_pack_kernel, marks, bits, n_blocks, width)
    return bits


def unpacked(bits: torch.Tensor, n_blocks: int) -> torch.Tensor:
    """Return the marks that `packed` was given.

    Args:
        bits: What it returned.
        n_blocks: Blocks of a line.
    """
    marks = torch.empty((*bits.shape[:-1], n_blocks), dtype=torch.int8, device=bits.device)
    _launch(_unpack_kernel, bits.contiguous(), marks, n_blocks, bits.shape[-1])
    return marks


def _launch(
    kernel: Any, given: torch.Tensor, made: torch.Tensor, n_blocks: int, width: int
) -> None:
    total = made.numel()
    if total:
        # Their addresses and the size of a pointer's numbers are all that variants depend on.
        kind = given.device.index, given.data_ptr() % 16, made.data_ptr() % 16, total >= 2**31
        launch(kernel, -(-total // _AT_ONCE), kind, given, made, total, n_blocks, width,
               SIZE=_AT_ONCE, num_warps=4)  # fmt: skip
