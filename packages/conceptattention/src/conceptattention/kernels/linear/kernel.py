r"""Linear layers of a few rows: one read of the weights at the speed of memory.

A concept stream has 1 to 64 rows x, so a linear layer costs what reading its weight W costs:

    y = act_out(p(x) W^T + b) * gate + residual,            W of shape (columns, features)
    p(x) = act_in(x), or norm(x) * (1 + scale) + shift with norm(x) = (x - mean) / sqrt(var + eps)

in which scale, shift and gate belong to an image, so to a group of consecutive rows. One kernel
makes p(x), a program for each row: some kilobytes, where doing it in every program of the product
would cost more than reading the weights. The other owns a tile of columns a program, walks over all
features, and meets each weight once, past the cache's reserved part, as it is not needed again; the
rows come from the cache. What follows on the product stays in registers. Up to three weights of one
shape (queries, keys, values) are handled by one launch, side by side.

Products are summed in float32 and rounded once. There is no split over features and no atomic
addition: the result is the same in every run.
"""

from typing import no_type_check

import triton
import triton.language as tl


@triton.jit
@no_type_check
def _activate(x, ACT: tl.constexpr):
    if ACT == "silu":
        x = x * tl.sigmoid(x)
    elif ACT == "gelu_tanh":  # 0.5 (1 + tanh(a)) = sigmoid(2 a)
        x = x * tl.sigmoid(2 * 0.7978845608028654 * (x + 0.044715 * x * x * x))
    elif ACT == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    return x


@triton.jit(do_not_specialize=["group"])
@no_type_check
def prepare_rows(
    x_ptr, y_ptr, scale_ptr, shift_ptr, norm_w_ptr, norm_b_ptr,
    group, features, stride_scale, stride_shift, eps,
    NORM: tl.constexpr, AFFINE: tl.constexpr, MODULATE: tl.constexpr, ACT: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Write p(x) of one block of one row; with a norm the block is the whole row."""
    row = tl.program_id(0)
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    known = k < features
    if ACT == "swiglu":
        x = tl.load(x_ptr + row * 2 * features + k, mask=known, other=0.0).to(tl.float32)
        up = tl.load(x_ptr + (row * 2 + 1) * features + k, mask=known, other=0.0)
        x = x * tl.sigmoid(x) * up.to(tl.float32)
    else:
        x = tl.load(x_ptr + row * features + k, mask=known, other=0.0).to(tl.float32)
        x = _activate(x, ACT)
    if NORM:
        x = tl.where(known, x - tl.sum(x, 0) / features, 0.0)
        x *= tl.rsqrt(tl.sum(x * x, 0) / features + eps)
        if AFFINE:
            x *= tl.load(norm_w_ptr + k, mask=known, other=0.0).to(tl.float32)
            x += tl.load(norm_b_ptr + k, mask=known, other=0.0).to(tl.float32)
    if MODULATE:
        image = row // group
        scale = tl.load(scale_ptr + image * stride_scale + k, mask=known, other=0.0)
        shift = tl.load(shift_ptr + image * stride_shift + k, mask=known, other=0.0)
        x = x * (1.0 + scale.to(tl.float32)) + shift.to(tl.float32)
    tl.store(y_ptr + row * features + k, x, mask=known)


@triton.jit(do_not_specialize=["rows", "group"])
@no_type_check
def few_rows(
    x_ptr, w0_ptr, w1_ptr, w2_ptr, b0_ptr, b1_ptr, b2_ptr, y_ptr, gate_ptr, residual_ptr,
    rows, group, features, columns, stride_gate,
    ACT: tl.constexpr, BIAS: tl.constexpr, GATE: tl.constexpr, RESIDUAL: tl.constexpr,
    EVEN: tl.constexpr, R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Write one tile of columns of one of the weights' products."""
    which = tl.program_id(1)
    row = tl.arange(0, R)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside, owned = row < rows, n < columns
    w_ptr = tl.where(which == 0, w0_ptr, tl.where(which == 1, w1_ptr, w2_ptr))
    w_ptr += n[:, None].to(tl.int64) * features
    x_ptr += row[:, None] * features
    total = tl.zeros([BLOCK_N, R], tl.float32)
    for start in range(0, features, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        if EVEN:
            w = tl.load(w_ptr + k[None, :], eviction_policy="evict_first")
            x = tl.load(x_ptr + k[None, :], mask=inside[:, None], other=0.0)
        else:
            known = (k < features)[None, :]
            w = tl.load(w_ptr + k[None, :], mask=owned[:, None] & known, other=0.0)
            x = tl.load(x_ptr + k[None, :], mask=inside[:, None] & known, other=0.0)
        # The weights stand on the left, as matrix units are wider there than on the right.
        total = tl.dot(w, tl.trans(x), total, input_precision="ieee")
    total = tl.trans(total)
    if BIAS:
        b_ptr = tl.where(which == 0, b0_ptr, tl.where(which == 1, b1_ptr, b2_ptr))
        total += tl.load(b_ptr + n, mask=owned, other=0.0).to(tl.float32)[None, :]
    total = _activate(total, ACT)
    live = inside[:, None] & owned[None, :]
    if GATE:
        place = (row // group)[:, None] * stride_gate + n[None, :]
        total *= tl.load(gate_ptr + place, mask=live, other=0.0).to(tl.float32)
    place = row[:, None] * columns + n[None, :]
    if RESIDUAL:
        total += tl.load(residual_ptr + place, mask=live, other=0.0).to(tl.float32)
    tl.store(y_ptr + which * rows * columns + place, total, mask=live)
