"""What shapes the scores beyond the product, for all kernels alike.

    z_ij = (alpha - 1) (cap tanh(scale q_i . k_j / cap) - slope |j - i - shift| + bias_ij)

with `shift = seq_k - seq_q`; each of cap, slope and bias may be missing. What a kernel has to know
is the constant FORM, a set of the bits below. Without any of them (`FORM == 0`) the scores are the
bare products, and kernels compile to what they would be without this file. With one of SHAPED,
scores come out times alpha - 1, and the factor of the kernel is 1.

PACKED: sequences stand one after another in `[1, heads, tokens, dim]`, and each attends to itself.
The grid covers their tiles without the host knowing where they begin: sequence s has its tiles from
slot `bounds[s] // BLOCK + s` on, which leaves room for the part of a tile at the end of each, and a
program finds its sequence by bisection. Slots that hold no tile have an empty list.

Source: cap as in Gemma 2 (arXiv 2408.00118), slopes as in ALiBi (arXiv 2108.12409).
"""

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl

from .tiles import hide, load_tile

CAPPED = tl.constexpr(1)
SLOPED = tl.constexpr(2)
BIASED = tl.constexpr(4)
PACKED = tl.constexpr(8)
CLOSE = tl.constexpr(16)  # eight neighbouring keys of the bias can be read at once
PLACED = tl.constexpr(2 + 4)  # scores depend on where row and key stand
SHAPED = tl.constexpr(1 + 2 + 4)


@triton.jit
@no_type_check
def factor_of(scale, alpha, FORM: tl.constexpr):
    """Return what the kernel multiplies scores by."""
    return 1.0 if SHAPED & FORM else scale * (alpha - 1.0)


@triton.jit
@no_type_check
def terms_of(
    plane, batch, head, scale, alpha, cap, slopes_ptr, bias_ptr,
    bias_batch, bias_head, bias_row, bias_key, FORM: tl.constexpr,
):  # fmt: skip
    """Return what `shaped` takes as `terms`, for one head."""
    slope = tl.load(slopes_ptr + plane) if SLOPED & FORM else 0.0
    if BIASED & FORM:
        bias_ptr += batch.to(tl.int64) * bias_batch + head.to(tl.int64) * bias_head
    return scale, alpha - 1.0, cap, slope, bias_ptr, bias_row, bias_key


@triton.jit
@no_type_check
def tanh(x):
    """Return tanh to float32 rounding: a polynomial near 0, where exponentials cancel."""
    square = x * x
    near = x * (1.0 + square * (-1.0 / 3.0 + square * (2.0 / 15.0 - square * (17.0 / 315.0))))
    power = tl.exp2(-2.8853900817779268 * tl.abs(x))  # exp(-2 |x|)
    far = (1.0 - power) / (1.0 + power)
    return tl.where(tl.abs(x) < 0.2, near, tl.where(x < 0.0, -far, far))


@triton.jit
@no_type_check
def distance_of(rows, keys, seq_q, seq_k):
    """Return how far keys are from the places of the rows, float32."""
    return tl.abs(keys - rows - (seq_k - seq_q)).to(tl.float32)


@triton.jit
@no_type_check
def lowest(ptr):
    """Return the smallest finite number of a pointer's dtype: as a bias it hides keys, as -inf."""
    if ptr.dtype.element_ty == tl.float16:
        return -65504.0
    elif ptr.dtype.element_ty == tl.bfloat16:
        return -3.3895313892515355e38
    else:
        return -3.4028234663852886e38


