"""Forward of alpha-entmax attention in two kernels; the formulas below are those of alpha 1.5.

    z_ij = scale / 2 * q_i . k_j        p_ij = relu(z_ij - tau_i) ** 2        o_i = sum_j p_ij v_j

with `tau_i` such that the row sums to 1. As `max_j z_ij - 1 <= tau_i < max_j z_ij`, a block of keys
whose scores lie at or below `max - 1` in every row is exactly zero.

1. *Screen*: one dense pass over the scores keeps the running maximum of every row; a row that meets
   a block above `maximum so far - 1` marks it. The maximum only grows, so no block of the support
   is missed. Keys are taken from the diagonal to the left: recent keys raise it soon.
2. *Solve*: every tile of queries lists its marked blocks, right to left, and, where they are few,
   drops those that the final maximum refutes. Then come passes over the listed blocks only; the
   scores of the first few stay in registers. With
   A0, A1, A2 the sums of x^2, x and 1 over `x = relu(z - t)`, f(t) = A0 - 1 is decreasing and
   convex, so each pass yields certified bounds: Newton's step is a lower bound (B1), the root for
   the support of t bounds tau from above where f > 0 and from below where f < 0 (B2). The first t
   solves for the blocks in registers, as a sample of all. A last pass adds up `p v` and marks the
   blocks that hold any weight.

For another alpha, `z = (alpha - 1) s` and `p = x ** (1 / (alpha - 1))`. The norm of x to that power
is convex in t as well, and Newton's step on it a lower bound; it alone is taken, from the left.

Layout: q [batch, heads, seq_q, dim_head], k and v [batch, heads_kv, seq_k, ...], strides as
`tiles.aligned` leaves them. Sums and tau are float32. Rows without a visible key give zeros and
`tau = +inf`; a NaN stays in its row. Source: AdaSplash (arXiv 2502.12082), section 3; screening,
first guess and stopping rule are our own.
"""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl

from fourfold_common import triton_status

from .tiles import (
    Tiles,
    aligned,
    describe,
    hide,
    list_marked,
    load_tile,
    padded,
    roots,
    store_rows,
    tiles_for,
)

