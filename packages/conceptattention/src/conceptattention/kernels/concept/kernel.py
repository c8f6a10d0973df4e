"""Two kernels whose work is one read of what a layer computed for the image.

1. *Attention*: at most 16 queries, so one tile of them meets every key. Programs split the patches
   and write partial sums with their running maximum; a second kernel adds the concepts' own keys
   and merges. Rotary positions are applied as keys are loaded: feature d needs its neighbour d ^ 1.
2. *Scores*: a tile of patches meets all concepts, feature block by feature block; then
   normalisation, softmax over concepts and both running means, without writing the scores.
"""

from typing import no_type_check

import triton
import triton.language as tl


@triton.jit
@no_type_check
def partial_attention(
    q_ptr, key_ptr, value_ptr, cos_ptr, sin_ptr, part_ptr, max_ptr, sum_ptr,
    stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    heads, concepts, patches, scale, splits, per_split,
    ROTARY: tl.constexpr, R: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write unnormalised outputs, maxima and sums of one split of the patches."""
    plane, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    batch, head = plane // heads, plane % heads
    row, col = tl.arange(0, R), tl.arange(0, D)
    inside = row < concepts
    q = tl.load(
        q_ptr + (plane * concepts + row[:, None]) * D + col[None, :],
        mask=inside[:, None],
        other=0.0,
    )
    key_ptr += batch * stride_kb + head * stride_kh
    value_ptr += batch * stride_vb + head * stride_vh
    sign = tl.where(col % 2 == 0, -1.0, 1.0)
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
            mate = tl.load(
                key_ptr + n[:, None] * stride_kn + (col ^ 1)[None, :], mask=live[:, None], other=0.0
            )
            turn = n[:, None] * D + col[None, :]
            cos = tl.load(cos_ptr + turn, mask=live[:, None], other=0.0)
            sin = tl.load(sin_ptr + turn, mask=live[:, None], other=0.0)
            k = (k.to(tl.float32) * cos + mate.to(tl.float32) * sign[None, :] * sin).to(q.dtype)
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
    place = (plane * splits + split) * R + row
    tl.store(part_ptr + place[:, None] * D + col[None, :], out)
    tl.store(max_ptr + place, top)
    tl.store(sum_ptr + place, total)


@triton.jit
@no_type_check
def merge_attention(
    q_ptr, k_ptr, v_ptr, part_ptr, max_ptr, sum_ptr, out_ptr,
    concepts, scale, splits, SELF: tl.constexpr, R: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Add the concepts' own keys, merge the splits, and write the outputs."""
    plane = tl.program_id(0).to(tl.int64)
    row, col = tl.arange(0, R), tl.arange(0, D)
    inside = row < concepts
    place = (plane * concepts + row[:, None]) * D + col[None, :]
    top = tl.full([R], float("-inf"), tl.float32)
    total = tl.zeros([R], tl.float32)
    out = tl.zeros([R, D], tl.float32)
    if SELF:
        q = tl.load(q_ptr + place, mask=inside[:, None], other=0.0)
        k = tl.load(k_ptr + place, mask=inside[:, None], other=0.0)
        v = tl.load(v_ptr + place, mask=inside[:, None], other=0.0)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        s = tl.where(inside[None, :], s, float("-inf"))
        top = tl.max(s, 1)
        p = tl.exp(s - top[:, None])
        total = tl.sum(p, 1)
        out = tl.dot(p.to(v.dtype), v, input_precision="ieee")
    for split in range(0, splits):
        line = (plane * splits + split) * R + row
        other = tl.load(max_ptr + line)
        new = tl.maximum(top, other)
        mine, theirs = tl.exp(top - new), tl.exp(other - new)
        part = tl.load(part_ptr + line[:, None] * D + col[None, :])
        out = out * mine[:, None] + part * theirs[:, None]
        total = total * mine + tl.load(sum_ptr + line) * theirs
        top = new
    tl.store(out_ptr + place, out / total[:, None], mask=inside[:, None])


@triton.jit
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
