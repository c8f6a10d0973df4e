"""Drawing and judging on the device, in a few launches for all rows, with noise from a counter.

    pick     c = argmax (z / T + gumbel) over columns of the drafter's logits, z combined where
             several of its ids are one column; scores z / T are kept as the law q of the draw
    pack     target tokens of the columns picked, run after run
    spread   law of each token of a run: mass of all columns whose runs go on with it

Judging is in `verdict`. A line of logits is divided among a few programs, whose parts the next
kernel joins: no atomic sum but in `spread`, so that like input gives like bits. Logits of any type,
sums in float32. With e = -log(1 - u), argmax p / e has the law p. Source: own.
"""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from .noise import DRAFT
from .reference import Cut

BLOCK = 1024  # Numbers of a line at a time.
_ALONE = 8192  # Columns that one program picks among.


def slices_of(size: int) -> int:
    """Return how many programs share a line: a power of two up to 32."""
    return min(32, int(triton.next_power_of_2(triton.cdiv(size, BLOCK))))


@triton.jit
@no_type_check
def _uniform(state_ptr, index, stream, row):
    """Return numbers uniform on (0, 1); see `noise`."""
    none = index * 0
    turn = (tl.load(state_ptr + 1) & 0xFFFFFFFF).to(tl.uint32).to(tl.int32, bitcast=True)
    bits, _, _, _ = tl.philox(tl.load(state_ptr), index, none + turn, none + stream, none + row)
    u = (bits.to(tl.uint32, bitcast=True).to(tl.float32) + 0.5) * 2.3283064365386963e-10
    return tl.minimum(u, 0.9999999403953552)


@triton.jit
@no_type_check
def _log_exponential(state_ptr, index, stream, row):
    """Return the logarithm of exponentially distributed numbers, exact for small ones too."""
    u = _uniform(state_ptr, index, stream, row)
    series = u * (1 + u * (0.5 + u * (1 / 3 + u * (0.25 + u * (0.2 + u / 6)))))
    return tl.log(tl.where(u < 0.1, series, -tl.log(1.0 - u)))


@triton.jit
@no_type_check
def _combined(logits_ptr, among_ptr, column, inside, MULTIPLE: tl.constexpr):
    """Return logits of columns: of their one id, or of the sum of their ids' probabilities."""
    if MULTIPLE == 0:
        z = tl.load(logits_ptr + column, mask=inside, other=float("-inf")).to(tl.float32)
    else:
        first = tl.load(among_ptr + column * MULTIPLE, mask=inside, other=0)
        z = tl.load(logits_ptr + first, mask=inside, other=float("-inf")).to(tl.float32)
        for place in tl.static_range(1, MULTIPLE):
            other = tl.load(among_ptr + column * MULTIPLE + place, mask=inside, other=-1)
            y = tl.load(logits_ptr + other, mask=inside & (other >= 0), other=float("-inf"))
            y = y.to(tl.float32)
            top = tl.maximum(z, y)
            top = tl.where(top == float("-inf"), 0.0, top)
            z = tl.where(y == float("-inf"), z, top + tl.log(tl.exp(z - top) + tl.exp(y - top)))
    return z


@triton.jit
@no_type_check
def _left(z, token, value_ptr, first_ptr, line, CUT: tl.constexpr):
    """Return logits with minus infinity for what a line's cut leaves out."""
    if CUT:
        value = tl.load(value_ptr + line)
        stays = (z > value) | ((z == value) & (token >= tl.load(first_ptr + line)))
        z = tl.where(stays, z, float("-inf"))
    return z


@triton.jit
@no_type_check
def _better(value, place, best, where):
    """Return the better of two values in each lane, and its place."""
    wins = value > best
    return tl.where(wins, value, best), tl.where(wins, place, where)


@triton.jit
@no_type_check
def _first_of(best, where):
    """Return the place of the best value; of like ones the first."""
    peak = tl.max(best, axis=0)
    return tl.min(tl.where(best == peak, where, 2147483647), axis=0)


