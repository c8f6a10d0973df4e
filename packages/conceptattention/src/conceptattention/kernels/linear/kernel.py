r"""Linear layers of a few rows: one read of the weights at the speed of memory.

A concept stream has 1 to 64 rows x, so a linear layer costs what reading its weight W costs:

    y = (act_out(p(x) W^T + b)) * gate + residual,          W of shape (columns, features)
    p(x) = act_in(x), or norm(x) * (1 + scale) + shift with norm(x) = (x - mean) / sqrt(var + eps)

in which scale, shift and gate belong to an image, so to a group of consecutive rows. Every program
owns a tile of columns, walks over all features, and meets each weight once; the few rows are read
again by every program, from the cache. The normalisation's mean and variance are found in a first
walk over the rows, tile by tile (Chan et al. 1979: means and squared deviations of parts add up),
so nothing is written between norm, projection, activation, gate and residual. Up to three weights
of one shape (queries, keys, values) are handled by one launch, side by side.

Products are summed in float32 and rounded once. There is no split over features and no atomic
addition: the result is the same in every run.
"""

from typing import no_type_check

import triton
import triton.language as tl


@triton.jit
@no_type_check
def _gelu_tanh(x):
    inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
    return x * tl.sigmoid(2 * inner)  # 0.5 (1 + tanh(a)) = sigmoid(2 a)


@triton.jit
@no_type_check
def _activate(x, ACT: tl.constexpr):
    if ACT == "silu":
        x = x * tl.sigmoid(x)
    elif ACT == "gelu_tanh":
        x = _gelu_tanh(x)
    elif ACT == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    return x


@triton.jit(do_not_specialize=["rows", "group"])
@no_type_check
def few_rows(
    x_ptr, w0_ptr, w1_ptr, w2_ptr, b0_ptr, b1_ptr, b2_ptr, y_ptr,
    scale_ptr, shift_ptr, norm_w_ptr, norm_b_ptr, gate_ptr, residual_ptr,
    rows, group, features, columns, stride_scale, stride_shift, stride_gate, eps,
    NORM: tl.constexpr, AFFINE: tl.constexpr, MODULATE: tl.constexpr, ACT_IN: tl.constexpr,
    ACT_OUT: tl.constexpr, BIAS: tl.constexpr, GATE: tl.constexpr, RESIDUAL: tl.constexpr,
    ONE: tl.constexpr, EVEN: tl.constexpr,
    R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Write one tile of columns of one of the weights' products."""
    which = tl.program_id(1)
    row = tl.arange(0, R)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside, owned = row < rows, n < columns
    image = row // group
    w_ptr = tl.where(which == 0, w0_ptr, tl.where(which == 1, w1_ptr, w2_ptr))
    line = row[:, None] * features
    if ACT_IN == "swiglu":
        line *= 2
    if NORM:
        mean = tl.zeros([R], tl.float32)
        square = tl.zeros([R], tl.float32)
        seen = 0.0
        for start in range(0, features, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            known = k < features
            x = tl.load(x_ptr + line + k[None, :], mask=inside[:, None] & known[None, :], other=0.0)
            x = x.to(tl.float32)
            size = tl.minimum(BLOCK_K, features - start).to(tl.float32)
            part = tl.sum(x, 1) / size
            apart = tl.where(known[None, :], x - part[:, None], 0.0)
            step = part - mean
            square += tl.sum(apart * apart, 1) + step * step * (seen * size / (seen + size))
            mean += step * (size / (seen + size))
            seen += size
        spread = tl.rsqrt(square / features + eps)
    total = tl.zeros([R, BLOCK_N], tl.float32)
    for start in range(0, features, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        known = k < features
        place = n[:, None].to(tl.int64) * features + k[None, :]
        if EVEN:
            w = tl.load(w_ptr + place)
        else:
            w = tl.load(w_ptr + place, mask=owned[:, None] & known[None, :], other=0.0)
        live = inside[:, None] & known[None, :]
        x = tl.load(x_ptr + line + k[None, :], mask=live, other=0.0)
        if ACT_IN == "swiglu":
            wide = x.to(tl.float32)
            up = tl.load(x_ptr + line + features + k[None, :], mask=live, other=0.0)
            x = wide * tl.sigmoid(wide) * up.to(tl.float32)
        elif ACT_IN != "none":
            x = _activate(x.to(tl.float32), ACT_IN)
        if NORM:
            x = (x.to(tl.float32) - mean[:, None]) * spread[:, None]
            if AFFINE:
                norm_w = tl.load(norm_w_ptr + k, mask=known, other=0.0).to(tl.float32)
                norm_b = tl.load(norm_b_ptr + k, mask=known, other=0.0).to(tl.float32)
                x = x * norm_w[None, :] + norm_b[None, :]
        if MODULATE:
            if ONE:
                scale = tl.load(scale_ptr + k, mask=known, other=0.0)[None, :]
                shift = tl.load(shift_ptr + k, mask=known, other=0.0)[None, :]
            else:
                scale_place = image[:, None] * stride_scale + k[None, :]
                scale = tl.load(scale_ptr + scale_place, mask=live, other=0.0)
                shift_place = image[:, None] * stride_shift + k[None, :]
                shift = tl.load(shift_ptr + shift_place, mask=live, other=0.0)
            x = x.to(tl.float32) * (1.0 + scale.to(tl.float32)) + shift.to(tl.float32)
        total = tl.dot(x.to(w.dtype), tl.trans(w), total, input_precision="ieee")
    if BIAS:
        b_ptr = tl.where(which == 0, b0_ptr, tl.where(which == 1, b1_ptr, b2_ptr))
        total += tl.load(b_ptr + n, mask=owned, other=0.0).to(tl.float32)[None, :]
    total = _activate(total, ACT_OUT)
    live = inside[:, None] & owned[None, :]
    if GATE:
        gate = tl.load(gate_ptr + image[:, None] * stride_gate + n[None, :], mask=live, other=0.0)
        total *= gate.to(tl.float32)
    place = row[:, None] * columns + n[None, :]
    if RESIDUAL:
        total += tl.load(residual_ptr + place, mask=live, other=0.0).to(tl.float32)
    tl.store(y_ptr + which * rows * columns + place, total, mask=live)
