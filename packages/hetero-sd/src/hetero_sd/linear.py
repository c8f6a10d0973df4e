"""Products of a weight and a few rows, which CPU libraries may do badly one way round."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

_logger = logging.getLogger(__name__)
_FEW = 6  # Rows up to which a float32 product is faster with the weight on the left.
_FEW_OF_MANY = 8  # The same for a weight with many outputs, such as a model's head.
_MANY = 16_384


def _turned(x: Tensor, weight: Tensor) -> Tensor:
    """Return `x @ weight.T` by a product with the weight on the left; one row goes as two."""
    if len(x) == 1:
        return (weight @ torch.cat([x, x]).t())[:, :1].t()
    return (weight @ x.t()).t()


@lru_cache(maxsize=_FEW_OF_MANY)
def _turning_pays(rows: int) -> bool:
    """Return whether PyTorch's library here is slow at so few rows; measured once in a process.

    Both ways take turns, and the best of each counts, since other processes may be busy.
    """
    weights = torch.ones(16, 1024, 512)  # 32 MiB, beyond the nearest caches.
    x = torch.ones(rows, 512)
    ways: list[Callable[[Tensor, Tensor], Tensor]] = [functional.linear, _turned]
    best = [float("inf")] * 2
    for _ in range(5):
        for way, product in enumerate(ways):
            begun = time.perf_counter()
            for weight in weights:
                product(x, weight)
            best[way] = min(best[way], time.perf_counter() - begun)
    straight, turned = best
    _logger.debug("%d rows: %.1f ms straight, %.1f turned", rows, 1e3 * straight, 1e3 * turned)
    return turned < 0.8 * straight


def few_rows_linear(
    x: Float[Tensor, "rows inputs"], weight: Float[Tensor, "outputs inputs"]
) -> Float[Tensor, "rows outputs"]:
    """Return `x @ weight.T`, fast for few rows on a CPU too.

    Args:
        x: Shape `(rows, inputs)`.
        weight: Shape `(outputs, inputs)`, of the same type.
    """
    few = _FEW_OF_MANY if len(weight) >= _MANY else _FEW
    if (
        0 < len(x) <= few
        and x.dtype == torch.float32
        and x.device.type == "cpu"
        and _turning_pays(len(x))
    ):
        return _turned(x, weight)
    return functional.linear(x, weight)
