"""Triton kernels that end a decoding layer and start the next, in one launch.

    hidden[t, :] = residual[t, :] + update[t, :] + sum_j softmax(logits[t, :])_j v_j
    normed[t, :] = hidden[t, :] weight / sqrt(mean(hidden[t, :]^2) + eps)

The vectors v_j and their layout are those of the combine kernel. One program computes all channels
of a token; sizes are constants. Sums accumulate in float32, and `hidden` is not rounded before its
norm is taken.

For plain values and NF4 everything is asked for before anything is used. Left to itself, the
compiler saves registers and waits for memory several times; volatile loads stay in their order.
Source: Jie et al. 2025 (arXiv 2503.15798), equation 6; the fusion is own.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl

from .kernel import _form, _vectors

_AHEAD = 16  # vectors that are in registers at a time


@triton.jit
@no_type_check  # a runtime type checker would hide the helpers from the interpreter
def _scales(
    scales, d, mask, FIRST: tl.constexpr, SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr
):  # as `d`, or one for all
    """Scales of the `SIZE` channels from `FIRST` on."""
    if BLOCK_SIZE % SIZE == 0:  # one block covers them
        found = tl.load(scales + FIRST // BLOCK_SIZE, volatile=True)
    else:
        found = tl.load(scales + (FIRST + d) // BLOCK_SIZE, mask=mask, other=0.0, volatile=True)
    return found


@triton.jit
@no_type_check
def _ask(
    row, scales, d, mask, DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, FORMAT: tl.constexpr
):  # tuple, for `_decode`
    """What is stored of channels `d` of one vector; for NF4 also of those `DIM / 2` further on."""
    if FORMAT == "nf4":
        asked = (
            _scales(scales, d, mask, 0, DIM // 2, BLOCK_SIZE),
            _scales(scales, d, mask, DIM // 2, DIM // 2, BLOCK_SIZE),
            tl.load(row + d, mask=mask, other=0, volatile=True),
        )
    else:
        asked = (tl.load(row + d, mask=mask, other=0.0, volatile=True),)
    return asked


@triton.jit
@no_type_check
def _decode(stored, codebook_ptr, keep, FORMAT: tl.constexpr):  # two of [BLOCK_D]
    """Values of the channels that `_ask` asked for; twice the same but for NF4."""
    if FORMAT == "nf4":
        pairs = stored[2].to(tl.int32)
        low = tl.load(codebook_ptr + (pairs & keep)) * stored[0].to(tl.float32)
        high = tl.load(codebook_ptr + (pairs >> 4 & keep)) * stored[1].to(tl.float32)
    else:
        low = stored[0].to(tl.float32)
        high = low
    return low, high


@triton.jit
@no_type_check
def _norm_kernel(
    logits_ptr,
    values_ptr,
    scales_ptr,
    residual_ptr,
    update_ptr,
    weight_ptr,
    codebook_ptr,
    out_ptr,
    normed_ptr,
    stride_lt,
    stride_vt,
    stride_st,
    stride_rt,
    stride_ut,
    eps,
    DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    EXPERTS: tl.constexpr,
    STRIDE_VN: tl.constexpr,
    STRIDE_SN: tl.constexpr,
    FORMAT: tl.constexpr,
    AHEAD: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program computes all channels of one token."""
    HALVES: tl.constexpr = FORMAT == "nf4"
    SIZE: tl.constexpr = DIM // 2 if HALVES else DIM
    token = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    mask = d < SIZE
    row, scales = values_ptr + token * stride_vt, scales_ptr + token * stride_st
    residual_row, update_row = residual_ptr + token * stride_rt, update_ptr + token * stride_ut
    ahead = ()
    for j in tl.static_range(AHEAD):
        asked = _ask(row + j * STRIDE_VN, scales + j * STRIDE_SN, d, mask, DIM, BLOCK_SIZE, FORMAT)
        ahead += (asked,)
    residual = tl.load(residual_row + d, mask=mask, other=0.0, volatile=True)
    update = tl.load(update_row + d, mask=mask, other=0.0, volatile=True)
    weight = tl.load(weight_ptr + d, mask=mask, other=0.0, volatile=True)
    if HALVES:
        residual2 = tl.load(residual_row + SIZE + d, mask=mask, other=0.0, volatile=True)
        update2 = tl.load(update_row + SIZE + d, mask=mask, other=0.0, volatile=True)
        weight2 = tl.load(weight_ptr + SIZE + d, mask=mask, other=0.0, volatile=True)
    logits = ()
    for j in tl.static_range(EXPERTS):
        logit = tl.load(logits_ptr + token * stride_lt + j, volatile=True)
        logits += (logit.to(tl.float32),)
    top = logits[0]
    for j in tl.static_range(1, EXPERTS):
        top = tl.maximum(top, logits[j])
    # Codes are looked up when everything was asked for: their mask depends on what was asked for
    # last, and on the codebook, which has come near meanwhile.
    last = logits[EXPERTS - 1] + 0.0 * (tl.load(codebook_ptr) + tl.load(codebook_ptr + 8))
    keep = tl.where(last == last, 15, 0)  # all bits, unless the logits are no numbers anyway
    total, total2 = tl.zeros([BLOCK_D], dtype=tl.float32), tl.zeros([BLOCK_D], dtype=tl.float32)
    norm = 0.0
    for first in tl.static_range(0, EXPERTS, AHEAD):
        vectors = ahead
        if first > 0:
            vectors = ()
            for j in tl.static_range(AHEAD):
                if first + j < EXPERTS:
                    n = first + j
                    asked = _ask(
                        row + n * STRIDE_VN,
                        scales + n * STRIDE_SN,
                        d,
                        mask,
                        DIM,
                        BLOCK_SIZE,
                        FORMAT,
                    )
                    vectors += (asked,)
        for j in tl.static_range(AHEAD):
            if first + j < EXPERTS:
                numerator = tl.exp(logits[first + j] - top)
                norm += numerator
                low, high = _decode(vectors[j], codebook_ptr, keep, FORMAT)
                total += numerator * low
                if HALVES:
                    total2 += numerator * high
    out = residual.to(tl.float32) + update.to(tl.float32) + total / norm
    out = tl.where(mask, out, 0.0)  # code 0 is not the value 0
    squares = out * out
    if HALVES:
        out2 = residual2.to(tl.float32) + update2.to(tl.float32) + total2 / norm
        out2 = tl.where(mask, out2, 0.0)
        squares += out2 * out2
    rms = tl.rsqrt(tl.sum(squares, axis=0) / DIM + eps)
    kind = out_ptr.dtype.element_ty
    out_row, normed_row = out_ptr + token * DIM + d, normed_ptr + token * DIM + d
    tl.store(out_row, out.to(kind), mask=mask)
    tl.store(normed_row, (out * rms * weight.to(tl.float32)).to(kind), mask=mask)
    if HALVES:
        tl.store(out_row + SIZE, out2.to(kind), mask=mask)
        normed2 = out2 * rms * weight2.to(tl.float32)
        tl.store(normed_row + SIZE, normed2.to(kind), mask=mask)


