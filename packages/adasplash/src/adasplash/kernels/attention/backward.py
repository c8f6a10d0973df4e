"""Backward of alpha-entmax attention in two kernels.

With `u = p ** (2 - alpha)`, which is `relu(z - tau)` for alpha 1.5, the Jacobian of the weights
with respect to the scores is `diag(u) - u u^T / sum(u)`. Hence

    dP = dO V^T        delta_i = sum_j u_ij dP_ij / sum_j u_ij        dS = u (dP - delta)
    dQ = scale dS K    dK = scale dS^T Q    dV = p^T dO

1. *Queries*: one program per tile of queries; the first sweep over its active blocks adds up delta,
   the second dQ.
2. *Keys*: one program per tile of keys; for every query head of its group it visits the tiles of
   queries that give these keys weight, and adds up dK and dV.

The gradient of alpha needs three more sums of every row, which the first sweep adds up:

    dalpha = (sum p dP - delta) / (alpha - 1)^2
             - (sum p ln p dP - delta sum p ln p) / (alpha - 1)

Only blocks that the forward marked as active are visited. There are no atomics: the result is the
same in every run. Rows with `tau = +inf` have u = 0 and get zero gradients. Layout as in
`forward.py`. Source: AdaSplash (arXiv 2502.12082), section 3.3 and appendix.
"""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl

