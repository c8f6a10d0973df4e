"""Triton kernel of the combine operation, forward only.

    out[t, :] = residual[t, :] + sum_j softmax(logits[t, :])_j scale[r, j, :] code(values[r, j, :])

Row r of token t is t itself, or `index[t]` where tokens share rows.
Layout: all tensors row-major with unit stride in the last axis; the other strides are free, so that
one layer's slice of the gathered rows needs no copy. Softmax and sum accumulate in float32; the
result has the residual's type. Values are float32, float16, bfloat16, int8 or float8 (e4m3) codes,
NF4 pairs (uint8: byte i holds element i in the low half, element i + dim/2 in the high half) or NF3
planes (uint8: dim/4 bytes with the low bits of four quarters, dim/8 bytes with the high bits of
eight eighths). Any number of experts and any dim (even for NF4, a multiple of 8 for NF3). Rows of
NaN logits give NaN. `_combine_norm_kernel` (codes) and `_plain_norm_kernel` (plain values) add an
update to the residual first and return the RMSNorm of the result, too: the end of a decoding layer
and the start of the next in one launch.
Source: Jie et al. 2025 (arXiv 2503.15798), equation 6.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl

from fourfold_common import tuning_configs

_TUNING = tuning_configs(
    [
        triton.Config({"BLOCK_D": 512}, num_warps=4),  # few tokens: long rows, one program each
        triton.Config({"BLOCK_D": 256}, num_warps=2),  # more programs for narrow models
        triton.Config({"BLOCK_D": 1024}, num_warps=8),  # wide models
    ]
)


@triton.jit
@no_type_check  # a runtime type checker would hide the helpers from the interpreter
def _softmax(logits):  # [BLOCK_N] -> [BLOCK_N]
    """Softmax of one row of logits; masked entries are -inf."""
    weights = tl.exp(logits - tl.max(logits, axis=0))
    return weights / tl.sum(weights, axis=0)


@triton.jit
@no_type_check
def _vectors(
    rows, scale_rows, d, mask, dim, block_size, codebook_ptr, FORMAT: tl.constexpr
):  # as `mask`
    """Decoded channels `d` of the vectors that begin at `rows`; shapes are broadcast."""
    if FORMAT == "nf4":
        half = dim // 2
        low = d < half
        pairs = tl.load(rows + tl.where(low, d, d - half), mask=mask, other=0).to(tl.int32)
        codes = tl.where(low, pairs & 15, pairs >> 4)
        values = tl.load(codebook_ptr + codes, mask=mask, other=0.0)
    elif FORMAT == "nf3":
        quarter = dim // 4
        eighth = dim // 8
        lows = tl.load(rows + (d % quarter), mask=mask, other=0).to(tl.int32)
        highs = tl.load(rows + (quarter + d % eighth), mask=mask, other=0).to(tl.int32)
        lows = (lows >> (2 * (d // quarter))) & 3
        highs = (highs >> (d // eighth)) & 1
        values = tl.load(codebook_ptr + 16 + (lows | highs << 2), mask=mask, other=0.0)
    elif FORMAT == "fp8":
        # The bits of e4m3, seven places up, are those of a float16 that is 256 times too small.
        bits = tl.load(rows + d, mask=mask, other=0).to(tl.int16)
        half_bits = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7)
        values = half_bits.to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    else:
        values = tl.load(rows + d, mask=mask, other=0).to(tl.float32)
    if FORMAT != "float":
        scales = scale_rows + d // block_size
        values *= tl.load(scales, mask=mask, other=0.0).to(tl.float32)
    return values


_AHEAD = 16  # vectors whose values are in registers at a time


@triton.autotune(configs=_TUNING, key=["dim", "experts"])
@triton.jit
@no_type_check  # a runtime type checker would hide the helpers from the interpreter
def _combine_kernel(
    logits_ptr,
    values_ptr,
    scales_ptr,
    residual_ptr,
    codebook_ptr,
    index_ptr,
    out_ptr,
    stride_lt,
    stride_vt,
    stride_vn,
    stride_st,
    stride_sn,
    stride_rt,
    stride_ot,
    experts,
    dim,
    block_size,
    INDEXED: tl.constexpr,
    FORMAT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program computes BLOCK_D channels of one token."""
    token = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, BLOCK_N)  # [BLOCK_N]
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)  # [BLOCK_D]
    logits = tl.load(logits_ptr + token * stride_lt + n, mask=n < experts, other=float("-inf")).to(
        tl.float32
    )
    gates = _softmax(logits)  # [BLOCK_N]

    row = token
    if INDEXED:
        row = tl.load(index_ptr + token).to(tl.int64)
    rows = values_ptr + row * stride_vt + n[:, None] * stride_vn  # [BLOCK_N, 1]
    mask = (n[:, None] < experts) & (d[None, :] < dim)  # [BLOCK_N, BLOCK_D]
    scale_rows = scales_ptr + row * stride_st + n[:, None] * stride_sn
    values = _vectors(rows, scale_rows, d[None, :], mask, dim, block_size, codebook_ptr, FORMAT)

    residual = tl.load(residual_ptr + token * stride_rt + d, mask=d < dim, other=0.0)
    out = residual.to(tl.float32) + tl.sum(gates[:, None] * values, axis=0)  # [BLOCK_D]
    tl.store(out_ptr + token * stride_ot + d, out.to(out_ptr.dtype.element_ty), mask=d < dim)


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


def _warps(elements: int, form: str) -> int:
    """Return the warps of a program that adds up so many values; measured on an H200."""
    if form == "float":
        return 4 if elements <= 4096 else 8
    return 16 if form == "nf4" else 8


def _form(
    values: torch.Tensor, scales: torch.Tensor | None, dim: int
) -> tuple[torch.Tensor, str, int]:
    """Return the values as the kernels read them, their format, and the elements of a block."""
    if scales is None:
        return values, "float", dim
    block_size = dim // scales.shape[-1]
    if values.dtype == torch.int8:
        return values, "int8", block_size
    if values.dtype == torch.float8_e4m3fn:
        return values.view(torch.uint8), "fp8", block_size
    return values, "nf4" if 2 * values.shape[-1] == dim else "nf3", block_size


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
    block_n = triton.next_power_of_2(experts)
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
            num_warps=_warps(block_n * block_d, form),
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
        BLOCK_N=block_n,
        BLOCK_D=block_d,
        num_warps=_warps(block_n * block_d, form),
    )
    return out, normed


def _launch_forward(
    logits: torch.Tensor,
    values: torch.Tensor,
    residual: torch.Tensor,
    scales: torch.Tensor | None,
    codebook: torch.Tensor,
    index: torch.Tensor | None,
) -> torch.Tensor:
    """Return the combined tokens; shapes were checked by the caller."""
    tokens, dim = residual.shape
    experts = logits.shape[1]
    out = torch.empty((tokens, dim), dtype=residual.dtype, device=residual.device)
    if tokens == 0:
        return out
    values, form, block_size = _form(values, scales, dim)
    scales = logits if scales is None else scales
    _combine_kernel[lambda meta: (tokens, triton.cdiv(dim, meta["BLOCK_D"]))](
        logits,
        values,
        scales,
        residual,
        codebook,
        logits if index is None else index,
        out,
        logits.stride(0),
        values.stride(0),
        values.stride(1),
        scales.stride(0),
        scales.stride(1),
        residual.stride(0),
        out.stride(0),
        experts,
        dim,
        block_size,
        INDEXED=index is not None,
        FORMAT=form,
        BLOCK_N=triton.next_power_of_2(experts),
    )
    return out