@triton.jit
@no_type_check
def _weights(logits_row, experts, BLOCK_N: tl.constexpr):
    """Largest logit, and one over the sum of the softmax's numerators, as scalars of the program.

    Every thread has them without asking others, and so has each expert's weight.
    """
    top = tl.load(logits_row).to(tl.float32)
    for j in tl.static_range(1, BLOCK_N):
        logit = tl.load(logits_row + j, mask=j < experts, other=float("-inf"))
        top = tl.maximum(top, logit.to(tl.float32))
    total = 0.0
    for j in tl.static_range(BLOCK_N):
        logit = tl.load(logits_row + j, mask=j < experts, other=float("-inf"))
        total += tl.exp(logit.to(tl.float32) - top)
    return top, 1.0 / total


@triton.jit
@no_type_check
def _codes_norm_kernel(
    logits_ptr,
    values_ptr,
    scales_ptr,
    residual_ptr,
    update_ptr,
    weight_ptr,
    codebook_ptr,
    out_ptr,
    normed_ptr,
    stride_lt,
    stride_vt,
    stride_vn,
    stride_st,
    stride_sn,
    stride_rt,
    stride_ut,
    experts,
    eps,
    DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    FORMAT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program computes all channels of one token from int8, float8 or NF3 codes.

    Their scales are vectors: asked for by volatile loads, which pass the L1 cache, they cost more
    than they save.
    """
    token = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    logits_row = logits_ptr + token * stride_lt
    row, scale_row = values_ptr + token * stride_vt, scales_ptr + token * stride_st
    top, inverse = _weights(logits_row, experts, BLOCK_N)
    norm_weight = tl.load(weight_ptr + d, mask=d < DIM, other=0.0).to(tl.float32)
    residual = tl.load(residual_ptr + token * stride_rt + d, mask=d < DIM, other=0.0)
    update = tl.load(update_ptr + token * stride_ut + d, mask=d < DIM, other=0.0)
    total = tl.zeros([BLOCK_D], dtype=tl.float32)
    for j in tl.static_range(BLOCK_N):
        logit = tl.load(logits_row + j, mask=j < experts, other=float("-inf"))
        weight = tl.exp(logit.to(tl.float32) - top)
        mask = (d < DIM) & (j < experts)
        vector, scales = row + j * stride_vn, scale_row + j * stride_sn
        total += weight * _vectors(vector, scales, d, mask, DIM, BLOCK_SIZE, codebook_ptr, FORMAT)
    out = residual.to(tl.float32) + update.to(tl.float32) + inverse * total
    rms = tl.rsqrt(tl.sum(out * out, axis=0) / DIM + eps)
    kind = out_ptr.dtype.element_ty
    tl.store(out_ptr + token * DIM + d, out.to(kind), mask=d < DIM)
    normed = out * rms * norm_weight
    tl.store(normed_ptr + token * DIM + d, normed.to(kind), mask=d < DIM)


def _warps(block_d: int, form: str) -> int:
    """Return the warps of a program for so many channels; measured on an H200 at a width of 1,024.

    For plain values a thread has eight channels of every vector that it asks for ahead.
    """
    return max(4, min(block_d // 256, 16)) if form == "float" else 8


def _launch_norm(
    logits: torch.Tensor,
    values: torch.Tensor,
    residual: torch.Tensor,
    update: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    scales: torch.Tensor | None,
    codebook: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the combined tokens and their norms; shapes were checked by the caller."""
    tokens, dim = residual.shape
    experts = logits.shape[1]
    out = torch.empty((tokens, dim), dtype=residual.dtype, device=residual.device)
    normed = torch.empty_like(out)
    if tokens == 0:
        return out, normed
    values, form, block_size = _form(values, scales, dim)
    scales = logits if scales is None else scales  # not read
    block_d = triton.next_power_of_2(dim // 2 if form == "nf4" else dim)
    if form not in ("float", "nf4"):
        _codes_norm_kernel[(tokens,)](
            logits,
            values,
            scales,
            residual,
            update,
            weight,
            codebook,
            out,
            normed,
            logits.stride(0),
            values.stride(0),
            values.stride(1),
            scales.stride(0),
            scales.stride(1),
            residual.stride(0),
            update.stride(0),
            experts,
            eps,
            DIM=dim,
            BLOCK_SIZE=block_size,
            FORMAT=form,
            BLOCK_N=triton.next_power_of_2(experts),
            BLOCK_D=block_d,
            num_warps=_warps(block_d, form),
        )
        return out, normed
    _norm_kernel[(tokens,)](
        logits,
        values,
        scales,
        residual,
        update,
        weight,
        codebook,
        out,
        normed,
        logits.stride(0),
        values.stride(0),
        scales.stride(0),
        residual.stride(0),
        update.stride(0),
        eps,
        DIM=dim,
        BLOCK_SIZE=block_size,
        EXPERTS=experts,
        STRIDE_VN=values.stride(1),
        STRIDE_SN=scales.stride(1),
        FORMAT=form,
        AHEAD=min(experts, _AHEAD),
        BLOCK_D=block_d,
        num_warps=_warps(block_d, form),
    )
    return out, normed
