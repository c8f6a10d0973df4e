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
_LONG = 0.998  # The same where texts of many kinds are looked at together.
_HOPE = 1.0  # Proposals that a method is credited with, beside those judged,
_APART = 0.3  # accepted so much oftener than those of all methods.
_STEP = 0.06  # What a drafter step is taken to cost, in plain rounds, before one was timed.
_FIXED = 0.5  # Share of what a draft costs that is one for all lookaheads, on a GPU.
_GAIN = 0.95  # What a lookahead never played must promise, of the best one's rate.
_ALLOWANCE = 2.0  # Rounds' worth of plain decoding that trials may cost at once,
_SHARE = 0.01  # and share of the time that pays it back.
_RECENT = 15  # Rounds of an arm whose times are kept,
_FIRST = 2  # how many it takes to believe them,
_STALE = 160  # and rounds of any arm after which they are out of date.
_LOOK = 8  # Rounds from one look at what is not ready to the next.
_CLEAR = 1.05  # By what factor an arm must beat plain decoding for its next draft to begin early.
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
        tokens: New tokens of the row that is furthest behind: a batch ends when its last row does.
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

    def plus(self, other: _Record) -> _Record:
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return _Record(*(one + two for one, two in pairs))

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

    def steady(self, arm: Arm) -> bool:
        """Return whether the next round is likely to be of the same arm."""
        return True

    def learn(self, arm: Arm, outcome: Outcome) -> None:
        """Take note of a round."""

    def prepared(self, arm: Arm, seconds: float) -> None:
        """Take note of what getting an arm ready took, once for all."""


