"""Triton kernel of the gather operation.

    out[t, first:last] = table[ids[t], first:last]

Layout: rows of 64-bit words with unit stride; `first` and `last` count words. The table may lie in
pinned host memory, which the device reads over its bus at unified virtual addresses. A fixed, small
number of programs walks over all blocks: it keeps the bus busy and leaves the other multiprocessors
to the layers that run beside it. Ids that are not in the table give zeros and set the flag.
Source: own.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl

_BLOCK = 512  # words, 4 KiB: 16 bytes for every thread of 8 warps


@triton.jit
@no_type_check  # a runtime type checker would hide the helpers from the interpreter
def _gather_kernel(
    table_ptr,
    ids_ptr,
    out_ptr,
    flag_ptr,
    stride_table,
    stride_out,
    vocab,
    first,
    last,
    blocks,
    tiles,
    BLOCK: tl.constexpr,
):
    """Every program copies each so-many-th block of words of all rows."""
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        token = tile // blocks
        words = first + (tile % blocks) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
        row = tl.load(ids_ptr + token).to(tl.int64)
        known = (row >= 0) & (row < vocab)
        values = tl.load(
            table_ptr + row * stride_table + words, mask=known & (words < last), other=0
        )
        tl.store(out_ptr + token.to(tl.int64) * stride_out + words, values, mask=words < last)
        tl.store(flag_ptr, 1, mask=~known)


def _launch(
    table: torch.Tensor,
    ids: torch.Tensor,
    out: torch.Tensor,
    flag: torch.Tensor,
    first: int,
    last: int,
    programs: int,
) -> None:
    """Copy; shapes were checked by the caller, byte offsets are multiples of 8."""
    blocks = triton.cdiv((last - first) // 8, _BLOCK)
    tiles = len(ids) * blocks
    if tiles == 0:
        return
    words, target = table.view(torch.int64), out.view(torch.int64)
    _gather_kernel[(min(tiles, programs),)](
        words,
        ids,
        target,
        flag,
        words.stride(0),
        target.stride(0),
        words.shape[0],
        first // 8,
        last // 8,
        blocks,
        tiles,
        BLOCK=_BLOCK,
        num_warps=8,
    )
