"""Ways to draft: each turns what a drafter says into target tokens, and knows their law."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from .chance import Chance
from .context import DrafterMemory
from .drafts import Certain, Draft
from .processors import Processors


@dataclass(frozen=True)
class Situation:
    """What a drafting method may look at.

    Attributes:
        memory: The drafter.
        processors: What is done to the target's logits.
        chance: Source of draws.
        histories: Target ids of each row, padding included, as processors see them.
        rows: For each row, its place in the batch that the processors were made for.
        recent: Target ids of each row without padding.
        rooms: Most target tokens to propose, in each row; 0 for none.
        lookahead: Steps to draft.
    """

    memory: DrafterMemory
    processors: Processors
    chance: Chance
    histories: list[list[int]]
    rows: list[int]
    recent: list[list[int]]
    rooms: list[int]
    lookahead: int


@dataclass(frozen=True)
class Table:
    """What a device needs to know to draft target tokens by itself.

    Attributes:
        head: Rows of the drafter's head to compute; all if missing.
        among: Of these, the ids whose probabilities add up to each column, padded with −1, shape
            `(columns, most)`; a column for each if missing.
        forth: The drafter id that each column goes on with, shape `(columns,)`.
        runs: Target tokens of each column, padded with −1, shape `(columns, longest)`.
        column_of: Column of each target id in int32, −1 where it has none, shape `(vocab,)`;
            missing unless each column is a target id of its own.
        block: Whether drafts may be judged as blocks.
    """

    head: Tensor | None
    among: Tensor | None
    forth: Tensor
    runs: Tensor
    column_of: Tensor | None
    block: bool


@runtime_checkable
class Method(Protocol):
    """A way to draft."""

    def draft(self, now: Situation) -> tuple[list[Draft], int]:
        """Return a draft for each row, and how many drafter tokens it took in all."""
        ...


@runtime_checkable
class Beginner(Method, Protocol):
    """A way to draft that begins on a device, while the host does other things."""

    def begin(self, now: Situation) -> Callable[[], tuple[list[Draft], int]]:
        """Begin a draft, and return what waits for it and returns it."""
        ...


def nothing(count: int) -> list[Draft]:
    """Return a draft without proposals for each row."""
    return [Certain() for _ in range(count)]
