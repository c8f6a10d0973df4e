"""Which tokens top-k, top-p and min-p leave, by a search for the cut: no line is sorted.

A number's bits order it. The cut is the highest v such that what is at v and above reaches a
bound: k tokens (top-k), or p of the mass that top-k has left (top-p). It is found four bits at a
time, from above:

    narrow   of each slice: tokens and mass in each of 16 parts of what the last stage has left over
    cut      the cut, and of the tokens that equal it the first that stays

A line is divided among a few programs, whose parts the next stage joins, each time in the same
order. All bits of a bfloat16 need four stages, those of float32 eight. Where 16 bits will do and a
line is short, as a drafter's are, one program holds it and finds bit after bit, in one launch:

    short    the cut, by the tokens or the mass at each trial value and above

Source: own, a radix select.
"""

from __future__ import annotations

import math
from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from .kernel import _ALONE, BLOCK, _combined, slices_of
from .reference import Cut, Warp

_PART = 256  # Numbers of a line at a time, each beside 16 parts.
_STAGES = {torch.bfloat16: 4, torch.float16: 5}  # For all bits; of other types, 8.
_ROUGH = 4  # Stages where the lower bits do not matter.


@triton.jit
@no_type_check
def _ordered(z):
    """Return bits, without a sign, that are ordered as the numbers are."""
    bits = tl.where(z == 0, 0.0, z).to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) | -2147483648)).to(tl.uint32, bitcast=True)


@triton.jit
@no_type_check
def _number(ordered):
    """Return the number of ordered bits; minus infinity where they are no number's."""
    bits = ordered.to(tl.int32, bitcast=True)
    z = (bits ^ ((~bits >> 31) | -2147483648)).to(tl.float32, bitcast=True)
    return tl.where(z == z, z, float("-inf"))


@triton.jit
@no_type_check
def _joined(
    part_ptr,
    peaks_ptr,
    found_ptr,
    above_ptr,
    line,
    lines,
    temperature,
    bound,
    STAGE: tl.constexpr,
    COUNTED: tl.constexpr,
    STAGES: tl.constexpr,
    SLICES: tl.constexpr,
):
    """Return what a stage has found: the cut's first bits, what lies above them, the bound, peak.

    Of `COUNTED` stages tokens are counted, of those after them the masses are.
    """
    piece, place = tl.arange(0, SLICES), tl.arange(0, 16)
    peaks = tl.load(peaks_ptr + line * SLICES + piece)
    peak = tl.max(peaks, axis=0)
    part = ((STAGE * lines + line) * SLICES + piece) * 32
    if STAGE < COUNTED:
        parts = tl.load(part_ptr + part[:, None] + place[None, :])
    else:
        parts = tl.load(part_ptr + part[:, None] + place[None, :] + 16)
        if STAGE == 0:  # Each slice knew no peak but its own.
            parts *= tl.where(peaks > float("-inf"), tl.exp((peaks - peak) / temperature), 0.0)[
                :, None
            ]
    sizes = tl.sum(parts, axis=0)
    found = tl.full([], 0, tl.uint32)
    above = tl.full([], 0.0, tl.float32)
    if STAGE % STAGES > 0:
        before = (STAGE - 1) * lines + line
        found = tl.load(found_ptr + before).to(tl.uint32, bitcast=True)
        above = tl.load(above_ptr + before * 2)
        bound = tl.load(above_ptr + before * 2 + 1)
    elif STAGE >= COUNTED:
        bound = bound * tl.sum(sizes, axis=0)
    # The highest part with which the bound is reached. By rounding there may be none: the lowest.
    upto = tl.sum(tl.where(place[:, None] <= place[None, :], sizes[None, :], 0.0), axis=1)
    chosen = tl.max(tl.where(above + upto >= bound, place, 0), axis=0)
    above += tl.sum(tl.where(place > chosen, sizes, 0.0), axis=0)
    found = found | (chosen.to(tl.uint32) << (28 - 4 * (STAGE % STAGES)))
    return found, above, bound, peak


