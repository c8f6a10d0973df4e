"""Which blocks of keys can hold weight, from one dense pass over the scores.

As `tau_i < max_j z_ij <= tau_i + 1`, a block of keys whose scores lie at or below `max - 1` in
every row is exactly zero. Far better than `max - 1` is a bound from the maxima of the blocks: the
weights of these alone must not exceed 1, so the tau that they would have lies below tau.

1. *Screen*: one dense pass keeps the maximum of every row, and stores that of every block.
2. *List*: every tile of queries lists the blocks that rise above the bound of one of its rows,
   from right to left. The bound is where the solver begins.

Stored maxima are float16; what that rounds by is added where a block is to be refuted, and taken
off where a bound is raised. They take 2 bytes for 64 scores: long sequences are screened in parts
that fit `_ROOM`.

Scores and layout as in `forward.py`. Source: own.
"""

from __future__ import annotations

from typing import NamedTuple, no_type_check

import torch
import triton
import triton.language as tl

from ..launch import interpreted, launch
from .mask import visible_range
from .scores import (
    PACKED,
    PLACED,
    factor_of,
    load_part,
    sequence_of,
    shaped,
    slots_of,
    terms_of,
)
from .solver import power_step, step_left
from .tiles import (
    SIZES,
    UNALIGNED,
    Problem,
    describe,
    hide,
    load_tile,
    n_slots,
    roots,
    saturated,
)

_ROOM = 2**28  # bytes of stored maxima
_CHUNK, _LISTED, _WARPS, _REGISTERS = 4, 64, 1, 128  # of the second kernel: blocks at a time
_LIST_SWITCHES = "IS_CAUSAL", "HAS_MASK", "HAS_WINDOW", "HALF", "FORM", "BLOCK_M", "BLOCK_N"
_STEPS = tl.constexpr(2)
_MANY = tl.constexpr(16)  # blocks whose maxima rise above the largest score - 1
_SHARE = tl.constexpr(0.8)  # of the weight of a row, that of the maxima of blocks alone; a guess


class Candidates(NamedTuple):
    """What the screening finds.

    Args:
        top: Largest z of every row, float32 `[batch, heads, seq_q]`; -inf for empty rows.
        bound: A lower bound of tau, as large.
        start: A guess of tau not below that.
        listed: Blocks that may hold weight, right to left, int32 `[batch, heads, tiles, blocks]`.
        length: How many they are, int32 `[batch, heads, tiles]`.
    """

    top: torch.Tensor
    bound: torch.Tensor
    start: torch.Tensor
    listed: torch.Tensor
    length: torch.Tensor


@triton.jit
@no_type_check
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
@no_type_check
def _highest(z, AXIS: tl.constexpr, INTERPRETED: tl.constexpr):
    """Return the maximum along an axis; NaN if one is in it."""
    if INTERPRETED:  # the interpreter has no fast reduction that keeps NaN
        poisoned = tl.max((z != z).to(tl.int32), AXIS) != 0
        return tl.where(poisoned, float("nan"), tl.max(z, AXIS))
    else:
        return tl.reduce(z, AXIS, _larger)


