"""The drafter's view of the target's tokens: the same bytes, in the drafter's own tokens."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from ._bytes import ByteEncoder, unfinished_tail
from .processors import Processors
from .runners import Chooser, Runner, Weigher
from .vocab import VocabMap

_LOOKBACK = 4  # Tokens before new text that may be encoded anew with it.


@runtime_checkable
class Context(Protocol):
    """A drafter's context.

    Attributes:
        ids: Drafter ids.
        pending: Bytes of the history that `ids` does not hold yet.
        kept: Ids before this place are as they were when it was set; a context only lowers it.
    """

    ids: list[int]
    pending: bytes
    kept: int

    def extend(self, tokens: Sequence[int]) -> None:
        """Append target tokens."""
        ...


class SameContext:
    """The context of a drafter that has the target's own vocabulary."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.pending = b""
        self.kept = 0

    def extend(self, tokens: Sequence[int]) -> None:
        """Append target tokens."""
        self.ids += tokens


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
        ids: Ids to begin with, such as a chat in the drafter's own template.

    Attributes:
        ids: The drafter's context.
        pending: Bytes of the history that `ids` does not hold yet.
        kept: Ids before this place are as they were when it was set.
    """

    def __init__(
        self, encoder: ByteEncoder, mapping: VocabMap, start: int | None, ids: Sequence[int] = ()
    ) -> None:
        self._encoder = encoder
        self._mapping = mapping
        self._start = start
        self.ids: list[int] = list(ids)
        self.pending = b""
        self.kept = 0
        self._run = len(self.ids)  # Where the current run of text starts in `ids`.

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
                self.kept = min(self.kept, cut)
                return
        self.ids += self._encoder.encode(data)


class DrafterMemory:
    """A drafter, its contexts and its cache, for all rows of a batch.

    Args:
        runner: The drafter.
        contexts: A context for each row.
        limit: Longest context in tokens; beyond it, the older half is dropped.
    """

    def __init__(self, runner: Runner, contexts: list[Context], limit: int) -> None:
        self._runner = runner
        self._limit = limit
        self.contexts = contexts
        self._held: list[list[int]] = [[] for _ in contexts]  # Ids in the cache.
        self._dropped = [0 for _ in contexts]

    def missing(self, rooms: Sequence[int]) -> list[list[int]]:
        """Crop to what agrees with the contexts, and return the ids to feed: at least the last.

        Args:
            rooms: Tokens that will be drafted after each context; where it is 0, where the context
                is empty or in the middle of a character, nothing is to be fed.
        """
        feeds: list[list[int]] = []
        keep: list[int] = []
        for row, (context, room) in enumerate(zip(self.contexts, rooms, strict=True)):
            held = self._held[row]
            if not room or context.pending or not context.ids:
                feeds.append([])
                keep.append(len(held))
                continue
            if len(context.ids) - self._dropped[row] + room > self._limit:
                self._dropped[row] = max(len(context.ids) - self._limit // 2, 0)
                held.clear()
            there = min(len(held), self._runner.lengths[row])
            # What was held agrees with the context up to where that has changed since.
            ids, start = context.ids, self._dropped[row]
            place = max(min(context.kept - start, there), 0)
            end = min(there, len(ids) - start)
            while place < end and held[place] == ids[start + place]:
                place += 1
            keep.append(min(place, len(ids) - start - 1))
            feeds.append(ids[start + keep[-1] :])
            context.kept = len(ids)
        self.crop(keep)
        return feeds

    def crop(self, lengths: Sequence[int]) -> None:
        """Forget all but the first ids of each row."""
        for held, length in zip(self._held, lengths, strict=True):
            del held[length:]
        self._runner.crop(lengths)

    @property
    def setup_seconds(self) -> float:
        """Time that the drafter spent on what is done once, in seconds."""
        seconds: float = getattr(self._runner, "setup_seconds", 0.0)
        return seconds

    @property
    def lengths(self) -> list[int]:
        """Ids in the cache, of each row."""
        return [len(held) for held in self._held]

    def feed(
        self,
        feeds: Sequence[Sequence[int]],
        head: Tensor | None = None,
        keep: Sequence[int] | None = None,
    ) -> list[Tensor]:
        """Feed ids and return logits after each row's last, or last few; see `Runner.extend`."""
        for held, feed in zip(self._held, feeds, strict=True):
            held += feed
        if keep is None:
            keep = [int(bool(feed)) for feed in feeds]
        return self._runner.extend(feeds, keep, head)

    def write(
        self,
        feeds: Sequence[Sequence[int]],
        rooms: Sequence[int],
        ends: Container[int],
        among: Tensor | None = None,
        steps: int = 0,
    ) -> Callable[[], list[list[int]]]:
        """Let the drafter write its likeliest ids after each feed; return what waits for them.

        Args:
            feeds: Ids that `missing` returned.
            rooms: Most ids to write in each row.
            ends: Ids after which a row writes no more.
            among: Ids to choose from, ascending; all if missing.
            steps: As for `Chooser.write`.
        """
        if not (isinstance(self._runner, Chooser) and any(feeds)):
            return lambda: self._write(feeds, rooms, ends, among)
        read = self._runner.write(feeds, rooms, among, steps)

        def wait() -> list[list[int]]:
            written: list[list[int]] = []
            for held, feed, ids in zip(self._held, feeds, read(), strict=True):
                held += [*feed, *ids[:-1]]
                end = next((i + 1 for i, token in enumerate(ids) if token in ends), len(ids))
                written.append(ids[:end])
            return written

        return wait

    def _write(
        self,
        feeds: Sequence[Sequence[int]],
        rooms: Sequence[int],
        ends: Container[int],
        among: Tensor | None,
    ) -> list[list[int]]:
        written: list[list[int]] = [[] for _ in feeds]
        while any(feeds):
            active = [row for row, feed in enumerate(feeds) if feed]
            said = self.feed(feeds)
            logits = torch.cat([said[row] for row in active])
            best = (logits if among is None else logits[:, among]).argmax(dim=1)
            feeds = [[] for _ in feeds]
            for row, token in zip(
                active, (best if among is None else among[best]).tolist(), strict=True
            ):
                written[row].append(token)
                if len(written[row]) < rooms[row] and token not in ends:
                    feeds[row] = [token]
        return written

    def weigh(
        self,
        feeds: Sequence[Sequence[int]],
        ends: Container[int],
        steps: int,
        processors: Processors,
        top: int,
    ) -> Callable[[], tuple[list[list[int]], list[list[int]], list[list[float]]]]:
        """Let the drafter write its likeliest ids, and weigh the best ones for the last.

        Args:
            feeds: Ids that `missing` returned.
            ends: Ids after which a row writes no more.
            steps: Ids to write, the last one included, 1 or more.
            processors: What is done to its logits before they are weighed.
            top: How many are weighed.

        Returns:
            What waits for the ids before the last one, up to an end; the best ids for the last,
            none in a row that has ended or was not fed, and their probabilities.
        """
        runner = self._runner
        if isinstance(runner, Weigher) and any(feeds) and runner.weighs(steps):
            read = runner.weigh(feeds, steps, processors, top)

            def wait() -> tuple[list[list[int]], list[list[int]], list[list[float]]]:
                written, best, masses = read()
                for row, feed in enumerate(feeds):
                    ids = written[row] = written[row] if feed else []
                    self._held[row] += [*feed, *ids]
                    end = next((i + 1 for i, token in enumerate(ids) if token in ends), 0)
                    if end or not feed:
                        written[row], best[row] = ids[:end], []
                return written, best, masses

            return wait
        return lambda: self._weigh(feeds, ends, steps, processors, top)

    def _weigh(
        self,
        feeds: Sequence[Sequence[int]],
        ends: Container[int],
        steps: int,
        processors: Processors,
        top: int,
    ) -> tuple[list[list[int]], list[list[int]], list[list[float]]]:
        rooms = [steps - 1 if feed else 0 for feed in feeds]
        written: list[list[int]] = [[] for _ in feeds]
        if steps > 1:
            written = self.write(feeds, rooms, ends, steps=steps - 1)()
            feeds = [ids[-1:] if ids and ids[-1] not in ends else [] for ids in written]
        best: list[list[int]] = [[] for _ in feeds]
        masses: list[list[float]] = [[] for _ in feeds]
        active = [row for row, feed in enumerate(feeds) if feed]
        if active:
            said = self.feed(feeds)
            law = processors.scores_only(torch.cat([said[row] for row in active])).softmax(dim=1)
            found = law.topk(min(top, law.shape[1]), dim=1)
            for row, shares, ids in zip(
                active, found.values.tolist(), found.indices.tolist(), strict=True
            ):
                best[row], masses[row] = ids, shares
        return written, best, masses

    def note(self, feeds: Sequence[Sequence[int]]) -> None:
        """Take note of ids that were fed to the drafter without this object."""
        for held, feed in zip(self._held, feeds, strict=True):
            held += feed

    def select(self, rows: Sequence[int]) -> None:
        """Keep these rows only."""
        self._runner.select(rows)
        self.contexts = [self.contexts[row] for row in rows]
        self._held = [self._held[row] for row in rows]
        self._dropped = [self._dropped[row] for row in rows]
