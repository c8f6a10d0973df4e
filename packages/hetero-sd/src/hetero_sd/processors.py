"""Logits processors on many positions at once, each as `generate` would call it on one."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .kernels.judge import Warp

# What these do to a token depends on the scores alone, so that they act on any set of tokens.
_BY_SCORE = frozenset(
    {
        "EpsilonLogitsWarper",
        "EtaLogitsWarper",
        "InfNanRemoveLogitsProcessor",
        "LogitNormalization",
        "MinPLogitsWarper",
        "TemperatureLogitsWarper",
        "TopHLogitsWarper",
        "TopKLogitsWarper",
        "TopPLogitsWarper",
        "TypicalLogitsWarper",
    }
)
_WARPERS = {  # Places in the order of `generate`, and what each of them is told.
    "TemperatureLogitsWarper": (0, "temperature"),
    "TopKLogitsWarper": (1, "top_k"),
    "TopPLogitsWarper": (2, "top_p"),
    "MinPLogitsWarper": (3, "min_p"),
}
_STATEFUL = {
    "UnbatchedClassifierFreeGuidanceLogitsProcessor": "guidance_scale",
    "SynthIDTextWatermarkLogitsProcessor": "watermarking_config",
}


class Processors:
    """What is done to logits before a token is chosen.

    Args:
        chain: Processors in the order of `generate`, each called as `processor(input_ids, scores)`.
            One with a true attribute `ignores_input_ids` is called on many positions at once.
        greedy: Whether the best token is taken, rather than one drawn.
        rows: Rows of the batch that they were made for.

    Raises:
        ValueError: A processor remembers earlier calls, which positions tried ahead would spoil.
    """

    def __init__(self, chain: Sequence[Any] = (), greedy: bool = True, rows: int = 1) -> None:
        for processor in chain:
            option = _STATEFUL.get(type(processor).__name__)
            if option:
                raise ValueError(
                    f"`{option}` keeps a state from token to token, which speculative decoding "
                    "cannot take back; decode without the drafter."
                )
        self.greedy = greedy
        self._chain = [(p, _kind(p)) for p in chain]
        self._of_row = [[_for_row(p, row) for p in chain] for row in range(rows)]

    @property
    def by_score(self) -> bool:
        """Whether all act on the scores alone, so that any set of tokens may be given."""
        return all(kind == "score" for _, kind in self._chain)

    @property
    def empty(self) -> bool:
        """Whether nothing is done."""
        return not self._chain

    @property
    def warp(self) -> Warp | None:
        """What is done, where a kernel can do it: temperature, top-k, top-p, min-p in this order.

        None where anything else is done.
        """
        found: dict[str, Any] = {}
        last = -1
        for processor, kind in self._chain:
            place = _WARPERS.get(type(processor).__name__, (-1, ""))[0] if kind == "score" else -1
            other = getattr(processor, "filter_value", -math.inf) != -math.inf
            if place <= last or other or getattr(processor, "min_tokens_to_keep", 1) != 1:
                return None
            name = _WARPERS[type(processor).__name__][1]
            found[name], last = getattr(processor, name), place
        warp = Warp(**found)
        return None if self.greedy and warp.cuts else warp

    @property
    def key(self) -> str:
        """What tells these processors from others that do something else."""
        return repr((self.greedy, [(type(p).__name__, vars(p)) for p, _ in self._chain]))

    def scores_only(self, logits: Tensor) -> Tensor:
        """Return logits over any set of tokens, after those that act on scores alone."""
        for processor, kind in self._chain:
            if kind == "score":
                logits = processor(None, logits)
        return logits

    def __call__(self, logits: Tensor, history: Sequence[int] = (), row: int = 0) -> Tensor:
        """Return processed logits of one row of the batch.

        Args:
            logits: Shape `(positions, vocab)`, over the target's whole vocabulary.
            history: Target ids before the last position, padding as `generate` sees it included;
                position i of n sees all but the last n − 1 − i. Not read where all act on scores.
            row: Row of the batch.
        """
        ids: Tensor | None = None
        for (_, kind), processor in zip(self._chain, self._of_row[row], strict=True):
            if kind != "ids":
                logits = processor(None, logits)
                continue
            if ids is None:
                ids = torch.tensor([list(history)], dtype=torch.long, device=logits.device)
            behind = len(logits) - 1
            logits = torch.cat(
                [
                    processor(ids[:, : ids.shape[1] - behind + i], logits[i : i + 1].clone())
                    for i in range(len(logits))
                ]
            )
        return logits


def _kind(processor: Any) -> str:
    name = type(processor).__name__
    if name in _BY_SCORE and type(processor).__module__.startswith("transformers."):
        return "score"
    if name == "SuppressTokensLogitsProcessor" or getattr(processor, "ignores_input_ids", False):
        return "vocabulary"
    return "ids"


def _for_row(processor: Any, row: int) -> Any:
    """Return a processor for a batch of one row out of one for a whole batch."""
    name = type(processor).__name__
    if name == "RepetitionPenaltyLogitsProcessor":
        ignored = getattr(processor, "prompt_ignore_length", None)
        if isinstance(ignored, Tensor):
            processor = copy.copy(processor)
            processor.prompt_ignore_length = ignored[row : row + 1]
    elif name == "EncoderRepetitionPenaltyLogitsProcessor":
        processor = copy.copy(processor)
        processor.encoder_input_ids = processor.encoder_input_ids[row : row + 1]
    elif name == "EncoderNoRepeatNGramLogitsProcessor":
        processor = copy.copy(processor)
        processor.batch_size = 1
        processor.generated_ngrams = processor.generated_ngrams[row : row + 1]
    elif name == "PrefixConstrainedLogitsProcessor":
        allowed = processor._prefix_allowed_tokens_fn
        processor = copy.copy(processor)
        processor._prefix_allowed_tokens_fn = lambda _, ids: allowed(row, ids)
    return processor
