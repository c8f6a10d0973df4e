"""Products of few rows with one weight or several, each weight read once.

    products   x weight^T for 1 to 16 rows of x and up to three weights, in one launch
    gated      silu(x gate^T) * (x up^T)

Tensors are contiguous. Sums are in float32, and results rounded as those of separate products are.
One and two rows by multiplication and addition, more by matrix instructions. Source: own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

Config = tuple[int, int, int, int]
# Outputs and inputs a program takes at a time, warps and stages, by rows: one, two, or more.
# The best of a sweep on an H200 over the layers of models of 5 and 8 B.
CONFIGS: dict[int, list[Config]] = {
    1: [(8, 512, 4, 3), (16, 256, 4, 3), (2, 2048, 4, 3)],
    2: [(2, 1024, 4, 3), (8, 512, 4, 3)],
    16: [(32, 256, 4, 4), (64, 128, 4, 5), (16, 256, 4, 3)],
}


def padded(rows: int) -> int:
    """Return the rows that a kernel computes for so many, a key of `CONFIGS`."""
    return rows if rows <= 2 else 16


@triton.jit
@no_type_check
def _product(
    x_ptr,
    line,
    real,
    rows,
    inputs,
    BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """Return a few outputs of all rows, `[BLOCK_O, BLOCK_T]`; `line` points to their weights."""
    i = tl.arange(0, BLOCK_I)
    t = tl.arange(0, BLOCK_T)
    if BLOCK_T <= 2:
        first = tl.zeros([BLOCK_O, BLOCK_I], tl.float32)
        second = tl.zeros([BLOCK_O, BLOCK_I], tl.float32)
        for start in range(0, inputs, BLOCK_I):
            inside = start + i < inputs
            w = tl.load(line + start, mask=real[:, None] & inside[None, :], other=0.0)
            w = w.to(tl.float32)
            x = tl.load(x_ptr + start + i, mask=inside, other=0.0)
            first += w * x.to(tl.float32)[None, :]
            if BLOCK_T == 2:
                x = tl.load(x_ptr + inputs + start + i, mask=inside, other=0.0)
                second += w * x.to(tl.float32)[None, :]
        total = tl.sum(first, axis=1)[:, None] + tl.zeros([BLOCK_O, BLOCK_T], tl.float32)
        if BLOCK_T == 2:
            total = tl.where(t[None, :] == 0, total, tl.sum(second, axis=1)[:, None])
    else:
        total = tl.zeros([BLOCK_O, BLOCK_T], tl.float32)
        for start in range(0, inputs, BLOCK_I):
            inside = start + i < inputs
            w = tl.load(line + start, mask=real[:, None] & inside[None, :], other=0.0)
            x = tl.load(
                x_ptr + t[None, :] * inputs + start + i[:, None],
                mask=inside[:, None] & (t < rows)[None, :],
                other=0.0,
            )  # [BLOCK_I, BLOCK_T]
            total = tl.dot(w, x, total, input_precision="ieee")
    return total


@triton.jit
@no_type_check
def _products_kernel(
    x_ptr,
    weight_ptr,
    second_ptr,
    third_ptr,
    out_ptr,
    second_out_ptr,
    third_out_ptr,
    rows,
    outputs,
    second_outputs,
    third_outputs,
    inputs,
    COUNT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """Compute a few outputs of all rows, of one weight."""
    block = tl.program_id(0)
    if COUNT > 1:
        before = tl.cdiv(outputs, BLOCK_O)
        both = before + tl.cdiv(second_outputs, BLOCK_O)
        if block >= both:
            weight_ptr, out_ptr, outputs, block = (
                third_ptr,
                third_out_ptr,
                third_outputs,
                block - both,
            )
        elif block >= before:
            weight_ptr, out_ptr, outputs, block = (
                second_ptr,
                second_out_ptr,
                second_outputs,
                block - before,
            )
    o = block * BLOCK_O + tl.arange(0, BLOCK_O)
    t = tl.arange(0, BLOCK_T)
    real = o < outputs
    line = weight_ptr + o.to(tl.int64)[:, None] * inputs + tl.arange(0, BLOCK_I)[None, :]
    total = _product(x_ptr, line, real, rows, inputs, BLOCK_T, BLOCK_O, BLOCK_I)
    there = real[:, None] & (t < rows)[None, :]
    tl.store(out_ptr + t[None, :] * outputs + o[:, None], total, mask=there)


@triton.jit
@no_type_check
def _gated_kernel(
    x_ptr,
    gate_ptr,
    up_ptr,
    out_ptr,
    rows,
    outputs,
    inputs,
    BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """Compute a few outputs of all rows, gated."""
    o = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    t = tl.arange(0, BLOCK_T)
    real = o < outputs
    place = o.to(tl.int64)[:, None] * inputs + tl.arange(0, BLOCK_I)[None, :]
    kind = out_ptr.dtype.element_ty
    gate = _product(x_ptr, gate_ptr + place, real, rows, inputs, BLOCK_T, BLOCK_O, BLOCK_I)
    up = _product(x_ptr, up_ptr + place, real, rows, inputs, BLOCK_T, BLOCK_O, BLOCK_I)
    wide = gate.to(kind).to(tl.float32)
    silu = (wide / (1.0 + tl.exp(-wide))).to(kind)
    there = real[:, None] & (t < rows)[None, :]
    tl.store(out_ptr + t[None, :] * outputs + o[:, None], silu * up.to(kind), mask=there)


def launch_products(x: Tensor, weights: Sequence[Tensor], config: Config) -> list[Tensor]:
    """Return `x @ weight.T` for 1 to 16 rows and each of one or three weights."""
    rows, inputs = x.shape
    block_o, block_i, warps, stages = config
    outs = [torch.empty(rows, len(w), dtype=x.dtype, device=x.device) for w in weights]
    three = list(weights) if len(weights) > 1 else list(weights) * 3
    three_outs = outs if len(weights) > 1 else outs * 3
    _products_kernel[(sum(triton.cdiv(len(weight), block_o) for weight in weights),)](
        x,
        *three,
        *three_outs,
        rows,
        *map(len, three),
        inputs,
        COUNT=len(weights),
        BLOCK_T=padded(rows),
        BLOCK_O=block_o,
        BLOCK_I=block_i,
        num_warps=warps,
        num_stages=stages,
    )
    return outs


def launch_gated(x: Tensor, weights: Sequence[Tensor], config: Config) -> Tensor:
    """Return `silu(x @ gate.T) * (x @ up.T)` for 1 to 16 rows and two weights."""
    rows, inputs = x.shape
    gate, up = weights
    block_o, block_i, warps, stages = config
    out = torch.empty(rows, len(gate), dtype=x.dtype, device=x.device)
    _gated_kernel[(triton.cdiv(len(gate), block_o),)](
        x,
        gate,
        up,
        out,
        rows,
        len(gate),
        inputs,
        BLOCK_T=padded(rows),
        BLOCK_O=block_o,
        BLOCK_I=block_i,
        num_warps=warps,
        num_stages=stages,
    )
    return out
