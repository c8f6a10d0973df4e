"""The same computations in torch: what the kernels are tested against, and the path on a CPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def rotate(
    keys: Float[Tensor, "batch heads patches dim"],
    cos: Float[Tensor, "patches dim"],
    sin: Float[Tensor, "patches dim"],
) -> Float[Tensor, "batch heads patches dim"]:
    """Return keys with rotary positions on neighbouring pairs of features, computed in float32."""
    wide = keys.float()
    even, odd = wide.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([-odd, even], dim=-1).flatten(-2)
    return (wide * cos + turned * sin).to(keys.dtype)


def concept_attention(
    q: Float[Tensor, "batch heads concepts dim"],
    k: Float[Tensor, "batch heads concepts dim"] | None,
    v: Float[Tensor, "batch heads concepts dim"] | None,
    keys: Float[Tensor, "batch heads patches dim"],
    values: Float[Tensor, "batch heads patches dim"],
    rotary: tuple[Tensor, Tensor] | None,
) -> Float[Tensor, "batch heads concepts dim"]:
    """Return softmax(q [k; R keys]^T / sqrt(dim)) [v; values], R the rotary positions."""
    keys = keys if rotary is None else rotate(keys, *rotary)
    if k is not None and v is not None:
        keys, values = torch.cat([k, keys.to(k.dtype)], 2), torch.cat([v, values.to(v.dtype)], 2)
    return F.scaled_dot_product_attention(q, keys.to(q.dtype), values.to(q.dtype))


def add_scores(
    concepts: Float[Tensor, "batch concepts dim"],
    patches: Float[Tensor, "batch patches dim"],
    raw: Float[Tensor, "batch concepts patches"],
    soft: Float[Tensor, "batch concepts patches"],
    count: int,
    temperature: float,
    scale: float,
    cosine: bool,
) -> None:
    """Add one layer's scores to float32 running means of scores and of their softmax, in place."""
    patches = patches.float()
    if cosine:
        patches = F.normalize(patches, dim=-1)
    scores = scale * (concepts.float() @ patches.mT)
    raw += (scores - raw) / count
    soft += ((scores / temperature).softmax(dim=1) - soft) / count
