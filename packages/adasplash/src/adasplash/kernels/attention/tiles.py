"""Tile sizes, and the host and device code that forward and backward share.

Scores are multiplied by alpha - 1 throughout: `z = (alpha - 1) scale * q k^T`, in float32 after the
product; half the scores for alpha 1.5. Hidden keys are `-inf`. Forward and backward compute them by
the same product, so they see the same numbers.

Tensors are read through tensor descriptors: the hardware computes addresses and fills what lies
outside with zeros, so any length and head size is a runtime value and costs no test per element.

Device functions are marked `no_type_check`: the type checker of the test suite would wrap them, and
the interpreter would no longer find the helpers that they call.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from .dropout import cut
from .mask import some_hidden, summarize
from .terms import PLAIN, Terms

# Arguments of every kernel; no value of them compiles anything.
SIZES = ["first_place", "stride_mask", "left", "right", "heads", "group", "seq_q", "seq_k",
         "n_tiles", "n_blocks", "max_passes", "max_tries", "n_seq", "bias_batch", "bias_head",
         "bias_row", "bias_key", "drop_below", "list_width", "its_heads", "batches",
         "n_heads"]  # fmt: skip
# The caller's own, at any address.
UNALIGNED = ["mask_ptr", "alpha_ptr", "slopes_ptr", "bias_ptr", "bounds_q_ptr", "bounds_k_ptr",
             "seed_ptr"]  # fmt: skip
TINY = 1e-30  # stands for a scale of 0, by which the -inf of hidden keys cannot be multiplied


class Registers(NamedTuple):
    """What a thread may take at most: with less, more programs fit. None: what it asks for."""

    screen: int | None = None
    threshold: int | None = None
    output: int | None = None
    queries: int | None = None
    keys: int | None = None


class Tiles(NamedTuple):
    """Launch parameters of the attention kernels."""

    block_m: int  # rows and keys of the blocks that are skipped or visited
    block_n: int
    num_warps: int
    num_stages: int
    output_stages: int
    screen_m: int  # a tile of the screening pass, multiples of the block
    screen_n: int
    screen_warps: int
    screen_stages: int
    queries_stages: int
    keys_stages: int
    most: Registers = Registers()
    powers: Registers = Registers()  # instead of it, for alphas other than 1.5
    drops: Registers = Registers()  # under dropout


# By the padded head size; float32 products need twice the room.
_HALF = {
    64: Tiles(
        64,
        64,
        4,
        2,
        2,
        128,
        128,
        4,
        3,
        2,
        3,
        Registers(168, 72, 128, 168),
        powers=Registers(168, 128, 128, 168, 168),
        drops=Registers(168, None, 128, 168),
    ),
    128: Tiles(64, 64, 4, 2, 3, 128, 128, 8, 2, 2, 2, powers=Registers(threshold=128)),
    256: Tiles(64, 32, 8, 2, 2, 64, 64, 4, 2, 2, 2),
}
_FULL = {
    64: Tiles(64, 32, 8, 2, 2, 64, 32, 8, 2, 2, 2),  # 8 warps: with 4 more registers spill
    128: Tiles(32, 32, 8, 2, 2, 32, 32, 8, 2, 2, 2),
    256: Tiles(32, 16, 8, 1, 1, 32, 16, 8, 1, 1, 1),
}


def padded(dim: int) -> int:
    """Return the size that a head of `dim` channels is padded to in the kernels."""
    return max(16, 1 << (dim - 1).bit_length())


def tiles_for(q: torch.Tensor, v: torch.Tensor) -> Tiles:
    """Return the launch parameters for the dtype of `q` and the larger head size of `q` and `v`."""
    return _tiles(q.dtype, max(q.shape[-1], v.shape[-1]))


def _tiles(dtype: torch.dtype, dim: int) -> Tiles:
    return (_FULL if dtype == torch.float32 else _HALF)[max(64, padded(dim))]


def aligned(x: torch.Tensor) -> torch.Tensor:
    """Return `x` itself if a descriptor can hold it, else a copy whose rows are 16-byte aligned."""
    unit = 16 // x.element_size()
    if x.data_ptr() % 16 == 0 and _steady(x.shape, x.stride(), unit):
        return x
    width = -(-x.shape[-1] // unit) * unit
    copy = x.new_empty(*x.shape[:-1], width)[..., : x.shape[-1]]
    return copy.copy_(x)


@lru_cache(4096)
def _steady(shape: tuple[int, ...], strides: tuple[int, ...], unit: int) -> bool:
    """Return whether rows are whole units apart, and the numbers of a row side by side."""
    rest = zip(strides[:-1], shape[:-1], strict=True)
    return strides[-1] == 1 and all(n > 0 and n % unit == 0 for n, size in rest if size > 1)


def describe(x: torch.Tensor, rows: int) -> TensorDescriptor:
    """Return a descriptor of `rows` rows at a time of an aligned `[batch, heads, seq, dim]`."""
    fields = _fields(x.shape, x.stride(), x.dtype, rows)
    descriptor = object.__new__(TensorDescriptor)  # what it would check has been checked once
    descriptor.__dict__ = {**fields, "base": x}
    return descriptor


@lru_cache(4096)
def _fields(
    shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype, rows: int
) -> dict[str, Any]:
    """Return what a descriptor holds beside the tensor."""
    # The stride of an axis of size 1 is never used, but it must be a legal one.
    legal = [s if n > 1 else 64 for s, n in zip(strides[:-1], shape[:-1], strict=True)]
    base = torch.empty(1, dtype=dtype)
    descriptor = TensorDescriptor(base, list(shape), [*legal, 1], [1, 1, rows, padded(shape[-1])])
    return {name: x for name, x in vars(descriptor).items() if name != "base"}


def n_slots(seq: int, block: int, n_seq: int) -> int:
    """Return for how many tiles there is room: packed sequences need not begin at a tile's."""
    return seq // block + n_seq if n_seq else -(-seq // block)


