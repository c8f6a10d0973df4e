"""What the next round begins with, as the device finds it itself: one launch for all rows.

    advance    kept = columns whose runs were accepted to the end
               ids fed = [last column, if all are kept], ids of tokens accepted beyond, of the next;
               the first joins with what stands before, where both side by side are one id

A program has a row. Its ids are few, and are laid one after another. Source: own.
"""

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl
from torch import Tensor

from .reference import JOINS, PARTS, Line, Spelling


@triton.jit
@no_type_check
def _lay(ids, count, lane, found, wanted, WIDTH: tl.constexpr):
    """Append an id, if it is wanted and is one; return the ids and how many there are."""
    takes = wanted & (found >= 0)
    ids = tl.where((lane == count) & takes, found, ids)
    return ids, tl.minimum(count + takes.to(tl.int64), WIDTH)


@triton.jit
@no_type_check
def _joined(left, right, joins_ptr, buckets, WAYS: tl.constexpr):
    """Return the id that two become side by side; −1 where they stay apart."""
    bucket = ((left * 0x9E3779B1 + right * 0x85EBCA77) >> 8) & (buckets - 1)
    entry = joins_ptr + (bucket * WAYS + tl.arange(0, WAYS)) * 3
    same = (tl.load(entry) == left) & (tl.load(entry + 1) == right)
    return tl.max(tl.where(same, tl.load(entry + 2), -1), axis=0).to(tl.int64)


@triton.jit
@no_type_check
def _advance_kernel(
    board_ptr,
    forth_ptr,
    runs_ptr,
    spelled_ptr,
    joins_ptr,
    stride,
    steps,
    most,
    vocab,
    buckets,
    drafter_end,
    target_end,
    LAST: tl.constexpr,
    IDS: tl.constexpr,
    PLACES: tl.constexpr,
    LATER: tl.constexpr,
    PENDING: tl.constexpr,
    TARGET_PLACES: tl.constexpr,
    TOKENS: tl.constexpr,
    LIMIT: tl.constexpr,
    ACCEPTED: tl.constexpr,
    FOLLOWING: tl.constexpr,
    COLUMNS: tl.constexpr,
    REACH: tl.constexpr,
    WIDTH: tl.constexpr,
    STEPS: tl.constexpr,
    LONGEST: tl.constexpr,
    DEPTHS: tl.constexpr,
    PARTS: tl.constexpr,
    PIECES: tl.constexpr,
    JOINS: tl.constexpr,
    WAYS: tl.constexpr,
):
    """Write one row's line."""
    board = board_ptr + tl.program_id(0).to(tl.int64) * stride
    accepted = tl.maximum(tl.load(board + ACCEPTED), 0)
    following = tl.minimum(tl.maximum(tl.load(board + FOLLOWING), 0), vocab - 1)
    fed = tl.load(board + LAST) + 1
    start = tl.load(board + PLACES) + fed
    target_start = tl.load(board + TARGET_PLACES) + 1 + accepted
    limit = tl.load(board + LIMIT)

    step, depth, lane = tl.arange(0, STEPS), tl.arange(0, DEPTHS), tl.arange(0, WIDTH)
    real = step < steps
    column = tl.load(board + COLUMNS + step, mask=real, other=0)
    if LONGEST == 0:
        forth = column
        reach = tl.load(board + REACH + step, mask=real, other=0)
    else:
        token = tl.load(
            runs_ptr + column[:, None] * LONGEST + depth[None, :],
            mask=real[:, None] & (depth < LONGEST)[None, :],
            other=-1,
        )
        reach = tl.cumsum(tl.sum((token >= 0).to(tl.int64), axis=1), axis=0)
        forth = tl.load(forth_ptr + column)
    whole = real & (reach <= accepted)
    kept = tl.sum(whole.to(tl.int64), axis=0)
    done = tl.max(tl.where(whole, reach, 0), axis=0)

    ids, count = lane.to(tl.int64) * 0, accepted * 0
    for place in tl.static_range(PARTS):
        begun = done + place < accepted
        part = tl.load(board + TOKENS + done + place, mask=begun, other=0)
        for piece in tl.static_range(PIECES):
            found = tl.load(spelled_ptr + part * PIECES + piece).to(tl.int64)
            ids, count = _lay(ids, count, lane, found, begun, WIDTH)
    for piece in tl.static_range(PIECES):
        found = tl.load(spelled_ptr + following * PIECES + piece).to(tl.int64)
        ids, count = _lay(ids, count, lane, found, found >= 0, WIDTH)

    first = tl.sum(tl.where(lane == 0, ids, 0), axis=0)
    going, gone = count > 0, accepted * 0
    for back in tl.static_range(JOINS):
        end = kept - 1 - back
        left = tl.sum(tl.where(step == end, forth, 0), axis=0)
        early = tl.load(board + IDS + fed + end, mask=(end < 0) & (fed + end >= 0), other=-1)
        left = tl.where(end < 0, early, left)
        joined = _joined(left, first, joins_ptr, buckets, WAYS)
        going = going & (joined >= 0) & (left >= 0)
        first = tl.where(going, joined, first)
        gone += going.to(tl.int64)
    ids = tl.where(lane == 0, first, ids)

    held = tl.minimum(kept - gone, tl.minimum(kept, steps - 1))
    leads = (kept - gone > held).to(tl.int64)  # The last column, which the cache does not hold.
    last = tl.sum(tl.where(step == steps - 1, forth, 0), axis=0)
    count = tl.minimum(tl.maximum(count + leads, 1), most)
    held += start
    tl.store(board + LAST, count - 1)
    tl.store(board + IDS + leads + lane, ids, mask=leads + lane < WIDTH)
    tl.store(board + IDS, last, mask=leads > 0)
    tl.store(board + PLACES + lane, tl.minimum(held + lane, drafter_end))
    later = tl.minimum(held + count + lane, drafter_end)
    tl.store(board + LATER + lane, later, mask=lane < WIDTH - 1)
    tl.store(board + TARGET_PLACES + lane, tl.minimum(target_start + lane, target_end))
    tl.store(board + PENDING, following)
    tl.store(board + LIMIT, tl.maximum(limit - 1 - accepted, 0))


def launch_advance(
    board: Tensor,
    line: Line,
    known: tuple[Tensor, Tensor] | None,
    spelling: Spelling,
    steps: int,
    most: int,
    ends: tuple[int, int],
) -> None:
    """See `reference.advance`."""
    each, joins = spelling
    forth, runs = known or (each, each)
    longest = 0 if known is None else runs.shape[1]
    _advance_kernel[(len(board),)](
        board,
        forth,
        runs,
        each,
        joins,
        board.stride(0),
        steps,
        most,
        len(each),
        len(joins),
        *ends,
        **{name.upper(): value for name, value in line._asdict().items()},
        STEPS=max(triton.next_power_of_2(steps), 2),
        LONGEST=longest,
        DEPTHS=max(triton.next_power_of_2(longest), 2),
        PARTS=PARTS if longest == 0 else min(longest - 1, PARTS),
        PIECES=each.shape[1],
        JOINS=JOINS,
        WAYS=joins.shape[1],
        num_warps=1,
    )
