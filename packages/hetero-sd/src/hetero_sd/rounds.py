"""Rounds of draft and verification over a batch of rows, each at its own pace."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .acceptance import verify_greedy
from .chance import Chance
from .context import DrafterMemory
from .control import PLAIN, Arm, Bandit, Fixed, Outcome
from .drafting import Beginner, Method, Situation
from .drafts import Certain, Draft, Weighed, judge_together
from .graphs import WIDTHS
from .processors import Processors
from .runners import Chooser, Runner, best_of
from .whole import GraphRound, Settled

_logger = logging.getLogger(__name__)
_NO_NUMBERS = "`target` gave logits that are no numbers."
WIDEST = WIDTHS[-1]  # Tokens of a row that a graph takes.
COUNTS = ("rounds", "row_rounds", "drafted", "proposed", "judged", "accepted", "generated")


@dataclass
class Stats:
    """What one generation did.

    Attributes:
        rounds: Draft-and-verify rounds; each is one forward pass of the target.
        row_rounds: The same, counted once for each row that took part.
        drafted: Tokens the drafter drafted.
        proposed: Target tokens proposed.
        judged: Proposals that were accepted, or were the first of their draft to be refused.
        accepted: Proposals accepted.
        by_position: For each position in a draft, how often it was proposed and accepted.
        generated: New tokens, of all rows.
        seconds: Time spent, in seconds: `draft`, `verify`, `text` (tokens of one kind into the
            other) and `total`.
        arms: Rounds by method and lookahead, such as `{"tli 3": 20, "plain 0": 2}`.
    """

    rounds: int = 0
    row_rounds: int = 0
    drafted: int = 0
    proposed: int = 0
    judged: int = 0
    accepted: int = 0
    by_position: list[tuple[int, int]] = field(default_factory=list)
    generated: int = 0
    seconds: dict[str, float] = field(
        default_factory=lambda: {"draft": 0.0, "verify": 0.0, "text": 0.0, "total": 0.0}
    )
    arms: dict[str, int] = field(default_factory=dict)

    @property
    def acceptance(self) -> float:
        """Share of proposals accepted, in [0, 1]; 0 where nothing was proposed."""
        return self.accepted / self.proposed if self.proposed else 0.0

    @property
    def block_efficiency(self) -> float:
        """New tokens of a row for each forward pass of the target; plain decoding has 1."""
        return self.generated / self.row_rounds if self.row_rounds else 0.0

    @property
    def tokens_per_second(self) -> float:
        """New tokens a second, prompt included."""
        total = self.seconds["total"]
        return self.generated / total if total else 0.0

    def add(self, other: Stats) -> None:
        """Add another generation's counts, positions left out."""
        for name in COUNTS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for mine, theirs in ((self.seconds, other.seconds), (self.arms, other.arms)):
            for key, value in theirs.items():
                mine[key] = mine.get(key, 0) + value  # type: ignore[assignment]

    def count(self, proposed: int, accepted: int) -> None:
        """Take note of one row's round."""
        self.row_rounds += 1
        self.proposed += proposed
        self.judged += min(accepted + 1, proposed)
        self.accepted += accepted
        while len(self.by_position) < proposed:
            self.by_position.append((0, 0))
        for place in range(proposed):
            tried, kept = self.by_position[place]
            self.by_position[place] = tried + 1, kept + (place < accepted)


@dataclass
class Row:
    """One sequence of the batch.

    Attributes:
        place: Its row in the output.
        padding: What stands before its prompt, as logits processors and criteria see it.
        ids: Target ids, prompt included.
        prompt: Length of the prompt.
        told: Target tokens that the drafter's context holds.
        ended: Whether nothing comes after its last token.
    """

    place: int
    padding: list[int]
    ids: list[int]
    prompt: int
    told: int = 0
    ended: bool = False

    @property
    def new(self) -> list[int]:
        """The new tokens."""
        return self.ids[self.prompt :]

    @property
    def history(self) -> list[int]:
        """What processors see."""
        return self.padding + self.ids


