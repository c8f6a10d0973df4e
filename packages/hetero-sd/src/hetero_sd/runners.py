"""A model and its key-value cache over rows of unequal length."""

from __future__ import annotations

import inspect
import itertools
import logging
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from .devices import input_device
from .processors import Processors

_logger = logging.getLogger(__name__)


@runtime_checkable
class Runner(Protocol):
    """Feeds ids to a model and remembers them, for several rows of unequal length."""

    @property
    def lengths(self) -> list[int]:
        """Ids in the cache, of each row."""
        ...

    def extend(
        self, feeds: Sequence[Sequence[int]], keep: Sequence[int], head: Tensor | None = None
    ) -> list[Tensor]:
        """Feed ids and return logits.

        Args:
            feeds: Ids for each row; an empty list leaves a row as it is.
            keep: How many positions at the end of each feed to return logits of.
            head: Rows of the model's head to compute, shape `(kept, hidden)`; all if missing.

        Returns:
            Logits of each row in float32 or wider, shape `(keep, vocab or kept)`.
        """
        ...

    def crop(self, lengths: Sequence[int]) -> None:
        """Forget what lies beyond a length, in each row."""
        ...

    def select(self, rows: Sequence[int]) -> None:
        """Keep these rows only, in this order."""
        ...


@runtime_checkable
class Chooser(Protocol):
    """A runner that takes ids on its own device, and so is waited for only once.

    Attributes:
        device: Where it runs.
    """

    device: torch.device

    def write(
        self,
        feeds: Sequence[Sequence[int]],
        counts: Sequence[int],
        among: Tensor | None = None,
        steps: int = 0,
    ) -> Callable[[], list[list[int]]]:
        """Feed ids and go on with the likeliest ones; all of these but the last are fed too.

        Returns a function that waits for these ids and returns them.

        Args:
            feeds: Ids for each row; an empty list leaves a row as it is.
            counts: How many ids to write in each row that is fed.
            among: Ids to choose from; all if missing.
            steps: How many ids are usually written, so that few graphs serve.
        """
        ...


@runtime_checkable
class Weigher(Protocol):
    """A runner that weighs the ends of a draft on its own device."""

    def weighs(self, steps: int) -> bool:
        """Return whether it takes drafts of so many ids."""
        ...

    def weigh(
        self, feeds: Sequence[Sequence[int]], steps: int, processors: Processors, top: int
    ) -> Callable[[], tuple[list[list[int]], list[list[int]], list[list[float]]]]:
        """Feed ids and go on with the likeliest ones; of the last one, weigh the best.

        Args:
            feeds: Ids for each row; an empty list leaves a row as it is.
            steps: Ids to write, the last one included; all others are fed too.
            processors: What is done to logits before they are weighed.
            top: How many are weighed.

        Returns:
            What waits for the ids but the last, the best ones for that, and their probabilities.
        """
        ...


def best_of(logits: Sequence[Tensor]) -> list[list[int]]:
    """Return the likeliest id of each row of each tensor; −1 where one is no number."""
    rows = logits[0] if len(logits) == 1 else torch.cat(list(logits))
    best: list[int] = torch.where(rows.isnan().any(dim=1), -1, rows.argmax(dim=1)).tolist()
    ends = list(itertools.accumulate(map(len, logits)))
    return [best[end - len(part) : end] for end, part in zip(ends, logits, strict=True)]