from ..launch import launch
from .tiles import (
    SIZES,
    UNALIGNED,
    aligned,
    describe,
    hide,
    is_partly_hidden,
    list_marked,
    load_tile,
    padded,
    pose,
    products,
    roots,
    store_rows,
)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=UNALIGNED)
@no_type_check
def _queries_kernel(
    q_desc, k_desc, v_desc, do_desc, mask_ptr, alpha_ptr, tau_ptr, active_ptr, list_ptr,
    dq_ptr, delta_ptr, dalpha_ptr,
    stride_mask, left, right, heads, group, seq_q, seq_k, n_tiles, n_blocks, scale, dim_head,
    IS_CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr, HAS_WINDOW: tl.constexpr,
    HALF: tl.constexpr, ALPHA_GRAD: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Write delta and dQ of one tile of queries."""
    place = tl.program_id(0)
    plane, tile = place // n_tiles, n_tiles - 1 - place % n_tiles
    line = (plane * n_tiles + tile).to(tl.int64)
    batch, head = plane // heads, plane % heads
    head_kv = head // group
    mask_ptr += batch.to(tl.int64) * stride_mask
    list_ptr += line * n_blocks
    count = list_marked(active_ptr + line * n_blocks, 1, n_blocks, list_ptr, True)
    first = tile * BLOCK_M
    rows = first + tl.arange(0, BLOCK_M)
    row_base = plane.to(tl.int64) * seq_q
    q = load_tile(q_desc, batch, head, first, BLOCK_M, BLOCK_D)
    do = load_tile(do_desc, batch, head, first, BLOCK_M, BLOCK_DV)
    tau = tl.load(tau_ptr + row_base + rows, mask=rows < seq_q, other=float("inf"))

    alpha = 1.5 if HALF else tl.load(alpha_ptr + plane)
    power = 1.0 / (alpha - 1.0)
    factor = scale * (alpha - 1.0)

    weighted = tl.zeros([BLOCK_M], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    p_sum = tl.zeros([BLOCK_M], tl.float32)
    p_dp = tl.zeros([BLOCK_M], tl.float32)
    log_dp = tl.zeros([BLOCK_M], tl.float32)
    entropy = tl.zeros([BLOCK_M], tl.float32)
    for index in range(0, count):
        start = tl.load(list_ptr + index) * BLOCK_N
        k = load_tile(k_desc, batch, head_kv, start, BLOCK_N, BLOCK_D)
        v = load_tile(v_desc, batch, head_kv, start, BLOCK_N, BLOCK_DV)
        s = products(
            q, k, mask_ptr, first, start, seq_q, seq_k, left, right,
            IS_CAUSAL, HAS_MASK, HAS_WINDOW, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        x, u = roots(s * factor, tau[:, None], power, HALF)
        dp = tl.dot(do, v.T, input_precision="ieee")
        weighted += tl.sum(u * dp, 1)
        total += tl.sum(u, 1)
        if ALPHA_GRAD:
            p = x * u
            log_p = p * power * tl.log(tl.where(x == 0.0, 1.0, x))  # p ln p
            p_sum += tl.sum(p, 1)
            p_dp += tl.sum(p * dp, 1)
            log_dp += tl.sum(log_p * dp, 1)
            entropy += tl.sum(log_p, 1)
    delta = weighted / tl.where(total == 0.0, 1.0, total)
    tl.store(delta_ptr + row_base + rows, delta, mask=rows < seq_q)
    if ALPHA_GRAD:  # with the sum of p itself: what it lacks to 1 would be blown up near alpha 1
        dalpha = (p_dp - delta * p_sum) * power - (log_dp - delta * entropy)
        tl.store(dalpha_ptr + row_base + rows, dalpha * power, mask=rows < seq_q)

    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for index in range(0, count):
        start = tl.load(list_ptr + index) * BLOCK_N
        k = load_tile(k_desc, batch, head_kv, start, BLOCK_N, BLOCK_D)
        v = load_tile(v_desc, batch, head_kv, start, BLOCK_N, BLOCK_DV)
        s = products(
            q, k, mask_ptr, first, start, seq_q, seq_k, left, right,
            IS_CAUSAL, HAS_MASK, HAS_WINDOW, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        x, u = roots(s * factor, tau[:, None], power, HALF)
        ds = u * (tl.dot(do, v.T, input_precision="ieee") - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
    dq = dq * scale
    store_rows(dq_ptr + row_base * dim_head, dq, rows, seq_q, dim_head, BLOCK_D)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=UNALIGNED)
@no_type_check
def _keys_kernel(
    q_desc, k_desc, v_desc, do_desc, mask_ptr, alpha_ptr, tau_ptr, active_ptr, list_ptr,
    delta_ptr, dk_ptr, dv_ptr,
    stride_mask, left, right, heads, group, seq_q, seq_k, n_tiles, n_blocks, scale,
    dim_head, dim_value,
    IS_CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr, HAS_WINDOW: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Write dK and dV of one block of keys, summed over the query heads that share them.

    Tiles are computed transposed, keys by queries, so that no product needs a transposed operand
    that is not in memory.
    """
    place = tl.program_id(0)
    block, plane = place % n_blocks, place // n_blocks
    heads_kv = heads // group
    batch, head_kv = plane // heads_kv, plane % heads_kv
    mask_ptr += batch.to(tl.int64) * stride_mask
    keys = block * BLOCK_N + tl.arange(0, BLOCK_N)
    k = load_tile(k_desc, batch, head_kv, block * BLOCK_N, BLOCK_N, BLOCK_D)
    v = load_tile(v_desc, batch, head_kv, block * BLOCK_N, BLOCK_N, BLOCK_DV)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    for member in range(0, group):
        head = head_kv * group + member
        row_base = (batch * heads + head).to(tl.int64) * seq_q
        marks = active_ptr + (batch * heads + head).to(tl.int64) * n_tiles * n_blocks + block
        listed = list_ptr + ((batch * heads + head) * n_blocks + block).to(tl.int64) * n_tiles
        count = list_marked(marks, n_blocks, n_tiles, listed, False)
        alpha = 1.5 if HALF else tl.load(alpha_ptr + batch * heads + head)
        power = 1.0 / (alpha - 1.0)
        factor = scale * (alpha - 1.0)
        for index in range(0, count):
            start = tl.load(listed + index) * BLOCK_M
            rows = start + tl.arange(0, BLOCK_M)
            q = load_tile(q_desc, batch, head, start, BLOCK_M, BLOCK_D)
            do = load_tile(do_desc, batch, head, start, BLOCK_M, BLOCK_DV)
            tau = tl.load(tau_ptr + row_base + rows, mask=rows < seq_q, other=float("inf"))
            delta = tl.load(delta_ptr + row_base + rows, mask=rows < seq_q, other=0.0)
            s = tl.dot(k, q.T, input_precision="ieee")  # [BLOCK_N, BLOCK_M]
            if is_partly_hidden(
                start, block * BLOCK_N, seq_q, seq_k, IS_CAUSAL, HAS_MASK, HAS_WINDOW, BLOCK_N
            ):  # fmt: skip
                s = hide(
                    s, rows[None, :], keys[:, None], seq_q, seq_k, mask_ptr, left, right,
                    IS_CAUSAL, HAS_MASK, HAS_WINDOW,
                )  # fmt: skip
            x, u = roots(s * factor, tau[None, :], power, HALF)
            dv = tl.dot((x * u).to(do.dtype), do, dv, input_precision="ieee")
            ds = u * (tl.dot(v, do.T, input_precision="ieee") - delta[None, :])
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    row_base = plane.to(tl.int64) * seq_k
    dk = dk * scale
    store_rows(dk_ptr + row_base * dim_head, dk, keys, seq_k, dim_head, BLOCK_D)
    store_rows(dv_ptr + row_base * dim_value, dv, keys, seq_k, dim_value, BLOCK_DV)


def launch_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_mask: torch.Tensor | None,
    alpha: torch.Tensor | None,
    tau: torch.Tensor,
    active: torch.Tensor,
    scale: float,
    is_causal: bool,
    window: tuple[int, int] | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of q, k, v and alpha (`[batch, heads]`, or empty if that is None).

    Args:
        grad: Gradient of the output, `[batch, heads, seq_q, dim_value]`, last stride 1.
        q: As in the forward, as are the arguments below but `tau` and `active`.
        k: Keys.
        v: Values.
        key_mask: True for visible keys.
        alpha: Float32, or None for 1.5.
        tau: From the forward.
        active: From the forward.
        scale: Factor of the scores.
        is_causal: Row i sees keys up to `i + seq_k - seq_q`.
        window: How far a row sees to the left and to the right; None for all.
    """
    problem, grad = pose(q, k, v, key_mask, alpha, scale, is_causal, window), aligned(grad)
    tiles, (n_tiles, n_blocks) = problem.tiles, problem.grid
    dim_head, dim_value = q.shape[-1], v.shape[-1]
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    delta = torch.empty_like(tau)
    dalpha = delta if alpha is None else torch.empty_like(tau)
    sources = (
        *problem.descriptors, describe(grad, tiles.block_m), problem.mask, problem.alpha, tau,
        active, torch.empty(active.shape, dtype=torch.int32, device=q.device),  # for the lists
    )  # fmt: skip
    constants = {
        **problem.switches,
        "BLOCK_DV": padded(dim_value),
        "num_warps": tiles.num_warps,
        "num_stages": tiles.back_stages,
    }
    kind = *problem.kind, (tau.data_ptr() | active.data_ptr()) % 16  # they may be anybody's
    launch(
        _queries_kernel, n_tiles * problem.planes, kind,
        *sources, dq, delta, dalpha, *problem.sizes, problem.scale, dim_head,
        ALPHA_GRAD=alpha is not None, **constants,
    )  # fmt: skip
    launch(
        _keys_kernel, n_blocks * k.shape[0] * k.shape[1], kind,
        *sources, delta, dk, dv, *problem.sizes, problem.scale, dim_head, dim_value, **constants,
    )  # fmt: skip
    return dq, dk, dv, tau.new_empty(0) if alpha is None else dalpha.sum(-1)
