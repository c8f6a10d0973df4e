"""SLRS: drafts of any drafter tokens, each a fixed run of target tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from .acceptance import Choice
from .drafting import Situation, Table, nothing
from .drafts import Certain, Draft, Runs
from .texts import Text
from .vocab import VocabMap

_LONGEST_RUN = 8  # Target tokens that one drafter token may be.


class TokenRuns:
    """SLRS with a decision at every drafter token, each of which is a fixed run of target tokens.

    The drafter draws from its whole vocabulary. The law of a run's first token is a sum over all
    drafter tokens whose run begins with it; how a run goes on is a walk down the tree of runs.

    Args:
        text: The tokenizers.
        mapping: The vocabularies' map.
        drafter_size: Rows of the drafter's head.
        device: Device of the drafter.

    Source: SLRS, Timor et al. 2025, algorithm 5, in a form of our own.
    """

    def __init__(
        self, text: Text, mapping: VocabMap, drafter_size: int, device: torch.device
    ) -> None:
        self._text = text
        same = dict(zip(mapping.keep.tolist(), mapping.to_target.tolist(), strict=True))
        runs: list[list[int]] = []
        for index in range(drafter_size):
            spelled = mapping.drafter_bytes[index] if index < len(mapping.drafter_bytes) else None
            if index in same:
                run = [same[index]]
            elif spelled is None:
                run = []
            else:
                run = text.target.encode(spelled)
                if text.target.spell(run) != spelled or len(run) > _LONGEST_RUN:
                    run = []
            runs.append(run)
        usable = [index for index, run in enumerate(runs) if run]
        longest = max((len(runs[index]) for index in usable), default=1)
        self.usable = torch.tensor(usable, dtype=torch.long, device=device)
        padded = [runs[index] + [-1] * (longest - len(runs[index])) for index in usable]
        self.runs = torch.tensor(padded, device=device).view(len(usable), longest)
        self._run_of = [runs[index] for index in usable]
        self._usable = usable
        self._place = {index: place for place, index in enumerate(usable)}
        self._all = len(usable) == drafter_size

    def table(self) -> Table:
        """Return what a graph needs to draft by itself."""
        among = None if self._all else self.usable[:, None]
        return Table(None, among, self.usable, self.runs, None, False)

    def draft(self, now: Situation) -> tuple[list[Draft], int]:
        """See `Method`."""
        rooms = [min(room, now.lookahead) for room in now.rooms]
        feeds = now.memory.missing(rooms)
        drafts, eos = nothing(len(feeds)), self._text.drafter_eos
        if now.processors.greedy:
            written = now.memory.write(feeds, rooms, eos, self.usable, now.lookahead)()
            for row, ids in enumerate(written):
                run = [token for d in ids for token in self._run_of[self._place[d]]]
                drafts[row] = Certain(run[: now.rooms[row]])
            return drafts, sum(map(len, written))
        tokens: list[list[int]] = [[] for _ in feeds]
        steps: list[list[Choice]] = [[] for _ in feeds]
        lengths: list[list[int]] = [[] for _ in feeds]

        def take(row: int, law: Tensor, place: int) -> bool:
            """Append a run, and return whether another may follow."""
            steps[row].append(Choice(self.runs, law, place))
            tokens[row].extend(self._run_of[place])
            lengths[row].append(len(self._run_of[place]))
            ended = self._usable[place] in eos
            return len(tokens[row]) < now.rooms[row] and not ended

        drafted = 0
        active = [row for row, feed in enumerate(feeds) if feed]
        while active:
            said = now.memory.feed(feeds)
            logits = torch.cat([said[row] for row in active])[:, self.usable]
            drafted += len(active)
            law = now.processors.scores_only(logits).softmax(dim=1)
            places = now.chance.draw(law)
            feeds = [[] for _ in feeds]
            for i, (row, place) in enumerate(zip(active, places, strict=True)):
                if take(row, law[i], place) and len(steps[row]) < rooms[row]:
                    feeds[row] = [self._usable[place]]
            active = [row for row in active if feeds[row]]
        for row, run in enumerate(tokens):
            if run:
                drafts[row] = Runs(run[: now.rooms[row]], steps[row], lengths[row])
        return drafts, drafted
