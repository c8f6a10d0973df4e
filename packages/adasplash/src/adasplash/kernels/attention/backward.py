"""Backward of 1.5-entmax attention in two kernels.

With `u = relu(z - tau)`, so `p = u ** 2`, the Jacobian of the weights with respect to the scores is
`diag(u) - u u^T / sum(u)`. Hence

    dP = dO V^T        delta_i = sum_j u_ij dP_ij / sum_j u_ij        dS = u (dP - delta)
    dQ = scale dS K    dK = scale dS^T Q    dV = p^T dO

1. *Queries*: one program per tile of queries; the first sweep over its active blocks adds up delta,
   the second dQ.
2. *Keys*: one program per tile of keys; for every query head of its group it visits the tiles of
   queries that give these keys weight, and adds up dK and dV.

Only blocks that the forward marked as active are visited. There are no atomics: the result is the
same in every run. Rows with `tau = +inf` have u = 0 and get zero gradients. Layout as in
`forward.py`. Source: AdaSplash (arXiv 2502.12082), section 3.3 and appendix.
"""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl

from .forward import list_blocks
from .tiles import half_scores, load_rows, padded, store_rows, tiles_for


@triton.jit
@no_type_check
def _queries_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, mask_ptr, tau_ptr, list_ptr, count_ptr, dq_ptr, delta_ptr,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn, stride_ob, stride_oh, stride_om,
    stride_db, stride_dh, stride_dm, stride_mask,
    heads, group, seq_q, seq_k, dim_head, dim_value, scale, n_tiles, n_blocks,
    IS_CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Write delta and dQ of one tile of queries."""
    place = tl.program_id(0).to(tl.int64)
    tile, plane = place % n_tiles, place // n_tiles
    batch, head = plane // heads, plane % heads
    q_ptr += batch * stride_qb + head * stride_qh
    k_ptr += batch * stride_kb + head // group * stride_kh
    v_ptr += batch * stride_vb + head // group * stride_vh
    do_ptr += batch * stride_ob + head * stride_oh
    dq_ptr += batch * stride_db + head * stride_dh
    mask_ptr += batch * stride_mask
    list_ptr += place * n_blocks
    count = tl.load(count_ptr + place)
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    q = load_rows(q_ptr, stride_qm, rows, seq_q, dim_head, BLOCK_D)
    do = load_rows(do_ptr, stride_om, rows, seq_q, dim_value, BLOCK_DV)
    tau = tl.load(tau_ptr + plane * seq_q + rows, mask=rows < seq_q, other=float("inf"))

    weighted = tl.zeros([BLOCK_M], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for index in range(0, count):
        keys = tl.load(list_ptr + index) * BLOCK_N + tl.arange(0, BLOCK_N)
        k = load_rows(k_ptr, stride_kn, keys, seq_k, dim_head, BLOCK_D)
        v = load_rows(v_ptr, stride_vn, keys, seq_k, dim_value, BLOCK_DV)
        z = half_scores(q, k, scale * 0.5, rows, keys, seq_q, seq_k, mask_ptr, IS_CAUSAL, HAS_MASK)
        u = z - tau[:, None]
        u = tl.where(u < 0.0, 0.0, u)  # keeps NaN
        dp = tl.dot(do, tl.trans(v), input_precision="ieee")
        weighted += tl.sum(u * dp, 1)
        total += tl.sum(u, 1)
    delta = weighted / tl.where(total == 0.0, 1.0, total)
    tl.store(delta_ptr + plane * seq_q + rows, delta, mask=rows < seq_q)

    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for index in range(0, count):
        keys = tl.load(list_ptr + index) * BLOCK_N + tl.arange(0, BLOCK_N)
        k = load_rows(k_ptr, stride_kn, keys, seq_k, dim_head, BLOCK_D)
        v = load_rows(v_ptr, stride_vn, keys, seq_k, dim_value, BLOCK_DV)
        z = half_scores(q, k, scale * 0.5, rows, keys, seq_q, seq_k, mask_ptr, IS_CAUSAL, HAS_MASK)
        u = z - tau[:, None]
        u = tl.where(u < 0.0, 0.0, u)
        ds = u * (tl.dot(do, tl.trans(v), input_precision="ieee") - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
    store_rows(dq_ptr, dq * scale, stride_dm, rows, seq_q, dim_head, BLOCK_D)


@triton.jit
@no_type_check
def _keys_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, mask_ptr, tau_ptr, delta_ptr, list_ptr, count_ptr, dk_ptr, dv_ptr,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn, stride_ob, stride_oh, stride_om,
    stride_dkb, stride_dkh, stride_dkn, stride_dvb, stride_dvh, stride_dvn, stride_mask,
    heads, group, seq_q, seq_k, dim_head, dim_value, scale, n_tiles, n_blocks,
    IS_CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Write dK and dV of one tile of keys, summed over the query heads that share them."""
    place = tl.program_id(0).to(tl.int64)
    block, plane = place % n_blocks, place // n_blocks
    heads_kv = heads // group
    batch, head_kv = plane // heads_kv, plane % heads_kv
    k_ptr += batch * stride_kb + head_kv * stride_kh
    v_ptr += batch * stride_vb + head_kv * stride_vh
    mask_ptr += batch * stride_mask
    keys = block * BLOCK_N + tl.arange(0, BLOCK_N)
    k = load_rows(k_ptr, stride_kn, keys, seq_k, dim_head, BLOCK_D)
    v = load_rows(v_ptr, stride_vn, keys, seq_k, dim_value, BLOCK_DV)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    for member in range(0, group):
        head = head_kv * group + member
        line = (batch * heads + head) * n_blocks + block
        row_base = (batch * heads + head) * seq_q
        count = tl.load(count_ptr + line)
        for index in range(0, count):
            tile = tl.load(list_ptr + line * n_tiles + index)
            rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
            q = load_rows(
                q_ptr + batch * stride_qb + head * stride_qh,
                stride_qm, rows, seq_q, dim_head, BLOCK_D,
            )  # fmt: skip
            do = load_rows(
                do_ptr + batch * stride_ob + head * stride_oh,
                stride_om, rows, seq_q, dim_value, BLOCK_DV,
            )  # fmt: skip
            tau = tl.load(tau_ptr + row_base + rows, mask=rows < seq_q, other=float("inf"))
            delta = tl.load(delta_ptr + row_base + rows, mask=rows < seq_q, other=0.0)
            z = half_scores(
                q, k, scale * 0.5, rows, keys, seq_q, seq_k, mask_ptr, IS_CAUSAL, HAS_MASK
            )
            u = z - tau[:, None]
            u = tl.where(u < 0.0, 0.0, u)
            dv = tl.dot(tl.trans((u * u).to(do.dtype)), do, dv, input_precision="ieee")
            ds = u * (tl.dot(do, tl.trans(v), input_precision="ieee") - delta[:, None])
            dk = tl.dot(tl.trans(ds.to(q.dtype)), q, dk, input_precision="ieee")
    dk_ptr += batch * stride_dkb + head_kv * stride_dkh
    dv_ptr += batch * stride_dvb + head_kv * stride_dvh
    store_rows(dk_ptr, dk * scale, stride_dkn, keys, seq_k, dim_head, BLOCK_D)
    store_rows(dv_ptr, dv, stride_dvn, keys, seq_k, dim_value, BLOCK_DV)