@triton.jit
@no_type_check
def _pick_kernel(
    logits_ptr,
    among_ptr,
    state_ptr,
    scores_ptr,
    part_ptr,
    place_ptr,
    value_ptr,
    first_ptr,
    forth_ptr,
    columns_ptr,
    norms_ptr,
    next_ptr,
    stride,
    scores_stride,
    columns_stride,
    norms_stride,
    columns,
    temperature,
    stream,
    MULTIPLE: tl.constexpr,
    DRAWS: tl.constexpr,
    CUT: tl.constexpr,
    SLICES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Find the best column of one slice, and its sum of exponentials; of few columns, all."""
    row, piece = tl.program_id(0), tl.program_id(1)
    length = tl.cdiv(tl.cdiv(columns, SLICES), BLOCK) * BLOCK
    lane = tl.arange(0, BLOCK)
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    where = lane * 0
    peak = tl.full([BLOCK], float("-inf"), tl.float32)
    mass = tl.zeros([BLOCK], tl.float32)
    for at in range(piece * length, tl.minimum(piece * length + length, columns), BLOCK):
        column = at + lane
        inside = column < columns
        z = _combined(logits_ptr + row.to(tl.int64) * stride, among_ptr, column, inside, MULTIPLE)
        z = _left(z, column, value_ptr, first_ptr, row, CUT)
        if DRAWS:
            z = z / temperature
            tl.store(scores_ptr + row.to(tl.int64) * scores_stride + column, z, mask=inside)
            higher = tl.maximum(peak, z)
            known = tl.where(higher == float("-inf"), 0.0, higher)
            mass = mass * tl.exp(peak - known) + tl.exp(z - known)
            peak = higher
            z = z - _log_exponential(state_ptr, column, stream, row)
        best, where = _better(z, column, best, where)
    column = _first_of(best, where)
    top = tl.max(peak, axis=0)
    known = tl.where(top == float("-inf"), 0.0, top)
    total = tl.sum(mass * tl.exp(peak - known), axis=0)
    if SLICES == 1:
        tl.store(columns_ptr + row * columns_stride, column.to(tl.int64))
        tl.store(next_ptr + row, tl.load(forth_ptr + column))
        if DRAWS:
            tl.store(norms_ptr + row * norms_stride, top + tl.log(total))
    else:
        part = part_ptr + (row * SLICES + piece) * 3
        tl.store(part, tl.max(best, axis=0))
        tl.store(place_ptr + row * SLICES + piece, column)
        if DRAWS:
            tl.store(part + 1, top)
            tl.store(part + 2, total)


@triton.jit
@no_type_check
def _picked_kernel(
    part_ptr,
    place_ptr,
    forth_ptr,
    columns_ptr,
    norms_ptr,
    next_ptr,
    columns_stride,
    norms_stride,
    DRAWS: tl.constexpr,
    SLICES: tl.constexpr,
):
    """Join one row's slices: the column, the drafter's id for it, the logarithm of the sum."""
    row = tl.program_id(0)
    piece = tl.arange(0, SLICES)
    part = part_ptr + (row * SLICES + piece) * 3
    column = _first_of(tl.load(part), tl.load(place_ptr + row * SLICES + piece))
    tl.store(columns_ptr + row * columns_stride, column.to(tl.int64))
    tl.store(next_ptr + row, tl.load(forth_ptr + column))
    if DRAWS:
        peak = tl.load(part + 1)
        top = tl.max(peak, axis=0)
        mass = tl.sum(tl.load(part + 2) * tl.exp(peak - top), axis=0)
        tl.store(norms_ptr + row * norms_stride, top + tl.log(mass))


def launch_pick(
    logits: Tensor,
    among: Tensor | None,
    forth: Tensor,
    columns: Tensor,
    following: Tensor,
    draws: tuple[Tensor, Tensor, Tensor, float, int] | None = None,
    left: Cut | None = None,
) -> None:
    """See `reference.pick`."""
    rows, size = len(logits), len(forth)
    slices = 1 if size <= _ALONE else slices_of(size)
    part = torch.empty(rows, slices, 3, dtype=torch.float32, device=logits.device)
    place = torch.empty(rows, slices, dtype=torch.int32, device=logits.device)
    scores, norms, state, temperature, step = draws or (part, part, part, 1.0, 0)
    _pick_kernel[(rows, slices)](
        logits,
        forth if among is None else among,
        state,
        scores,
        part,
        place,
        *(left or (part, place)),
        forth,
        columns,
        norms,
        following,
        logits.stride(0),
        scores.stride(0),
        columns.stride(0),
        norms.stride(0),
        size,
        float(temperature),
        DRAFT + step,
        MULTIPLE=0 if among is None else among.shape[1],
        DRAWS=draws is not None,
        CUT=left is not None,
        SLICES=slices,
        BLOCK=BLOCK if slices > 1 else 2 * BLOCK,
        num_warps=4 if slices > 1 else 8,
    )
    if slices == 1:
        return
    _picked_kernel[(rows,)](
        part,
        place,
        forth,
        columns,
        norms,
        following,
        columns.stride(0),
        norms.stride(0),
        DRAWS=draws is not None,
        SLICES=slices,
        num_warps=1,
    )


@triton.jit
@no_type_check
def _pack_kernel(
    columns_ptr,
    runs_ptr,
    tokens_ptr,
    origin_ptr,
    total_ptr,
    limits_ptr,
    columns_stride,
    tokens_stride,
    origin_stride,
    total_stride,
    limits_stride,
    steps,
    room,
    LONGEST: tl.constexpr,
    STEPS: tl.constexpr,
    DEPTHS: tl.constexpr,
):
    """Lay the runs of one row's columns one after another."""
    row = tl.program_id(0)
    step, depth = tl.arange(0, STEPS), tl.arange(0, DEPTHS)
    real = step < steps
    column = tl.load(columns_ptr + row * columns_stride + step, mask=real, other=0)
    token = tl.load(
        runs_ptr + column[:, None] * LONGEST + depth[None, :],
        mask=real[:, None] & (depth < LONGEST)[None, :],
        other=-1,
    )
    length = tl.sum((token >= 0).to(tl.int32), axis=1)
    place = (tl.cumsum(length, axis=0) - length)[:, None] + depth[None, :]
    fits = (token >= 0) & (place < room)
    tl.store(tokens_ptr + row * tokens_stride + place, token, mask=fits)
    origin = step[:, None] * LONGEST + depth[None, :]
    tl.store(origin_ptr + row * origin_stride + place, origin.to(tl.int64), mask=fits)
    total = tl.minimum(tl.sum(length, axis=0), room).to(tl.int64)
    total = tl.minimum(total, tl.load(limits_ptr + row * limits_stride))
    tl.store(total_ptr + row * total_stride, total)


def launch_pack(
    columns: Tensor,
    runs: Tensor,
    tokens: Tensor,
    origin: Tensor,
    total: Tensor,
    limits: Tensor,
    steps: int,
) -> None:
    """See `reference.pack`."""
    longest = runs.shape[1]
    _pack_kernel[(len(columns),)](
        columns,
        runs,
        tokens,
        origin,
        total,
        limits,
        columns.stride(0),
        tokens.stride(0),
        origin.stride(0),
        total.stride(0),
        limits.stride(0),
        steps,
        tokens.shape[1],
        LONGEST=longest,
        STEPS=triton.next_power_of_2(max(steps, 2)),
        DEPTHS=triton.next_power_of_2(max(longest, 2)),
        num_warps=1,
    )


@triton.jit
@no_type_check
def _spread_kernel(
    scores_ptr,
    norms_ptr,
    columns_ptr,
    runs_ptr,
    origin_ptr,
    total_ptr,
    law_ptr,
    mass_ptr,
    scores_stride,
    norms_stride,
    columns_stride,
    origin_stride,
    total_stride,
    size,
    count,
    vocab,
    step_stride,
    LONGEST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add one block of columns to the law of one proposal."""
    row, place = tl.program_id(0) // count, tl.program_id(0) % count
    if place < tl.load(total_ptr + row * total_stride):
        origin = tl.load(origin_ptr + row * origin_stride + place)
        step, depth = origin // LONGEST, origin % LONGEST
        chosen = tl.load(columns_ptr + row * columns_stride + step)
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = column < size
        line = scores_ptr + row.to(tl.int64) * scores_stride + step * step_stride
        score = tl.load(line + column, mask=inside, other=float("-inf"))
        mass = tl.exp(score - tl.load(norms_ptr + row * norms_stride + step))
        for before in range(0, depth):
            mine = tl.load(runs_ptr + column * LONGEST + before, mask=inside, other=-1)
            same = mine == tl.load(runs_ptr + chosen * LONGEST + before)
            mass = tl.where(same, mass, 0.0)
        going = tl.load(runs_ptr + column * LONGEST + depth, mask=inside, other=-1)
        mass = tl.where(going >= 0, mass, 0.0)  # The latent: the run does not end here.
        line = law_ptr + tl.program_id(0).to(tl.int64) * vocab
        tl.atomic_add(line + going, mass, mask=inside & (mass > 0), sem="relaxed")
        tl.atomic_add(mass_ptr + tl.program_id(0), tl.sum(mass, axis=0), sem="relaxed")


def launch_spread(
    scores: Tensor,
    norms: Tensor,
    columns: Tensor,
    runs: Tensor,
    origin: Tensor,
    total: Tensor,
    law: Tensor,
    mass: Tensor,
) -> None:
    """See `reference.spread`."""
    rows, count, vocab = law.shape
    law.zero_()
    mass.zero_()
    size = len(runs)
    _spread_kernel[(rows * count, triton.cdiv(size, BLOCK))](
        scores,
        norms,
        columns,
        runs,
        origin,
        total,
        law,
        mass,
        scores.stride(0),
        norms.stride(0),
        columns.stride(0),
        origin.stride(0),
        total.stride(0),
        size,
        count,
        vocab,
        scores.stride(1),
        LONGEST=runs.shape[1],
        BLOCK=BLOCK,
        num_warps=4,
    )