@dataclass(frozen=True)
class Request:
    """What a generation is to do, beside its rows.

    Attributes:
        processors: Logits processors.
        stops: Returns whether a row ends with its last token, for each criterion.
        eos: Tokens that end a row.
        max_new_tokens: Most new tokens of a row.
        chance: Randomness.
        clock: Seconds on some clock that only moves on.
    """

    processors: Processors
    stops: Sequence[Callable[[Row], bool]]
    eos: frozenset[int]
    max_new_tokens: int
    chance: Chance
    clock: Callable[[], float] = time.perf_counter


class _Timed:
    """A context whose time is added to what a name has taken so far."""

    def __init__(self, seconds: dict[str, float], name: str, clock: Callable[[], float]) -> None:
        self._seconds, self._name, self._clock = seconds, name, clock

    def __enter__(self) -> None:
        self._begun = self._clock()

    def __exit__(self, *_: object) -> None:
        self._seconds[self._name] += self._clock() - self._begun


@dataclass
class _Course:
    """A round that has begun.

    Attributes:
        arm: What is played.
        finish: Waits for it, and returns the new tokens of each row.
        ahead: The arm of the next round, where it had to be known.
        counts: What had been counted before it, as `_counts` returns it.
        setup: Time spent before it on what is done once, in seconds.
        seconds: Time that it has taken the host so far.
        readied: Of this, what getting ready took.
        written: The rows that are in it, each with its new tokens before it.
    """

    arm: Arm
    finish: Callable[[], list[list[int]]]
    ahead: Arm | None
    counts: tuple[int, ...]
    setup: float
    seconds: float
    readied: float
    written: list[tuple[Row, int]]

    def advance(self) -> int:
        """Return how far the row came that is behind all others; those that ended count last."""
        rows = [(row, n) for row, n in self.written if not row.ended] or self.written
        return max(min(len(row.new) for row, _ in rows) - min(n for _, n in rows), 1)


