"""One layer of a decoding step, for one token of every sequence."""

import itertools
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, nn

from ..kernels.combine import combine_norm
from ..modeling.attention import rotate
from .mixture import mixture


class Layer(NamedTuple):
    """One layer's weights as the step reads them; a router of its own has a mixture of experts.

    Below the up-projection lie the gate's, where there is one, and the router's rows.
    """

    qkv: Tensor
    out: Tensor
    post: Tensor
    up: Tensor
    down: Tensor
    next: Tensor
    keys: Tensor
    values: Tensor
    gated: bool = False
    router: Tensor | None = None
    top_k: int = 0


def compute(
    hidden: Tensor,
    normed: Tensor,
    layer: Layer,
    cos: Tensor,
    sin: Tensor,
    position: Tensor,
    mask: Tensor,
    heads: int,
    inner: int,
    eps: float,
    act: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what a layer's end takes: residual stream, feed-forward output, router's logits."""
    batch, dim = hidden.shape
    kv_heads, head = layer.keys.shape[1], layer.keys.shape[3]
    projected = nn.functional.linear(normed, layer.qkv).view(batch, -1, 1, head)
    query, key, value = projected.split([heads, kv_heads, kv_heads], dim=1)
    layer.keys.index_copy_(2, position, rotate(key, cos, sin))
    layer.values.index_copy_(2, position, value)
    attended = nn.functional.scaled_dot_product_attention(
        rotate(query, cos, sin),
        layer.keys,
        layer.values,
        attn_mask=mask,
        enable_gqa=heads != kv_heads,
    )
    hidden = hidden + nn.functional.linear(attended.reshape(batch, dim), layer.out)
    x = nn.functional.rms_norm(hidden, (dim,), layer.post, eps)
    if layer.router is not None:
        update = mixture(x, layer.router, layer.up, layer.down, layer.top_k, act)
        return hidden, update, update[:, :0]
    up = nn.functional.linear(x, layer.up)
    wide, end = up[:, :inner], inner
    if layer.gated:
        wide, end = act(up[:, inner : 2 * inner]) * wide, 2 * inner
    else:
        wide = act(wide)
    return hidden, nn.functional.linear(wide, layer.down), up[:, end:]


def end(
    hidden: Tensor,
    update: Tensor,
    logits: Tensor,
    layer: Layer,
    rows: tuple[Tensor, Tensor | None] | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Return the residual stream after one layer, and its norm for the next."""
    if rows is None:
        hidden = hidden + update
        return hidden, nn.functional.rms_norm(hidden, hidden.shape[1:], layer.next, eps)
    values, scales = rows
    logits = logits[:, : values.shape[1]]
    return combine_norm(logits, values, hidden, update, layer.next, eps, scales)


def fused(weights: list[nn.Parameter], rows: int) -> Tensor:
    """Return matrices under each other, padded to so many rows; they become parts of it.

    What is fused already, by another decoder of the model, is used as it is.
    """
    first = weights[0]
    begins = [w.data_ptr() - first.data_ptr() for w in weights]
    above = [0, *itertools.accumulate(w.nbytes for w in weights)]
    storage = first.untyped_storage()
    one = all(w.untyped_storage().data_ptr() == storage.data_ptr() for w in weights)
    end = first.storage_offset() * first.element_size() + rows * first[0].nbytes
    if one and begins == above[:-1] and end <= storage.nbytes():
        return first.detach().as_strided((rows, first.shape[1]), (first.shape[1], 1))
    fused, begin = first.new_zeros(rows, first.shape[1]), 0
    for weight in weights:
        part = fused[begin : begin + len(weight)]
        part.copy_(weight)
        weight.data = part
        begin += len(part)
    return fused


__all__ = ["Layer", "compute", "end", "fused"]
