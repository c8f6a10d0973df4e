"""The public function, the bounds of pages, and the reference."""

from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fourfold_common import triton_status

from ..attention.checks import DTYPES, check_alpha, check_window
from ..attention.op import adasplash
from ..attention.operators import unheard
from ..checks import check_number, check_tensor

_BLOCK = 64  # keys of a block where the cache has no pages


class PageStats(NamedTuple):
    """The smallest and largest value of every feature of the keys of a page.

    Args:
        low: `[batch or pages, heads_kv, blocks, dim_head]`, float32.
        high: The same shape.
    """

    low: Tensor
    high: Tensor


def page_stats(
    k_cache: Float[Tensor, "slabs heads_kv places dim_head"], page_size: int | None = None
) -> PageStats:
    """Return the bounds with which `adasplash_decode` skips pages.

    Recompute them for a page whenever keys are written to it; places that hold no key yet only
    loosen the bounds.

    Args:
        k_cache: Keys, as `adasplash_decode` takes them.
        page_size: Keys of a page: all `places` with a block table, else 64, which is what None
            means for a cache of more than 64 places.

    Raises:
        ValueError: `page_size` does not divide the places, or `k_cache` has other dimensions.

    Source: own.
    """
    check_tensor("k_cache", k_cache)
    if k_cache.ndim != 4:
        raise ValueError(f"`k_cache` must have 4 dimensions; got shape {tuple(k_cache.shape)}.")
    places = k_cache.shape[2]
    size = (places if places <= _BLOCK else _BLOCK) if page_size is None else page_size
    if size < 1 or places % size:
        raise ValueError(f"`page_size` must divide the {places} places of `k_cache`; got {size}.")
    pages = k_cache.float().unflatten(2, (-1, size))
    return PageStats(pages.amin(3), pages.amax(3))


def adasplash_decode(
    q: Float[Tensor, "batch heads seq_q dim_head"],
    k_cache: Float[Tensor, "slabs heads_kv places dim_head"],
    v_cache: Float[Tensor, "slabs heads_kv places dim_value"],
    cache_seqlens: Int[Tensor, " batch"],
    block_table: Int[Tensor, "batch pages"] | None = None,
    page_stats: PageStats | None = None,
    *,
    alpha: float | Tensor = 1.5,
    scale: float | None = None,
    window: tuple[int, int] | None = None,
    key_padding_mask: Bool[Tensor, "batch seq_k"] | None = None,
    backend: Literal["auto", "triton", "reference"] = "auto",
) -> Float[Tensor, "batch heads seq_q dim_value"]:
    """Return alpha-entmax attention of the newest tokens to a cache that holds their keys, too.

    The same numbers as `adasplash` on the sequences alone. Nothing waits for the device, shapes
    depend on shapes only. No gradients.

    Args:
        q: Queries of the last `seq_q` tokens of every sequence; token i sees all but the
            `seq_q - 1 - i` last keys.
        k_cache: Keys: one slab per sequence; or pages, with `block_table`.
        v_cache: Values, laid out as the keys.
        cache_seqlens: How many keys each sequence has, at least `seq_q`; int32.
        block_table: The pages of each sequence, in order; int32. Entries behind its last page are
            not read. A page holds a power of two of keys, 16 to 256.
        page_stats: From `page_stats(k_cache)`, kept up to date: pages whose bound proves that they
            hold no weight are not read.
        alpha: Above 1, up to 2; or a tensor of shape `[]`, `[heads]` or `[batch, heads]` with such
            values.
        scale: Factor of the scores; `dim_head ** -0.5` if None.
        window: How many keys to the left of its own place a token sees, and to the right, where
            there are none; -1 for all. Keys outside are not read.
        key_padding_mask: True for keys to attend to, `[batch, places]`, by their place in the
            sequence. Hidden keys are not read. A sequence without a visible
            key gives zeros.
        backend: `"auto"` runs the kernels on CUDA tensors and plain PyTorch elsewhere.

    Raises:
        TypeError: A dtype is not supported, or dtypes differ.
        ValueError: Shapes or an option do not fit, or the backend cannot run here.

    Source: own; upper bounds of pages as in Quest (arXiv 2406.10774), but used to skip exactly.
    """
    _check(q, k_cache, v_cache, cache_seqlens, block_table, page_stats, alpha, scale, window,
           backend)  # fmt: skip
    _check_mask(key_padding_mask, q, k_cache, block_table)
    if window is not None and window[0] >= 0:
        new = q.shape[2]
        if new > 1:  # every token has a window of its own
            each = [
                adasplash_decode(
                    q[:, :, i : i + 1], k_cache, v_cache, cache_seqlens - (new - 1 - i),
                    block_table, page_stats, alpha=alpha, scale=scale, window=window,
                    key_padding_mask=key_padding_mask, backend=backend,
                )
                for i in range(new)
            ]  # fmt: skip
            return torch.cat(each, 2)
        places = k_cache.shape[2] * (1 if block_table is None else block_table.shape[1])
        near = torch.arange(places, device=q.device) >= (
            cache_seqlens.to(q.device)[:, None] - 1 - window[0]
        )
        seen = key_padding_mask
        key_padding_mask = near if seen is None else near & seen[:, :places]
    factor = q.shape[-1] ** -0.5 if scale is None else float(scale)
    lengths = cache_seqlens.to(q.device, torch.int32)
    able = _able(q)
    if backend == "triton" and not able:
        raise ValueError(
            "`backend` 'triton' cannot run here: it needs CUDA tensors in float16, bfloat16 or "
            f"float32, or TRITON_INTERPRET=1; got {q.dtype} on {q.device}."
        )
    if backend == "reference" or (backend == "auto" and not q.is_cuda) or not able:
        return _reference(
            q, k_cache, v_cache, lengths, block_table, key_padding_mask, alpha, factor
        )  # fmt: skip
    k_cache, v_cache = (x if x.stride(-1) == 1 else x.contiguous() for x in (k_cache, v_cache))
    table = None if block_table is None else block_table.to(torch.int32).contiguous()
    low, high = (None, None) if page_stats is None else page_stats
    mask = None if key_padding_mask is None else key_padding_mask.contiguous()
    run = _launch if unheard(q, k_cache, v_cache) else _decode
    with torch.no_grad():
        alphas = _spread(alpha, q)
        output: Tensor = run(
            q, k_cache, v_cache, lengths, table, low, high, mask, alphas, factor
        )  # fmt: skip
    return output


