"""Two kernels whose work is one read of what a layer computed for the image.

1. *Attention*: at most 64 queries, so one tile of them meets every key. Programs split the patches
   and write partial sums with their running maximum; a second kernel, one program a query, adds the
   concepts' own keys and merges. Rotary positions are applied as keys are loaded, pair by pair: the
   tables (patches, dim_head / 2) are shared by all heads. Normalisation of queries and of the
   concepts' keys over the head's features (root mean square or layer) happens on load too.
2. *Scores*: a tile of patches meets all concepts, feature block by feature block; then
   normalisation, softmax over concepts and both running means, without writing the scores.
"""

from typing import no_type_check

import triton
import triton.language as tl


@triton.jit
@no_type_check
def _normalised(x, w_ptr, b_ptr, col, eps, NORM: tl.constexpr, BIAS: tl.constexpr):
    """Return float32 rows x normalised over their features, with weight and bias."""
    x = x.to(tl.float32)
    if NORM != "none":
        if NORM == "layer":
            x -= (tl.sum(x, 1) / x.shape[1])[:, None]
        x *= tl.rsqrt(tl.sum(x * x, 1) / x.shape[1] + eps)[:, None]
        x *= tl.load(w_ptr + col).to(tl.float32)[None, :]
        if BIAS:
            x += tl.load(b_ptr + col).to(tl.float32)[None, :]
    return x


