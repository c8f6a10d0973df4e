"""Choice of method and lookahead by what they bring, in tokens a second."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple

from .speed import expected_tokens

METHODS = ("auto", "tli", "slem", "slrs", "c-slrs", "slrs-plain", "standard")
LADDER = (1, 2, 3, 4, 6, 8, 12)
_DISCOUNT = 0.99  # Weight of a round at the next one: a memory of some 100 rounds.
_ANEW = 0.1  # The same of all rounds before a text.
_HOPE = 1.0  # Proposals that a method is credited with, beside those judged,
_APART = 0.3  # accepted so much oftener than those of all methods.
_STEP = 0.06  # What a drafter step is taken to cost, in plain rounds, before one was timed.
_GAIN = {True: 1.05, False: 0.95}  # What an arm never played must promise, if dear to prepare.
_ALLOWANCE = 2.0  # Rounds' worth of plain decoding that trials may cost at first,
_SHARE = 0.01  # and share of all time after that.
_RECENT = 15  # Rounds of an arm whose times are kept,
_FIRST = 2  # how many it takes to believe them,
_STALE = 160  # and rounds of any arm after which they are out of date.
_OUTLIER = 2.0  # An arm's first round counts for no more than so many as were expected.


class Arm(NamedTuple):
    """A method and a lookahead; the method "plain" has lookahead 0."""

    method: str
    lookahead: int


PLAIN = Arm("plain", 0)


@dataclass(frozen=True)
class Outcome:
    """What a round brought, and what it took.

    Attributes:
        rows: Rows of the batch.
        tokens: New tokens, of all rows.
        proposed: Proposals.
        judged: Proposals that were accepted, or were the first of their draft to be refused.
        accepted: Proposals that were accepted.
        seconds: Time that it took, in seconds.
        readied: Time that getting ready for it took beside, which says nothing about it.
    """

    rows: int
    tokens: int
    proposed: int
    judged: int
    accepted: int
    seconds: float
    readied: float = 0.0


class _Cost:
    """What an arm's rounds take: the median of recent ones, a guess standing in for the first."""

    def __init__(self) -> None:
        self._recent: deque[float] = deque(maxlen=_RECENT)
        self.seconds = 0.0
        self.round = 0  # When it was played last.

    @property
    def believed(self) -> bool:
        """Whether enough rounds were timed."""
        return len(self._recent) >= _FIRST

    def add(self, seconds: float, guess: float, now: int) -> None:
        """Take note of a round.

        Args:
            seconds: What it took.
            guess: What it was expected to take, before any was timed.
            now: Number of the round.
        """
        if now - self.round > _STALE:
            self._recent.clear()
        self._recent.append(seconds)
        self.round = now
        unknown = [guess] * (_FIRST - len(self._recent))
        self.seconds = median([*self._recent, *unknown])


@dataclass
class _Record:
    """How a method's proposals fare, at any lookahead; recent rounds count most."""

    steps: float = 0.0
    proposed: float = 0.0
    judged: float = 0.0
    accepted: float = 0.0

    def fade(self, share: float = _DISCOUNT) -> None:
        for name, value in vars(self).items():
            setattr(self, name, share * value)

    def tokens(self, lookahead: int, prior: float = 0.5, weight: float = 2.0) -> float:
        """Return the tokens that a round is expected to bring to a row.

        Args:
            lookahead: Drafter steps.
            prior: What acceptance is taken to be beside what was judged,
            weight: as if on so many proposals.
        """
        acceptance = (self.accepted + weight * prior) / (self.judged + weight)
        length = lookahead * (self.proposed / self.steps if self.steps else 1.0)
        whole = int(length)
        least, most = (expected_tokens(acceptance, whole + more) for more in (0, 1))
        return least + (most - least) * (length - whole)


class Fixed:
    """The one arm that the user asked for."""

    hopeful = False  # The prompt's own round drafts, if any does.

    def __init__(self, arm: Arm) -> None:
        self._arm = arm

    def begin(self) -> None:
        """Take note that a new text begins."""

    def choose(self) -> Arm:
        """Return the arm of the next round."""
        return self._arm

    def learn(self, arm: Arm, outcome: Outcome) -> None:
        """Take note of a round."""


