"""Logits processors in the order of `transformers`' `generate`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Processors:
    """What is done to logits before a token is chosen.

    Args:
        do_sample: Whether tokens are drawn; the warpers act only then.
        temperature: Above 0.
        top_k: Keep the k best tokens; 0 or None keeps all.
        top_p: Keep the smallest set of tokens with this mass, in (0, 1]; 1 keeps all.
        min_p: Keep tokens with at least this share of the best one's probability, in [0, 1].
        repetition_penalty: Above 0; 1 is none.
        custom: Further processors, called as `processor(input_ids, scores)` on one position at a
            time, after the penalty and before the temperature.

    Raises:
        ValueError: A number is out of its range.
    """

    def __init__(
        self,
        *,
        do_sample: bool,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float = 1.0,
        custom: list[Any] | None = None,
    ) -> None:
        _check("temperature", temperature, temperature > 0, "above 0 (use `do_sample=False`)")
        _check("top_k", top_k, top_k is None or top_k >= 0, "0 or more")
        _check("top_p", top_p, top_p is None or 0 < top_p <= 1, "in (0, 1]")
        _check("min_p", min_p, min_p is None or 0 <= min_p <= 1, "in [0, 1]")
        _check("repetition_penalty", repetition_penalty, repetition_penalty > 0, "above 0")
        from transformers.generation import logits_process as library

        self.greedy = not do_sample
        self._by_position: list[Any] = []
        if repetition_penalty != 1.0:
            self._by_position.append(
                library.RepetitionPenaltyLogitsProcessor(penalty=float(repetition_penalty))
            )
        self._by_position += custom or []
        self._warpers: list[Any] = []
        if do_sample:
            if temperature != 1.0:
                self._warpers.append(library.TemperatureLogitsWarper(float(temperature)))
            if top_k:
                self._warpers.append(library.TopKLogitsWarper(top_k=top_k))
            if top_p is not None and top_p < 1.0:
                self._warpers.append(library.TopPLogitsWarper(top_p=float(top_p)))
            if min_p:
                self._warpers.append(library.MinPLogitsWarper(min_p=float(min_p)))

    @property
    def need_ids(self) -> bool:
        """Whether some processor looks at token ids, so that it must see the target's own."""
        return bool(self._by_position)

    def __call__(self, logits: Tensor, history: Tensor | None = None) -> Tensor:
        """Return processed logits.

        Args:
            logits: Shape `(positions, vocab)`, or any set of tokens where no processor needs ids.
            history: Target ids before the last position, `(length,)`; position i of n sees all
                but the last n − 1 − i. Only where processors need ids.
        """
        if self._by_position:
            if history is None:
                raise ValueError("`history` must be given where a processor looks at token ids.")
            rows = []
            for i, row in enumerate(logits):
                ids = history[None, : len(history) - (len(logits) - 1 - i)]
                scores = row[None]
                for processor in self._by_position:
                    scores = processor(ids, scores)
                rows.append(scores)
            logits = torch.cat(rows)
        for warper in self._warpers:
            logits = warper(None, logits)
        return logits


def _check(name: str, value: Any, fits: bool, allowed: str) -> None:
    if not fits:
        raise ValueError(f"`{name}` must be {allowed}; got {value!r}.")