@triton.jit(do_not_specialize=["heads", "concepts", "patches", "splits"])
@no_type_check
def partial_attention(
    q_ptr, key_ptr, value_ptr, cos_ptr, sin_ptr, part_ptr, max_ptr, sum_ptr, norm_w_ptr, norm_b_ptr,
    stride_qb, stride_qh, stride_qr, stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn, heads, concepts, patches, splits, per_split, scale, eps,
    NORM: tl.constexpr, NORM_BIAS: tl.constexpr, ROTARY: tl.constexpr,
    R: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write unnormalised outputs, maxima and sums of one split of the patches."""
    plane, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    batch, head = plane // heads, plane % heads
    row, col = tl.arange(0, R), tl.arange(0, D)
    pair = tl.arange(0, D // 2)
    inside = row < concepts
    q_ptr += batch * stride_qb + head * stride_qh
    key_ptr += batch * stride_kb + head * stride_kh
    value_ptr += batch * stride_vb + head * stride_vh
    q = tl.load(q_ptr + row[:, None] * stride_qr + col[None, :], mask=inside[:, None], other=0.0)
    q = _normalised(q, norm_w_ptr, norm_b_ptr, col, eps, NORM, NORM_BIAS).to(q.dtype)
    top = tl.full([R], float("-inf"), tl.float32)
    total = tl.zeros([R], tl.float32)
    out = tl.zeros([R, D], tl.float32)
    first = split * per_split
    last = tl.minimum(first + per_split, patches)
    for start in range(first, last, BLOCK):
        n = start + tl.arange(0, BLOCK)
        live = n < last
        k = tl.load(key_ptr + n[:, None] * stride_kn + col[None, :], mask=live[:, None], other=0.0)
        if ROTARY:
            turn = n[:, None] * (D // 2) + pair[None, :]
            cos = tl.load(cos_ptr + turn, mask=live[:, None], other=0.0)
            sin = tl.load(sin_ptr + turn, mask=live[:, None], other=0.0)
            even, odd = tl.split(tl.reshape(k.to(tl.float32), [BLOCK, D // 2, 2]))
            k = tl.join(even * cos - odd * sin, odd * cos + even * sin)
            k = tl.reshape(k, [BLOCK, D]).to(q.dtype)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        s = tl.where(live[None, :], s, float("-inf"))
        new = tl.maximum(top, tl.max(s, 1))
        shrink = tl.exp(top - new)
        p = tl.exp(s - new[:, None])
        v = tl.load(
            value_ptr + n[:, None] * stride_vn + col[None, :], mask=live[:, None], other=0.0
        )
        out = out * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        total = total * shrink + tl.sum(p, 1)
        top = new
    place = (plane * concepts + row) * splits + split
    tl.store(part_ptr + place[:, None] * D + col[None, :], out, mask=inside[:, None])
    tl.store(max_ptr + place, top, mask=inside)
    tl.store(sum_ptr + place, total, mask=inside)


@triton.jit(do_not_specialize=["heads", "concepts", "splits"])
@no_type_check
def merge_attention(
    q_ptr, k_ptr, v_ptr, part_ptr, max_ptr, sum_ptr, out_ptr,
    qw_ptr, qb_ptr, kw_ptr, kb_ptr, stride_qb, stride_qh, stride_qr,
    heads, concepts, splits, scale, q_eps, k_eps,
    SELF: tl.constexpr, Q_NORM: tl.constexpr, Q_BIAS: tl.constexpr, K_NORM: tl.constexpr,
    K_BIAS: tl.constexpr, R: tl.constexpr, D: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """Add the concepts' own keys to the merged splits of one query, and write its output."""
    plane, query = tl.program_id(0).to(tl.int64), tl.program_id(1)
    batch, head = plane // heads, plane % heads
    col, split = tl.arange(0, D), tl.arange(0, S)
    line = (plane * concepts + query) * splits + split
    known = split < splits
    tops = tl.load(max_ptr + line, mask=known, other=float("-inf"))
    sums = tl.load(sum_ptr + line, mask=known, other=0.0)
    parts = tl.load(part_ptr + line[:, None] * D + col[None, :], mask=known[:, None], other=0.0)
    top = tl.max(tops, 0)
    if SELF:
        row = tl.arange(0, R)
        inside = row < concepts
        shift = batch * stride_qb + head * stride_qh
        rows = shift + row[:, None] * stride_qr + col[None, :]
        k = tl.load(k_ptr + rows, mask=inside[:, None], other=0.0)
        v = tl.load(v_ptr + rows, mask=inside[:, None], other=0.0).to(tl.float32)
        q = tl.load(q_ptr + shift + query * stride_qr + col)
        # Rounded where the first kernel rounds.
        q = _normalised(q[None, :], qw_ptr, qb_ptr, col, q_eps, Q_NORM, Q_BIAS).to(q.dtype)
        k = _normalised(k, kw_ptr, kb_ptr, col, k_eps, K_NORM, K_BIAS).to(k.dtype)
        s = tl.sum(q.to(tl.float32) * k.to(tl.float32), 1) * scale
        s = tl.where(inside, s, float("-inf"))
        top = tl.maximum(top, tl.max(s, 0))
        p = tl.exp(s - top)
        total = tl.sum(p, 0)
        out = tl.sum(p[:, None] * v, 0)
    else:
        total = 0.0
        out = tl.zeros([D], tl.float32)
    shares = tl.exp(tops - top)
    total += tl.sum(shares * sums, 0)
    out += tl.sum(shares[:, None] * parts, 0)
    place = ((batch * concepts + query) * heads + head) * D + col
    tl.store(out_ptr + place, out / total)


@triton.jit(do_not_specialize=["concepts"])
@no_type_check
def score_patches(
    concept_ptr, patch_ptr, raw_ptr, soft_ptr,
    stride_pb, stride_pn, concepts, patches, dim, count, temperature, scale,
    COSINE: tl.constexpr, R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Update both running means for one tile of patches."""
    batch, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row, n = tl.arange(0, R), tile * BLOCK_N + tl.arange(0, BLOCK_N)
    inside, live = row < concepts, n < patches
    patch_ptr += batch * stride_pb
    concept_ptr += batch * concepts * dim
    s = tl.zeros([BLOCK_N, R], tl.float32)
    square = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, dim, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        known = d < dim
        x = tl.load(
            patch_ptr + n[:, None] * stride_pn + d[None, :],
            mask=live[:, None] & known[None, :], other=0.0,
        )  # fmt: skip
        c = tl.load(
            concept_ptr + row[:, None] * dim + d[None, :],
            mask=inside[:, None] & known[None, :], other=0.0,
        )  # fmt: skip
        s = tl.dot(x, tl.trans(c), s, input_precision="ieee")
        if COSINE:
            wide = x.to(tl.float32)
            square += tl.sum(wide * wide, 1)
    if COSINE:
        s = s / tl.maximum(tl.sqrt(square), 1e-12)[:, None]
    s *= scale
    heat = tl.where(inside[None, :], s / temperature, float("-inf"))
    p = tl.exp(heat - tl.max(heat, 1)[:, None])
    p = p / tl.sum(p, 1)[:, None]
    place = (batch * concepts + row[None, :]) * patches + n[:, None]
    mask = live[:, None] & inside[None, :]
    raw = tl.load(raw_ptr + place, mask=mask, other=0.0)
    soft = tl.load(soft_ptr + place, mask=mask, other=0.0)
    tl.store(raw_ptr + place, raw + (s - raw) / count, mask=mask)
    tl.store(soft_ptr + place, soft + (p - soft) / count, mask=mask)
