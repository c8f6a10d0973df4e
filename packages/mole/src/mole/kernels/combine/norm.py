"""Triton kernels that end a decoding layer and start the next, in one launch.

    hidden[t, :] = residual[t, :] + update[t, :] + sum_j softmax(logits[t, :])_j v_j
    normed[t, :] = hidden[t, :] weight / sqrt(mean(hidden[t, :]^2) + eps)

The vectors v_j and their layout are those of the combine kernel. One program computes all channels
of a token; sizes are constants. `_plain_norm_kernel` takes plain values, `_combine_norm_kernel`
codes. Sums accumulate in float32, and `hidden` is not rounded before its norm is taken.
Source: Jie et al. 2025 (arXiv 2503.15798), equation 6; the fusion is own.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl

from .kernel import _form, _vectors

_AHEAD = 16  # vectors whose values are in registers at a time


@triton.jit
@no_type_check
def _weights(logits_row, experts, BLOCK_N: tl.constexpr):
    """Largest logit, and one over the sum of the softmax's numerators, as scalars of the program.

    Every thread has them without asking others, and so has each expert's weight in `_part`.
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
def _part(
    logits_row,
    top,
    inverse,
    row,
    scale_row,
    stride_vn,
    stride_sn,
    residual_ptr,
    update_ptr,
    codebook_ptr,
    zero,
    experts,
    PART: tl.constexpr,
    SIZE: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    FORMAT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # [BLOCK_D]
    """Sum for the `SIZE` channels of part `PART`; the loop keeps all of a channel in one thread."""
    d = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    c = PART * SIZE + d
    residual = tl.load(residual_ptr + c, mask=d < SIZE, other=0.0).to(tl.float32)
    update = tl.load(update_ptr + c, mask=d < SIZE, other=0.0).to(tl.float32)
    total = tl.zeros([BLOCK_D], dtype=tl.float32) + zero
    for j in tl.static_range(BLOCK_N):
        logit = tl.load(logits_row + j, mask=j < experts, other=float("-inf"))
        weight = tl.exp(logit.to(tl.float32) - top)
        mask = (d < SIZE) & (j < experts)
        values_row, scales = row + j * stride_vn, scale_row + j * stride_sn
        if FORMAT == "nf4":  # a part is one half of the channels: every byte is read whole
            pairs = tl.load(values_row + d, mask=mask, other=0).to(tl.int32)
            codes = pairs >> 4 if PART else pairs & 15
            values = tl.load(codebook_ptr + codes, mask=mask, other=0.0)
            if BLOCK_SIZE % SIZE == 0:  # one block covers the part
                scale = scales + PART * SIZE // BLOCK_SIZE
                weight *= tl.load(scale, mask=j < experts, other=0.0).to(tl.float32)
            else:
                values *= tl.load(scales + c // BLOCK_SIZE, mask=mask, other=0.0).to(tl.float32)
        else:
            values = _vectors(values_row, scales, d, mask, DIM, BLOCK_SIZE, codebook_ptr, FORMAT)
        total += weight * values
    return residual + update + inverse * total


@triton.jit
@no_type_check
def _combine_norm_kernel(
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
    """One program computes all channels of one token from codes; sizes are constants."""
    token = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    logits_row = logits_ptr + token * stride_lt
    row, scale_row = values_ptr + token * stride_vt, scales_ptr + token * stride_st
    zero = 0.0
    if FORMAT == "nf4":  # brings both halves of the codebook near while the codes are on their way
        zero = 0.0 * (tl.load(codebook_ptr) + tl.load(codebook_ptr + 8))
    top, inverse = _weights(logits_row, experts, BLOCK_N)
    PARTS: tl.constexpr = 2 if FORMAT == "nf4" else 1
    SIZE: tl.constexpr = DIM // PARTS
    residual_row = residual_ptr + token * stride_rt
    update_row = update_ptr + token * stride_ut
    first_weight = tl.load(weight_ptr + d, mask=d < SIZE, other=0.0).to(tl.float32)
    first = _part(
        logits_row,
        top,
        inverse,
        row,
        scale_row,
        stride_vn,
        stride_sn,
        residual_row,
        update_row,
        codebook_ptr,
        zero,
        experts,
        0,
        SIZE,
        DIM,
        BLOCK_SIZE,
        FORMAT,
        BLOCK_N,
        BLOCK_D,
    )
    squares = first * first
    if PARTS == 2:
        second_weight = tl.load(weight_ptr + SIZE + d, mask=d < SIZE, other=0.0).to(tl.float32)
        second = _part(
            logits_row,
            top,
            inverse,
            row,
            scale_row,
            stride_vn,
            stride_sn,
            residual_row,
            update_row,
            codebook_ptr,
            zero,
            experts,
            1,
            SIZE,
            DIM,
            BLOCK_SIZE,
            FORMAT,
            BLOCK_N,
            BLOCK_D,
        )
        squares += second * second
    rms = tl.rsqrt(tl.sum(squares, axis=0) / DIM + eps)
    out_row = out_ptr + token * DIM + d
    normed_row = normed_ptr + token * DIM + d
    kind = out_ptr.dtype.element_ty
    tl.store(out_row, first.to(kind), mask=d < SIZE)
    tl.store(normed_row, (first * rms * first_weight).to(kind), mask=d < SIZE)
    if PARTS == 2:
        tl.store(out_row + SIZE, second.to(kind), mask=d < SIZE)
        tl.store(normed_row + SIZE, (second * rms * second_weight).to(kind), mask=d < SIZE)


@triton.jit
@no_type_check
def _plain_norm_kernel(
    logits_ptr,
    values_ptr,
    residual_ptr,
    update_ptr,
    weight_ptr,
    out_ptr,
    normed_ptr,
    stride_lt,
    stride_vt,
    stride_rt,
    stride_ut,
    eps,
    DIM: tl.constexpr,
    EXPERTS: tl.constexpr,
    STRIDE_VN: tl.constexpr,
    AHEAD: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program computes all channels of one token from values that need no decoding.

    Everything is asked for before anything is used, vectors `AHEAD` at a time. Left to itself the
    compiler saves registers and waits for memory several times; volatile loads stay in order.
    """
    token = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    mask = d < DIM
    row = values_ptr + token * stride_vt + d
    ahead = ()
    for j in tl.static_range(AHEAD):
        ahead += (tl.load(row + j * STRIDE_VN, mask=mask, other=0.0, volatile=True),)
    residual = tl.load(residual_ptr + token * stride_rt + d, mask=mask, other=0.0, volatile=True)
    update = tl.load(update_ptr + token * stride_ut + d, mask=mask, other=0.0, volatile=True)
    weight = tl.load(weight_ptr + d, mask=mask, other=0.0, volatile=True)
    logits = ()
    for j in tl.static_range(EXPERTS):
        logit = tl.load(logits_ptr + token * stride_lt + j, volatile=True)
        logits += (logit.to(tl.float32),)
    top = logits[0]
    for j in tl.static_range(1, EXPERTS):
        top = tl.maximum(top, logits[j])
    total, norm = tl.zeros([BLOCK_D], dtype=tl.float32), 0.0
    for first in tl.static_range(0, EXPERTS, AHEAD):
        values = ahead
        if first > 0:
            values = ()
            for j in tl.static_range(AHEAD):
                if first + j < EXPERTS:
                    place = row + (first + j) * STRIDE_VN
                    values += (tl.load(place, mask=mask, other=0.0, volatile=True),)
        for j in tl.static_range(AHEAD):
            if first + j < EXPERTS:
                numerator = tl.exp(logits[first + j] - top)
                norm += numerator
                total += numerator * values[j].to(tl.float32)
    out = residual.to(tl.float32) + update.to(tl.float32) + total / norm
    rms = tl.rsqrt(tl.sum(out * out, axis=0) / DIM + eps)
    kind = out_ptr.dtype.element_ty
    tl.store(out_ptr + token * DIM + d, out.to(kind), mask=mask)
    normed = out * rms * weight.to(tl.float32)
    tl.store(normed_ptr + token * DIM + d, normed.to(kind), mask=mask)


def _warps(block_d: int, form: str) -> int:
    """Return the warps of a program for so many channels; measured on an H200 at a width of 1,024.

    For plain values a thread has eight channels of every vector that it asks for ahead.
    """
    if form == "float":
        return max(4, min(block_d // 256, 16))
    return 16 if form == "nf4" else 8


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
    block_d = triton.next_power_of_2(dim // 2 if form == "nf4" else dim)
    if scales is None:
        _plain_norm_kernel[(tokens,)](
            logits,
            values,
            residual,
            update,
            weight,
            out,
            normed,
            logits.stride(0),
            values.stride(0),
            residual.stride(0),
            update.stride(0),
            eps,
            DIM=dim,
            EXPERTS=experts,
            STRIDE_VN=values.stride(1),
            AHEAD=min(experts, _AHEAD),
            BLOCK_D=block_d,
            num_warps=_warps(block_d, form),
        )
        return out, normed
    _combine_norm_kernel[(tokens,)](
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