class Bandit:
    """Optimism in the face of uncertainty, over plain decoding and (method, lookahead) pairs.

    A method's acceptance is learnt from each proposal that is judged, whatever the lookahead, and
    an arm's cost from its rounds. Both together predict what every lookahead brings: the best one
    is found without trials of the others. Methods are tried again as what is known of them fades.

    Trials of what turns out slower than plain decoding may cost a small share of all time, and no
    more: beyond it, plain decoding goes on until the share is small again. An arm that has to be
    prepared is played only where it promises a gain. What is chosen
    depends on the past alone, never on the round at hand, so the law of the output is the same for
    any choice.

    Args:
        methods: Methods to choose from, the likeliest best first.
        lookaheads: Ladder of lookaheads, ascending.
        start: Lookahead to begin with.
        dear: Whether an arm that was never played has to be prepared, as graphs are.

    Source: own; the model of the speed is Leviathan et al.'s, the optimism as in Lai and Robbins.
    """

    def __init__(
        self,
        methods: Sequence[str],
        lookaheads: Sequence[int] = LADDER,
        start: int = 3,
        dear: bool = True,
    ) -> None:
        self._gain = _GAIN[dear]
        self._ladder = sorted(lookaheads)
        self._start = min(self._ladder, key=lambda step: abs(step - start))
        self._records = {method: _Record() for method in methods}
        self._costs: dict[Arm, _Cost] = {}
        self._rounds = 0
        self._elapsed = 0.0
        self._lost = 0.0  # Seconds lost to trials against plain decoding; negative when gained.
        self.history: list[Arm] = []

    def begin(self) -> None:
        """Take note that a new text begins, which may be of another kind."""
        for record in self._records.values():
            record.fade(_ANEW)
        self._lost = max(self._lost, 0.0)  # Gains elsewhere are no credit for trials here.

    def choose(self) -> Arm:
        """Return the arm of the next round."""
        arm = self._choose()
        self.history.append(arm)
        return arm

    @property
    def hopeful(self) -> bool:
        """Whether drafting is likely to be tried soon."""
        played = [arm for arm in self._costs if arm != PLAIN]
        rates = self.rates()
        return not played or max(rates[arm] for arm in played) > rates.get(PLAIN, 0.0)

    def _choose(self) -> Arm:
        plain = self._costs.get(PLAIN)
        if plain is None or self._rounds - plain.round > _STALE:
            return PLAIN
        if self._lost > _ALLOWANCE * plain.seconds + _SHARE * self._elapsed:
            return PLAIN
        arms = [self._best_of(method) for method in self._records]
        best = max(arms, key=self._hoped)  # Of equals, the first method.
        return best if self._hoped(best) * plain.seconds > 1 else PLAIN

    def _best_of(self, method: str) -> Arm:
        """Return the arm of a method that promises most."""
        played = [arm for arm in self._costs if arm.method == method]
        if not played:
            return Arm(method, self._start)
        best = max(played, key=self._rate)
        if not self._costs[best].believed:
            return best
        place = self._ladder.index(best.lookahead)
        near = [Arm(method, step) for step in self._ladder[max(place - 1, 0) : place + 2]]
        plain = self._rate(PLAIN)
        least = max(self._gain * max(self._rate(best), plain), plain)
        fresh = [arm for arm in near if arm not in self._costs and self._rate(arm) > least]
        return max(fresh, key=self._rate, default=best)

    def _rate(self, arm: Arm) -> float:
        """Return the tokens a second that an arm is expected to bring to a row."""
        tokens = 1.0 if arm == PLAIN else self._records[arm.method].tokens(arm.lookahead)
        return tokens / self._seconds(arm)

    def _hoped(self, arm: Arm) -> float:
        """Return the same by an acceptance that might be, as far as is known.

        One drafter makes all proposals, so that methods differ less than drafters do.
        """
        judged = sum(record.judged for record in self._records.values())
        accepted = sum(record.accepted for record in self._records.values())
        prior = min((accepted + _HOPE) / (judged + _HOPE) + _APART, 1.0)
        return self._records[arm.method].tokens(arm.lookahead, prior, _HOPE) / self._seconds(arm)

    def _seconds(self, arm: Arm) -> float:
        """Return what a round is expected to take; what is not known by what is."""
        cost = self._costs.get(arm)
        if cost is None or (arm != PLAIN and self._rounds - cost.round > _STALE):
            return self._guess(arm)
        return cost.seconds

    def _guess(self, arm: Arm) -> float:
        plain = self._costs[PLAIN].seconds if PLAIN in self._costs else 0.0
        guess = plain * (1 + _STEP * arm.lookahead)
        timed = [other for other in self._costs if other.method == arm.method and other != arm]
        if not timed or arm == PLAIN:
            return guess
        near = min(timed, key=lambda other: abs(other.lookahead - arm.lookahead))
        more = self._costs[near].seconds - plain
        return plain + max(more, 0.0) * arm.lookahead / near.lookahead

    def learn(self, arm: Arm, outcome: Outcome) -> None:
        """Take note of a round."""
        self._rounds += 1
        for record in self._records.values():
            record.fade()
        guess = self._guess(arm) or outcome.seconds
        seconds = outcome.seconds
        if arm not in self._costs:  # What is done only once is no cost of an arm's.
            seconds = min(seconds, _OUTLIER * guess)
        self._costs.setdefault(arm, _Cost()).add(seconds, guess, self._rounds)
        self._elapsed += outcome.seconds + outcome.readied
        if arm == PLAIN:
            return
        record = self._records[arm.method]
        record.steps += arm.lookahead * outcome.rows
        record.proposed += outcome.proposed
        record.judged += outcome.judged
        record.accepted += outcome.accepted
        if PLAIN in self._costs:
            plain = self._costs[PLAIN].seconds
            readied = min(outcome.readied, _ALLOWANCE * plain)
            # By what both usually take: a busy machine's noise is no arm's fault.
            lost = self._costs[arm].seconds + readied - plain * outcome.tokens / outcome.rows
            # What was gained long ago is little credit for new trials.
            self._lost = max(self._lost + lost, -_ALLOWANCE * plain)

    def rates(self) -> dict[Arm, float]:
        """Return the tokens a second that each arm played so far is expected to bring to a row."""
        return {arm: self._rate(arm) for arm in self._costs} if PLAIN in self._costs else {}