class Bandit:
    """Optimism in the face of uncertainty, over plain decoding and (method, lookahead) pairs.

    A method's acceptance is learnt from each proposal that is judged, whatever the lookahead, and
    an arm's cost from its rounds. Both together predict what every lookahead brings: the best one
    is found without trials of the others. Methods are tried again as what is known of them fades.

    Trials of what turns out slower than plain decoding may cost a few rounds at once and a small
    share of all time, and no more: beyond it, plain decoding goes on. An arm that has to be
    prepared, all but the first, is prepared once it would have saved as much time as that takes,
    had it been there: at worst twice the time that the best foresight would take. What is chosen
    depends on the past alone, never on the round at hand, so the law of the output is the same for
    any choice.

    Args:
        methods: Methods to choose from, the likeliest best first.
        lookaheads: Ladder of lookaheads, ascending.
        start: Lookahead to begin with.
        dear: Whether an arm that was never played has to be prepared, as graphs are.

    Source: own; the model of the speed is Leviathan et al.'s, the optimism as in Lai and Robbins,
        the rule for what has to be prepared that of renting or buying skis (Karlin et al. 1988).
    """

    def __init__(
        self,
        methods: Sequence[str],
        lookaheads: Sequence[int] = LADDER,
        start: int = 3,
        dear: bool = True,
    ) -> None:
        self._dear = dear
        self._fixed = _FIXED if dear else 0.0
        self._ladder = sorted(lookaheads)
        self._start = min(self._ladder, key=lambda step: abs(step - start))
        self._records = {method: _Record() for method in methods}
        self._costs: dict[Arm, _Cost] = {}
        self._rounds = 0
        self._lost = 0.0  # Seconds lost to trials against plain decoding; negative when gained.
        self._gained = 0.0  # Seconds gained by drafts, all texts together.
        self._long = {method: _Record() for method in methods}
        self._ready: set[Arm] = set()
        self._unseen = 0.0  # Seconds since this was looked at.
        self._price = 0.0  # Seconds that it last took to prepare an arm.
        self._missed: dict[Arm, float] = {}  # Seconds that arms not ready would have saved.
        self.history: list[Arm] = []

    def begin(self) -> None:
        """Take note that a new text begins, which may be of another kind."""
        for record in self._records.values():
            record.fade(_ANEW)
        if self._lost > 0 and self._gained > 0:
            self._lost = 0.0  # One bad text says little about the next.

    def choose(self) -> Arm:
        """Return the arm of the next round."""
        arm = self._choose()
        self.history.append(arm)
        return arm

    def steady(self, arm: Arm) -> bool:
        """Return whether the next round is likely to be of the same arm.

        A draft that began early for nothing would be paid by the round after it, and a plain round
        look as dear as a drafted one.
        """
        rates = self.rates()
        return arm in rates and rates[arm] > _CLEAR * rates[PLAIN]

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
        if self._lost > _ALLOWANCE * plain.seconds:
            return PLAIN
        arms = [arm for arm in map(self._best_of, self._records) if self._pays(arm)]
        best = max(arms, key=self._hoped, default=PLAIN)  # Of equals, the first method.
        return best if best != PLAIN and self._hoped(best) * plain.seconds > 1 else PLAIN

    def _best_of(self, method: str) -> Arm:
        """Return the arm of a method that promises most."""
        ready = [arm for arm in (*self._costs, *self._ready) if arm.method == method]
        if not ready:
            return Arm(method, self._start)
        best = max(ready, key=self._rate)
        if best not in self._costs or not self._costs[best].believed:
            return best
        steps = self._ladder
        if not self._dear:
            place = steps.index(best.lookahead)
            steps = steps[max(place - 1, 0) : place + 2]
        least = max(_GAIN * self._rate(best), self._rate(PLAIN))
        others = [Arm(method, step) for step in steps]
        fresh = [arm for arm in others if arm not in ready and self._rate(arm) > least]
        return max(filter(self._pays, fresh), key=self._rate, default=best)

    def _pays(self, arm: Arm) -> bool:
        """Return whether an arm is ready, or would have saved what it takes to get it ready."""
        if not self._dear or arm in self._costs or arm in self._ready or not self._ready:
            return True
        return self._missed.get(arm, 0.0) >= self._price

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
        timed = [other for other in self._costs if other not in (arm, PLAIN)]
        own = [other for other in timed if other.method == arm.method]
        timed = own if own or not self._dear else timed
        if not timed or arm == PLAIN:
            return guess
        near = min(timed, key=lambda other: abs(other.lookahead - arm.lookahead))
        more = max(self._costs[near].seconds - plain, 0.0)
        return plain + more * (self._fixed + (1 - self._fixed) * arm.lookahead / near.lookahead)

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
        if PLAIN in self._costs:
            credit = -_ALLOWANCE * self._costs[PLAIN].seconds
            paid = _SHARE * (outcome.seconds + outcome.readied)
            self._lost = max(self._lost - paid, min(self._lost, credit))
        self._unseen += seconds
        if self._dear and self._ready and self._rounds % _LOOK == 0:
            self._miss(self._unseen)
            self._unseen = 0.0
        if arm == PLAIN:
            return
        steps = arm.lookahead * outcome.rows
        counts = steps, outcome.proposed, outcome.judged, outcome.accepted
        found = _Record(*map(float, counts))
        for records, share in ((self._records, 1.0), (self._long, _LONG)):
            records[arm.method].fade(share)
            records[arm.method] = records[arm.method].plus(found)
        if PLAIN in self._costs:
            plain = self._costs[PLAIN].seconds
            readied = min(outcome.readied, _ALLOWANCE * plain)
            # By what both usually take: a busy machine's noise is no arm's fault.
            lost = self._costs[arm].seconds + readied - plain * outcome.tokens
            self._gained = _LONG * self._gained - lost
            # What was gained long ago is little credit for new trials.
            self._lost = max(self._lost + lost, -_ALLOWANCE * plain)

    def prepared(self, arm: Arm, seconds: float) -> None:
        """Take note of what getting an arm ready took, once for all."""
        if arm != PLAIN:
            self._ready.add(arm)
            self._price = seconds
            self._missed.clear()  # What others would have saved, this one will save now.

    def _long_rate(self, arm: Arm) -> float:
        """Return the tokens a second of an arm by all texts so far, methods taken as alike."""
        own = self._long[arm.method]
        if not own.judged:
            for record in self._long.values():
                own = own.plus(record)
        return own.tokens(arm.lookahead) / self._seconds(arm)

    def _miss(self, seconds: float) -> None:
        """Take note of what the arms that are not ready would have saved in so much time."""
        ready = self._ready | self._costs.keys() - {PLAIN}
        best = max([self._rate(PLAIN), *map(self._long_rate, ready)])
        for arm in (Arm(method, step) for method in self._records for step in self._ladder):
            if arm not in ready:
                saved = seconds * (1 - best / self._long_rate(arm))
                self._missed[arm] = max(self._missed.get(arm, 0.0) + saved, 0.0)

    def rates(self) -> dict[Arm, float]:
        """Return the tokens a second that each arm played so far is expected to bring to a row."""
        return {arm: self._rate(arm) for arm in self._costs} if PLAIN in self._costs else {}