class EagerRunner:
    """Runs a model's own `forward`, one row or several.

    Rows of unequal length share one cache: what a row has forgotten, or never had, stays as a hole
    that its attention mask hides. Positions are each row's own.

    Args:
        model: A causal language model of `transformers`.
        rows: Number of rows, 1 or more.
    """

    def __init__(self, model: Any, rows: int = 1) -> None:
        from transformers import DynamicCache

        self.lengths = [0] * rows
        self._model = model
        self._cache: Any = DynamicCache()
        self._filled = 0
        self._valid = torch.zeros(rows, 0, dtype=torch.bool)
        self._device = input_device(model)
        self._trims = "logits_to_keep" in inspect.signature(model.forward).parameters

    def extend(
        self, feeds: Sequence[Sequence[int]], keep: Sequence[int], head: Tensor | None = None
    ) -> list[Tensor]:
        """See `Runner`."""
        width = max(map(len, feeds))
        if not width:
            return [torch.empty(0) for _ in feeds]
        device = self._device
        ids = torch.tensor([[*feed, *[0] * (width - len(feed))] for feed in feeds], device=device)
        inputs: dict[str, Any] = {"input_ids": ids}
        if len(feeds) > 1:
            fed = torch.tensor([len(feed) for feed in feeds])[:, None]
            new = torch.arange(width)[None] < fed
            self._valid = torch.cat([self._valid, new], dim=1)
            places = torch.tensor(self.lengths)[:, None] + torch.arange(width)
            inputs["attention_mask"] = self._valid.to(device).long()
            inputs["position_ids"] = places.to(device)
        # The first position that any row needs; one at least is computed.
        first = min((len(f) - k for f, k in zip(feeds, keep, strict=True) if k), default=width - 1)
        module = self._model
        if head is not None:
            module = self._model.base_model
        elif self._trims:
            inputs["logits_to_keep"] = width - first
        out = module(**inputs, past_key_values=self._cache, use_cache=True)
        self._filled += width
        states = out.last_hidden_state[:, first:] @ head.T if head is not None else out.logits
        states = states[:, -(width - first) :]
        for row, feed in enumerate(feeds):
            self.lengths[row] += len(feed)
        return [
            widen(states[row, max(len(feed) - k - first, 0) : max(len(feed) - first, 0)])
            if k
            else states[row, :0]
            for row, (feed, k) in enumerate(zip(feeds, keep, strict=True))
        ]

    def crop(self, lengths: Sequence[int]) -> None:
        """See `Runner`."""
        lengths = [min(a, b) for a, b in zip(self.lengths, lengths, strict=True)]
        if len(lengths) == 1:
            spare = self._filled - lengths[0]
        else:
            self._valid &= self._valid.cumsum(dim=1) <= torch.tensor(lengths)[:, None]
            used = self._valid.any(dim=0).nonzero()
            spare = self._filled - (int(used[-1]) + 1 if len(used) else 0)
            self._valid = self._valid[:, : self._filled - spare]
        if spare:
            self._cache.crop(-spare)
            self._filled -= spare
        self.lengths = lengths
        if len(lengths) > 1 and self._filled > 2 * max(lengths) + 64:
            self._close_holes()

    def _close_holes(self) -> None:
        """Move every row's entries to its end, so that only the shorter rows' holes remain."""
        order = self._valid.int().argsort(dim=1, stable=True)[:, -max(max(self.lengths), 1) :]
        self._valid = self._valid.gather(1, order)
        self._filled = order.shape[1]
        for layer in self._cache.layers:
            index = order.to(layer.keys.device)[:, None, :, None]
            layer.keys = layer.keys.gather(2, index.expand(*_outer(layer.keys, self._filled)))
            layer.values = layer.values.gather(2, index.expand(*_outer(layer.values, self._filled)))

    def select(self, rows: Sequence[int]) -> None:
        """See `Runner`."""
        if list(rows) == list(range(len(self.lengths))):
            return
        index = torch.tensor(list(rows))
        if self._filled:
            self._cache.batch_select_indices(index)  # On the CPU, for layers anywhere.
        self.lengths = [self.lengths[row] for row in rows]
        self._valid = self._valid[index]
        if len(rows) == 1:  # One row knows no holes.
            keep = self._valid[0].nonzero()[:, 0]
            for layer in self._cache.layers if self._filled else ():
                layer.keys = layer.keys[:, :, keep.to(layer.keys.device)]
                layer.values = layer.values[:, :, keep.to(layer.values.device)]
            self._filled = len(keep)


def widen(logits: Tensor) -> Tensor:
    """Return logits in float32 at least."""
    return logits if logits.dtype == torch.float64 else logits.float()


def _outer(entries: Tensor, length: int) -> tuple[int, int, int, int]:
    return entries.shape[0], entries.shape[1], length, entries.shape[3]


class OneByOneRunner:
    """Runs the rows one after another, each with a cache of its own.

    For models whose attention reaches back a number of cache entries, which holes would shorten.

    Args:
        model: A causal language model of `transformers`.
        rows: Number of rows, 1 or more.
    """

    def __init__(self, model: Any, rows: int) -> None:
        self._runners = [EagerRunner(model) for _ in range(rows)]

    @property
    def lengths(self) -> list[int]:
        """See `Runner`."""
        return [runner.lengths[0] for runner in self._runners]

    def extend(
        self, feeds: Sequence[Sequence[int]], keep: Sequence[int], head: Tensor | None = None
    ) -> list[Tensor]:
        """See `Runner`."""
        return [
            runner.extend([feed], [k], head)[0] if feed else torch.empty(0)
            for runner, feed, k in zip(self._runners, feeds, keep, strict=True)
        ]

    def crop(self, lengths: Sequence[int]) -> None:
        """See `Runner`."""
        for runner, length in zip(self._runners, lengths, strict=True):
            runner.crop([length])

    def select(self, rows: Sequence[int]) -> None:
        """See `Runner`."""
        self._runners = [self._runners[row] for row in rows]


def why_not_one_cache(model: Any) -> str:
    """Return why rows of unequal length cannot share one cache of this model; "" if they can."""
    config = model.config.get_text_config()
    parameters = inspect.signature(model.forward).parameters
    missing = [name for name in ("attention_mask", "position_ids") if name not in parameters]
    if missing:
        return f"its `forward` takes no `{missing[0]}`"
    kinds = set(getattr(config, "layer_types", None) or ())
    if getattr(config, "sliding_window", None) and kinds != {"full_attention"}:
        return "its attention has a sliding window"
    if kinds - {"full_attention"}:
        return f"it has layers of kind {sorted(kinds - {'full_attention'})[0]!r}"
    return ""


def make_runner(model: Any, rows: int, backend: str = "auto") -> Runner:
    """Return the fastest runner that fits the model; the reason for it is logged at DEBUG.

    Args:
        model: A causal language model of `transformers`.
        rows: Number of rows, 1 or more.
        backend: `"auto"`, or `"eager"` for the model's own `forward`.
    """
    from .llama import LlamaRunner, why_not_llama

    name = type(model).__name__
    if backend != "eager":
        reason = why_not_llama(model)
        if not reason:
            return LlamaRunner(model, rows)
        _logger.debug("%s runs by its own forward: %s", name, reason)
    if rows > 1 and (reason := why_not_one_cache(model)):
        _logger.debug("%s runs row by row: %s", name, reason)
        return OneByOneRunner(model, rows)
    return EagerRunner(model, rows)