@triton.jit
@no_type_check
def key_range(
    first, rows: tl.constexpr, seq_q, seq_k, mask_ptr, left, right,
    IS_CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr, HAS_WINDOW: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Return the first key that rows of a tile may see, and the one behind the last."""
    begin, end = 0, seq_k
    shift = seq_k - seq_q
    if IS_CAUSAL:
        end = tl.maximum(tl.minimum(first + rows, seq_q) + shift, 0)
    if HAS_WINDOW:
        end = tl.minimum(end, tl.maximum(first + rows + shift + right, 0))
        begin = tl.maximum(first + shift - left, 0)
    if HAS_MASK:
        low, high = visible_range(mask_ptr, seq_k, BLOCK_N)
        begin, end = tl.maximum(begin, low), tl.minimum(end, high)
    return begin, end


@triton.jit
@no_type_check
def _store_peaks(
    peak_ptr, peaks, rows, first_block, n_blocks, TILE_M: tl.constexpr, PARTS: tl.constexpr
):  # fmt: skip
    """Store the maxima of some blocks."""
    blocks = first_block + tl.arange(0, PARTS)[None, :]
    tl.store(
        peak_ptr + blocks * TILE_M + rows[:, None], peaks.to(tl.float16), mask=blocks < n_blocks
    )


@triton.jit
@no_type_check
def _bare_tiles(
    q, k_desc, mask_ptr, peak_ptr, top, batch, head_kv, first, begin, end, seq_q, seq_k,
    left, right, n_blocks, factor,
    IS_CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr, HAS_WINDOW: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Store the maxima of tiles of bare products; return the maxima of the rows.

    Without a mask or a window every row sees all of them; with one every tile is asked.

    Positive numbers are ordered as their bits are, and the hardware takes the maximum of three
    integers at once. Of a block with no positive score that gives the smallest one; it is stored as
    0, which is too high. Once every row has seen a score above 1 a block at 0 holds no weight
    anyway; till then numbers are compared.
    """
    PARTS: tl.constexpr = TILE_N // BLOCK_N
    LEAD: tl.constexpr = 4  # tiles before the question whether every row has one
    inner = tl.arange(0, TILE_M)
    rows = first + inner
    count = tl.maximum(end - begin, 0)
    done, stop = 0, tl.minimum(LEAD, count)
    while done < stop:
        for index in range(done, stop):
            tile = end - 1 - index  # the diagonal's neighbours first
            k = load_tile(k_desc, batch, head_kv, tile * TILE_N, TILE_N, BLOCK_D)
            z = tl.dot(q, k.T, input_precision="ieee")
            if HAS_MASK or HAS_WINDOW:
                z = hide(
                    z, first, tile * TILE_N, seq_q, seq_k, mask_ptr, left, right,
                    IS_CAUSAL, HAS_MASK, HAS_WINDOW, TILE_M, TILE_N, BLOCK_N,
                )  # fmt: skip
            # The scale is positive: the largest product has the largest score.
            peaks = _highest(tl.reshape(z, [TILE_M, PARTS, BLOCK_N]), 2, INTERPRETED) * factor
            top = _larger(top, _highest(peaks, 1, INTERPRETED))
            _store_peaks(peak_ptr, peaks, inner, tile * PARTS, n_blocks, TILE_M, PARTS)
        # With what the second kernel allows for rounding, and as much again.
        high = (top >= 1.0 + (tl.abs(top) + 1.0) * 2.0**-9) | (top != top) | (rows >= seq_q)
        done, stop = stop, tl.where(tl.min(tl.where(high, 1, 0), 0) > 0, stop, count)
    for index in range(done, count):
        tile = end - 1 - index
        k = load_tile(k_desc, batch, head_kv, tile * TILE_N, TILE_N, BLOCK_D)
        z = tl.dot(q, k.T, input_precision="ieee")
        if HAS_MASK or HAS_WINDOW:
            z = hide(
                z, first, tile * TILE_N, seq_q, seq_k, mask_ptr, left, right,
                IS_CAUSAL, HAS_MASK, HAS_WINDOW, TILE_M, TILE_N, BLOCK_N,
            )  # fmt: skip
        if INTERPRETED:
            z = tl.where(z != z, float("nan"), z)  # that of the tensor cores is positive
        bits = tl.reshape(z.to(tl.int32, bitcast=True), [TILE_M, PARTS, BLOCK_N])
        peaks = _larger(tl.max(bits, 2).to(tl.float32, bitcast=True), 0.0) * factor
        top = _larger(top, _highest(peaks, 1, INTERPRETED))
        _store_peaks(peak_ptr, peaks, inner, tile * PARTS, n_blocks, TILE_M, PARTS)
    return top


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=UNALIGNED)
@no_type_check
def _screen_kernel(
    q_desc, k_desc, mask_ptr, alpha_ptr, top_ptr, peak_ptr, first_place,
    slopes_ptr, bias_ptr, bounds_q_ptr, bounds_k_ptr, n_seq, cap,
    bias_batch, bias_head, bias_row, bias_key,
    stride_mask, left, right, heads, group, seq_q, seq_k, n_tiles, n_blocks, scale,
    IS_CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr, HAS_WINDOW: tl.constexpr,
    HALF: tl.constexpr, FORM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Write the maximum of every row, and of every row in every block."""
    PARTS: tl.constexpr = TILE_N // BLOCK_N
    HIDING: tl.constexpr = HAS_MASK or HAS_WINDOW
    n_wide = slots_of(seq_q, n_seq, FORM, TILE_M)
    place = first_place + tl.program_id(0)
    plane = place // n_wide
    wide = n_wide - 1 - place % n_wide  # under a causal mask the longest rows first
    batch, head = plane // heads, plane % heads
    head_kv = head // group
    mask_ptr += batch.to(tl.int64) * stride_mask
    peak_ptr += tl.program_id(0).to(tl.int64) * n_blocks * TILE_M
    top_ptr += plane.to(tl.int64) * seq_q
    wide, row_at, seq_q, key_at, seq_k, _sequence = sequence_of(
        wide, bounds_q_ptr, bounds_q_ptr, bounds_k_ptr, n_seq, seq_q, seq_k, FORM, TILE_M
    )
    first = wide * TILE_M
    inner = tl.arange(0, TILE_M)
    rows = first + inner
    q = load_part(q_desc, batch, head, row_at, first, seq_q, FORM, TILE_M, BLOCK_D)

    alpha = 1.5 if HALF else tl.load(alpha_ptr + plane)
    factor = factor_of(scale, alpha, FORM)
    terms = terms_of(
        plane, batch, head, scale, alpha, cap, slopes_ptr, bias_ptr,
        bias_batch, bias_head, bias_row, bias_key, FORM,
    )  # fmt: skip

    begin, limit = key_range(
        first, TILE_M, seq_q, seq_k, mask_ptr, left, right,
        IS_CAUSAL, HAS_MASK, HAS_WINDOW, BLOCK_N,
    )  # fmt: skip
    if PACKED & FORM:
        limit = tl.where(first < seq_q, limit, 0)  # a slot without a tile
    full = limit // TILE_N  # tiles before `full` are visible to every row
    if IS_CAUSAL:
        full = tl.minimum(full, tl.maximum(first + 1 + seq_k - seq_q, 0) // TILE_N)
    begin, end = begin // TILE_N, tl.cdiv(limit, TILE_N)
    if HIDING:  # bare products leave no tile to the first loop, and others none to the second
        full = end if FORM == 0 else 0
    else:
        begin = 0
    top = tl.full([TILE_M], float("-inf"), tl.float32)
    if FORM != 0 or not HIDING:
        for tile in range(tl.maximum(full, begin), end):
            keys = tile * TILE_N + tl.arange(0, TILE_N)
            k = load_part(
                k_desc, batch, head_kv, key_at, tile * TILE_N, seq_k, FORM, TILE_N, BLOCK_D
            )
            z = tl.dot(q, k.T, input_precision="ieee")
            z, _gate = shaped(z, rows[:, None], keys[None, :], first, seq_q, seq_k, terms, FORM)
            z = hide(
                z * factor, first, tile * TILE_N, seq_q, seq_k, mask_ptr, left, right,
                IS_CAUSAL, HAS_MASK, HAS_WINDOW, TILE_M, TILE_N, BLOCK_N,
            )  # fmt: skip
            peaks = _highest(tl.reshape(z, [TILE_M, PARTS, BLOCK_N]), 2, INTERPRETED)
            top = _larger(top, _highest(peaks, 1, INTERPRETED))
            _store_peaks(peak_ptr, peaks, inner, tile * PARTS, n_blocks, TILE_M, PARTS)
    if FORM == 0:
        top = _bare_tiles(
            q, k_desc, mask_ptr, peak_ptr, top, batch, head_kv, first, begin, full, seq_q, seq_k,
            left, right, n_blocks, factor, IS_CAUSAL, HAS_MASK, HAS_WINDOW,
            BLOCK_N, BLOCK_D, TILE_M, TILE_N, INTERPRETED,
        )  # fmt: skip
    else:
        for tile in range(0, full):
            k = load_part(
                k_desc, batch, head_kv, key_at, tile * TILE_N, seq_k, FORM, TILE_N, BLOCK_D
            )
            z = tl.dot(q, k.T, input_precision="ieee")
            if PLACED & FORM:
                keys = tile * TILE_N + tl.arange(0, TILE_N)
                z, _gate = shaped(z, rows[:, None], keys[None, :], first, seq_q, seq_k, terms, FORM)
            # The scale is positive, and the cap rises: the largest product has the largest score.
            peaks = _highest(tl.reshape(z, [TILE_M, PARTS, BLOCK_N]), 2, INTERPRETED)
            if (PLACED & FORM) == 0:
                peaks, _gate = shaped(peaks, rows, rows, first, seq_q, seq_k, terms, FORM)
            peaks = peaks * factor
            top = _larger(top, _highest(peaks, 1, INTERPRETED))
            _store_peaks(peak_ptr, peaks, inner, tile * PARTS, n_blocks, TILE_M, PARTS)
    tl.store(top_ptr + row_at + rows, top, mask=rows < seq_q)


@triton.jit
@no_type_check
def _peaks(peak_ptr, blocks, rows, real, TILE_M: tl.constexpr):
    """Return stored maxima `[blocks, rows]`; -inf for blocks that are none."""
    peaks = tl.load(
        peak_ptr + blocks[:, None] * TILE_M + rows[None, :], mask=real[:, None], other=float("-inf")
    )
    return peaks.to(tl.float32)


@triton.jit
@no_type_check
def _limit(bound, slack, known, real):
    """Return what maxima must not exceed in a block without weight; NaN where all have to stay."""
    return tl.where(real, tl.where(known, bound - slack, float("nan")), float("inf"))


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=UNALIGNED)
@no_type_check
def _list_kernel(
    mask_ptr, alpha_ptr, top_ptr, peak_ptr, bound_ptr, start_ptr, list_ptr, count_ptr, first_place,
    bounds_q_ptr, bounds_k_ptr, n_seq,
    stride_mask, left, right, heads, group, seq_q, seq_k, n_tiles, n_blocks,
    IS_CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr, HAS_WINDOW: tl.constexpr,
    HALF: tl.constexpr, FORM: tl.constexpr, SKIP: tl.constexpr, SATURATE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TILE_M: tl.constexpr,
    CHUNK: tl.constexpr, LISTED: tl.constexpr,
):  # fmt: skip
    """Write the bounds of one tile's rows, and the blocks that rise above them.

    All blocks are read once, for a list by `max - 1`; what follows reads those of the list.
    """
    PARTS: tl.constexpr = TILE_M // BLOCK_M
    MORE: tl.constexpr = 4 * CHUNK
    n_wide = slots_of(seq_q, n_seq, FORM, TILE_M)
    local, part = tl.program_id(0) // PARTS, tl.program_id(0) % PARTS
    place = first_place + local
    plane = place // n_wide
    row_base = plane.to(tl.int64) * seq_q
    wide, row_at, seq_q, _key_at, seq_k, sequence = sequence_of(
        n_wide - 1 - place % n_wide, bounds_q_ptr, bounds_q_ptr, bounds_k_ptr, n_seq,
        seq_q, seq_k, FORM, TILE_M,
    )  # fmt: skip
    first = wide * TILE_M + part * BLOCK_M
    if first < seq_q:
        peak_ptr += local.to(tl.int64) * n_blocks * TILE_M
        slot = first // BLOCK_M
        if PACKED & FORM:
            slot += row_at // BLOCK_M + sequence
        line = (plane * n_tiles + slot).to(tl.int64)
        list_ptr += line * n_blocks
        inner = part * BLOCK_M + tl.arange(0, BLOCK_M)
        rows = first + tl.arange(0, BLOCK_M)
        row_base += row_at
        top = tl.load(top_ptr + row_base + rows, mask=rows < seq_q, other=float("-inf"))
        alpha = 1.5 if HALF else tl.load(alpha_ptr + plane)
        power = 1.0 / (alpha - 1.0)
        its_mask = mask_ptr + (plane // heads).to(tl.int64) * stride_mask
        begin, end = key_range(
            first, BLOCK_M, seq_q, seq_k, its_mask, left, right,
            IS_CAUSAL, HAS_MASK, HAS_WINDOW, BLOCK_N,
        )  # fmt: skip
        begin, end = begin // BLOCK_N, tl.minimum(tl.cdiv(end, BLOCK_N), n_blocks)

        empty, size = top == float("-inf"), tl.abs(top)
        slack = (size + 1.0) * 2.0**-10  # what the maxima near the top were rounded by, at most
        known = empty | (size < 60000.0)  # beyond float16 nothing is
        lowest = tl.where(empty, 0.0, top - 1.0)
        limit = _limit(lowest, slack, known, rows < seq_q)
        count = 0
        for offset in range(0, end - begin, LISTED):
            blocks = end - 1 - offset - tl.arange(0, LISTED)
            real = blocks >= begin
            peaks = _peaks(peak_ptr, blocks, inner, real, TILE_M)
            needed = tl.max(((peaks <= limit[None, :]) == 0).to(tl.int32), 1)  # true for NaN
            needed = tl.where(real, needed, 0)
            tl.store(list_ptr + count + tl.cumsum(needed, 0) - needed, blocks, mask=needed != 0)
            count += tl.sum(needed, 0)
        tl.debug_barrier()  # other threads read the list

        # Newton's method and the like on the maxima alone, until it hardly moves; where many scores
        # are near the largest tau is far from the lowest that it can be.
        bound, t, guess, steps, moving = lowest, lowest, lowest, 0, 1
        if HALF:
            t += tl.where(count > _MANY, 0.3, 0.0)
        while (steps < _STEPS) & (moving > 0):
            sum_p = tl.zeros([CHUNK, BLOCK_M], tl.float32)
            sum_u = tl.zeros([CHUNK, BLOCK_M], tl.float32)
            support = tl.zeros([CHUNK, BLOCK_M], tl.float32)
            for offset in range(0, count, CHUNK):
                index = offset + tl.arange(0, CHUNK)
                real = index < count
                blocks = tl.load(list_ptr + index, mask=real, other=0)
                peaks = _peaks(peak_ptr, blocks, inner, real, TILE_M)
                if SATURATE:
                    x = saturated(peaks, 1.0, (t + slack)[None, :])
                    u, sign = x, saturated(x, 1e30, 0.0)
                else:
                    x, u = roots(peaks, (t + slack)[None, :], power, HALF)
                    sign = (x > 0.0).to(tl.float32)
                sum_p, sum_u, support = sum_p + x * u, sum_u + u, support + sign
            a0, a1, a2 = tl.sum(sum_p, 0), tl.sum(sum_u, 0), tl.sum(support, 0)
            t_next, below, _ = step_left(t, a0, 1.0, a1, a2, power, HALF)
            if HALF:  # what is not the maximum of its block has some weight, too
                some = a0 > 0.0
                guess = power_step(
                    t, tl.where(some, a0, 1.0), _SHARE, tl.where(some, a1, 1.0), 1.0 / 3.5
                )
            # What rounds in these sums must not lift a bound over tau.
            below = tl.where(a1 > 0.0, below - 1e-6 * (1.0 + tl.abs(below)), bound)
            moved = below > bound + 0.02
            bound = tl.where(below > bound, below, bound)  # stays NaN
            t = tl.where(t_next > bound, t_next, bound)
            moving = tl.max(moved.to(tl.int32), 0)
            steps += 1
        bound = tl.where(known, bound, lowest)
        tl.store(bound_ptr + row_base + rows, bound, mask=rows < seq_q)
        guess = tl.minimum(tl.maximum(guess, bound), 0.5 * (bound + top))
        tl.store(start_ptr + row_base + rows, guess, mask=rows < seq_q)

        limit = _limit(bound, slack, known, rows < seq_q)
        kept = 0
        if SKIP:
            for offset in range(0, count, MORE):
                index = offset + tl.arange(0, MORE)
                real = index < count
                blocks = tl.load(list_ptr + index, mask=real, other=0)
                peaks = _peaks(peak_ptr, blocks, inner, real, TILE_M)
                needed = tl.max(((peaks <= limit[None, :]) == 0).to(tl.int32), 1)
                needed = tl.where(real, needed, 0)
                tl.debug_barrier()  # never beyond what all have read
                tl.store(list_ptr + kept + tl.cumsum(needed, 0) - needed, blocks, mask=needed != 0)
                kept += tl.sum(needed, 0)
        else:
            for offset in range(0, end - begin, LISTED):
                blocks = end - 1 - offset - tl.arange(0, LISTED)
                tl.store(list_ptr + end - 1 - blocks, blocks, mask=blocks >= begin)
            kept = tl.maximum(end - begin, 0)
        tl.store(count_ptr + line, kept)


def screen(problem: Problem, *, skip: bool = True) -> Candidates:
    """Return the blocks that may hold weight; all that are visible unless `skip`."""
    q, tiles, switches = problem.q, problem.tiles, problem.switches
    device, (n_tiles, n_blocks) = q.device, problem.grid
    top = problem.new(*q.shape[:3], dtype=torch.float32)
    bound = problem.new(*q.shape[:3], dtype=torch.float32)
    start = torch.empty_like(bound)
    listed = torch.empty((*q.shape[:2], n_tiles, n_blocks), dtype=torch.int32, device=device)
    count = problem.new(*q.shape[:2], n_tiles, dtype=torch.int32)
    places = n_slots(q.shape[2], tiles.screen_m, problem.terms.n_seq) * problem.planes
    at_once = min(places, max(1, _ROOM // (2 * n_blocks * tiles.screen_m)))
    peaks = torch.empty(at_once * n_blocks * tiles.screen_m, dtype=torch.float16, device=device)
    interpreting = interpreted(_screen_kernel)
    sources = describe(q, tiles.screen_m), describe(problem.k, tiles.screen_n)
    for first in range(0, places, at_once):
        some = min(at_once, places - first)
        launch(
            _screen_kernel, some, problem.kind,
            *sources, problem.mask, problem.alpha, top, peaks, first, *problem.added,
            *problem.sizes, problem.scale,
            **switches, TILE_M=tiles.screen_m, TILE_N=tiles.screen_n, INTERPRETED=interpreting,
            num_warps=tiles.screen_warps, num_stages=tiles.screen_stages,
            maxnreg=tiles.most.screen,
        )  # fmt: skip
        launch(
            _list_kernel, some * (tiles.screen_m // tiles.block_m), problem.kind,
            problem.mask, problem.alpha, top, peaks, bound, start, listed, count, first,
            *problem.added[2:5], *problem.sizes,
            **{name: switches[name] for name in _LIST_SWITCHES}, SKIP=skip,
            SATURATE=switches["HALF"] and not interpreting, TILE_M=tiles.screen_m,
            CHUNK=_CHUNK, LISTED=_LISTED, num_warps=_WARPS, maxnreg=_REGISTERS,
        )  # fmt: skip
    return Candidates(top, bound, start, listed, count)
