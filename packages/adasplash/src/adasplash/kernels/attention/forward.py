"""Forward of alpha-entmax attention; the formulas are those of alpha 1.5.

    z_ij = scale / 2 * q_i . k_j        p_ij = relu(z_ij - tau_i) ** 2        o_i = sum_j p_ij v_j

with `tau_i` such that the row sums to 1. Three steps, of which only the first sees all scores:

1. `screen.py` lists, for every tile of queries, the blocks of keys that may hold weight.
2. `threshold.py` solves for tau over those.
3. The kernel below adds up `p v` over them, and marks the blocks that hold any weight for the
   backward.

For another alpha, `z = (alpha - 1) s` and `p = x ** (1 / (alpha - 1))`.

Layout: q [batch, heads, seq_q, dim_head], k and v [batch, heads_kv, seq_k, ...], strides as
`tiles.aligned` leaves them. Sums and tau are float32. Rows without a visible key give zeros and
`tau = +inf`; a NaN stays in its row. Source: AdaSplash (arXiv 2502.12082), section 3.
"""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl

from .screen import screen
from .threshold import threshold
from .tiles import (
    TINY,
    Tiles,
    aligned,
    describe,
    load_tile,
    mask_bytes,
    padded,
    products,
    roots,
    store_rows,
    tiles_for,
)

_SIZES = ["heads", "group", "seq_q", "seq_k", "n_tiles", "n_blocks"]


@triton.jit(do_not_specialize=_SIZES)
@no_type_check
def _output_kernel(
    q_desc, k_desc, v_desc, mask_ptr, alpha_ptr, list_ptr, count_ptr, tau_ptr, out_ptr, active_ptr,
    stride_mask, left, right, heads, group, seq_q, seq_k, n_tiles, n_blocks, dim_value, scale,
    IS_CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr, HAS_WINDOW: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Write the output of one tile of queries, and mark the blocks that hold weight."""
    place = tl.program_id(0)
    plane, tile = place // n_tiles, n_tiles - 1 - place % n_tiles
    line = (plane * n_tiles + tile).to(tl.int64)
    batch, head = plane // heads, plane % heads
    head_kv = head // group
    mask_ptr += batch.to(tl.int64) * stride_mask
    list_ptr += line * n_blocks
    active_ptr += line * n_blocks
    count = tl.load(count_ptr + line)
    first = tile * BLOCK_M
    rows = first + tl.arange(0, BLOCK_M)
    row_base = plane.to(tl.int64) * seq_q
    q = load_tile(q_desc, batch, head, first, BLOCK_M, BLOCK_D)
    tau = tl.load(tau_ptr + row_base + rows, mask=rows < seq_q, other=float("inf"))
    alpha = 1.5 if HALF else tl.load(alpha_ptr + plane)
    power = 1.0 / (alpha - 1.0)
    factor = scale * (alpha - 1.0)
    output = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    for index in range(0, count):
        block = tl.load(list_ptr + index)
        start = block * BLOCK_N
        k = load_tile(k_desc, batch, head_kv, start, BLOCK_N, BLOCK_D)
        v = load_tile(v_desc, batch, head_kv, start, BLOCK_N, BLOCK_DV)
        s = products(
            q, k, mask_ptr, first, start, seq_q, seq_k, left, right,
            IS_CAUSAL, HAS_MASK, HAS_WINDOW, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        x, u = roots(s * factor, tau[:, None], power, HALF)
        p = x * u
        output = tl.dot(p.to(v.dtype), v, output, input_precision="ieee")
        weighted = tl.sum(p, 1) != 0.0
        tl.store(active_ptr + block + rows * 0, 1, mask=weighted)
    store_rows(out_ptr + row_base * dim_value, output, rows, seq_q, dim_value, BLOCK_DV)


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
    options = scale or TINY, is_causal, window, tiles
    candidates = screen(q, k, key_mask, alpha, *options, skip=skip)
    tau = threshold(q, k, key_mask, alpha, candidates, *options)
    out, active = output(q, k, v, key_mask, alpha, candidates[2:], tau, *options)
    return out, tau, active


def output(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_mask: torch.Tensor | None,
    alpha: torch.Tensor | None,
    lists: tuple[torch.Tensor, ...],
    tau: torch.Tensor,
    scale: float,
    is_causal: bool,
    window: tuple[int, int] | None,
    tiles: Tiles,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the output and the blocks that hold weight (int8), given those that may, and tau."""
    batch, heads, seq_q, dim_head = q.shape
    seq_k, dim_value = v.shape[-2:]
    n_tiles, n_blocks = lists[0].shape[-2:]
    out = torch.empty((batch, heads, seq_q, dim_value), dtype=q.dtype, device=q.device)
    active = torch.zeros(lists[0].shape, dtype=torch.int8, device=q.device)
    mask, stride_mask = mask_bytes(key_mask, q)
    _output_kernel[(n_tiles * batch * heads,)](
        describe(q, tiles.block_m), describe(k, tiles.block_n), describe(v, tiles.block_n),
        mask, q if alpha is None else alpha, *lists, tau, out, active, stride_mask,
        *(window or (0, 0)), heads, heads // k.shape[1], seq_q, seq_k, n_tiles, n_blocks, dim_value,
        scale,
        IS_CAUSAL=is_causal, HAS_MASK=key_mask is not None, HAS_WINDOW=window is not None,
        HALF=alpha is None, BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n,
        BLOCK_D=padded(dim_head), BLOCK_DV=padded(dim_value),
        num_warps=tiles.num_warps, num_stages=tiles.num_stages,
    )  # fmt: skip
    return out, active