class Rounds:
    """A generation: the rows, the target, the drafter and the counts.

    Args:
        rows: The sequences.
        target: Runner of the target, with a row for each.
        memory: The drafter, with a row for each.
        methods: Drafting methods by name.
        policy: Chooses method and lookahead of each round.
        request: What is to be done.
        whole: Does rounds of TLI and of plain decoding as a whole; nothing does if missing.
        at_end: Called when no more rounds will come.
    """

    def __init__(
        self,
        rows: list[Row],
        target: Runner,
        memory: DrafterMemory,
        methods: dict[str, Method],
        policy: Fixed | Bandit,
        request: Request,
        whole: GraphRound | None = None,
        at_end: Callable[[], None] | None = None,
    ) -> None:
        self.rows = rows
        self.stats = Stats()
        self._target = target
        self._memory = memory
        self._methods = methods
        self._policy = policy
        self._request = request
        self._whole = whole
        self._at_end = at_end

    def run(self) -> Iterator[list[tuple[Row, list[int]]]]:
        """Yield the new tokens of each row after each round, until all rows have ended."""
        try:
            rounds = self._run()
            while True:
                with torch.no_grad():  # Only while it runs, not while the caller does.
                    new = next(rounds, None)
                if new is None:
                    return
                yield new
        finally:
            if self._at_end is not None:
                self._at_end()

    def _run(self) -> Iterator[list[tuple[Row, list[int]]]]:
        policy = self._policy
        policy.begin()
        # The prompt goes through the target alone: it says nothing about any arm.
        arm = PLAIN if isinstance(policy, Bandit) else policy.choose()
        before: Arm | None = None
        course = self._start(arm, before) if self.rows else None
        while course is not None:
            new, setup, outcome = self._end(course)
            # What is done once, and a round with it, say nothing about an arm's speed.
            if setup:
                policy.prepared(arm, setup)
            elif before is not None:
                policy.learn(arm, outcome)
            before, ahead, course = arm, course.ahead, None
            if self.rows:
                arm = ahead or policy.choose()
                # The device may work while the caller does, unless its time is measured.
                if isinstance(policy, Fixed):
                    course = self._start(arm, before)
            yield new
            if self.rows and course is None:
                course = self._start(arm, before)

    def _start(self, arm: Arm, before: Arm | None) -> _Course:
        """Begin a round."""
        clock, policy = self._request.clock, self._policy
        begun, setup, readied = clock(), self._setup_seconds(), 0.0
        # What a trial costs once is no part of what a round costs.
        if policy.hopeful if before is None else arm.lookahead and before == PLAIN:
            self._catch_up()
            readied = clock() - begun
        # A plain round may begin before the last one's result is known: chosen ahead, then.
        ahead = policy.choose() if arm == PLAIN and self._chainable() else None
        counts = self._counts()
        written = [(row, len(row.new)) for row in self.rows]
        alike = ahead == PLAIN if arm == PLAIN else policy.steady(arm)
        finish = self._begin(arm, alike)
        spent = clock() - begun
        return _Course(arm, finish, ahead, counts, setup, spent, readied, written)

    def _end(self, course: _Course) -> tuple[list[tuple[Row, list[int]]], float, Outcome]:
        """Finish a round; return its tokens, the seconds that setting up took, what it brought."""
        begun = self._request.clock()
        new = course.finish()
        stats = self.stats
        name = f"{course.arm.method} {course.arm.lookahead}"
        stats.arms[name] = stats.arms.get(name, 0) + 1
        stats.rounds += 1
        stats.generated += sum(map(len, new))
        result = list(zip(self.rows, new, strict=True))
        alive = [i for i, row in enumerate(self.rows) if not row.ended]
        if len(alive) < len(self.rows):
            self.rows = [self.rows[i] for i in alive]
            if alive:
                self._target.select(alive)
                self._memory.select(alive)
        setup = self._setup_seconds() - course.setup
        seconds = course.seconds + self._request.clock() - begun - setup
        stats.seconds["total"] += seconds
        counts = zip(self._counts(), course.counts, strict=True)
        rows, proposed, judged, accepted = (now - then for now, then in counts)
        # A batch ends with its last row: what counts is how far the one behind all others came.
        outcome = Outcome(
            rows=rows,
            tokens=course.advance(),
            proposed=proposed,
            judged=judged,
            accepted=accepted,
            seconds=seconds - course.readied,
            readied=course.readied,
        )
        return result, setup, outcome

    def _counts(self) -> tuple[int, ...]:
        """Return rounds of rows, proposals, those judged and those accepted so far."""
        now = self.stats
        return now.row_rounds, now.proposed, now.judged, now.accepted

    def _chainable(self) -> bool:
        """Return whether a plain round may begin before the result of the last one is known."""
        return self._fits(PLAIN) and any(self._room(row) > 0 for row in self.rows)

    def _timed(self, what: str) -> _Timed:
        return _Timed(self.stats.seconds, what, self._request.clock)

    def _begin(self, arm: Arm, alike: bool) -> Callable[[], list[list[int]]]:
        """Begin a round as far as nothing is to be waited for, and return what finishes it."""
        if self._whole is not None and arm.lookahead and not self._in_step():
            with self._timed("verify"):  # All of a prompt but its end, so that the device does
                held = zip(self.rows, self._target.lengths, strict=True)  # the round as a whole.
                self._target.extend([row.ids[n:-1] for row, n in held], [0 for _ in self.rows])
        if self._fits(arm):
            return self._play(arm, alike)
        if not arm.lookahead:
            return lambda: self._verify([Certain() for _ in self.rows])
        drafts = self._draft(arm)
        return lambda: self._verify(drafts(), alike)

    def _setup_seconds(self) -> float:
        """Time spent so far on what is done once, such as capturing graphs."""
        own: float = getattr(self._target, "setup_seconds", 0.0)
        return own + self._memory.setup_seconds

    def _fits(self, arm: Arm) -> bool:
        """Return whether the device can play a round of an arm by itself."""
        if self._whole is None or arm.lookahead >= WIDEST:
            return False
        return (arm == PLAIN or arm.method in self._whole.methods) and self._in_step()

    def _in_step(self) -> bool:
        """Return whether the target has seen all of every row but its last id."""
        pairs = zip(self.rows, self._target.lengths, strict=True)
        return all(len(row.ids) == length + 1 for row, length in pairs)

    def _play(self, arm: Arm, alike: bool) -> Callable[[], list[list[int]]]:
        """Begin a round as a whole, and the next one if that is of the same kind."""
        memory = self._memory
        assert self._whole is not None
        rooms = [0 for _ in self.rows]
        feeds: list[list[int]] = [[] for _ in self.rows]
        if arm.lookahead:
            self._tell()
            rooms = [self._room(row) for row in self.rows]
            with self._timed("text"):
                feeds = memory.missing([arm.lookahead if room else 0 for room in rooms])
            rooms = [room if feed else 0 for room, feed in zip(rooms, feeds, strict=True)]
        with self._timed("verify"):
            pending = [row.ids[-1] for row in self.rows]
            lookahead = arm.lookahead if any(feeds) else 0
            try:
                wait = self._whole.play(arm.method, pending, feeds, rooms, lookahead, alike)
            except RuntimeError as error:
                _logger.debug("no CUDA graphs: %s", error)
                self._whole = None
                memory.crop(memory.lengths)
                return lambda: self._verify([Certain() for _ in self.rows])
        return lambda: self._played(arm, wait)

    def _played(self, arm: Arm, wait: Callable[[], Settled]) -> list[list[int]]:
        """Wait for a round that the device plays as a whole, and return its tokens."""
        with self._timed("verify"):
            done = wait()
        self._memory.note(done.fed)
        new: list[list[int]] = []
        everything = zip(self.rows, done.proposed, done.accepted, done.following, strict=True)
        for row, proposed, accepted, following in everything:
            self.stats.drafted += arm.lookahead if proposed else 0
            self.stats.count(len(proposed), accepted)
            new.append(self._append(row, [*proposed[:accepted], following]))
        return new

    def _room(self, row: Row) -> int:
        """Return how many proposals may come before a row's last token."""
        return self._request.max_new_tokens - len(row.ids) + row.prompt - 1

    def _tell(self) -> None:
        """Let the drafter's contexts know what has been settled."""
        with self._timed("text"):
            for row, context in zip(self.rows, self._memory.contexts, strict=True):
                context.extend(row.ids[row.told :])
                row.told = len(row.ids)

    def _catch_up(self) -> None:
        """Let the drafter read what it has not, so that its next draft costs what others do."""
        self._tell()
        feeds = self._memory.missing([1 for _ in self.rows])
        if max(map(len, feeds)) > WIDEST:  # A few go with the draft.
            with self._timed("draft"):
                self._memory.feed([feed[:-1] for feed in feeds], keep=[0 for _ in feeds])

    def _draft(self, arm: Arm) -> Callable[[], list[Draft]]:
        """Begin a draft, and return what waits for it."""
        request = self._request
        self._tell()
        plain = request.processors.by_score
        now = Situation(
            memory=self._memory,
            processors=request.processors,
            chance=request.chance,
            histories=[[] if plain else row.history for row in self.rows],
            rows=[row.place for row in self.rows],
            recent=[row.ids[-8:] for row in self.rows],
            rooms=[min(self._room(row), max(WIDEST - 1, arm.lookahead)) for row in self.rows],
            lookahead=arm.lookahead,
        )
        method = self._methods[arm.method]
        with self._timed("draft"):
            wait = method.begin(now) if isinstance(method, Beginner) else None

        def drafts() -> list[Draft]:
            with self._timed("draft"):
                found, drafted = wait() if wait is not None else method.draft(now)
            self.stats.drafted += drafted
            return found

        return drafts

    def _verify(self, drafts: list[Draft], alike: bool = False) -> list[list[int]]:
        """Run the target over the proposals and return the tokens that it settles."""
        with self._timed("verify"):
            if (settled := self._judge(drafts, alike)) is not None:
                return self._take(drafts, settled)
            feeds = [
                row.ids[held:] + draft.tokens
                for row, held, draft in zip(self.rows, self._target.lengths, drafts, strict=True)
            ]
            keeps = [len(draft.tokens) + 1 for draft in drafts]
            settled = self._settle(self._target.extend(feeds, keeps), drafts)
            kept = zip(self.rows, settled, strict=True)
            keep = [len(row.ids) + accepted for row, (accepted, _) in kept]
            new = self._take(drafts, settled)
            self._target.crop(keep)
        return new

    def _judge(self, drafts: list[Draft], alike: bool) -> list[tuple[int, int]] | None:
        """Return how many proposals are accepted, and the next token, as the device judges them.

        None where it cannot.
        """
        if self._whole is None or not self._in_step():
            return None
        known = [draft for draft in drafts if isinstance(draft, Certain | Weighed)]
        if len(known) < len(drafts) or any(len(draft.tokens) >= WIDEST for draft in known):
            return None
        return self._whole.judge([row.ids[-1] for row in self.rows], known, alike)

    def _take(self, drafts: Sequence[Draft], settled: Sequence[tuple[int, int]]) -> list[list[int]]:
        """Append what was settled to the rows, and return it."""
        new: list[list[int]] = []
        for row, draft, (accepted, following) in zip(self.rows, drafts, settled, strict=True):
            self.stats.count(len(draft.tokens), accepted)
            new.append(self._append(row, [*draft.tokens[:accepted], following]))
        return new

    def _settle(self, logits: list[Tensor], drafts: list[Draft]) -> list[tuple[int, int]]:
        """Return for each row how many proposals are accepted, and the token after them."""
        process, chance = self._request.processors, self._request.chance
        if not process.empty:
            logits = [
                process(rows, row.history + draft.tokens if not process.by_score else (), row.place)
                for rows, row, draft in zip(logits, self.rows, drafts, strict=True)
            ]
        if process.greedy:
            return _agree(best_of(logits), drafts)
        p = torch.cat(logits).softmax(dim=1)
        if isinstance(self._target, Chooser) and chance.serves(p.device):
            together = judge_together(drafts, p, chance)
            if together is not None:
                if any(accepted < 0 for accepted, _ in together):
                    raise ValueError(_NO_NUMBERS)
                return together
        _check_finite(p)
        settled = []
        for law, draft in zip(p.split([len(rows) for rows in logits]), drafts, strict=True):
            accepted, weights = draft.judge(law, chance)
            settled.append((accepted, chance.draw(weights[None])[0]))
        return settled

    def _append(self, row: Row, tokens: list[int]) -> list[int]:
        """Append tokens to a row up to the first that ends it, and return those appended."""
        request = self._request
        taken = 0
        for token in tokens:
            row.ids.append(token)
            taken += 1
            full = len(row.ids) - row.prompt >= request.max_new_tokens
            if full or token in request.eos or any(stop(row) for stop in request.stops):
                row.ended = True
                break
        return tokens[:taken]


def _agree(choices: list[list[int]], drafts: list[Draft]) -> list[tuple[int, int]]:
    """Return how many proposals are the target's choices, and its next one, for each row."""
    if any(token < 0 for row in choices for token in row):
        raise ValueError(_NO_NUMBERS)
    return [
        verify_greedy(choice, draft.tokens) for choice, draft in zip(choices, drafts, strict=True)
    ]


def _check_finite(p: Tensor) -> None:
    if bool(p.isnan().any()):
        raise ValueError(_NO_NUMBERS)


def stop_by(criterion: Any, device: torch.device) -> Callable[[Row], bool]:
    """Return a function that asks a criterion of `transformers` about a row."""

    def stop(row: Row) -> bool:
        ids = torch.tensor([row.history], device=device)
        return bool(torch.as_tensor(criterion(ids, None)).any())

    return stop
