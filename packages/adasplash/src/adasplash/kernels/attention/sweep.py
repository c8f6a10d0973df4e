"""The gradient of the queries in one sweep over the blocks, for alpha 1.5 in half formats.

delta is known only after all blocks, but dS = u (dP - delta) is linear in it:

    dQ = scale ((u (dP - d)) K - (delta - d) (u K))

for any d of a row. It saves a product and all loads of the second sweep. So that little cancels, d
is the mean of dP by u in the first block where the row has weight; roundings of the two sums grow
by half. Layout as in `backward.py`. Source: own.
"""

from __future__ import annotations

from typing import Any, no_type_check

import torch
import triton
import triton.language as tl

from ..launch import interpreted, launch
from .tiles import (
    SIZES,
    UNALIGNED,
    Problem,
    list_marked,
    load_tile,
    products,
    saturated,
    store_rows,
)

_MOST = 128  # channels of a head: two sums over larger ones do not fit the registers


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=UNALIGNED)
@no_type_check
def _sweep_kernel(
    q_desc, k_desc, v_desc, do_desc, mask_ptr, alpha_ptr, tau_ptr, active_ptr, list_ptr,
    dq_ptr, delta_ptr,
    stride_mask, left, right, heads, group, seq_q, seq_k, n_tiles, n_blocks, scale, dim_head,
    IS_CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr, HAS_WINDOW: tl.constexpr,
    HALF: tl.constexpr, FORM: tl.constexpr, SATURATE: tl.constexpr,
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
    factor = scale * 0.5
    total = tl.zeros([BLOCK_M], tl.float32)
    weighted = tl.zeros([BLOCK_M], tl.float32)
    near = tl.zeros([BLOCK_M], tl.float32)
    bent = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)  # (u (dP - d)) K
    plain = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)  # u K
    for index in range(0, count):
        start = tl.load(list_ptr + index) * BLOCK_N
        k = load_tile(k_desc, batch, head_kv, start, BLOCK_N, BLOCK_D)
        v = load_tile(v_desc, batch, head_kv, start, BLOCK_N, BLOCK_DV)
        s = products(
            q, k, mask_ptr, first, start, seq_q, seq_k, left, right,
            IS_CAUSAL, HAS_MASK, HAS_WINDOW, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        if SATURATE:
            u = saturated(s, factor, -tau[:, None])
        else:
            u = tl.maximum(s * factor - tau[:, None], 0.0)
        dp = tl.dot(do, v.T, input_precision="ieee")
        here = tl.sum(u, 1)
        mean = tl.sum(u * dp, 1)
        # Till a row has weight its sums are zero, and d is still to choose.
        near = tl.where((total == 0.0) & (here > 0.0), mean / tl.where(here > 0.0, here, 1.0), near)
        total += here
        weighted += mean
        bent = tl.dot((u * (dp - near[:, None])).to(k.dtype), k, bent, input_precision="ieee")
        plain = tl.dot(u.to(k.dtype), k, plain, input_precision="ieee")
    delta = weighted / tl.where(total == 0.0, 1.0, total)
    dq = (bent - (delta - near)[:, None] * plain) * scale
    dq = tl.where((tau != tau)[:, None], float("nan"), dq)
    tl.store(delta_ptr + row_base + rows, delta, mask=rows < seq_q)
    store_rows(dq_ptr + row_base * dim_head, dq, rows, seq_q, dim_head, BLOCK_D)


def fits(problem: Problem) -> bool:
    """Return whether `queries_gradient` covers a problem."""
    plain = problem.switches["HALF"] and problem.terms.form == 0 and not problem.terms.dropout
    size = max(problem.q.shape[-1], problem.v.shape[-1])
    return bool(plain) and problem.q.element_size() == 2 and size <= _MOST


def queries_gradient(
    problem: Problem,
    kind: tuple[Any, ...],
    sources: tuple[Any, ...],
    dq: torch.Tensor,
    delta: torch.Tensor,
    constants: dict[str, Any],
) -> None:
    """Write the gradient of the queries, and delta; arguments as `launch_backward` has them."""
    constants = {name: value for name, value in constants.items() if name != "DROPOUT"}
    launch(
        _sweep_kernel, problem.grid[0] * problem.planes, kind,
        *sources, dq, delta, *problem.sizes, problem.scale, problem.q.shape[-1],
        SATURATE=not interpreted(_sweep_kernel), **constants,
    )  # fmt: skip
