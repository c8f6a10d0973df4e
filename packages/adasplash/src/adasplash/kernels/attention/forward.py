"""Forward of 1.5-entmax attention in two kernels.

    z_ij = scale / 2 * q_i . k_j        p_ij = relu(z_ij - tau_i) ** 2        o_i = sum_j p_ij v_j

with `tau_i` such that the row sums to 1. As `max_j z_ij - 1 <= tau_i < max_j z_ij`, a block of keys
whose scores lie at or below `max - 1` in every row is exactly zero.

1. *Screen*: one dense pass over the scores keeps the running maximum of every row and marks each
   block of keys that rises above `maximum so far - 1`. The maximum only grows, so no block of the
   support is missed. Blocks are taken from the diagonal to the left: recent keys raise it soon.
2. *Solve*: passes over the marked blocks only. With A0, A1, A2 the sums of x^2, x and 1 over
   `x = relu(z - t)`, f(t) = A0 - 1 is decreasing and convex, so each pass yields certified bounds:
   Newton's step is a lower bound (B1), the root for the support of t a bound on the other side of
   f(t) = 0 (B2). The next t is the step of Halley's method where it lies between them, else the
   middle. The last pass adds up `p v` and marks the blocks that hold any weight.

Layout: q [batch, heads, seq_q, dim_head], k and v [batch, heads_kv, seq_k, ...], any strides with
the last one 1. Sums and tau are float32. Rows without a visible key give zeros and `tau = +inf`; a
NaN stays in its row. Source: AdaSplash (arXiv 2502.12082), section 3; the screening is our own.
"""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl

from .tiles import half_scores, load_rows, padded, store_rows, tiles_for

_MAX_PASSES = 20  # 4 to 7 suffice; this bounds the loop where ties slow it down
_TOLERANCE = 2e-7  # on |f(tau)|, a few units in the last place of a sum of one


