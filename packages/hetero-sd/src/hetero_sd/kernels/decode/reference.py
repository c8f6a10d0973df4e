"""The steps of a decoding layer in PyTorch: the oracle, and what runs without Triton."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional


def add_rms_norm(
    x: Float[Tensor, "tokens hidden"],
    y: Float[Tensor, "tokens hidden"] | None,
    weight: Float[Tensor, " hidden"],
    eps: float,
) -> tuple[Float[Tensor, "tokens hidden"], Float[Tensor, "tokens hidden"]]:
    """Return `x + y`, and the same divided by its root mean square and scaled."""
    total = x if y is None else x + y
    return total, functional.rms_norm(total, total.shape[-1:], weight, eps)


def rope_store(
    q: Float[Tensor, "rows width heads dim"],
    k: Float[Tensor, "rows width kv_heads dim"],
    v: Float[Tensor, "rows width kv_heads dim"],
    cos: Float[Tensor, "positions dim"],
    sin: Float[Tensor, "positions dim"],
    places: Int[Tensor, "rows width"],
    keys: Float[Tensor, "rows kv_heads capacity dim"],
    values: Float[Tensor, "rows kv_heads capacity dim"],
) -> Float[Tensor, "rows width heads dim"]:
    """Return queries turned to their positions; write turned keys, and values, to the cache.

    Args:
        q: Queries.
        k: Keys.
        v: Values.
        cos: Cosines by position.
        sin: Sines by position, negative in the first half.
        places: Positions of the tokens.
        keys: The cache, written at `places`.
        values: The same.
    """
    heads, half = q.shape[2], q.shape[3] // 2
    both = torch.cat([q, k], dim=2)
    both = both * cos[places][:, :, None] + both.roll(half, dims=-1) * sin[places][:, :, None]
    line = torch.arange(len(q), device=q.device)[:, None]
    keys[line, :, places] = both[:, :, heads:]
    values[line, :, places] = v
    return both[:, :, :heads]


def attend(
    q: Float[Tensor, "rows width heads dim"],
    keys: Float[Tensor, "rows kv_heads capacity dim"],
    values: Float[Tensor, "rows kv_heads capacity dim"],
    places: Int[Tensor, "rows width"],
    extent: int,
) -> Float[Tensor, "rows width heads dim"]:
    """Return attention of each query to its row's entries up to its own position.

    Args:
        q: Queries.
        keys: The cache.
        values: The same.
        places: Positions of the queries.
        extent: Entries to look at; above all positions.
    """
    rows, width, heads, dim = q.shape
    kv_heads = keys.shape[1]
    groups = heads // kv_heads
    old_k, old_v = keys[:, :, :extent], values[:, :, :extent]
    # Heads that share keys are rows of one product.
    q = q.reshape(rows, width, kv_heads, groups, dim).permute(0, 2, 3, 1, 4)
    q = q.reshape(rows, kv_heads, groups * width, dim)
    scores = (q @ old_k.transpose(-1, -2)) * dim**-0.5
    hidden = torch.arange(extent, device=q.device) > places[:, :, None]
    scores = scores.view(rows, kv_heads, groups, width, extent)
    scores = scores.masked_fill(hidden[:, None, None], float("-inf"))
    wide = torch.promote_types(q.dtype, torch.float32)
    weights = scores.softmax(dim=-1, dtype=wide).to(q.dtype)
    mixed = weights.view(rows, kv_heads, groups * width, extent) @ old_v
    mixed = mixed.view(rows, kv_heads, groups, width, dim).permute(0, 3, 1, 2, 4)
    out: Tensor = mixed.reshape(rows, width, heads, dim)
    return out


def swiglu(
    gate: Float[Tensor, "tokens hidden"], up: Float[Tensor, "tokens hidden"]
) -> Float[Tensor, "tokens hidden"]:
    """Return `silu(gate) * up`."""
    return functional.silu(gate) * up
