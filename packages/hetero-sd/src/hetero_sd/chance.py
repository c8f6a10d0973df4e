"""All randomness of a generation, in one place."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor


class Chance:
    """Draws tokens and coins.

    Args:
        generator: Source of randomness; PyTorch's global one if missing.
    """

    def __init__(self, generator: torch.Generator | None = None) -> None:
        self._generator = generator
        self._host: random.Random | None = None

    def draw(self, weights: Tensor) -> list[int]:
        """Return one index for each row of weights, which need not add up to 1."""
        where = self._generator.device if self._generator is not None else weights.device
        drawn = torch.multinomial(weights.to(where), 1, generator=self._generator)
        indices: list[int] = drawn[:, 0].tolist()
        return indices

    def pick(self, weights: Sequence[float]) -> int:
        """Return one index, without a device: weights need not add up to 1."""
        if self._host is None:
            self._host = random.Random(self.key())
        left = self._host.random() * sum(weights)
        for index, weight in enumerate(weights):
            left -= weight
            if left < 0:
                return index
        return max(index for index, weight in enumerate(weights) if weight > 0)  # By rounding.

    def coins(self, count: int, like: Tensor) -> Tensor:
        """Return numbers uniform on [0, 1), of the type and on the device of a tensor."""
        where = self._generator.device if self._generator is not None else like.device
        coins = torch.rand(count, generator=self._generator, device=where, dtype=like.dtype)
        return coins.to(like.device)

    def key(self) -> int:
        """Return a number of 62 bits for noise that is made from a counter."""
        device = self._generator.device if self._generator is not None else None
        return int(torch.randint(1 << 62, (), generator=self._generator, device=device))

    def fill(self, noise: Tensor, kind: str) -> None:
        """Fill a tensor with noise, in place and without waiting for its device.

        Args:
            noise: Where to put it.
            kind: `"uniform"` on [0, 1), or `"exponential"` with mean 1.
        """
        if kind == "uniform":
            noise.uniform_(generator=self._generator)
        else:
            noise.exponential_(generator=self._generator)

    def serves(self, device: torch.device) -> bool:
        """Return whether noise can be made on a device."""
        own = device if self._generator is None else self._generator.device
        indices = {own.index, device.index} - {None}
        return own.type == device.type and len(indices) < 2
