"""The concepts' way from one layer to the next, on a second stream of the device.

Between two attentions the concepts need nothing from the model but its weights: output projection,
feed-forward, and the next layer's modulation read some 300 MB a layer in Flux.1, while the model
multiplies matrices. So they run beside it. What reads the image's keys, values and outputs stays in
the model's own stream, so that no reference to them lives longer.

The model's memory is safe without further care, as the second stream writes to blocks of its own.
Weights must stay where they are meanwhile: layers with hooks of others (offloading, caches, casts)
or weights of other classes (quantised ones) do not take part.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from .adapters import Block
from .adapters.linear import untouched

_DENSE = (Tensor, nn.Parameter)


class Ahead:
    """Runs work on the second stream, and lets the model's stream wait for it.

    Args:
        blocks: The observed layers, in the order they run.
    """

    def __init__(self, blocks: Sequence[Block]) -> None:
        self._next = {block.index: after for block, after in pairwise(blocks)}
        self._settled: dict[int, bool] = {}
        self._stream: torch.cuda.Stream | None = None  # the model's stream has not waited for it
        self._held: Any = None

    def forget(self) -> None:
        """Forget which layers take part: between two runs of a pipeline they may change."""
        self._settled.clear()

    def following(self, block: Block) -> Block | None:
        """Return the next layer, where the way from this one to it may run ahead."""
        after = self._next.get(block.index)
        if after is None or torch.compiler.is_compiling():
            return None
        for each in (block, after):
            if each.index not in self._settled:
                self._settled[each.index] = _settled(each.module)
        return after if self._settled[block.index] and self._settled[after.index] else None

    @contextmanager
    def beside(self, device: torch.device, *needed: Any) -> Iterator[None]:
        """Launch on the second stream, after all that was launched so far.

        Args:
            device: Of the model; other devices than CUDA have one stream.
            needed: What the work reads of the first stream's memory; kept until `join`.
        """
        if device.type != "cuda":
            yield
            return
        stream = _second(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        self._stream, self._held = stream, needed
        with torch.cuda.stream(stream):
            yield

    def join(self) -> None:
        """Let the current stream wait for the second one; the host does not wait."""
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)
            self._stream = self._held = None


@cache
def _second(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _settled(module: nn.Module) -> bool:
    """Return whether nothing but the model's own code runs in a layer, and its weights are dense.

    Then they lie on the device, unchanged, also before and after its forward pass.
    """
    return all(
        untouched(part)
        and all(type(w) in _DENSE for w in part._parameters.values() if w is not None)
        for part in module.modules()
    )