def _spread(alpha: float | Tensor, q: Tensor) -> Tensor | None:
    """Return alpha of every head, float32 `[batch, heads]`; None for 1.5."""
    if isinstance(alpha, Tensor):
        return alpha.to(q.device, torch.float32).expand(q.shape[:2])
    return None if alpha == 1.5 else torch.full(q.shape[:2], alpha, device=q.device)


def _able(q: Tensor) -> bool:
    """Return whether the kernels can run on tensors like q."""
    if torch.compiler.is_compiling():  # it comes with Triton, and traces no imports
        return q.dtype != torch.float64
    status = triton_status()
    return status.importable and (q.is_cuda or status.interpreting) and q.dtype != torch.float64


def _launch(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    table: Tensor | None,
    low: Tensor | None,
    high: Tensor | None,
    key_mask: Tensor | None,
    alpha: Tensor | None,
    scale: float,
) -> Tensor:
    """Return the output by the kernels; `low` and `high` are the bounds of pages, or None.

    `alpha` is `[batch, heads]`, or None for 1.5; `key_mask` is contiguous.
    """
    from .bounds import launch_keep
    from .kernel import launch_decode

    batch, heads, seq_q, dim = q.shape
    heads_kv, places = k_cache.shape[1:3]
    rows = q.reshape(batch, heads_kv, heads // heads_kv * seq_q, dim).contiguous()
    alphas, mask = alpha, None if key_mask is None else key_mask.view(torch.uint8)
    if alpha is not None:  # of every row
        alphas = alpha[..., None].expand(-1, -1, seq_q).reshape(batch, heads_kv, -1).contiguous()
    block = _BLOCK if table is None else places
    n_blocks = -(-places // _BLOCK) if table is None else table.shape[1]
    with torch.cuda.device_of(q):  # Triton launches on the current device
        kept = None
        if low is not None and high is not None:
            kept = launch_keep(
                rows, k_cache, low.float().contiguous(), high.float().contiguous(), lengths, table,
                seq_q, block, n_blocks, alphas, scale, mask,
            )  # fmt: skip
        output = launch_decode(
            rows, k_cache, v_cache, lengths, table, kept, seq_q, block, n_blocks, alphas, scale,
            mask,
        )  # fmt: skip
    return output.reshape(batch, heads, seq_q, -1).to(q.dtype)


@torch.library.custom_op("adasplash::decode", mutates_args=())
def _decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    table: Tensor | None,
    low: Tensor | None,
    high: Tensor | None,
    key_mask: Tensor | None,
    alpha: Tensor | None,
    scale: float,
) -> Tensor:
    return _launch(q, k_cache, v_cache, lengths, table, low, high, key_mask, alpha, scale)


@_decode.register_fake
def _(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    table: Tensor | None,
    low: Tensor | None,
    high: Tensor | None,
    key_mask: Tensor | None,
    alpha: Tensor | None,
    scale: float,
) -> Tensor:
    return q.new_empty(*q.shape[:3], v_cache.shape[3])


def _reference(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    table: Tensor | None,
    mask: Tensor | None,
    alpha: float | Tensor,
    scale: float,
) -> Tensor:
    """Return the output in plain PyTorch, with the pages put one after another."""
    if table is not None:
        pages = table.long().clamp(0, len(k_cache) - 1)
        k_cache, v_cache = (x[pages].transpose(1, 2).flatten(2, 3) for x in (k_cache, v_cache))
    keys = torch.arange(k_cache.shape[2], device=q.device)
    last = lengths[:, None] - q.shape[2] + torch.arange(q.shape[2], device=q.device)
    seen = keys <= last[..., None]  # [batch, seq_q, keys]
    if mask is not None:
        seen = seen & mask[:, None, : len(keys)]
    # What lies behind the end may be anything, also NaN.
    filled = (keys < lengths[:, None])[:, None, :, None]
    k_cache, v_cache = (torch.where(filled, x, 0.0) for x in (k_cache, v_cache))
    bias = torch.zeros_like(seen, dtype=q.dtype).masked_fill(~seen, -torch.inf)[:, None]
    with torch.no_grad():
        output: Tensor = adasplash(
            q, k_cache, v_cache, alpha, is_causal=False, scale=scale, attn_bias=bias,
            backend="reference",
        )  # fmt: skip
    return output


def _check_mask(mask: Tensor | None, q: Tensor, k: Tensor, table: Tensor | None) -> None:
    if mask is None:
        return
    check_tensor("key_padding_mask", mask)
    places = k.shape[2] * (1 if table is None else table.shape[1])
    if mask.dtype != torch.bool or mask.ndim != 2 or len(mask) != len(q):
        raise ValueError(
            f"`key_padding_mask` must be bool with {len(q)} rows; got {mask.dtype} "
            f"{tuple(mask.shape)}."
        )
    if mask.shape[1] < places:
        raise ValueError(
            f"`key_padding_mask` must be as wide as the {places} places of the cache; got "
            f"{mask.shape[1]}."
        )


def _check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, x in (("q", q), ("k_cache", k), ("v_cache", v)):
        check_tensor(name, x)
        if x.ndim != 4:
            raise ValueError(f"`{name}` must have 4 dimensions; got shape {tuple(x.shape)}.")
        if x.dtype not in DTYPES or x.dtype != q.dtype:
            allowed = "floating point" if x is q else f"{q.dtype} as `q` is"
            raise TypeError(f"`{name}` must be {allowed}; got {x.dtype}.")
        if x.device != q.device:
            raise ValueError(f"`{name}` must be on {q.device} as `q` is; got {x.device}.")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"`k_cache` must have a number of heads that divides {q.shape[1]}, the heads of `q`; "
            f"got {k.shape[1]}."
        )
    if q.shape[-1] != k.shape[-1] or v.shape[:3] != k.shape[:3]:
        raise ValueError(
            "`q`, `k_cache` and `v_cache` must fit together; got "
            f"{tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}."
        )
    widest = max(q.shape[-1], v.shape[-1])
    if widest > 256:
        raise ValueError(f"`q` and `v_cache` must have a last size up to 256; got {widest}.")


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    table: Tensor | None,
    stats: PageStats | None,
    alpha: float | Tensor,
    scale: float | None,
    window: tuple[int, int] | None,
    backend: str,
) -> None:
    if backend not in ("auto", "triton", "reference"):
        raise ValueError(f"`backend` must be 'auto', 'triton' or 'reference'; got {backend!r}.")
    _check_tensors(q, k, v)
    check_alpha(alpha, tuple(q.shape[:2]), softmax=False)
    check_number("scale", 1.0 if scale is None else scale, tensor=True)
    check_window(window)
    check_tensor("cache_seqlens", lengths, whole=True)
    if lengths.shape != q.shape[:1]:
        raise ValueError(
            f"`cache_seqlens` must have shape {tuple(q.shape[:1])}; got {tuple(lengths.shape)}."
        )
    size, count = k.shape[2], k.shape[2]
    if table is None:
        if len(k) != len(q):
            raise ValueError(f"`k_cache` must hold {len(q)} slabs as `q` does; got {len(k)}.")
        size = _BLOCK if count > _BLOCK else count
    else:
        check_tensor("block_table", table, whole=True)
        if table.ndim != 2 or len(table) != len(q):
            raise ValueError(
                f"`block_table` must have {len(q)} rows, one per sequence; got "
                f"{tuple(table.shape)}."
            )
        if size not in (16, 32, 64, 128, 256):
            raise ValueError(f"`k_cache` must have pages of 16, 32, ... 256 keys; got {size}.")
        count = size * table.shape[1]
    if lengths.device.type == "cpu" and not torch.compiler.is_compiling():
        low, high = q.shape[2], count
        if len(lengths) and not low <= int(lengths.min()) <= int(lengths.max()) <= high:
            raise ValueError(
                f"`cache_seqlens` must be from {low}, the new tokens, to {high}, the places; got "
                f"{lengths.tolist()}."
            )
    if stats is not None:
        if not isinstance(stats, PageStats):
            got = type(stats).__name__
            raise TypeError(f"`page_stats` must be what `page_stats(k_cache)` gives; got {got}.")
        want = (len(k), k.shape[1], -(-k.shape[2] // size), k.shape[3])
        if tuple(stats.low.shape) != want or tuple(stats.high.shape) != want:
            raise ValueError(f"`page_stats` must have shape {want}; got {tuple(stats.low.shape)}.")
