"""Triton kernel of the combine operation, forward only.

    out[t, :] = residual[t, :] + sum_j softmax(logits[t, :])_j scale[r, j, :] code(values[r, j, :])

Row r of token t is t itself, or `index[t]` where tokens share rows.
Layout: all tensors row-major with unit stride in the last axis; the other strides are free, so that
one layer's slice of the gathered rows needs no copy. Softmax and sum accumulate in float32; the
result has the residual's type. Values are float32, float16, bfloat16, int8 or float8 (e4m3) codes,
NF4 pairs (uint8: byte i holds element i in the low half, element i + dim/2 in the high half) or NF3
planes (uint8: dim/4 bytes with the low bits of four quarters, dim/8 bytes with the high bits of
eight eighths). Any number of experts and any dim (even for NF4, a multiple of 8 for NF3). Rows of
NaN logits give NaN.
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