@triton.jit
@no_type_check
def shaped(s, rows, keys, first, seq_q, seq_k, terms, FORM: tl.constexpr):
    """Return scores times alpha - 1 for products, and the slope of the cap, 1 without one.

    Without SHAPED products stay what they are. `rows`, from `first` on, and `keys` are index
    tensors that broadcast to the shape of `s`; where one lies outside, scores may be anything.
    """
    gate = 1.0
    if SHAPED & FORM:
        scale, degree, cap, slope, bias_ptr, bias_row, bias_key = terms
        s = s * scale
        if CAPPED & FORM:
            bent = tanh(s / cap)
            s = cap * bent
            gate = 1.0 - bent * bent
        if SLOPED & FORM:
            s = s - slope * distance_of(rows, keys, seq_q, seq_k)
        if BIASED & FORM:
            bias_ptr += tl.cast(first, tl.int64) * bias_row
            if CLOSE & FORM:
                # Else threads would go down the rows, and read each key by itself. What lies
                # behind the last key is hidden later.
                places = bias_ptr + (rows - first) * bias_row + keys
                inside = (rows < seq_q) & (keys < (seq_k + 7) // 8 * 8)
                if keys.shape[0] == 1:
                    places = tl.multiple_of(places, [1, 8])
                    inside = tl.max_constancy(inside, [1, 8])
                else:
                    places = tl.multiple_of(places, [8, 1])
                    inside = tl.max_constancy(inside, [8, 1])
                bias = tl.load(places, mask=inside, other=0.0)
            else:
                places = bias_ptr + (rows - first) * bias_row + keys * bias_key
                inside = (rows < seq_q) & (keys < seq_k)
                bias = tl.load(places, mask=inside, other=0.0)
            s = s + tl.where(bias <= lowest(bias_ptr), float("-inf"), bias.to(tl.float32))
        s = s * degree
    return s, gate


@triton.jit
@no_type_check
def scores(
    q, k, mask_ptr, terms, first, start, seq_q, seq_k, left, right,
    IS_CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr, HAS_WINDOW: tl.constexpr,
    FORM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Return scores of the rows from `first` on and the keys from `start` on; -inf where hidden.

    Products if not SHAPED, else scores times alpha - 1. Beside them the slope of the cap.
    """
    s = tl.dot(q, k.T, input_precision="ieee")
    gate = 1.0
    if SHAPED & FORM:
        rows = (first + tl.arange(0, BLOCK_M))[:, None]
        keys = (start + tl.arange(0, BLOCK_N))[None, :]
        s, gate = shaped(s, rows, keys, first, seq_q, seq_k, terms, FORM)
    s = hide(
        s, first, start, seq_q, seq_k, mask_ptr, left, right,
        IS_CAUSAL, HAS_MASK, HAS_WINDOW, BLOCK_M, BLOCK_N, BLOCK_N,
    )  # fmt: skip
    return s, gate


@triton.jit
@no_type_check
def load_part(
    desc, batch, head, base, start, limit,
    FORM: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Load rows of one sequence, which begins at `base` and has `limit`; what lies outside is 0."""
    if PACKED & FORM:
        x = load_tile(desc, batch, head, base + start, ROWS, BLOCK_D)
        inside = start + tl.arange(0, ROWS) < limit
        return tl.where(inside[:, None], x, tl.zeros_like(x))
    else:
        return load_tile(desc, batch, head, start, ROWS, BLOCK_D)


@triton.jit
@no_type_check
def sequence_of(
    slot, bounds_ptr, bounds_q_ptr, bounds_k_ptr, n_seq, seq_q, seq_k,
    FORM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Return which tile of its sequence a slot holds, and where that lies.

    Args:
        slot: Number of the tile, of queries or of keys.
        bounds_ptr: Those of the two bounds below that the slots are made of.
        bounds_q_ptr: Where the queries of the sequences begin, and where the last one ends.
        bounds_k_ptr: The same for keys.
        n_seq: How many sequences.
        seq_q: Queries in all.
        seq_k: Keys in all.
        FORM: Without PACKED there is one sequence, and the slot is the tile.
        BLOCK: Rows of a tile.

    Returns:
        The tile; the first query and the number of queries; the same for keys; the sequence.
    """
    if PACKED & FORM:
        low, high = slot * 0, slot * 0 + n_seq - 1
        while low < high:
            middle = (low + high + 1) // 2
            reached = tl.load(bounds_ptr + middle) // BLOCK + middle <= slot
            low = tl.where(reached, middle, low)
            high = tl.where(reached, high, middle - 1)
        tile = slot - tl.load(bounds_ptr + low) // BLOCK - low
        # Bounds that do not rise, or lie outside, cost rows but touch no memory of others.
        row = tl.minimum(tl.maximum(tl.load(bounds_q_ptr + low), 0), seq_q)
        key = tl.minimum(tl.maximum(tl.load(bounds_k_ptr + low), 0), seq_k)
        n_rows = tl.minimum(tl.maximum(tl.load(bounds_q_ptr + low + 1), row), seq_q) - row
        n_keys = tl.minimum(tl.maximum(tl.load(bounds_k_ptr + low + 1), key), seq_k) - key
        return tile, row, n_rows, key, n_keys, low
    else:
        return slot, 0, seq_q, 0, seq_k, 0


@triton.jit
@no_type_check
def slots_of(seq, n_seq, FORM: tl.constexpr, BLOCK: tl.constexpr):
    """Return for how many tiles there is room; as `tiles.n_slots`."""
    return seq // BLOCK + n_seq if PACKED & FORM else tl.cdiv(seq, BLOCK)