def marks_of(
    shape: tuple[int, ...], keys: int, tiles: Tiles, n_seq: int, max_k: int
) -> tuple[int, int]:
    """Return the tiles of queries, and the blocks of keys of the longest sequence.

    What is kept is a bit for each of them, in rows of whole bytes.
    """
    return n_slots(shape[2], tiles.block_m, n_seq), -(-(max_k or keys) // tiles.block_n)


class Problem(NamedTuple):
    """What the launches of one call have in common; see `pose`."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    descriptors: tuple[TensorDescriptor, TensorDescriptor, TensorDescriptor]  # q, k, v by blocks
    mask: torch.Tensor  # as in `mask.py`; any tensor where there is none
    alpha: torch.Tensor  # any tensor for 1.5
    scale: float
    tiles: Tiles
    # stride of the mask, left, right, heads, group, seq_q, seq_k, tiles of queries, blocks of keys
    sizes: tuple[int, ...]
    switches: dict[str, Any]  # constants of all kernels
    kind: tuple[Any, ...]  # what else their variants depend on
    terms: Terms = PLAIN
    # slopes, bias, bounds of queries and keys, number of sequences, cap, strides of the bias
    added: tuple[Any, ...] = ()

    @property
    def planes(self) -> int:
        """Heads of the whole batch."""
        return self.q.shape[0] * self.q.shape[1]

    @property
    def grid(self) -> tuple[int, int]:
        """Tiles of queries, blocks of keys."""
        return self.sizes[-2], self.sizes[-1]

    @property
    def quick(self) -> bool:
        """Whether weights are divided by their sum, and tau need not be exact to the last digit."""
        return self.q.element_size() == 2 and bool(self.switches["HALF"])

    @property
    def drop(self) -> tuple[torch.Tensor, int, float]:
        """Seed of the dropout, the least word that is kept, and the scale of what is."""
        p = self.terms.dropout
        return (self.q if self.terms.seed is None else self.terms.seed), cut(p), 1.0 / (1.0 - p)

    def new(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        """Return memory to write; zeros where sequences are packed: bounds may leave rows out."""
        make = torch.zeros if self.terms.n_seq else torch.empty
        return make(shape, dtype=dtype, device=self.q.device)


def pose(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_mask: torch.Tensor | None,
    alpha: torch.Tensor | None,
    scale: float,
    is_causal: bool,
    window: tuple[int, int] | None,
    terms: Terms = PLAIN,
) -> Problem:
    """Return the problem; arguments as for `launch_forward`."""
    q, k, v = aligned(q), aligned(k), aligned(v)
    plan = _plan(
        q.shape, k.shape[1:3], v.shape[-1], q.dtype, q.device.index, key_mask is not None,
        alpha is None, is_causal, window, terms.n_seq, terms.max_k, terms.form,
        terms.dropout > 0.0,
    )  # fmt: skip
    tiles, sizes, switches, kind = plan
    mask = q
    if key_mask is not None:
        mask = summarize(key_mask, tiles.block_n)
        sizes = mask.shape[1], *sizes[1:]
    m, n = tiles.block_m, tiles.block_n
    strides, bias = [0] * 4, terms.bias
    if bias is not None:
        pairs = zip(bias.stride(), bias.shape, strict=True)
        strides = [stride if size > 1 else 0 for stride, size in pairs]
        kind = *kind, bias.dtype, max(strides) >= 2**31
    given = (terms.slopes, bias, terms.bounds_q, terms.bounds_k)
    added = (*(q if x is None else x for x in given), terms.n_seq, terms.softcap or 1.0, *strides)
    return Problem(q, k, v, (describe(q, m), describe(k, n), describe(v, n)), mask,
                   q if alpha is None else alpha, scale or TINY, tiles, sizes, switches, kind,
                   terms, added)  # fmt: skip


@lru_cache(1024)
def _plan(
    shape: tuple[int, ...],
    keys: tuple[int, ...],
    dim_value: int,
    dtype: torch.dtype,
    device: int | None,
    has_mask: bool,
    half: bool,
    is_causal: bool,
    window: tuple[int, int] | None,
    n_seq: int,
    max_k: int,
    form: int,
    drops: bool,
) -> tuple[Tiles, tuple[int, ...], dict[str, Any], tuple[Any, ...]]:
    """Return tiles, sizes, switches and kind of a problem; made once for each shape."""
    heads, seq_q, dim_head = shape[1:]
    heads_kv, seq_k = keys
    tiles = _tiles(dtype, max(dim_head, dim_value))
    if form % 8:  # what shapes the scores takes registers: no larger tiles than the blocks
        tiles = tiles._replace(screen_m=tiles.block_m, screen_n=tiles.block_n)
    if form or (drops and not half):
        tiles = tiles._replace(most=Registers())
    elif drops or not half:
        tiles = tiles._replace(most=tiles.drops if drops else tiles.powers)
    sizes = (0, *(window or (0, 0)), heads, heads // heads_kv, seq_q, seq_k,
             *marks_of(shape, seq_k, tiles, n_seq, max_k))  # fmt: skip
    switches = {
        "IS_CAUSAL": is_causal,
        "HAS_MASK": has_mask,
        "HAS_WINDOW": window is not None,
        "HALF": half,
        "FORM": form,
        "BLOCK_M": tiles.block_m,
        "BLOCK_N": tiles.block_n,
        "BLOCK_D": padded(dim_head),
    }
    return tiles, sizes, switches, (device, dtype, dim_head, dim_value)


@triton.jit
@no_type_check
def load_tile(desc, batch, head, start, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """Load rows of one head; what lies outside is 0."""
    return desc.load([batch, head, start, 0]).reshape([ROWS, BLOCK_D])


@triton.jit
@no_type_check
def store_rows(x_ptr, x, rows, n_rows, n_dim, BLOCK_D: tl.constexpr):
    """Store rows of a contiguous matrix."""
    dims = tl.arange(0, BLOCK_D)
    inside = (rows[:, None] < n_rows) & (dims[None, :] < n_dim)
    offsets = rows[:, None].to(tl.int64) * n_dim + dims[None, :]
    tl.store(x_ptr + offsets, x.to(x_ptr.dtype.element_ty), mask=inside)


@triton.jit
@no_type_check
def store_numbers(rows_ptr, line, tau, delta, BLOCK_M: tl.constexpr):
    """Store tau and delta of a tile of queries: the tiles of all heads stand one after another."""
    places = rows_ptr + line * (2 * BLOCK_M) + tl.arange(0, BLOCK_M)
    tl.store(places, tau)
    tl.store(places + BLOCK_M, delta)


@triton.jit
@no_type_check
def load_numbers(rows_ptr, line, BLOCK_M: tl.constexpr):
    """Return tau and delta of a tile of queries.

    Nothing is asked: rows behind the last have tau = +inf. With a question for each of them these
    two loads took half of the instructions of the loop they are in.
    """
    places = rows_ptr + line * (2 * BLOCK_M) + tl.arange(0, BLOCK_M)
    return tl.load(places), tl.load(places + BLOCK_M)


@triton.jit
@no_type_check
def pack_marks(marks_ptr, packed_ptr, n_items):
    """Write eight marks of a line, bytes that are 0 or 1, to the byte."""
    CHUNK: tl.constexpr = 64
    tl.debug_barrier()  # other threads have written them
    bits = tl.arange(0, 8)[None, :]
    for start in range(0, tl.cdiv(n_items, 8), CHUNK):
        places = start + tl.arange(0, CHUNK)
        item = places[:, None] * 8 + bits
        marks = tl.load(marks_ptr + item, mask=item < n_items, other=0).to(tl.int32)
        packed = tl.sum(marks << bits, 1).to(tl.uint8)
        tl.store(packed_ptr + places, packed, mask=places * 8 < n_items)


@triton.jit
@no_type_check
def list_marked(packed_ptr, stride, bit, n_items, list_ptr, DESCENDING: tl.constexpr):
    """Write the indices of the marked items of one line; return how many they are.

    Marks are packed along the line where `stride` is 0, else they are the `bit` of bytes that far
    apart. Every program lists the blocks that it visits by itself: nothing waits for the device or
    for another launch.
    """
    CHUNK: tl.constexpr = 128
    count = 0
    for start in range(0, n_items, CHUNK):
        order = start + tl.arange(0, CHUNK)
        item = n_items - 1 - order if DESCENDING else order
        along = stride == 0
        place = tl.where(along, item // 8, item.to(tl.int64) * stride)
        byte = tl.load(packed_ptr + place, mask=order < n_items, other=0).to(tl.int32)
        marked = (byte >> tl.where(along, item % 8, bit)) & 1
        tl.store(list_ptr + count + tl.cumsum(marked, 0) - marked, item, mask=marked != 0)
        count += tl.sum(marked, 0)
    tl.debug_barrier()  # other threads read the list
    return count


@triton.jit
@no_type_check
def partial_sums(x, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT: tl.constexpr):
    """Return sums over the columns, `[BLOCK_M, 1]`; where SPLIT in four parts, `[BLOCK_M, 4]`.

    Of a product of tensor cores each of four threads holds a pair of every eight columns: the parts
    are what a thread adds up alone.
    """
    if SPLIT:
        return tl.sum(tl.sum(tl.reshape(x, [BLOCK_M, BLOCK_N // 8, 4, 2]), 3), 1)
    else:
        return tl.sum(x, 1, keep_dims=True)


@triton.jit
@no_type_check
def relu(x):
    """Return the positive part; NaN stays NaN."""
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
@no_type_check
def roots(z, t, power, HALF: tl.constexpr):
    """Return x = relu(z - t) and u = x ** (power - 1), 0 where x is; the weights are x u.

    `power` is 1 / (alpha - 1), and u the weights to the power of 2 - alpha. HALF: alpha is 1.5.
    """
    x = relu(z - t)
    if HALF:
        return x, x
    else:
        u = tl.exp2((power - 1.0) * tl.log2(tl.where(x == 0.0, 1.0, x)))
        return x, tl.where(x == 0.0, 0.0, u)


@triton.jit
@no_type_check
def _not_above(keys, rows, TURNED: tl.constexpr):
    """Return which keys are at most the numbers of the rows; TURNED: `[keys, rows]`."""
    return keys[:, None] <= rows[None, :] if TURNED else keys[None, :] <= rows[:, None]


@triton.jit
@no_type_check
def _is_partly_hidden(
    first, start, seq_q, seq_k, mask_ptr, left, right,
    IS_CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr, HAS_WINDOW: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Return whether rows from `first` on may miss one of the keys from `start` on; most do not.

    Rows beyond the last do not count: nobody reads them, and their tau is +inf.
    """
    shift = seq_k - seq_q
    partly = start + KEYS > seq_k
    if IS_CAUSAL:
        partly = partly | (start + KEYS > first + 1 + shift)
    if HAS_WINDOW:
        partly = partly | (start + KEYS > first + 1 + shift + right)
        partly = partly | (start < first + ROWS - 1 + shift - left)
    if HAS_MASK:
        partly = partly | some_hidden(mask_ptr, start, seq_k, BLOCK_N, KEYS)
    return partly


@triton.jit
@no_type_check
def hide(
    z, first, start, seq_q, seq_k, mask_ptr, left, right,
    IS_CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr, HAS_WINDOW: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, BLOCK_N: tl.constexpr,
    TURNED: tl.constexpr = False,
):  # fmt: skip
    """Return `z` with -inf where the row, of ROWS from `first` on, may not see the key.

    Where all rows see all keys no score is asked. TURNED: `z` is `[KEYS, ROWS]`.
    """
    if _is_partly_hidden(
        first, start, seq_q, seq_k, mask_ptr, left, right,
        IS_CAUSAL, HAS_MASK, HAS_WINDOW, ROWS, KEYS, BLOCK_N,
    ):  # fmt: skip
        rows, keys = first + tl.arange(0, ROWS), start + tl.arange(0, KEYS)
        place = rows + (seq_k - seq_q)
        last = tl.where(rows < seq_q, seq_k - 1, -1)  # one comparison for each score
        if IS_CAUSAL:
            last = tl.minimum(last, place)
        if HAS_WINDOW:
            last = tl.minimum(last, place + right)
        if HAS_MASK:  # hidden keys lie behind the last of every row
            seen = tl.load(mask_ptr + keys, mask=keys < seq_k, other=0)
            limits = tl.where(seen != 0, keys, 2**31 - 1)
        else:
            limits = keys
        visible = _not_above(limits, last, TURNED)
        if HAS_WINDOW:
            visible = visible & (_not_above(keys, place - left - 1, TURNED) == 0)
        z = tl.where(visible, z, float("-inf"))
    return z


@triton.jit
@no_type_check
def saturated(a, b, c):
    """Return a b - c between 0 and 1, NaN as 0, in one instruction; not in the interpreter."""
    return tl.inline_asm_elementwise(
        "{ .reg .f32 m; neg.f32 m, $3; fma.rn.sat.f32 $0, $1, $2, m; }", "=f,f,f,f", [a, b, c],
        dtype=tl.float32, is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
@no_type_check
def settled(x, INTERPRETED: tl.constexpr):
    """Return `x`, computed by now: no instruction, but the product in it does not stay under way.

    A product that is under way from one turn of a loop to the next makes ptxas wait for each part
    of every product of the kernel, warning C7515.
    """
    if INTERPRETED:
        return x
    else:
        return tl.inline_asm_elementwise("", "=f,0", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
@no_type_check
def excess(s, factor, t, power, HALF: tl.constexpr, SATURATE: tl.constexpr):
    """Return what `roots` does for scores times `factor`.

    SATURATE, for alpha 1.5 on a GPU: t is at least the maximum - 1, so x is at most 1, and one
    instruction makes it; NaN becomes 0. For alpha 2, where `power` is 1, there is no power to take.
    """
    if SATURATE:
        x = saturated(s, factor, t)
        return x, x
    elif HALF:
        return roots(s * factor, t, power, HALF)
    else:
        z = s * factor
        if power == 1.0:
            x = relu(z - t)
            u = tl.where(x == 0.0, 0.0, 1.0)
        else:
            x, u = roots(z, t, power, HALF)
        return x, u