@triton.jit
@no_type_check
def _narrow_kernel(
    logits_ptr,
    among_ptr,
    part_ptr,
    peaks_ptr,
    found_ptr,
    above_ptr,
    stride,
    size,
    lines,
    temperature,
    bound,
    MULTIPLE: tl.constexpr,
    STAGE: tl.constexpr,
    COUNTED: tl.constexpr,
    STAGES: tl.constexpr,
    SLICES: tl.constexpr,
    BLOCK: tl.constexpr,
    PART: tl.constexpr,
):
    """Sum up one slice of one line; `bound` is that of the stage before."""
    line, piece = tl.program_id(0), tl.program_id(1)
    lane, place = tl.arange(0, PART), tl.arange(0, 16)
    length = tl.cdiv(tl.cdiv(size, SLICES), BLOCK) * BLOCK
    start, stop = piece * length, tl.minimum(piece * length + length, size)
    row_ptr = logits_ptr + line.to(tl.int64) * stride
    found = tl.full([], 0, tl.uint32)
    floor = found
    if STAGE == 0:
        best = tl.full([PART], float("-inf"), tl.float32)
        for at in range(start, stop, PART):
            z = _combined(row_ptr, among_ptr, at + lane, at + lane < stop, MULTIPLE)
            best = tl.maximum(best, z)
        peak = tl.max(best, axis=0)
        tl.store(peaks_ptr + line * SLICES + piece, peak)
    else:
        found, above, bound, peak = _joined(
            part_ptr,
            peaks_ptr,
            found_ptr,
            above_ptr,
            line,
            lines,
            temperature,
            bound,
            STAGE - 1,
            COUNTED,
            STAGES,
            SLICES,
        )
        if piece == 0:
            here = (STAGE - 1) * lines + line
            tl.store(found_ptr + here, found.to(tl.int32, bitcast=True))
            tl.store(above_ptr + here * 2, above)
            tl.store(above_ptr + here * 2 + 1, bound)
        if (COUNTED > 0) & (STAGE >= COUNTED):  # What top-k has left.
            floor = found
            if STAGE > COUNTED:
                floor = tl.load(found_ptr + (COUNTED - 1) * lines + line)
                floor = floor.to(tl.uint32, bitcast=True)
    peak = tl.where(peak == float("-inf"), 0.0, peak)
    tokens = tl.zeros([PART, 16], tl.float32)
    masses = tl.zeros([PART, 16], tl.float32)
    shift = 28 - 4 * (STAGE % STAGES)
    for at in range(start, stop, PART):
        z = _combined(row_ptr, among_ptr, at + lane, at + lane < stop, MULTIPLE)
        bits = _ordered(z)
        here = (at + lane < stop) & (bits >= floor)
        if STAGE % STAGES > 0:
            here = here & ((bits >> (shift + 4)) == (found >> (shift + 4)))
        digit = ((bits >> shift) & 15).to(tl.int32)
        mine = here[:, None] & (digit[:, None] == place[None, :])
        tokens += tl.where(mine, 1.0, 0.0)
        if STAGE >= COUNTED:
            masses += tl.where(mine, tl.exp((z - peak) / temperature)[:, None], 0.0)
    part = ((STAGE * lines + line) * SLICES + piece) * 32 + place
    tl.store(part_ptr + part, tl.sum(tokens, axis=0))
    if STAGE >= COUNTED:
        tl.store(part_ptr + part + 16, tl.sum(masses, axis=0))


