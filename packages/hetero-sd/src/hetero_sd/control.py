"""Choice of method and lookahead by what they bring, in tokens a second."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

METHODS = ("auto", "tli", "slem", "slrs", "c-slrs", "slrs-plain", "standard")
LADDER = (1, 2, 3, 4, 6, 8, 12)
_DISCOUNT = 0.99  # Weight of a round at the next one: a memory of some 100 rounds.
_WIDTH = 0.12  # Breadth of the confidence bound, in rates of the best arm.
_ALLOWANCE = 5.0  # Rounds' worth of plain decoding that trials may cost at first,
_SHARE = 0.015  # and share of all time after that.
_HOPE = 1.1  # What an arm that was never tried is hoped to bring, in rates of the best arm.
_FRESH = 0.2  # Weight below which what is known of plain decoding is measured anew.


class Arm(NamedTuple):
    """A method and a lookahead; the method "plain" has lookahead 0."""

    method: str
    lookahead: int


PLAIN = Arm("plain", 0)


@dataclass
class _Record:
    tokens: float = 0.0
    seconds: float = 0.0
    weight: float = 0.0

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


class Fixed:
    """The one arm that the user asked for."""

    hopeful = False  # The prompt's own round drafts, if any does.

    def __init__(self, arm: Arm) -> None:
        self._arm = arm

    def choose(self) -> Arm:
        """Return the arm of the next round."""
        return self._arm

    def learn(self, arm: Arm, tokens: float, seconds: float, readied: float = 0.0) -> None:
        """Take note of a round."""


class Bandit:
    """Discounted upper confidence bounds over plain decoding and (method, lookahead) pairs.

    Lookaheads are a ladder: tried are the best one known and its neighbours. Trials of what turns
    out slower than plain decoding may cost a small share of all time, and no more: beyond it,
    plain decoding goes on until the share is small again. What is chosen depends on the past alone,
    never on the round at hand, so the law of the output is the same for any choice.

    Args:
        methods: Methods to choose from, the likeliest best first.
        lookaheads: Ladder of lookaheads, ascending.
        start: Lookahead to begin with.

    Source: own; the bounds follow Garivier and Moulines, 2011.
    """

    def __init__(
        self, methods: Sequence[str], lookaheads: Sequence[int] = LADDER, start: int = 3
    ) -> None:
        self._methods = list(methods)
        self._ladder = sorted(lookaheads)
        self._start = min(self._ladder, key=lambda step: abs(step - start))
        self._records: dict[Arm, _Record] = {}
        self._elapsed = 0.0
        self._lost = 0.0  # Seconds lost to trials against plain decoding; negative when gained.
        self.history: list[Arm] = []

    def choose(self) -> Arm:
        """Return the arm of the next round."""
        arm = self._choose()
        self.history.append(arm)
        return arm

    @property
    def hopeful(self) -> bool:
        """Whether drafting is likely to be tried soon."""
        rates = self.rates()
        drafting = [rate for arm, rate in rates.items() if arm != PLAIN]
        return not drafting or max(drafting) > rates.get(PLAIN, 0.0)

    def _choose(self) -> Arm:
        plain = self._records.get(PLAIN)
        if plain is None or plain.weight < _FRESH:
            return PLAIN
        known = {arm: r for arm, r in self._records.items() if r.weight > 0}
        allowance = _ALLOWANCE / plain.rate + _SHARE * self._elapsed
        if self._lost > allowance:
            return PLAIN
        drafting = {arm: r for arm, r in known.items() if arm != PLAIN}
        candidates = {PLAIN, *drafting}
        if drafting:
            best = max(drafting, key=lambda arm: drafting[arm].rate)
            place = self._ladder.index(best.lookahead)
            for near in self._ladder[max(place - 1, 0) : place + 2]:
                candidates.add(Arm(best.method, near))
            candidates |= {Arm(method, best.lookahead) for method in self._methods}
        else:
            candidates.add(Arm(self._methods[0], self._start))
        top = max(r.rate for r in known.values())
        total = sum(r.weight for r in known.values())

        def bound(arm: Arm) -> float:
            record = self._records.get(arm)
            if record is None:
                return _HOPE * top
            spread = math.sqrt(math.log(1 + total) / max(record.weight, 1e-3))
            return record.rate + _WIDTH * top * spread

        # Of equals, the first method and the nearest lookahead.
        return max(sorted(candidates, key=self._rank), key=bound)

    def _rank(self, arm: Arm) -> tuple[int, int]:
        method = -1 if arm == PLAIN else self._methods.index(arm.method)
        return method, abs(arm.lookahead - self._start)

    def learn(self, arm: Arm, tokens: float, seconds: float, readied: float = 0.0) -> None:
        """Take note of a round.

        Args:
            arm: What was done.
            tokens: Tokens that it brought to each row, so that rows may end meanwhile.
            seconds: Time that it took, in seconds.
            readied: Time that getting ready for it took beside, which says nothing about it.
        """
        for record in self._records.values():
            record.tokens *= _DISCOUNT
            record.seconds *= _DISCOUNT
            record.weight *= _DISCOUNT
        record = self._records.setdefault(arm, _Record())
        record.tokens += tokens
        record.seconds += seconds
        record.weight += 1
        self._elapsed += seconds + readied
        plain = self._records.get(PLAIN)
        if arm != PLAIN and plain is not None:
            lost = self._lost + readied + seconds - tokens / plain.rate
            # What was gained long ago is little credit for new trials.
            self._lost = max(lost, -_ALLOWANCE / plain.rate)

    def rates(self) -> dict[Arm, float]:
        """Return the measured tokens a second of each arm, recent rounds counting most."""
        return {arm: record.rate for arm, record in self._records.items()}
