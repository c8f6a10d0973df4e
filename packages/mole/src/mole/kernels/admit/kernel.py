"""Triton kernels of the admit and hold operations.

    out[t, first:last] = landing[landed[t], first:last]   where landed[t] >= 0
                         table[slots[t], first:last]      elsewhere
    table[slots[t], first:last] = out[t, first:last]      where landed[t] >= 0 and slots[t] >= 0

Layout: rows of 64-bit words with unit stride; `first` and `last` count words. `landing` lies in
pinned host memory, which the device reads over its bus; all else is on the device. A token that is
there twice writes the same bytes to its slot twice.

`hold` waits until a counter in pinned host memory is past the device's own, counts that up, and
copies what the host tells: a graph can be launched before the host knows what its rows are. The
host writes rows and places first and the counter last. Source: own.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl

_BLOCK = 512  # words, 4 KiB: 16 bytes for every thread of 8 warps
_PROGRAMS = 64  # enough requests in flight for 50 GB/s at 2 us of latency, with room to spare


@triton.jit
@no_type_check  # a runtime type checker would hide the helpers from the interpreter
def _admit_kernel(
    table_ptr,
    slots_ptr,
    landing_ptr,
    landed_ptr,
    out_ptr,
    stride_table,
    stride_landing,
    stride_out,
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
        inside = words < last
        slot = tl.load(slots_ptr + token)
        place = tl.load(landed_ptr + token)
        kept = tl.load(table_ptr + slot * stride_table + words, mask=inside & (place < 0), other=0)
        fresh = tl.load(
            landing_ptr + place * stride_landing + words, mask=inside & (place >= 0), other=0
        )
        values = tl.where(place < 0, kept, fresh)
        tl.store(out_ptr + token.to(tl.int64) * stride_out + words, values, mask=inside)
        new = inside & (place >= 0) & (slot >= 0)
        tl.store(table_ptr + slot * stride_table + words, values, mask=new)


@triton.jit
@no_type_check  # a runtime type checker would hide the helpers from the interpreter
def _hold_kernel(ready_ptr, turn_ptr, told_ptr, known_ptr, count, BLOCK: tl.constexpr):
    """One program asks over the bus until the host has answered."""
    turn = tl.load(turn_ptr) + 1
    answered = tl.load(ready_ptr, volatile=True)
    while answered < turn:
        answered = tl.load(ready_ptr, volatile=True)
    tl.store(turn_ptr, turn)
    n = tl.arange(0, BLOCK)  # [BLOCK]
    told = tl.load(told_ptr + n, mask=n < count, other=0, volatile=True)
    tl.store(known_ptr + n, told, mask=n < count)


def _launch_hold(
    ready: torch.Tensor, turn: torch.Tensor, told: torch.Tensor, known: torch.Tensor
) -> None:
    """Wait and copy; shapes were checked by the caller."""
    count = told.numel()
    _hold_kernel[(1,)](
        ready, turn, told, known, count, BLOCK=triton.next_power_of_2(count), num_warps=1
    )


def _launch(
    table: torch.Tensor,
    slots: torch.Tensor,
    landing: torch.Tensor,
    landed: torch.Tensor,
    out: torch.Tensor,
    first: int,
    last: int,
) -> None:
    """Copy; shapes were checked by the caller, byte offsets are multiples of 8."""
    blocks = triton.cdiv((last - first) // 8, _BLOCK)
    tiles = len(slots) * blocks
    if tiles == 0:
        return
    rows, sources, target = (t.view(torch.int64) for t in (table, landing, out))
    _admit_kernel[(min(tiles, _PROGRAMS),)](
        rows,
        slots,
        sources,
        landed,
        target,
        rows.stride(0),
        sources.stride(0),
        target.stride(0),
        first // 8,
        last // 8,
        blocks,
        tiles,
        BLOCK=_BLOCK,
        num_warps=8,
    )