@triton.jit
@no_type_check
def _cut_kernel(
    logits_ptr,
    among_ptr,
    part_ptr,
    peaks_ptr,
    found_ptr,
    above_ptr,
    value_ptr,
    first_ptr,
    stride,
    size,
    lines,
    temperature,
    bound,
    margin,
    MULTIPLE: tl.constexpr,
    STAGE: tl.constexpr,
    COUNTED: tl.constexpr,
    STAGES: tl.constexpr,
    EXACT: tl.constexpr,
    SLICES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write one line's cut; `STAGE` is the last one, −1 where min-p alone is asked for."""
    line = tl.program_id(0)
    value = tl.full([], float("-inf"), tl.float32)
    first = tl.full([], 0, tl.int32)
    piece, lane = tl.arange(0, SLICES), tl.arange(0, BLOCK)
    peak = tl.max(tl.load(peaks_ptr + line * SLICES + piece), axis=0)
    if STAGE >= 0:
        found, above, bound, peak = _joined(
            part_ptr,
            peaks_ptr,
            found_ptr,
            above_ptr,
            line,
            lines,
            temperature,
            bound,
            STAGE,
            COUNTED,
            STAGES,
            SLICES,
        )
        if EXACT:  # What lies below the last stage is zero; of negative numbers, ordered bits are
            below = (1 << (28 - 4 * (STAGE % STAGES))) - 1  # the complement.
            found = found | tl.where(found >> 31 == 0, below, 0).to(tl.uint32)
        value = _number(found)
        if EXACT & (STAGE >= COUNTED):
            # Of equal tokens top-p leaves the last ones, as many as reach the bound.
            digit = ((found >> (28 - 4 * (STAGE % STAGES))) & 15).to(tl.int32)
            part = ((STAGE * lines + line) * SLICES + piece) * 32 + digit
            equal = tl.load(part_ptr + part)
            count = tl.sum(equal, axis=0)
            mass = tl.exp((value - peak) / temperature)
            stay = tl.ceil((bound - above) / mass)
            leave = count - tl.maximum(tl.minimum(stay, count), 1.0)
            if leave > 0:
                upto = tl.cumsum(equal, axis=0)
                slice = tl.min(tl.where(upto > leave, piece, SLICES), axis=0)
                left = leave - tl.sum(tl.where(piece < slice, equal, 0.0), axis=0)
                length = tl.cdiv(tl.cdiv(size, SLICES), BLOCK) * BLOCK
                start = slice * length
                seen = tl.full([], 0, tl.int32)
                best = tl.full([], 2147483647, tl.int32)
                row_ptr = logits_ptr + line.to(tl.int64) * stride
                for at in range(start, tl.minimum(start + length, size), BLOCK):
                    inside = at + lane < size
                    z = _combined(row_ptr, among_ptr, at + lane, inside, MULTIPLE)
                    same = (inside & (_ordered(z) == found)).to(tl.int32)
                    order = tl.cumsum(same, axis=0) + seen
                    here = (same > 0) & (order == left.to(tl.int32) + 1)
                    best = tl.minimum(best, tl.min(tl.where(here, at + lane, best), axis=0))
                    seen += tl.sum(same, axis=0)
                first = best
        if (COUNTED > 0) & (STAGE >= COUNTED):
            floor = tl.load(found_ptr + (COUNTED - 1) * lines + line).to(tl.uint32, bitcast=True)
            if EXACT:
                floor = floor | tl.where(floor >> 31 == 0, below, 0).to(tl.uint32)
            if found < floor:  # By rounding.
                value = _number(floor)
                first = first * 0
    least = peak + margin
    if least > value:
        value = least
        first = first * 0
    tl.store(value_ptr + line, value)
    tl.store(first_ptr + line, first)


@triton.jit
@no_type_check
def _short_kernel(
    logits_ptr,
    among_ptr,
    value_ptr,
    first_ptr,
    stride,
    size,
    temperature,
    top_k,
    top_p,
    margin,
    MULTIPLE: tl.constexpr,
    COUNTED: tl.constexpr,
    SUMMED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the cut of one line that a program holds, by the first 16 bits of its numbers."""
    line, lane = tl.program_id(0), tl.arange(0, BLOCK)
    inside = lane < size
    row_ptr = logits_ptr + line.to(tl.int64) * stride
    z = _combined(row_ptr, among_ptr, lane, inside, MULTIPLE)
    bits = _ordered(z)
    peak = tl.max(z, axis=0)
    one = tl.full([], 1, tl.uint32)
    found = tl.full([], 0, tl.uint32)
    if COUNTED:
        for bit in tl.static_range(16):
            trial = found | (one << (31 - bit))
            count = tl.sum((inside & (bits >= trial)).to(tl.int32), axis=0)
            found = tl.where(count >= top_k, trial, found)
    if SUMMED:
        floor = found
        known = tl.where(peak == float("-inf"), 0.0, peak)
        mass = tl.where(inside & (bits >= floor), tl.exp((z - known) / temperature), 0.0)
        bound = top_p * tl.sum(mass, axis=0)
        found = tl.full([], 0, tl.uint32)
        for bit in tl.static_range(16):
            trial = found | (one << (31 - bit))
            upto = tl.sum(tl.where(bits >= trial, mass, 0.0), axis=0)
            found = tl.where(upto >= bound, trial, found)
        found = tl.where(found < floor, floor, found)
    value = _number(found)
    tl.store(value_ptr + line, tl.maximum(value, peak + margin))
    tl.store(first_ptr + line, 0)


def launch_cut(
    logits: Tensor, among: Tensor | None, size: int, warp: Warp, exact: bool = True
) -> Cut:
    """See `reference.cut`; unless `exact`, of numbers that agree in 16 bits all stay."""
    lines, slices = len(logits), slices_of(size)
    multiple = 0 if among is None else among.shape[1]
    margin = warp.temperature * math.log(warp.min_p) if warp.min_p > 0 else -math.inf
    if not exact and size <= _ALONE:
        value = torch.empty(lines, dtype=torch.float32, device=logits.device)
        first = torch.empty(lines, dtype=torch.int32, device=logits.device)
        _short_kernel[(lines,)](
            logits,
            first if among is None else among,
            value,
            first,
            logits.stride(0),
            size,
            float(warp.temperature),
            min(warp.top_k, size),
            float(max(warp.top_p, 1e-30)),
            margin,
            MULTIPLE=multiple,
            COUNTED=warp.top_k > 0,
            SUMMED=warp.top_p < 1,
            BLOCK=max(triton.next_power_of_2(size), 128),
            num_warps=8,
        )
        return Cut(value, first)
    stages = _STAGES.get(logits.dtype, 8) if multiple < 2 else 8
    exact = exact or stages <= _ROUGH
    stages = stages if exact else _ROUGH
    counted = stages if warp.top_k > 0 else 0
    total = counted + (stages if warp.top_p < 1 else 0)

    def number(*shape: int, kind: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=kind, device=logits.device)

    whole = torch.int32
    peaks, found = number(lines, slices), number(max(total, 1), lines, kind=whole)
    part, above = number(max(total, 1), lines, slices, 32), number(max(total, 1), lines, 2)
    value, first = number(lines), number(lines, kind=whole)
    given = logits, found if among is None else among, part, peaks, found, above

    def bound(stage: int) -> float:
        return float(min(warp.top_k, size) if stage < counted else max(warp.top_p, 1e-30))

    sizes = logits.stride(0), size, lines, float(warp.temperature)
    for stage in range(max(total, 1)):
        _narrow_kernel[(lines, slices)](
            *given,
            *sizes,
            bound(stage - 1),
            MULTIPLE=multiple,
            STAGE=stage,
            COUNTED=counted,
            STAGES=stages,
            SLICES=slices,
            BLOCK=BLOCK,
            PART=_PART,
            num_warps=4,
        )
    _cut_kernel[(lines,)](
        *given,
        value,
        first,
        *sizes,
        bound(total - 1),
        margin,
        MULTIPLE=multiple,
        STAGE=total - 1,
        COUNTED=counted,
        STAGES=stages,
        EXACT=exact,
        SLICES=slices,
        BLOCK=BLOCK,
        num_warps=4,
    )
    return Cut(value, first)
