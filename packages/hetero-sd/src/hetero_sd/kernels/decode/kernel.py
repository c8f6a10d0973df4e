"""Steps of a decoding layer for a few tokens a row, over a cache of rows of any length.

    add_rms_norm   s = x + y,  s / sqrt(mean(s^2) + eps) * weight
    rope_store     q cos + roll(q) sin;  the same for k, into the cache with v
    attend         softmax(q k^T / sqrt(dim)) v over entries up to each query's position
    swiglu         silu(gate) * up

Tensors are contiguous; a cache is (rows, kv_heads, capacity, dim) with strides of its own. Sums are
in float32. Types float32, float16, bfloat16; attention in two passes, the first over stretches of
the cache. Positions beyond the capacity are undefined. For products see `products`. Source: own;
the stretches follow Dao et al., Flash-Decoding, 2023.
"""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

_STRETCHES = 8  # Programs for each row and head that share the cache's length.
_BLOCK_N = 64  # Cache entries at a time.


@triton.jit
@no_type_check
def _add_rms_norm_kernel(
    x_ptr, y_ptr, weight_ptr, sum_ptr, out_ptr, size, eps, ADDS: tl.constexpr, BLOCK: tl.constexpr
):
    """Add and normalise one token."""
    start = tl.program_id(0).to(tl.int64) * size
    columns = tl.arange(0, BLOCK)
    inside = columns < size
    x = tl.load(x_ptr + start + columns, mask=inside, other=0.0)
    if ADDS:
        x = x + tl.load(y_ptr + start + columns, mask=inside, other=0.0)
        tl.store(sum_ptr + start + columns, x, mask=inside)
    wide = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, axis=0) / size + eps)
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0)
    tl.store(out_ptr + start + columns, (wide * scale).to(x.dtype) * weight, mask=inside)


