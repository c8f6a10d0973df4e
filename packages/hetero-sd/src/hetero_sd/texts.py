"""SLEM and C-SLRS: drafts of text, which the target's tokenizer turns into tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ._bytes import ByteEncoder, unfinished_tail
from .drafting import Situation, nothing
from .drafts import Certain, Draft, Weighed

_LOOKBACK = 4  # Target tokens before a draft that are tokenised anew with it.


@dataclass(frozen=True)
class Text:
    """What the drafting methods need to turn drafter tokens into target tokens.

    Attributes:
        target: Encoder of the target's tokenizer.
        drafter: Encoder of the drafter's tokenizer.
        target_eos: End tokens of the target, first the one to propose.
        drafter_eos: End tokens of the drafter.
    """

    target: ByteEncoder
    drafter: ByteEncoder
    target_eos: list[int]
    drafter_eos: list[int]

    def retokenise(self, recent: Sequence[int], drafted: Sequence[int]) -> list[int]:
        """Return target tokens for drafted ones, as they would follow the last of the history."""
        data = self.drafter.spell(list(drafted))
        data = data[: len(data) - unfinished_tail(data)]
        if not data:
            return []
        table = self.target.table
        before: list[int] = []
        for token in reversed(recent[-_LOOKBACK:]):
            if token >= len(table) or table[token] is None:
                break
            before.insert(0, token)
        both = self.target.encode(self.target.spell(before) + data)
        if both[: len(before)] == before:
            return both[len(before) :]
        return self.target.encode(data)

    def reach(self, drafted: Sequence[int], tokens: Sequence[int]) -> list[tuple[int, int]]:
        """Return drafter tokens, each with the number of target tokens that have it in their text.

        That is where the bytes of both end together: a drafter token that ends within a target
        token takes as many as the next one that does not, or more than there are.

        Args:
            drafted: Drafter ids.
            tokens: Target ids of the same text.
        """
        ends, size = {}, 0
        for count, token in enumerate(tokens):
            size += len(self.target.spell([token]))
            ends[size] = count + 1
        found, size = [], 0
        for index in drafted:
            size += len(self.drafter.spell([index]))
            found.append(ends.get(size, 0))
        later = len(tokens) + 1
        for place in reversed(range(len(found))):
            later = found[place] = found[place] or later
        return list(zip(drafted, found, strict=True))

    def retokenise_each(
        self, recent: Sequence[int], drafted: Sequence[int], choices: Sequence[int]
    ) -> list[list[int]]:
        """Return target tokens for drafted ones and each of several after them.

        Only the end of what all have in common is tokenised anew with each.
        """
        data = self.drafter.spell(list(drafted))
        tail = data[len(data) - unfinished_tail(data) :]
        run = self.retokenise(recent, drafted)
        keep, window = run[:-2], run[-2:]
        before = keep[-1:] or list(recent[-1:])
        known = self.target.spell(before)
        before = before if known else []
        known += self.target.spell(window) + tail
        found = []
        for choice in choices:
            data = known + self.drafter.spell([choice])
            data = data[: len(data) - unfinished_tail(data)]
            both = self.target.encode(data)
            if both[: len(before)] != before:
                before_bytes = len(self.target.spell(before))
                found.append([*keep, *self.target.encode(data[before_bytes:])])
            else:
                found.append([*keep, *both[len(before) :]])
        return found


class ExactText:
    """SLEM: the drafter writes its likeliest text, which the target's tokenizer turns into tokens.

    Args:
        text: The tokenizers.

    Source: Timor et al. 2025, algorithm 2.
    """

    def __init__(self, text: Text) -> None:
        self._text = text

    def draft(self, now: Situation) -> tuple[list[Draft], int]:
        """See `Method`."""
        return self.begin(now)()

    def begin(self, now: Situation) -> Callable[[], tuple[list[Draft], int]]:
        """See `Beginner`."""
        wait = self._write(now, now.lookahead)
        return lambda: self._proposals(now, *wait())

    def _proposals(
        self, now: Situation, written: list[list[int]], ended: list[bool], drafted: int
    ) -> tuple[list[Draft], int]:
        text = self._text
        drafts = nothing(len(written))
        for row, (ids, room) in enumerate(zip(written, now.rooms, strict=True)):
            if not room or not (ids or ended[row]):
                continue
            run = text.retokenise(now.recent[row], ids)
            if ended[row] and text.target_eos:
                run = [*run, text.target_eos[0]]
            kept = None if ended[row] else text.reach(ids[:-1], run)
            drafts[row] = Certain(run[:room], kept)
        return drafts, drafted

    def _write(
        self, now: Situation, steps: int
    ) -> Callable[[], tuple[list[list[int]], list[bool], int]]:
        """Return what waits for the drafter's likeliest tokens.

        That is, these tokens, whether it ended there, and how many it took.
        """
        rooms = [min(room, steps) for room in now.rooms]
        feeds = now.memory.missing(rooms)
        ends = self._text.drafter_eos
        read = now.memory.write(feeds, rooms, ends, steps=steps)

        def wait() -> tuple[list[list[int]], list[bool], int]:
            written = read()
            ended = [bool(ids) and ids[-1] in ends for ids in written]
            drafted = sum(map(len, written))
            return (
                [ids[: len(ids) - end] for ids, end in zip(written, ended, strict=True)],
                ended,
                drafted,
            )

        return wait


class LastTokenRuns(ExactText):
    """C-SLRS: all drafter tokens but the last are given; the last one's every choice is weighed.

    The drafter writes its likeliest tokens and draws the last among its best `top` ones; each of
    these makes a text, and so a run of target tokens.

    Args:
        text: The tokenizers.
        top: Choices of the last drafter token, 1 or more.

    Source: own.
    """

    def __init__(self, text: Text, top: int = 16) -> None:
        super().__init__(text)
        self._top = top

    def begin(self, now: Situation) -> Callable[[], tuple[list[Draft], int]]:
        """See `Beginner`."""
        if now.processors.greedy:
            return super().begin(now)
        rooms = [min(room, now.lookahead) for room in now.rooms]
        feeds = now.memory.missing(rooms)
        wait = now.memory.weigh(
            feeds, self._text.drafter_eos, now.lookahead, now.processors, self._top
        )
        return lambda: self._weighed(now, *wait())

    def _weighed(
        self,
        now: Situation,
        written: list[list[int]],
        choices: list[list[int]],
        masses: list[list[float]],
    ) -> tuple[list[Draft], int]:
        text, drafts = self._text, nothing(len(written))
        end = text.target_eos[:1]
        for row, ids in enumerate(written):
            recent, room = now.recent[row], now.rooms[row]
            if ids and ids[-1] in text.drafter_eos:
                run = [*text.retokenise(recent, ids[:-1]), *end]
                drafts[row] = Certain(run[:room])
            elif choices[row]:
                runs = text.retokenise_each(recent, ids, choices[row])
                ended = [choice in text.drafter_eos for choice in choices[row]]
                if any(ended):
                    whole = [*text.retokenise(recent, ids), *end]
                    runs = [whole if e else run for run, e in zip(runs, ended, strict=True)]
                runs = [run[:room] for run in runs]
                shares = [m if run else 0.0 for m, run in zip(masses[row], runs, strict=True)]
                if sum(shares) > 0:
                    place = now.chance.pick(shares)
                    kept = text.reach(ids, runs[place])
                    drafts[row] = Weighed.among(runs, shares, place, kept)
        return drafts, sum(map(len, written)) + sum(map(bool, choices))
