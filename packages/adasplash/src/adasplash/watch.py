"""How sparse the attention of a transformers model is, layer by layer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from .kernels.attention import AttentionAux, adasplash


class _Watch:
    """The layers of the model that is watched by name, and what they did last."""

    names: dict[nn.Module, str]
    found: dict[str, AttentionAux]

    def __init__(self, model: nn.Module) -> None:
        self.names = {module: name for name, module in model.named_modules()}
        self.found = {}


_watches: list[_Watch] = []  # one at a time


@contextmanager
def watch_sparsity(model: nn.Module) -> Iterator[dict[str, AttentionAux]]:
    """Keep the thresholds, supports and block densities of every layer's last forward.

    A diagnostic: one more pass over all scores of every layer, in plain PyTorch. Layers at alpha 1
    and tokens of `generate` that `adasplash_decode` computes are not kept. One model at a time.

        with watch_sparsity(model) as layers:
            model(input_ids)
        for name, aux in layers.items():
            print(name, 1 - aux.block_density.mean())  # share of empty 64x64 blocks

    Args:
        model: A model with `attn_implementation="adasplash"`.

    Yields:
        By the name of the attention module, filled as the model runs.

    Raises:
        RuntimeError: A model is watched already.

    Source: own.
    """
    if _watches:
        raise RuntimeError("`watch_sparsity` watches a model already; leave it first.")
    watch = _Watch(model)
    _watches.append(watch)
    try:
        yield watch.found
    finally:
        _watches.clear()


def watched(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """Return `adasplash(q, k, v, ...)` for a layer, and keep what there is to see if watched."""
    alpha = options["alpha"]
    name = _watches[0].names.get(module) if _watches else None
    if name is None or (not isinstance(alpha, Tensor) and alpha == 1):
        output: Tensor = adasplash(q, k, v, **options)
        return output
    output, _watches[0].found[name] = adasplash(q, k, v, **options, return_aux=True)
    return output