@triton.jit
@no_type_check
def _screen_kernel(
    q_ptr, k_ptr, mask_ptr, top_ptr, marked_ptr,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn, stride_mask,
    heads, group, seq_q, seq_k, dim_head, half_scale, n_tiles, n_blocks,
    IS_CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr, SKIP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write the maximum of every row and mark the blocks of keys that may hold weight."""
    place = tl.program_id(0).to(tl.int64)
    tile, plane = place % n_tiles, place // n_tiles
    batch, head = plane // heads, plane % heads
    q_ptr += batch * stride_qb + head * stride_qh
    k_ptr += batch * stride_kb + head // group * stride_kh
    mask_ptr += batch * stride_mask
    marked_ptr += place * n_blocks
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    q = load_rows(q_ptr, stride_qm, rows, seq_q, dim_head, BLOCK_D)  # [BLOCK_M, BLOCK_D]

    end = n_blocks
    if IS_CAUSAL:  # blocks to the right of the diagonal are hidden: they stay unmarked
        last = tl.minimum(tile * BLOCK_M + BLOCK_M, seq_q) + (seq_k - seq_q)
        end = tl.minimum(end, tl.maximum(tl.cdiv(last, BLOCK_N), 0))
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    poisoned = tl.zeros([BLOCK_M], tl.int32)
    for step in range(0, end):
        block = end - 1 - step
        keys = block * BLOCK_N + tl.arange(0, BLOCK_N)
        k = load_rows(k_ptr, stride_kn, keys, seq_k, dim_head, BLOCK_D)
        z = half_scores(q, k, half_scale, rows, keys, seq_q, seq_k, mask_ptr, IS_CAUSAL, HAS_MASK)
        highest = tl.max(z, 1)  # [BLOCK_M]
        # A maximum may drop NaN: look for it by name.
        poisoned = tl.maximum(poisoned, tl.max((z != z).to(tl.int32), 1))
        top = tl.maximum(top, highest)
        needed = (highest > top - 1.0) | (poisoned != 0)
        marked = tl.max(needed.to(tl.int32), 0) if SKIP else 1
        tl.store(marked_ptr + block, marked)
    top = tl.where(poisoned != 0, float("nan"), top)
    tl.store(top_ptr + plane * seq_q + rows, top, mask=rows < seq_q)


@triton.jit
@no_type_check
def _improve(t, f, a1, a2, lower, upper):
    """Return the next t of every row, its bounds, and whether float32 can do no better."""
    slope = tl.where(a1 > 0.0, a1, 1.0)
    newton = t + f / (2.0 * slope)
    square = a1 * a1 - a2 * f
    root = t + f / (slope + tl.sqrt(tl.maximum(square, 0.0)))
    lower = tl.maximum(lower, tl.minimum(newton, upper))
    lower = tl.where(f > 0.0, tl.maximum(lower, t), tl.maximum(lower, tl.minimum(root, upper)))
    upper = tl.where((f > 0.0) & (square >= 0.0), tl.minimum(upper, root), upper)
    upper = tl.maximum(tl.where(f < 0.0, tl.minimum(upper, t), upper), lower)
    halley = t + 2.0 * f * slope / (4.0 * slope * slope - f * a2)
    # Bounds included: near the root they agree to the last digit, and halving would start anew.
    within = (halley >= lower) & (halley <= upper)
    t_next = tl.where(within, halley, 0.5 * (lower + upper))
    stuck = (t_next == t) | (upper - lower <= 1.2e-7 * tl.abs(upper))
    return t_next, lower, upper, stuck


@triton.jit
@no_type_check
def _solve_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, top_ptr, list_ptr, count_ptr, out_ptr, tau_ptr, active_ptr,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn, stride_ob, stride_oh, stride_om, stride_mask,
    heads, group, seq_q, seq_k, dim_head, dim_value, half_scale, n_tiles, n_blocks,
    max_passes, tolerance,
    IS_CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Write tau and the output of one tile of queries, and mark the blocks that hold weight."""
    place = tl.program_id(0).to(tl.int64)
    tile, plane = place % n_tiles, place // n_tiles
    batch, head = plane // heads, plane % heads
    q_ptr += batch * stride_qb + head * stride_qh
    k_ptr += batch * stride_kb + head // group * stride_kh
    v_ptr += batch * stride_vb + head // group * stride_vh
    out_ptr += batch * stride_ob + head * stride_oh
    mask_ptr += batch * stride_mask
    list_ptr += place * n_blocks
    active_ptr += place * n_blocks
    count = tl.load(count_ptr + place)
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    q = load_rows(q_ptr, stride_qm, rows, seq_q, dim_head, BLOCK_D)
    top = tl.load(top_ptr + plane * seq_q + rows, mask=rows < seq_q, other=float("-inf"))
    empty = top == float("-inf")
    top = tl.where(empty, 0.0, top)

    lower, upper = top - 1.0, top  # f(lower) >= 0 > f(upper)
    t = lower
    passes, unsolved = 0, 1
    while (passes < max_passes) & (unsolved > 0):
        a0 = tl.zeros([BLOCK_M], tl.float32)
        a1 = tl.zeros([BLOCK_M], tl.float32)
        a2 = tl.zeros([BLOCK_M], tl.float32)
        for index in range(0, count):
            keys = tl.load(list_ptr + index) * BLOCK_N + tl.arange(0, BLOCK_N)
            k = load_rows(k_ptr, stride_kn, keys, seq_k, dim_head, BLOCK_D)
            z = half_scores(
                q, k, half_scale, rows, keys, seq_q, seq_k, mask_ptr, IS_CAUSAL, HAS_MASK
            )
            x = z - t[:, None]
            x = tl.where(x < 0.0, 0.0, x)  # keeps NaN
            a0 += tl.sum(x * x, 1)
            a1 += tl.sum(x, 1)
            a2 += tl.sum((x > 0.0).to(tl.float32), 1)
        f = a0 - 1.0  # f' = -2 a1, f'' = 2 a2
        t_next, lower, upper, stuck = _improve(t, f, a1, a2, lower, upper)
        solved = empty | (tl.abs(f) <= tolerance) | (f != f)
        t = tl.where(solved, t, t_next)
        unsolved = tl.max(tl.where(solved | stuck, 0, 1), 0)
        passes += 1

    output = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    for index in range(0, count):
        block = tl.load(list_ptr + index)
        keys = block * BLOCK_N + tl.arange(0, BLOCK_N)
        k = load_rows(k_ptr, stride_kn, keys, seq_k, dim_head, BLOCK_D)
        v = load_rows(v_ptr, stride_vn, keys, seq_k, dim_value, BLOCK_DV)
        z = half_scores(q, k, half_scale, rows, keys, seq_q, seq_k, mask_ptr, IS_CAUSAL, HAS_MASK)
        x = z - t[:, None]
        x = tl.where(x < 0.0, 0.0, x)
        p = x * x
        output = tl.dot(p.to(v.dtype), v, output, input_precision="ieee")
        weighted = tl.max(tl.max((p != 0.0).to(tl.int32), 1), 0)
        tl.store(active_ptr + block, weighted.to(tl.int8))
    store_rows(out_ptr, output, stride_om, rows, seq_q, dim_value, BLOCK_DV)
    tau = tl.where(empty, float("inf"), t)
    tl.store(tau_ptr + plane * seq_q + rows, tau, mask=rows < seq_q)


def launch_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_mask: torch.Tensor | None,
    scale: float,
    is_causal: bool,
    *,
    skip: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return output, tau and the blocks that hold weight.

    Args:
        q: `[batch, heads, seq_q, dim_head]`.
        k: `[batch, heads_kv, seq_k, dim_head]`.
        v: `[batch, heads_kv, seq_k, dim_value]`.
        key_mask: True for visible keys, `[batch, seq_k]`.
        scale: Factor of the scores.
        is_causal: Row i sees keys up to `i + seq_k - seq_q`.
        skip: False visits every block; the output is the same, bit for bit.
    """
    batch, heads, seq_q, dim_head = q.shape
    seq_k, dim_value = v.shape[-2:]
    tiles = tiles_for(q, v)
    n_tiles, n_blocks = triton.cdiv(seq_q, tiles.block_m), triton.cdiv(seq_k, tiles.block_n)
    output = torch.empty((batch, heads, seq_q, dim_value), dtype=q.dtype, device=q.device)
    tau = torch.empty((batch, heads, seq_q), dtype=torch.float32, device=q.device)
    top = torch.empty_like(tau)
    shape = (batch, heads, n_tiles, n_blocks)
    marked = torch.zeros(shape, dtype=torch.int8, device=q.device)
    active = torch.zeros_like(marked)
    mask = q if key_mask is None else key_mask.view(torch.uint8)
    grid = (n_tiles * batch * heads,)
    common = {
        "IS_CAUSAL": is_causal,
        "HAS_MASK": key_mask is not None,
        "BLOCK_M": tiles.block_m,
        "BLOCK_N": tiles.block_n,
        "BLOCK_D": padded(dim_head),
        "num_warps": tiles.num_warps,
        "num_stages": tiles.num_stages,
    }
    stride_mask = 0 if key_mask is None else mask.stride(0)
    _screen_kernel[grid](
        q, k, mask, top, marked,
        *q.stride()[:3], *k.stride()[:3], stride_mask,
        heads, heads // k.shape[1], seq_q, seq_k, dim_head, scale / 2, n_tiles, n_blocks,
        SKIP=skip, **common,
    )  # fmt: skip
    listed, count = list_blocks(marked)
    _solve_kernel[grid](
        q, k, v, mask, top, listed, count, output, tau, active,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *output.stride()[:3], stride_mask,
        heads, heads // k.shape[1], seq_q, seq_k, dim_head, dim_value, scale / 2, n_tiles, n_blocks,
        _MAX_PASSES, _TOLERANCE, BLOCK_DV=padded(dim_value), **common,
    )  # fmt: skip
    return output, tau, active


def list_blocks(marked: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the indices of the marked blocks, first in each row, and how many they are.

    Shapes depend on shapes only: nothing waits for the device.

    Args:
        marked: int8 `[..., blocks]`, contiguous.
    """
    listed = marked.argsort(dim=-1, descending=True, stable=True).to(torch.int32)
    return listed, marked.sum(-1, dtype=torch.int32)