def launch_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_mask: torch.Tensor | None,
    tau: torch.Tensor,
    active: torch.Tensor,
    scale: float,
    is_causal: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of q, k and v.

    Args:
        grad: Gradient of the output, `[batch, heads, seq_q, dim_value]`, last stride 1.
        q: As in the forward, as are `k`, `v`, `key_mask`, `scale` and `is_causal`.
        k: Keys.
        v: Values.
        key_mask: True for visible keys.
        tau: From the forward.
        active: From the forward.
        scale: Factor of the scores.
        is_causal: Row i sees keys up to `i + seq_k - seq_q`.
    """
    batch, heads, seq_q, dim_head = q.shape
    heads_kv, seq_k, dim_value = v.shape[1:]
    tiles = tiles_for(q, v)
    n_tiles, n_blocks = active.shape[-2:]
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    delta = torch.empty_like(tau)
    mask = q if key_mask is None else key_mask.view(torch.uint8)
    stride_mask = 0 if key_mask is None else mask.stride(0)
    inputs = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *grad.stride()[:3])
    sizes = (
        heads, heads // heads_kv, seq_q, seq_k, dim_head, dim_value, scale, n_tiles, n_blocks,
    )  # fmt: skip
    common = {
        "IS_CAUSAL": is_causal,
        "HAS_MASK": key_mask is not None,
        "BLOCK_M": tiles.block_m,
        "BLOCK_N": tiles.block_n,
        "BLOCK_D": padded(dim_head),
        "BLOCK_DV": padded(dim_value),
        "num_warps": tiles.num_warps,
        "num_stages": tiles.num_stages,
    }
    _queries_kernel[(n_tiles * batch * heads,)](
        q, k, v, grad, mask, tau, *list_blocks(active), dq, delta,
        *inputs, *dq.stride()[:3], stride_mask, *sizes, **common,
    )  # fmt: skip
    _keys_kernel[(n_blocks * batch * heads_kv,)](
        q, k, v, grad, mask, tau, delta, *list_blocks(active.mT.contiguous()), dk, dv,
        *inputs, *dk.stride()[:3], *dv.stride()[:3], stride_mask, *sizes, **common,
    )  # fmt: skip
    return dq, dk, dv
