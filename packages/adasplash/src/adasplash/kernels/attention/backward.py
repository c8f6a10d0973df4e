"""Backward of alpha-entmax attention in two kernels, and a third one for a bias.

With `u = p ** (2 - alpha)`, which is `relu(z - tau)` for alpha 1.5, the Jacobian of the weights
with respect to the scores is `diag(u) - u u^T / sum(u)`. Hence

    dP = D (dO V^T)    delta_i = sum_j u_ij dP_ij / sum_j u_ij        dS = u (dP - delta)
    dQ = scale C K     dK = scale C^T Q     dV = (D p)^T dO           C = c' dS

where D is 1 / (1 - dropout) for weights that are kept, else 0, and c' the slope of the cap, both 1
where there is none. The gradient of a slope of ALiBi is the sum of `-dS |distance|`; that of a bias
is in `bias.py`.

1. *Queries*: one program per tile of queries; the first sweep over its active blocks adds up delta,
   the second dQ. In half formats at alpha 1.5 the first one takes a few blocks of a long list. They
   give a guess d of delta, and dQ = scale (A - (delta - d) B), A the sum of u (dP - d) k and B that
   of u k: as d is near, the difference cancels no digits.
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

from ..launch import SideBySide, interpreted, launch
from .bias import bias_gradient
from .philox import words
from .scores import (
    CAPPED,
    PACKED,
    SLOPED,
    distance_of,
    factor_of,
    load_part,
    scores,
    sequence_of,
    shaped,
    slots_of,
    terms_of,
)
from .terms import PLAIN, Terms
from .tiles import (
    SIZES,
    UNALIGNED,
    aligned,
    describe,
    excess,
    hide,
    list_marked,
    load_numbers,
    n_slots,
    padded,
    partial_sums,
    pose,
    settled,
    store_numbers,
    store_rows,
)

_SAMPLE = tl.constexpr(8)  # blocks that delta is guessed from


@triton.jit
@no_type_check
def _block(
    q, k, do, v, tau, mask_ptr, terms, plane, row_at, first, start, seq_q, seq_k, left, right,
    factor, power, seed_ptr, drop_below, keep_scale,
    IS_CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr, HAS_WINDOW: tl.constexpr,
    HALF: tl.constexpr, FORM: tl.constexpr, DROPOUT: tl.constexpr, SATURATE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Return x, u and dP of the rows from `first` on and the keys from `start` on, and c'."""
    s, gate = scores(
        q, k, mask_ptr, terms, first, start, seq_q, seq_k, left, right,
        IS_CAUSAL, HAS_MASK, HAS_WINDOW, FORM, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    x, u = excess(s, factor, tau[:, None], power, HALF, SATURATE)
    dp = tl.dot(do, v.T, input_precision="ieee")
    if DROPOUT:
        drawn = words(tl.load(seed_ptr), plane, row_at + first, start, BLOCK_M, BLOCK_N)
        dp = tl.where(drawn >= drop_below, dp * keep_scale, 0.0)
    return x, u, dp, gate


@triton.jit
@no_type_check
def _ratio(weighted, total):
    """Return the quotient of sums of rows, 0 where the lower is."""
    total = tl.sum(total, 1)
    return tl.sum(weighted, 1) / tl.where(total == 0.0, 1.0, total)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=UNALIGNED)
