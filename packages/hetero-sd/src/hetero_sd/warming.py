"""Rounds that are played so that what they need is there when texts come."""

from __future__ import annotations

from collections.abc import Sequence

from .control import PLAIN, Arm, Bandit, Fixed


class Tour(Fixed):
    """Plays each arm in turn, in the place of a policy, which learns only what is ready.

    Args:
        arms: The arms; plain rounds come first.
        policy: What will choose when texts come.
    """

    def __init__(self, arms: Sequence[Arm], policy: Fixed | Bandit) -> None:
        super().__init__(PLAIN)
        # Several times each: a round after the first one may take other steps, or propose nothing.
        self._left = [PLAIN, PLAIN, *(arm for arm in arms for _ in range(3))]
        self._policy = policy

    @property
    def over(self) -> bool:
        """Whether each was played."""
        return not self._left

    def choose(self) -> Arm:
        """Return the arm of the next round."""
        return self._left.pop(0) if self._left else PLAIN

    def prepared(self, arm: Arm, seconds: float) -> None:
        """Take note of what getting an arm ready took, once for all."""
        self._policy.prepared(arm, seconds)