@triton.jit
@no_type_check
def _rope_store_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    cos_ptr,
    sin_ptr,
    places_ptr,
    out_ptr,
    keys_ptr,
    values_ptr,
    width,
    stride_row,
    stride_head,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Turn or copy one head of one token."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    columns = tl.arange(0, BLOCK)
    inside = columns < DIM
    rolled = (columns + DIM // 2) % DIM
    place = tl.load(places_ptr + token)
    cos = tl.load(cos_ptr + place * DIM + columns, mask=inside, other=0.0)
    sin = tl.load(sin_ptr + place * DIM + columns, mask=inside, other=0.0)
    if head < HEADS:
        source = q_ptr + (token * HEADS + head) * DIM
        x = tl.load(source + columns, mask=inside, other=0.0)
        other = tl.load(source + rolled, mask=inside, other=0.0)
        tl.store(
            out_ptr + (token * HEADS + head) * DIM + columns, x * cos + other * sin, mask=inside
        )
    elif head < HEADS + KV_HEADS:
        kv = head - HEADS
        source = k_ptr + (token * KV_HEADS + kv) * DIM
        x = tl.load(source + columns, mask=inside, other=0.0)
        other = tl.load(source + rolled, mask=inside, other=0.0)
        entry = (token // width) * stride_row + kv * stride_head + place * DIM
        tl.store(keys_ptr + entry + columns, x * cos + other * sin, mask=inside)
    else:
        kv = head - HEADS - KV_HEADS
        x = tl.load(v_ptr + (token * KV_HEADS + kv) * DIM + columns, mask=inside, other=0.0)
        entry = (token // width) * stride_row + kv * stride_head + place * DIM
        tl.store(values_ptr + entry + columns, x, mask=inside)


@triton.jit
@no_type_check
def _attend_kernel(
    q_ptr,
    keys_ptr,
    values_ptr,
    places_ptr,
    part_ptr,
    peak_ptr,
    mass_ptr,
    width,
    scale,
    stride_row,
    stride_head,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STRETCHES: tl.constexpr,
):
    """Attend from all queries of one row and key head to one stretch of the cache."""
    row = (tl.program_id(0) // KV_HEADS).to(tl.int64)
    kv = tl.program_id(0) % KV_HEADS
    stretch = tl.program_id(1)
    GROUPS: tl.constexpr = HEADS // KV_HEADS
    m = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    real = m < width * GROUPS
    token = row * width + m // GROUPS
    head = kv * GROUPS + m % GROUPS
    place = tl.load(places_ptr + token, mask=real, other=-1)
    q = tl.load(
        q_ptr + ((token * HEADS + head) * DIM)[:, None] + d[None, :],
        mask=real[:, None] & (d < DIM)[None, :],
        other=0.0,
    )  # [BLOCK_M, BLOCK_D]
    length = tl.max(place, axis=0) + 1
    blocks = tl.cdiv(length, BLOCK_N)
    each = tl.cdiv(blocks, STRETCHES) * BLOCK_N
    begin = stretch * each
    end = tl.minimum(begin + each, length)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    mass = tl.zeros([BLOCK_M], tl.float32)
    mixed = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    base = row * stride_row + kv * stride_head
    for start in range(begin, end, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        entry = base + (n * DIM)[:, None] + d[None, :]
        there = (n < end)[:, None] & (d < DIM)[None, :]
        k = tl.load(keys_ptr + entry, mask=there, other=0.0)  # [BLOCK_N, BLOCK_D]
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale  # [BLOCK_M, BLOCK_N]
        s = tl.where((n[None, :] <= place[:, None]) & (n < end)[None, :], s, float("-inf"))
        higher = tl.maximum(peak, tl.max(s, axis=1))
        # A query that sees nothing so far has no peak to measure from.
        level = tl.where(higher == float("-inf"), 0.0, higher)
        weight = tl.exp(s - level[:, None])
        old = tl.exp(peak - level)
        v = tl.load(values_ptr + entry, mask=there, other=0.0)
        mixed = mixed * old[:, None] + tl.dot(weight.to(v.dtype), v, input_precision="ieee")
        mass = mass * old + tl.sum(weight, axis=1)
        peak = higher
    slot = (tl.program_id(0) * STRETCHES + stretch) * BLOCK_M + m
    tl.store(peak_ptr + slot, peak)
    tl.store(mass_ptr + slot, mass)
    tl.store(part_ptr + (slot * BLOCK_D)[:, None] + d[None, :], mixed)


@triton.jit
@no_type_check
def _gather_stretches_kernel(
    part_ptr,
    peak_ptr,
    mass_ptr,
    out_ptr,
    width,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STRETCHES: tl.constexpr,
):
    """Join the stretches of one query."""
    GROUPS: tl.constexpr = HEADS // KV_HEADS
    pair = tl.program_id(0)
    m = tl.program_id(1)
    d = tl.arange(0, BLOCK_D)
    stretch = tl.arange(0, STRETCHES)
    slot = (pair * STRETCHES + stretch) * BLOCK_M + m
    peak = tl.load(peak_ptr + slot)
    mass = tl.load(mass_ptr + slot)
    share = tl.exp(peak - tl.max(peak, axis=0))
    part = tl.load(part_ptr + (slot * BLOCK_D)[:, None] + d[None, :])  # [STRETCHES, BLOCK_D]
    mixed = tl.sum(part * share[:, None], axis=0) / tl.sum(mass * share, axis=0)
    token = (pair // KV_HEADS).to(tl.int64) * width + m // GROUPS
    head = (pair % KV_HEADS) * GROUPS + m % GROUPS
    tl.store(out_ptr + (token * HEADS + head) * DIM + d, mixed, mask=d < DIM)


@triton.jit
@no_type_check
def _swiglu_kernel(gate_ptr, up_ptr, out_ptr, size, BLOCK: tl.constexpr):
    """Gate one stretch of the numbers."""
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = places < size
    gate = tl.load(gate_ptr + places, mask=inside, other=0.0)
    up = tl.load(up_ptr + places, mask=inside, other=0.0)
    wide = gate.to(tl.float32)
    silu = (wide / (1.0 + tl.exp(-wide))).to(gate.dtype)
    tl.store(out_ptr + places, silu * up, mask=inside)


def launch_add_rms_norm(
    x: Tensor, y: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """See `reference.add_rms_norm`."""
    out = torch.empty_like(x)
    total = x if y is None else torch.empty_like(x)
    size = x.shape[1]
    block = triton.next_power_of_2(size)
    _add_rms_norm_kernel[(len(x),)](
        x,
        x if y is None else y,
        weight,
        total,
        out,
        size,
        eps,
        ADDS=y is not None,
        BLOCK=block,
        num_warps=4 if block <= 2048 else 8,
    )
    return total, out


def launch_rope_store(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    places: Tensor,
    keys: Tensor,
    values: Tensor,
) -> Tensor:
    """See `reference.rope_store`."""
    rows, width, heads, dim = q.shape
    kv_heads = k.shape[2]
    out = torch.empty_like(q)
    _rope_store_kernel[(rows * width, heads + 2 * kv_heads)](
        q,
        k,
        v,
        cos,
        sin,
        places,
        out,
        keys,
        values,
        width,
        keys.stride(0),
        keys.stride(1),
        HEADS=heads,
        KV_HEADS=kv_heads,
        DIM=dim,
        BLOCK=triton.next_power_of_2(dim),
        num_warps=1,
    )
    return out


def launch_attend(q: Tensor, keys: Tensor, values: Tensor, places: Tensor) -> Tensor:
    """See `reference.attend`; the extent follows from the positions."""
    rows, width, heads, dim = q.shape
    kv_heads = keys.shape[1]
    queries = width * heads // kv_heads
    block_m = max(16, triton.next_power_of_2(queries))
    block_d = max(16, triton.next_power_of_2(dim))
    pairs = rows * kv_heads
    slots = pairs * _STRETCHES * block_m
    part = torch.empty(slots, block_d, dtype=torch.float32, device=q.device)
    peak = torch.empty(slots, dtype=torch.float32, device=q.device)
    mass = torch.empty_like(peak)
    out = torch.empty_like(q)
    _attend_kernel[(pairs, _STRETCHES)](
        q,
        keys,
        values,
        places,
        part,
        peak,
        mass,
        width,
        dim**-0.5,
        keys.stride(0),
        keys.stride(1),
        HEADS=heads,
        KV_HEADS=kv_heads,
        DIM=dim,
        BLOCK_M=block_m,
        BLOCK_N=_BLOCK_N,
        BLOCK_D=block_d,
        STRETCHES=_STRETCHES,
        num_warps=4,
    )
    _gather_stretches_kernel[(pairs, queries)](
        part,
        peak,
        mass,
        out,
        width,
        HEADS=heads,
        KV_HEADS=kv_heads,
        DIM=dim,
        BLOCK_M=block_m,
        BLOCK_D=block_d,
        STRETCHES=_STRETCHES,
        num_warps=1,
    )
    return out


def launch_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """See `reference.swiglu`."""
    out = torch.empty_like(gate)
    _swiglu_kernel[(triton.cdiv(gate.numel(), 1024),)](gate, up, out, gate.numel(), BLOCK=1024)
    return out