@no_type_check
def _queries_kernel(
    q_desc, k_desc, v_desc, do_desc, mask_ptr, alpha_ptr, active_ptr, list_ptr, tau_ptr,
    dq_ptr, rows_ptr, dalpha_ptr, dslope_ptr,
    slopes_ptr, bias_ptr, bounds_q_ptr, bounds_k_ptr, n_seq, cap,
    bias_batch, bias_head, bias_row, bias_key,
    stride_mask, left, right, heads, group, seq_q, seq_k, n_tiles, n_blocks, scale,
    seed_ptr, drop_below, keep_scale, dim_head,
    IS_CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr, HAS_WINDOW: tl.constexpr,
    HALF: tl.constexpr, FORM: tl.constexpr, DROPOUT: tl.constexpr,
    QUICK: tl.constexpr, SATURATE: tl.constexpr, ALPHA_GRAD: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Write dQ of one tile of queries, and tau and delta of its rows side by side.

    QUICK: delta of a long list is guessed from some of its blocks. The second sweep finds what the
    guess lacks, and takes it off with what all weights alike would give.
    """
    PARTS: tl.constexpr = 4 if QUICK else 1
    place = tl.program_id(0)
    plane, tile = place // n_tiles, n_tiles - 1 - place % n_tiles
    line = (plane * n_tiles + tile).to(tl.int64)
    batch, head = plane // heads, plane % heads
    head_kv = head // group
    mask_ptr += batch.to(tl.int64) * stride_mask
    list_ptr += line * n_blocks
    active_ptr += line * tl.cdiv(n_blocks, 8)
    count = list_marked(active_ptr, 0, 0, n_blocks, list_ptr, True)
    row_base = plane.to(tl.int64) * seq_q
    tile, row_at, seq_q, key_at, seq_k, _sequence = sequence_of(
        tile, bounds_q_ptr, bounds_q_ptr, bounds_k_ptr, n_seq, seq_q, seq_k, FORM, BLOCK_M
    )
    first = tile * BLOCK_M
    rows = first + tl.arange(0, BLOCK_M)
    row_base += row_at
    q = load_part(q_desc, batch, head, row_at, first, seq_q, FORM, BLOCK_M, BLOCK_D)
    do = load_part(do_desc, batch, head, row_at, first, seq_q, FORM, BLOCK_M, BLOCK_DV)
    tau = tl.load(tau_ptr + row_base + rows, mask=rows < seq_q, other=float("inf"))

    alpha = 1.5 if HALF else tl.load(alpha_ptr + plane)
    power = 1.0 / (alpha - 1.0)
    factor = factor_of(scale, alpha, FORM)
    terms = terms_of(
        plane, batch, head, scale, alpha, cap, slopes_ptr, bias_ptr,
        bias_batch, bias_head, bias_row, bias_key, FORM,
    )  # fmt: skip

    some, step = count, 1
    if QUICK:
        some = tl.minimum(count, _SAMPLE)
        step = tl.maximum(count // _SAMPLE, 1)
    weighted = tl.zeros([BLOCK_M, PARTS], tl.float32)
    total = tl.zeros([BLOCK_M, PARTS], tl.float32)
    p_sum = tl.zeros([BLOCK_M], tl.float32)
    p_dp = tl.zeros([BLOCK_M], tl.float32)
    log_dp = tl.zeros([BLOCK_M], tl.float32)
    entropy = tl.zeros([BLOCK_M], tl.float32)
    for index in range(0, some):
        start = tl.load(list_ptr + index * step) * BLOCK_N
        k = load_part(k_desc, batch, head_kv, key_at, start, seq_k, FORM, BLOCK_N, BLOCK_D)
        v = load_part(v_desc, batch, head_kv, key_at, start, seq_k, FORM, BLOCK_N, BLOCK_DV)
        x, u, dp, _gate = _block(
            q, k, do, v, tau, mask_ptr, terms, plane, row_at, first, start, seq_q, seq_k,
            left, right, factor, power, seed_ptr, drop_below, keep_scale,
            IS_CAUSAL, HAS_MASK, HAS_WINDOW, HALF, FORM, DROPOUT, SATURATE, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        weighted += partial_sums(u * dp, BLOCK_M, BLOCK_N, QUICK)
        total += partial_sums(u, BLOCK_M, BLOCK_N, QUICK)
        if ALPHA_GRAD:
            p = x * u
            log_p = p * power * tl.log(tl.where(x == 0.0, 1.0, x))  # p ln p
            p_sum += tl.sum(p, 1)
            p_dp += tl.sum(p * dp, 1)
            log_dp += tl.sum(log_p * dp, 1)
            entropy += tl.sum(log_p, 1)
    delta = _ratio(weighted, total)
    if ALPHA_GRAD:  # with the sum of p itself: what it lacks to 1 would be blown up near alpha 1
        dalpha = (p_dp - delta * p_sum) * power - (log_dp - delta * entropy)
        tl.store(dalpha_ptr + row_base + rows, dalpha * power, mask=rows < seq_q)

    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if some < count:
        plain = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        weighted = tl.zeros([BLOCK_M, PARTS], tl.float32)
        total = tl.zeros([BLOCK_M, PARTS], tl.float32)
        for index in range(0, count):
            start = tl.load(list_ptr + index) * BLOCK_N
            k = load_part(k_desc, batch, head_kv, key_at, start, seq_k, FORM, BLOCK_N, BLOCK_D)
            v = load_part(v_desc, batch, head_kv, key_at, start, seq_k, FORM, BLOCK_N, BLOCK_DV)
            _x, u, dp, _gate = _block(
                q, k, do, v, tau, mask_ptr, terms, plane, row_at, first, start, seq_q, seq_k,
                left, right, factor, power, seed_ptr, drop_below, keep_scale,
                IS_CAUSAL, HAS_MASK, HAS_WINDOW, HALF, FORM, DROPOUT, SATURATE, BLOCK_M, BLOCK_N,
            )  # fmt: skip
            ds = u * (dp - delta[:, None])
            weighted += partial_sums(ds, BLOCK_M, BLOCK_N, QUICK)
            total += partial_sums(u, BLOCK_M, BLOCK_N, QUICK)
            dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
            plain = tl.dot(u.to(k.dtype), k, plain, input_precision="ieee")
            dq, plain = settled(dq, INTERPRETED), settled(plain, INTERPRETED)
        rest = _ratio(weighted, total)
        dq = dq - rest[:, None] * plain
        delta += rest
    else:
        dslope = tl.zeros([BLOCK_M], tl.float32)
        for index in range(0, count):
            start = tl.load(list_ptr + index) * BLOCK_N
            k = load_part(k_desc, batch, head_kv, key_at, start, seq_k, FORM, BLOCK_N, BLOCK_D)
            v = load_part(v_desc, batch, head_kv, key_at, start, seq_k, FORM, BLOCK_N, BLOCK_DV)
            _x, u, dp, gate = _block(
                q, k, do, v, tau, mask_ptr, terms, plane, row_at, first, start, seq_q, seq_k,
                left, right, factor, power, seed_ptr, drop_below, keep_scale,
                IS_CAUSAL, HAS_MASK, HAS_WINDOW, HALF, FORM, DROPOUT, SATURATE, BLOCK_M, BLOCK_N,
            )  # fmt: skip
            ds = u * (dp - delta[:, None])
            if SLOPED & FORM:
                keys = start + tl.arange(0, BLOCK_N)
                dslope -= tl.sum(ds * distance_of(rows[:, None], keys[None, :], seq_q, seq_k), 1)
            if CAPPED & FORM:
                ds = ds * gate
            dq = settled(tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee"), INTERPRETED)
        if SLOPED & FORM:
            tl.store(dslope_ptr + row_base + rows, dslope, mask=rows < seq_q)
    delta = tl.where(tau != tau, tau, delta)
    store_numbers(rows_ptr, line, tau, delta, BLOCK_M)
    dq = tl.where((tau != tau)[:, None], float("nan"), dq * scale)
    store_rows(dq_ptr + row_base * dim_head, dq, rows, seq_q, dim_head, BLOCK_D)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=UNALIGNED)
@no_type_check
def _keys_kernel(
    q_desc, k_desc, v_desc, do_desc, mask_ptr, alpha_ptr, active_ptr, list_ptr,
    rows_ptr, dk_ptr, dv_ptr,
    slopes_ptr, bias_ptr, bounds_q_ptr, bounds_k_ptr, n_seq, cap,
    bias_batch, bias_head, bias_row, bias_key,
    stride_mask, left, right, heads, group, seq_q, seq_k, n_tiles, n_blocks, scale,
    seed_ptr, drop_below, keep_scale, list_width, dim_head, dim_value,
    IS_CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr, HAS_WINDOW: tl.constexpr,
    HALF: tl.constexpr, FORM: tl.constexpr, DROPOUT: tl.constexpr,
    SATURATE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Write dK and dV of one block of keys, summed over the query heads that share them.

    Tiles are computed transposed, keys by queries, so that no product needs a transposed operand
    that is not in memory.
    """
    place = tl.program_id(0)
    n_slots = slots_of(seq_k, n_seq, FORM, BLOCK_N)
    slot, plane_kv = place % n_slots, place // n_slots
    heads_kv = heads // group
    batch, head_kv = plane_kv // heads_kv, plane_kv % heads_kv
    mask_ptr += batch.to(tl.int64) * stride_mask
    key_base = plane_kv.to(tl.int64) * seq_k
    block, row_at, seq_q, key_at, seq_k, sequence = sequence_of(
        slot, bounds_k_ptr, bounds_q_ptr, bounds_k_ptr, n_seq, seq_q, seq_k, FORM, BLOCK_N
    )
    key_base += key_at
    first_tile, its_tiles = 0, n_tiles
    if PACKED & FORM:  # slots behind the last block of a sequence visit no tile
        first_tile = row_at // BLOCK_M + sequence
        real = (block < tl.cdiv(seq_k, BLOCK_N)) & (block < n_blocks)
        its_tiles = tl.where(real, tl.minimum(tl.cdiv(seq_q, BLOCK_M), list_width), 0)
    first_key = block * BLOCK_N
    keys = first_key + tl.arange(0, BLOCK_N)
    k = load_part(k_desc, batch, head_kv, key_at, first_key, seq_k, FORM, BLOCK_N, BLOCK_D)
    v = load_part(v_desc, batch, head_kv, key_at, first_key, seq_k, FORM, BLOCK_N, BLOCK_DV)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    for member in range(0, group):
        head = head_kv * group + member
        plane = batch * heads + head
        line = plane.to(tl.int64) * n_tiles + first_tile
        n_bytes = tl.cdiv(n_blocks, 8)
        marks = active_ptr + line * n_bytes + block // 8
        listed = list_ptr + (plane * n_slots + slot).to(tl.int64) * list_width
        count = list_marked(marks, n_bytes, block % 8, its_tiles, listed, False)
        alpha = 1.5 if HALF else tl.load(alpha_ptr + plane)
        power = 1.0 / (alpha - 1.0)
        factor = factor_of(scale, alpha, FORM)
        terms = terms_of(
            plane, batch, head, scale, alpha, cap, slopes_ptr, bias_ptr,
            bias_batch, bias_head, bias_row, bias_key, FORM,
        )  # fmt: skip
        for index in range(0, count):
            tile = tl.load(listed + index)
            start = tile * BLOCK_M
            rows = start + tl.arange(0, BLOCK_M)
            q = load_part(q_desc, batch, head, row_at, start, seq_q, FORM, BLOCK_M, BLOCK_D)
            do = load_part(do_desc, batch, head, row_at, start, seq_q, FORM, BLOCK_M, BLOCK_DV)
            tau, delta = load_numbers(rows_ptr, line + tile, BLOCK_M)
            s = tl.dot(k, q.T, input_precision="ieee")  # [BLOCK_N, BLOCK_M]
            s, gate = shaped(s, rows[None, :], keys[:, None], start, seq_q, seq_k, terms, FORM)
            s = hide(
                s, start, first_key, seq_q, seq_k, mask_ptr, left, right,
                IS_CAUSAL, HAS_MASK, HAS_WINDOW, BLOCK_M, BLOCK_N, BLOCK_N, TURNED=True,
            )  # fmt: skip
            x, u = excess(s, factor, tau[None, :], power, HALF, SATURATE)
            p = x * u
            if DROPOUT:
                drawn = words(tl.load(seed_ptr), plane, row_at + start, first_key, BLOCK_M, BLOCK_N)
                keep = tl.trans(drawn) >= drop_below
                p = tl.where(keep, p, 0.0)
            dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
            dp = tl.dot(v, do.T, input_precision="ieee")
            if DROPOUT:
                dp = tl.where(keep, dp * keep_scale, 0.0)
            ds = u * (dp - delta[None, :])
            if CAPPED & FORM:
                ds = ds * gate
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    dk = dk * scale
    if DROPOUT:
        dv = dv * keep_scale
    store_rows(dk_ptr + key_base * dim_head, dk, keys, seq_k, dim_head, BLOCK_D)
    store_rows(dv_ptr + key_base * dim_value, dv, keys, seq_k, dim_value, BLOCK_DV)


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
    terms: Terms = PLAIN,
    *,
    bias_grad: bool = False,
) -> tuple[torch.Tensor, ...]:
    """Return the gradients of q, k, v, alpha (`[batch, heads]`), slopes (as alpha) and bias.

    Those of alpha, slopes and bias are empty where there is none.

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
        terms: What else there is.
        bias_grad: Whether the gradient of the bias is wanted: it takes a kernel of its own.
    """
    problem = pose(q, k, v, key_mask, alpha, scale, is_causal, window, terms)
    grad = aligned(grad)
    tiles, (n_tiles, n_blocks) = problem.tiles, problem.grid
    dim_head, dim_value = q.shape[-1], v.shape[-1]
    dq, dk, dv = (problem.new(*x.shape, dtype=x.dtype) for x in (q, k, v))
    numbers_of_rows = problem.planes, n_tiles, 2, tiles.block_m
    rows = torch.empty(numbers_of_rows, dtype=tau.dtype, device=q.device)
    dalpha = rows if alpha is None else problem.new(*tau.shape, dtype=tau.dtype)
    dslope = rows if terms.slopes is None else problem.new(*tau.shape, dtype=tau.dtype)
    # Keys list tiles of queries in the room where queries list blocks of keys.
    slots = n_slots(k.shape[2], tiles.block_n, terms.n_seq)
    width = triton.cdiv(terms.max_q or q.shape[2], tiles.block_m)
    room = problem.planes * max(n_tiles * n_blocks, slots * width)
    sources = (
        *problem.descriptors, describe(grad, tiles.block_m), problem.mask, problem.alpha,
        active, torch.empty(room, dtype=torch.int32, device=q.device),
    )  # fmt: skip
    interpreting = interpreted(_queries_kernel)
    numbers = *problem.added, *problem.sizes, problem.scale, *problem.drop
    constants = {
        **problem.switches,
        "DROPOUT": terms.dropout > 0.0,
        "SATURATE": problem.quick and not interpreting,
        "BLOCK_DV": padded(dim_value),
        "num_warps": tiles.num_warps,
    }
    kind = *problem.kind, (tau.data_ptr() | active.data_ptr()) % 16  # they may be anybody's
    with SideBySide():
        launch(
            _queries_kernel, n_tiles * problem.planes, kind,
            *sources, tau, dq, rows, dalpha, dslope, *numbers, dim_head,
            QUICK=problem.quick and terms.form in (0, PACKED.value) and not terms.dropout,
            ALPHA_GRAD=alpha is not None, INTERPRETED=interpreting, **constants,
            num_stages=tiles.queries_stages, maxnreg=tiles.most.queries,
        )  # fmt: skip
        launch(
            _keys_kernel, slots * k.shape[0] * k.shape[1], kind,
            *sources, rows, dk, dv, *numbers, width, dim_head, dim_value, **constants,
            num_stages=tiles.keys_stages, maxnreg=tiles.most.keys,
        )  # fmt: skip
    sums = (tau.new_empty(0) if x is rows else x.sum(-1) for x in (dalpha, dslope))
    dbias = bias_gradient(problem, grad, active, rows) if bias_grad else tau.new_empty(0)
    return dq, dk, dv, *sums, dbias
