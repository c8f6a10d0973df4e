"""SLEM and C-SLRS: drafts of text, which the target's tokenizer turns into tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ._bytes import ByteEncoder, unfinished_tail
from .acceptance import Choice
from .drafting import Situation, nothing
from .drafts import Certain, Draft, Runs

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
            drafts[row] = Certain(run[:room])
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
        wait = self._write(now, now.lookahead - 1)
        return lambda: self._weighed(now, *wait())

    def _weighed(
        self, now: Situation, written: list[list[int]], ended: list[bool], drafted: int
    ) -> tuple[list[Draft], int]:
        text = self._text
        drafts = nothing(len(written))
        feeds: list[list[int]] = []
        if now.lookahead > 1:
            for row, ids in enumerate(written):
                feeds.append(ids[-1:] if ids and not ended[row] else [])
                if ended[row] and text.target_eos:
                    run = [*text.retokenise(now.recent[row], ids), text.target_eos[0]]
                    drafts[row] = Certain(run[: now.rooms[row]])
        else:
            feeds = now.memory.missing([min(room, 1) for room in now.rooms])
        active = [row for row, feed in enumerate(feeds) if feed]
        if not active:
            return drafts, drafted
        said = now.memory.feed(feeds)
        logits = torch.cat([said[row] for row in active])
        law = now.processors.scores_only(logits).softmax(dim=1)
        best, tokens = law.topk(min(self._top, law.shape[1]), dim=1)
        best = best / best.sum(dim=1, keepdim=True)
        for i, row in enumerate(active):
            runs = []
            for token, mass in zip(tokens[i].tolist(), best[i].tolist(), strict=True):
                end = token in text.drafter_eos
                ids = written[row] if end else [*written[row], token]
                run = text.retokenise(now.recent[row], ids) if mass > 0 else []
                if end:
                    run = [*run, *text.target_eos[:1]]
                runs.append(run[: now.rooms[row]])
            mass = best[i] * torch.tensor([bool(run) for run in runs], device=best.device)
            if not bool(mass.sum() > 0):
                continue
            mass = mass / mass.sum()
            longest = max(map(len, runs))
            padded = [run + [-1] * (longest - len(run)) for run in runs]
            table = torch.tensor(padded, device=best.device)
            (chosen,) = now.chance.draw(mass[None])
            run = runs[chosen]
            drafts[row] = Runs(run, [Choice(table, mass, chosen)], [len(run)])
        return drafts, drafted + len(active)
