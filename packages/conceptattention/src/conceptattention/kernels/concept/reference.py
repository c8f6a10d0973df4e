"""The same computations in torch: what the kernels are tested against, and the path without them.

They, too, avoid passes over what the model computed for the image: its keys are multiplied with
two tables instead of being rotated in float32, the concepts' own keys are not appended to them, and
products of half-precision vectors are summed and kept in float32 without widening the vectors.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

_WIDE_PRODUCTS = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 8)


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


def products(
    rows: Float[Tensor, "batch rows dim"], columns: Float[Tensor, "batch columns dim"]
) -> Tensor:
    """Return float32 (or wider) dot products of all rows with all columns of one dtype."""
    if rows.dtype not in (torch.float16, torch.bfloat16):
        return torch.bmm(rows, columns.mT)
    if rows.is_cuda and _WIDE_PRODUCTS:
        return torch.bmm(rows, columns.mT, out_dtype=torch.float32)
    return torch.bmm(rows.float(), columns.mT.float())


def concept_attention(
    q: Float[Tensor, "batch heads concepts dim"],
    k: Float[Tensor, "batch heads concepts dim"] | None,
    v: Float[Tensor, "batch heads concepts dim"] | None,
    keys: Float[Tensor, "batch heads patches dim"],
    values: Float[Tensor, "batch heads patches dim"],
    rotary: tuple[Tensor, Tensor] | None,
) -> Float[Tensor, "batch heads concepts dim"]:
    """Return softmax(q [k; R keys]^T / sqrt(dim)) [v; values], R the rotary positions.

    R keys are not computed: q . (R k) = q . (cos k) + q' . (sin k), with q' the queries' pairs
    turned by a right angle.
    """
    keys, values, patches = keys.to(q.dtype), values.to(q.dtype), keys.shape[2]
    q = q * q.shape[-1] ** -0.5
    seen = [keys] if rotary is None else [keys * table.to(q.dtype) for table in rotary]
    turned = q
    if rotary is not None:
        even, odd = q.unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack([odd, -even], dim=-1).flatten(-2)
    made = []
    for image in range(len(q)):  # a batch of heads is one product without copies
        scores = products(q[image], seen[0][image])
        if rotary is not None:
            scores += products(turned[image], seen[1][image])
        if k is not None:
            scores = torch.cat([scores, products(q[image], k[image].to(q.dtype))], dim=-1)
        shares = scores.softmax(dim=-1)
        out = torch.bmm(shares[..., :patches].to(q.dtype), values[image])
        if k is not None and v is not None:
            own = shares[..., patches:].to(q.dtype)
            out = torch.baddbmm(out, own, v[image].to(q.dtype))
        made.append(out)
    return torch.stack(made) if len(made) > 1 else made[0][None]


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
    if cosine:
        patches = F.normalize(patches.float(), dim=-1)
    scores = products(concepts.to(patches.dtype), patches).to(raw.dtype)
    scores = scores if scale == 1 else scale * scores
    raw.lerp_(scores, 1 / count)
    soft.lerp_((scores / temperature).softmax(dim=1), 1 / count)