_MAX_PASSES = 20  # 2 to 5 suffice; this bounds the loop where ties slow it down
_GUESSES = 4
# On the sum of a row: a few units in the last place of one, or far below the step of half formats.
_TOLERANCE = {torch.float32: 2e-7, torch.float16: 1e-5, torch.bfloat16: 1e-5}
_SIZES = [
    "heads",
    "group",
    "seq_q",
    "seq_k",
    "n_tiles",
    "n_blocks",
]  # a new length compiles nothing


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
def _mark(
    peaks, top, lines, first_block, inside, n_blocks,
    SKIP: tl.constexpr, PARTS: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Mark the blocks in which a row rises above its bound; return the new maxima.

    Rows that agree on a block all write the same 1: no reduction over rows, no atomics.
    """
    top = _larger(top, _highest(peaks, 1, INTERPRETED))
    blocks = first_block + tl.arange(0, PARTS)[None, :]
    needed = (peaks <= (top - 1.0)[:, None]) == 0  # true for NaN
    if not SKIP:
        needed = blocks >= 0
    tl.store(lines[:, None] + blocks, 1, mask=needed & inside[:, None] & (blocks < n_blocks))
    return top


@triton.jit(do_not_specialize=_SIZES)
@no_type_check
def _screen_kernel(
    q_desc, k_desc, mask_ptr, alpha_ptr, top_ptr, marked_ptr, stride_mask,
    left, right, heads, group, seq_q, seq_k, n_tiles, n_blocks, scale,
    IS_CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr, HAS_WINDOW: tl.constexpr,
    HALF: tl.constexpr, SKIP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Write the maximum of every row and mark the blocks of keys that may hold weight."""
    PARTS: tl.constexpr = TILE_N // BLOCK_N
    n_wide = tl.cdiv(seq_q, TILE_M)
    place = tl.program_id(0)
    plane = place // n_wide
    first = (n_wide - 1 - place % n_wide) * TILE_M  # under a causal mask the longest rows first
    batch, head = plane // heads, plane % heads
    head_kv = head // group
    mask_ptr += batch.to(tl.int64) * stride_mask
    rows = first + tl.arange(0, TILE_M)
    inside = rows < seq_q
    lines = marked_ptr + (plane * n_tiles + rows // BLOCK_M).to(tl.int64) * n_blocks
    q = load_tile(q_desc, batch, head, first, TILE_M, BLOCK_D)

    alpha = 1.5 if HALF else tl.load(alpha_ptr + plane)
    factor = scale * (alpha - 1.0)

    limit, full = seq_k, seq_k // TILE_N  # tiles before `full` are visible to every row
    if IS_CAUSAL:
        shift = seq_k - seq_q
        limit = tl.maximum(tl.minimum(first + TILE_M, seq_q) + shift, 0)
        full = tl.minimum(full, tl.maximum(first + 1 + shift, 0) // TILE_N)
    if HAS_MASK or HAS_WINDOW:
        full = 0
    begin = 0
    if HAS_WINDOW:
        shift = seq_k - seq_q
        limit = tl.minimum(limit, tl.maximum(first + TILE_M + shift + right, 0))
        begin = tl.maximum(first + shift - left, 0) // TILE_N
    end = tl.cdiv(limit, TILE_N)
    top = tl.full([TILE_M], float("-inf"), tl.float32)
    for step in range(0, end - tl.maximum(full, begin)):
        tile = end - 1 - step
        keys = tile * TILE_N + tl.arange(0, TILE_N)
        k = load_tile(k_desc, batch, head_kv, tile * TILE_N, TILE_N, BLOCK_D)
        z = tl.dot(q, k.T, input_precision="ieee") * factor
        z = hide(
            z,
            rows[:, None],
            keys[None, :],
            seq_q,
            seq_k,
            mask_ptr,
            left,
            right,
            IS_CAUSAL,
            HAS_MASK,
            HAS_WINDOW,
        )
        peaks = _highest(tl.reshape(z, [TILE_M, PARTS, BLOCK_N]), 2, INTERPRETED)
        top = _mark(peaks, top, lines, tile * PARTS, inside, n_blocks, SKIP, PARTS, INTERPRETED)
    for step in range(0, full):
        tile = full - 1 - step
        k = load_tile(k_desc, batch, head_kv, tile * TILE_N, TILE_N, BLOCK_D)
        z = tl.dot(q, k.T, input_precision="ieee")
        # The scale is positive: the largest product has the largest score.
        peaks = _highest(tl.reshape(z, [TILE_M, PARTS, BLOCK_N]), 2, INTERPRETED) * factor
        top = _mark(peaks, top, lines, tile * PARTS, inside, n_blocks, SKIP, PARTS, INTERPRETED)
    tl.store(top_ptr + plane.to(tl.int64) * seq_q + rows, top, mask=inside)


@triton.jit
@no_type_check
def _held_sums(held, t, power, HALF: tl.constexpr, HELD: tl.constexpr):
    """Return what `_sums` returns, for all blocks in registers together."""
    x, u = roots(held[0], t[:, None], power, HALF)
    p, support = x * u, (x > 0.0).to(tl.float32)
    for part in tl.static_range(1, HELD):
        x, v = roots(held[part], t[:, None], power, HALF)
        p, u, support = p + x * v, u + v, support + (x > 0.0).to(tl.float32)
    total = tl.sum(u, 1)
    return tl.sum(p, 1), total, tl.sum(support, 1) if HALF else total


@triton.jit
@no_type_check
def _sums(z, t, power, HALF: tl.constexpr):
    """Return the sums of p and u, and the number of positive x, of every row (HALF only)."""
    x, u = roots(z, t[:, None], power, HALF)
    if HALF:
        return tl.sum(x * x, 1), tl.sum(x, 1), tl.sum((x > 0.0).to(tl.float32), 1)
    else:
        total = tl.sum(u, 1)
        return tl.sum(x * u, 1), total, total


@triton.jit
@no_type_check
def _step(t, a0, goal, a1, a2, power, HALF: tl.constexpr):
    """Return a step that lands left of the root of a0 - goal, a lower and an upper bound of it.

    HALF: with g = a2 f / a1^2, the weight that keeps the step left of the root for evenly spread
    scores is g / 2. Where the support of t has no root (g > 1), Halley's step is taken, and the
    upper bound is infinite.
    """
    f = a0 - goal
    slope = tl.where(a1 > 0.0, a1, 1.0)
    if HALF:
        square = a1 * a1 - a2 * f
        newton = t + 0.5 * f / slope
        root = t + f / (slope + tl.sqrt(tl.maximum(square, 0.0)))
        halley = t + 2.0 * f * slope / (4.0 * slope * slope - f * a2)
        back = tl.minimum(tl.maximum(0.5 * a2 * f / (slope * slope), 0.0), 1.0)
        step = tl.where(square > 0.0, root - back * (root - newton), halley)
        step = tl.where(f < 0.0, root, step)
        lower = tl.where(f < 0.0, root, newton)
        return step, lower, tl.where((f > 0.0) & (square > 0.0), root, float("inf"))
    else:
        # The p-norm of x has the slope -a1 / a0^(1 - 1/power).
        norm = tl.exp2(tl.log2(tl.where(a0 > 0.0, a0, 1.0)) * (1.0 - 1.0 / power))
        step = t + (a0 - tl.exp2(tl.log2(goal) / power) * norm) / slope
        return step, step, tl.full(t.shape, float("inf"), tl.float32)


@triton.jit
@no_type_check
def _improve(t, a0, a1, a2, power, lower, upper, tolerance, HALF: tl.constexpr):
    """Return the next t of every row, its bounds, and whether it is as good as it has to be."""
    f = a0 - 1.0
    t_next, below, above = _step(t, a0, 1.0, a1, a2, power, HALF)
    known = a1 > 0.0
    lower = tl.where(known, tl.maximum(lower, tl.minimum(below, upper)), lower)
    lower = tl.where(f > 0.0, tl.maximum(lower, t), lower)
    upper = tl.where(known, tl.minimum(upper, above), upper)
    upper = tl.maximum(tl.where(f < 0.0, tl.minimum(upper, t), upper), lower)
    # Bounds included: near the root they agree to the last digit, and halving would start anew.
    within = known & (t_next >= lower) & (t_next <= upper)
    t_next = tl.where(within, t_next, 0.5 * (lower + upper))
    # f' shrinks to the right: between the bounds the sum of the row changes by this at most.
    close = known & (f >= 0.0) & (power * a1 * (upper - lower) <= tolerance)
    done = close | (upper - lower <= 1.2e-7 * tl.abs(upper)) | (t_next == t)
    exact = (tl.abs(f) <= tolerance) | (f != f)
    return tl.where(exact, t, t_next), lower, upper, done | exact


@triton.jit
@no_type_check
def _shorten(
    list_ptr, count, q, k_desc, mask_ptr, batch, head, rows, bound, factor,
    seq_q, seq_k, left, right,
    IS_CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr, HAS_WINDOW: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Keep the blocks of the list that rise above the bound of a row; return how many they are.

    The maxima have grown since screening marked these blocks.
    """
    kept = 0
    for index in range(0, count):
        block = tl.load(list_ptr + index)
        k = load_tile(k_desc, batch, head, block * BLOCK_N, BLOCK_N, BLOCK_D)
        z = tl.dot(q, k.T, input_precision="ieee") * factor
        keys = (block * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
        z = hide(
            z,
            rows[:, None],
            keys,
            seq_q,
            seq_k,
            mask_ptr,
            left,
            right,
            IS_CAUSAL,
            HAS_MASK,
            HAS_WINDOW,
        )
        needed = ((z <= bound[:, None]) == 0).to(tl.int32)  # true for NaN
        tl.store(list_ptr + kept, block)  # never beyond what has been read
        kept += tl.max(tl.max(needed, 1), 0)
    tl.debug_barrier()  # what follows reads the list in other threads
    return kept


@triton.jit(do_not_specialize=_SIZES)
@no_type_check
def _solve_kernel(
    q_desc, k_desc, v_desc, mask_ptr, alpha_ptr, top_ptr, marked_ptr, list_ptr,
    out_ptr, tau_ptr, active_ptr,
    stride_mask, left, right, heads, group, seq_q, seq_k, n_tiles, n_blocks, dim_value, scale,
    tolerance, max_passes, guesses,
    IS_CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr, HAS_WINDOW: tl.constexpr,
    HALF: tl.constexpr, HELD: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Write tau and the output of one tile of queries, and mark the blocks that hold weight."""
    # The first of the list can cross the diagonal, or the end of the keys.
    ALWAYS: tl.constexpr = HAS_MASK or HAS_WINDOW or (HELD < BLOCK_M // BLOCK_N + 1)
    FEW: tl.constexpr = 6  # a list too short to be worth another look
    place = tl.program_id(0)
    plane, tile = place // n_tiles, n_tiles - 1 - place % n_tiles
    line = (plane * n_tiles + tile).to(tl.int64)
    batch, head = plane // heads, plane % heads
    head_kv = head // group
    mask_ptr += batch.to(tl.int64) * stride_mask
    list_ptr += line * n_blocks
    active_ptr += line * n_blocks
    count = list_marked(marked_ptr + line * n_blocks, 1, n_blocks, list_ptr, True)
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    row_base = plane.to(tl.int64) * seq_q
    q = load_tile(q_desc, batch, head, tile * BLOCK_M, BLOCK_M, BLOCK_D)
    top = tl.load(top_ptr + row_base + rows, mask=rows < seq_q, other=float("-inf"))
    alpha = 1.5 if HALF else tl.load(alpha_ptr + plane)
    power = 1.0 / (alpha - 1.0)
    factor = scale * (alpha - 1.0)
    if not HALF:  # a high power of x has fewer digits
        tolerance = tolerance * (1.0 + power)
    empty = top == float("-inf")
    top = tl.where(empty, 0.0, top)

    visible = tl.cdiv(seq_k, BLOCK_N)
    if IS_CAUSAL:
        visible = tl.minimum(visible, tl.cdiv((tile + 1) * BLOCK_M + seq_k - seq_q, BLOCK_N))
    if (count > FEW) & (2 * count <= visible):
        count = _shorten(
            list_ptr, count, q, k_desc, mask_ptr, batch, head_kv, rows, top - 1.0, factor,
            seq_q, seq_k, left, right, IS_CAUSAL, HAS_MASK, HAS_WINDOW, BLOCK_N, BLOCK_D,
        )  # fmt: skip

    held = ()
    for part in tl.static_range(HELD):
        z = tl.full([BLOCK_M, BLOCK_N], float("-inf"), tl.float32)
        if part < count:
            start = tl.load(list_ptr + part) * BLOCK_N
            keys = start + tl.arange(0, BLOCK_N)
            k = load_tile(k_desc, batch, head_kv, start, BLOCK_N, BLOCK_D)
            z = tl.dot(q, k.T, input_precision="ieee") * factor
            z = hide(
                z,
                rows[:, None],
                keys[None, :],
                seq_q,
                seq_k,
                mask_ptr,
                left,
                right,
                IS_CAUSAL,
                HAS_MASK,
                HAS_WINDOW,
            )
        held = held + (z,)  # noqa: RUF005 -- Triton unpacks no tuples

    lower, upper = top - 1.0, top  # f(lower) >= 0 > f(upper)
    t = lower
    if HELD > 0:  # noqa: SIM102 -- known when compiling, unlike the count
        if count > HELD:
            share = HELD / count.to(tl.float32)
            highest = tl.max(held[0], 1)
            for part in tl.static_range(1, HELD):
                highest = tl.maximum(highest, tl.max(held[part], 1))
            t = tl.maximum(highest - tl.exp2(tl.log2(share) / power), lower)
            for _ in range(0, guesses):
                a0, a1, a2 = _held_sums(held, t, power, HALF, HELD)
                t = tl.where(a1 > 0.0, _step(t, a0, share, a1, a2, power, HALF)[0], t)
            t = tl.where((t > lower) & (t < upper), t, lower)

    passes, unsolved = 0, 1
    while (passes < max_passes) & (unsolved > 0):
        a0 = tl.zeros([BLOCK_M], tl.float32)
        a1 = tl.zeros([BLOCK_M], tl.float32)
        a2 = tl.zeros([BLOCK_M], tl.float32)
        if HELD > 0:
            a0, a1, a2 = _held_sums(held, t, power, HALF, HELD)
        for index in range(HELD, count):
            start = tl.load(list_ptr + index) * BLOCK_N
            k = load_tile(k_desc, batch, head_kv, start, BLOCK_N, BLOCK_D)
            z = tl.dot(q, k.T, input_precision="ieee") * factor
            if ALWAYS:
                keys = (start + tl.arange(0, BLOCK_N))[None, :]
                z = hide(
                    z,
                    rows[:, None],
                    keys,
                    seq_q,
                    seq_k,
                    mask_ptr,
                    left,
                    right,
                    IS_CAUSAL,
                    HAS_MASK,
                    HAS_WINDOW,
                )
            b0, b1, b2 = _sums(z, t, power, HALF)
            a0, a1, a2 = a0 + b0, a1 + b1, a2 + b2
        t_next, lower, upper, done = _improve(t, a0, a1, a2, power, lower, upper, tolerance, HALF)
        done = done | empty
        # A row that is done keeps its t, whatever its neighbours still need.
        t = t_next
        lower, upper = tl.where(done, t, lower), tl.where(done, t, upper)
        unsolved = tl.max(tl.where(done, 0, 1), 0)
        passes += 1

    output = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    for part in tl.static_range(HELD):
        if part < count:
            block = tl.load(list_ptr + part)
            v = load_tile(v_desc, batch, head_kv, block * BLOCK_N, BLOCK_N, BLOCK_DV)
            x, u = roots(held[part], t[:, None], power, HALF)
            p = x * u
            output = tl.dot(p.to(v.dtype), v, output, input_precision="ieee")
            weighted = tl.sum(p, 1) != 0.0
            tl.store(active_ptr + block + rows * 0, 1, mask=weighted)
    for index in range(HELD, count):
        block = tl.load(list_ptr + index)
        k = load_tile(k_desc, batch, head_kv, block * BLOCK_N, BLOCK_N, BLOCK_D)
        v = load_tile(v_desc, batch, head_kv, block * BLOCK_N, BLOCK_N, BLOCK_DV)
        z = tl.dot(q, k.T, input_precision="ieee") * factor
        if ALWAYS:
            keys = (block * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
            z = hide(
                z,
                rows[:, None],
                keys,
                seq_q,
                seq_k,
                mask_ptr,
                left,
                right,
                IS_CAUSAL,
                HAS_MASK,
                HAS_WINDOW,
            )
        x, u = roots(z, t[:, None], power, HALF)
        p = x * u
        output = tl.dot(p.to(v.dtype), v, output, input_precision="ieee")
        weighted = tl.sum(p, 1) != 0.0
        tl.store(active_ptr + block + rows * 0, 1, mask=weighted)
    store_rows(out_ptr + row_base * dim_value, output, rows, seq_q, dim_value, BLOCK_DV)
    tau = tl.where(empty, float("inf"), t)
    tl.store(tau_ptr + row_base + rows, tau, mask=rows < seq_q)


def launch_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_mask: torch.Tensor | None,
    alpha: torch.Tensor | None,
    scale: float,
    is_causal: bool,
    window: tuple[int, int] | None,
    *,
    skip: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return output, tau and the blocks that hold weight.

    Args:
        q: `[batch, heads, seq_q, dim_head]`.
        k: `[batch, heads_kv, seq_k, dim_head]`.
        v: `[batch, heads_kv, seq_k, dim_value]`.
        key_mask: True for visible keys, `[batch, seq_k]`.
        alpha: Float32 `[batch, heads]`, contiguous; None means 1.5.
        scale: Factor of the scores, at least 0.
        is_causal: Row i sees keys up to `i + seq_k - seq_q`.
        window: How far a row sees to the left and to the right; None for all.
        skip: False visits every block; in float32 the output is the same, bit for bit.
    """
    q, k, v = aligned(q), aligned(k), aligned(v)
    tiles = tiles_for(q, v)
    top, marked = screen(q, k, key_mask, alpha, scale, is_causal, window, tiles, skip=skip)
    return solve(q, k, v, key_mask, alpha, top, marked, scale, is_causal, window, tiles)


def screen(
    q: torch.Tensor,
    k: torch.Tensor,
    key_mask: torch.Tensor | None,
    alpha: torch.Tensor | None,
    scale: float,
    is_causal: bool,
    window: tuple[int, int] | None,
    tiles: Tiles,
    *,
    skip: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the largest z of every row, and the blocks that may hold weight (int8)."""
    batch, heads, seq_q, dim_head = q.shape
    seq_k = k.shape[2]
    n_tiles, n_blocks = triton.cdiv(seq_q, tiles.block_m), triton.cdiv(seq_k, tiles.block_n)
    top = torch.empty((batch, heads, seq_q), dtype=torch.float32, device=q.device)
    marked = torch.zeros((batch, heads, n_tiles, n_blocks), dtype=torch.int8, device=q.device)
    mask, stride_mask = mask_bytes(key_mask, q)
    bounds = window or (0, 0)
    _screen_kernel[(triton.cdiv(seq_q, tiles.screen_m) * batch * heads,)](
        describe(q, tiles.screen_m), describe(k, tiles.screen_n),
        mask, q if alpha is None else alpha, top, marked, stride_mask,
        *bounds, heads, heads // k.shape[1], seq_q, seq_k, n_tiles, n_blocks, scale,
        IS_CAUSAL=is_causal, HAS_MASK=key_mask is not None, HAS_WINDOW=window is not None,
        HALF=alpha is None, SKIP=skip,
        BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n, BLOCK_D=padded(dim_head),
        TILE_M=tiles.screen_m, TILE_N=tiles.screen_n, INTERPRETED=triton_status().interpreting,
        num_warps=tiles.screen_warps, num_stages=tiles.screen_stages,
    )  # fmt: skip
    return top, marked


def solve(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_mask: torch.Tensor | None,
    alpha: torch.Tensor | None,
    top: torch.Tensor,
    marked: torch.Tensor,
    scale: float,
    is_causal: bool,
    window: tuple[int, int] | None,
    tiles: Tiles,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return output, tau and the blocks that hold weight (int8), given the blocks that may."""
    batch, heads, seq_q, dim_head = q.shape
    seq_k, dim_value = v.shape[-2:]
    n_tiles, n_blocks = marked.shape[-2:]
    output = torch.empty((batch, heads, seq_q, dim_value), dtype=q.dtype, device=q.device)
    tau = torch.empty_like(top)
    listed = torch.empty(marked.shape, dtype=torch.int32, device=q.device)
    active = torch.zeros_like(marked)
    mask, stride_mask = mask_bytes(key_mask, q)
    bounds = window or (0, 0)
    _solve_kernel[(n_tiles * batch * heads,)](
        describe(q, tiles.block_m), describe(k, tiles.block_n), describe(v, tiles.block_n),
        mask, q if alpha is None else alpha, top, marked, listed, output, tau, active, stride_mask,
        *bounds, heads, heads // k.shape[1], seq_q, seq_k, n_tiles, n_blocks, dim_value, scale,
        _TOLERANCE[q.dtype], _MAX_PASSES, _GUESSES,
        IS_CAUSAL=is_causal, HAS_MASK=key_mask is not None, HAS_WINDOW=window is not None,
        HALF=alpha is None,
        HELD=tiles.held if alpha is None else min(tiles.held, 2),  # powers need registers, too
        BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n,
        BLOCK_D=padded(dim_head), BLOCK_DV=padded(dim_value),
        num_warps=tiles.num_warps, num_stages=tiles.num_stages, maxnreg=tiles.solve_registers,
    )  # fmt: skip
    return output, tau, active


def mask_bytes(key_mask: torch.Tensor | None, q: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Return the mask as bytes with its stride; any tensor where there is none."""
    return (q, 0) if key_mask is None else (key_mask.view(torch.uint8), key_mask.stride(0))
