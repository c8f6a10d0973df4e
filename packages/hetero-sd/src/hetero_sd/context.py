"""The drafter's view of the target's tokens: the same bytes, in the drafter's own tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ._bytes import ByteEncoder, unfinished_tail
from .vocab import VocabMap

_LOOKBACK = 4  # Tokens before new text that may be encoded anew with it.


class DrafterContext:
    """Drafter ids whose bytes are a prefix of the bytes of the target's history.

    New target tokens are appended as bytes. The last few drafter tokens are encoded anew together
    with them, so that the ids stay close to what the drafter's tokenizer makes of the whole text,
    at a cost that does not grow with its length. Special tokens end a run of text. A character
    whose bytes are not all there yet is held back.

    Args:
        encoder: Encoder of the drafter's tokenizer.
        mapping: The vocabularies' map.
        start: The drafter's start token, if it has one.

    Attributes:
        ids: The drafter's context.
        pending: Bytes of the history that `ids` does not hold yet.
    """

    def __init__(self, encoder: ByteEncoder, mapping: VocabMap, start: int | None) -> None:
        self._encoder = encoder
        self._mapping = mapping
        self._start = start
        self.ids: list[int] = []
        self.pending = b""
        self._run = 0  # Where the current run of text starts in `ids`.

    def extend(self, tokens: Sequence[int]) -> None:
        """Append target tokens."""
        table, special = self._mapping.target_bytes, self._mapping.special
        data = self.pending
        for token in tokens:
            spelled = table[token] if token < len(table) else None
            if spelled is not None:
                data += spelled
                continue
            self._append(data)
            data = b""
            if token in special:
                self._begin(special[token])
                self.ids.append(special[token])
            self._run = len(self.ids)
        tail = unfinished_tail(data)
        self.pending = data[len(data) - tail :]
        self._append(data[: len(data) - tail])

    def _begin(self, first: int | None) -> None:
        if not self.ids and self._start is not None and first != self._start:
            self.ids.append(self._start)
            self._run = 1

    def _append(self, data: bytes) -> None:
        if not data:
            return
        self._begin(None)
        cut = max(self._run, len(self.ids) - _LOOKBACK)
        old = self.ids[cut:]
        if old:
            known = self._encoder.spell(old)
            anew = self._encoder.encode(known + data)
            # Trust the new reading only if it agrees where the window starts.
            if anew[:1] == old[:1] and self._encoder.spell(anew) == known + data:
                self.ids[cut:] = anew
                return
        self.ids += self._encoder.encode(data)


class DrafterCache:
    """A drafter's key-value cache, and which ids are in it.

    Args:
        limit: Longest context in tokens; beyond it, the older half is dropped.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._dropped = 0
        self._reset()

    def _reset(self) -> None:
        from transformers import DynamicCache

        self.cache: Any = DynamicCache()
        self.held: list[int] = []

    def missing(self, ids: list[int], room: int) -> list[int]:
        """Crop to what agrees with the context, and return the ids to feed: at least the last.

        Args:
            ids: The context.
            room: Tokens that will be drafted after it.
        """
        if len(ids) - self._dropped + room > self._limit:
            self._dropped = max(len(ids) - self._limit // 2, 0)
            self._reset()
        ids = ids[self._dropped :]
        common = 0
        for ours, theirs in zip(self.held, ids, strict=False):
            if ours != theirs:
                break
            common += 1
        common = min(common, len(ids) - 1)
        if common < len(self.held):
            self.cache.crop(common - len(self.held))  # Negative: drop so many.
            del self.held[common:]
        return ids[common:]
