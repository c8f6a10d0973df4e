"""How a decoding step chooses the next ids."""

from typing import NamedTuple

import torch
from torch import Tensor, nn


def choose(normed: Tensor, head: Tensor, ids: Tensor) -> None:
    """Write the likeliest next ids."""
    ids.copy_(nn.functional.linear(normed, head).argmax(-1))


class Sampling(NamedTuple):
    """What a sampled step reads, on the device: a graph that was captured once serves all values.

    Of independent exponential times with the ids' chances as rates, an id's is the first with that
    id's chance; so the noise, drawn beforehand, decides and no step waits for the host.
    """

    noise: Tensor
    temperature: Tensor
    top_k: Tensor
    top_p: Tensor

    def draw(self, logits: Tensor, some: bool) -> Tensor:
        """Return an id for every row of logits, of `some` ids only if the limits are to count."""
        logits = logits.float() / self.temperature
        if not some:
            return (logits.softmax(-1) / self.noise).argmax(-1)
        logits, ids = logits.sort(-1, descending=True)
        ranks = torch.arange(logits.shape[-1], device=logits.device)
        chances = logits.masked_fill(ranks >= self.top_k, -torch.inf).softmax(-1)
        before = chances.cumsum(-1) - chances
        chances = chances.masked_fill(before >= self.top_p, 0)
        first = (chances / self.noise.gather(-1, ids)).argmax(-1, keepdim=True)
        return ids.gather(-1, first).squeeze(-1)


__all__ = ["Sampling", "choose"]
