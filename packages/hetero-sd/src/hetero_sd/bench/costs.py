"""Times of single forward passes, which the model of the speed is made of."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..decoder import HeteroSpeculativeDecoder
from ..graphs import WIDTHS, GraphRunner
from .contenders import wait

_SECONDS, _LEAST = 0.03, 3  # How long to repeat a pass, and how often at least.


class Costs:
    """Seconds of a pass of either model, as the decoder runs them: by a graph where it can.

    Args:
        decoder: Whose models, and whose way to run them.
        rows: Rows of the batch.
        context: Tokens that each row holds already.
    """

    def __init__(self, decoder: HeteroSpeculativeDecoder, rows: int, context: int) -> None:
        self._decoder, self._rows, self._context = decoder, rows, context
        self._known: dict[tuple[str, int], float] = {}

    def target(self, width: int | float) -> float:
        """Return the time of a target pass, between widths that were timed in proportion.

        Args:
            width: Tokens of each row, 1 or more.
        """
        above = next((w for w in WIDTHS if w >= width), WIDTHS[-1])
        below = next((w for w in reversed(WIDTHS) if w <= width), 1)
        low, high = (self._pass("target", w) for w in (below, above))
        if above == below:
            return high
        return low + (high - low) * (min(width, above) - below) / (above - below)

    def drafter(self, shared: bool) -> float:
        """Return the time of a drafter step.

        Args:
            shared: Whether only the head's rows of shared tokens are computed, as TLI does.
        """
        return self._pass("shared" if shared else "drafter", 1)

    @torch.no_grad()
    def _pass(self, who: str, width: int) -> float:
        if (who, width) not in self._known:
            decoder = self._decoder
            model = decoder.target if who == "target" else decoder.drafter
            head = decoder._shared.head if who == "shared" else None
            self._known[who, width] = _time_pass(
                decoder, model, self._rows, width, self._context, head
            )
        return self._known[who, width]


def _time_pass(
    decoder: HeteroSpeculativeDecoder,
    model: Any,
    rows: int,
    width: int,
    context: int,
    head: Tensor | None,
) -> float:
    limit = getattr(model.config, "max_position_embeddings", None) or 1 << 30
    context = min(context, limit - width)
    runner = decoder._runner(model, rows, context + width)
    if isinstance(runner, GraphRunner):
        ids = torch.zeros(runner.rows, width, dtype=torch.long, device=runner.device)
        places = (context + torch.arange(width, device=runner.device)).expand(len(ids), width)

        def step() -> Tensor:
            states = runner.forward(ids, places)
            return runner.body.logits(states.reshape(-1, states.shape[-1]), head)

        graph, _ = runner.capture(step)
        seconds = _time(graph.replay)
        decoder._kept.give_back(model, runner)
        return seconds
    if context:
        runner.extend([[0] * context] * rows, [0] * rows)

    def once() -> None:
        runner.extend([[0] * width] * rows, [width] * rows, head)
        runner.crop([context] * rows)

    return _time(once)


def _time(step: Callable[[], Any]) -> float:
    """Return the median time of a step, three times over as many as fill a moment."""
    step()
    wait()
    begun = time.perf_counter()
    step()
    wait()
    count = max(int(_SECONDS / max(time.perf_counter() - begun, 1e-6)), _LEAST)
    taken = []
    for _ in range(3):
        begun = time.perf_counter()
        for _ in range(count):
            step()
        wait()
        taken.append((time.perf_counter() - begun) / count)
    return statistics.median(taken)
