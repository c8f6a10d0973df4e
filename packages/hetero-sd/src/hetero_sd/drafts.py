"""Drafts: proposals that know the law they were drawn from, and so how they are to be judged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from .acceptance import Choice, laws_of_runs, settle, verify, verify_block, verify_runs
from .chance import Chance


@runtime_checkable
class Draft(Protocol):
    """Proposals for one row."""

    @property
    def tokens(self) -> list[int]:
        """Target ids, in order."""
        ...

    def judge(self, p: Tensor, chance: Chance) -> tuple[int, Tensor]:
        """Return how many proposals are accepted, and weights of the law of the next token.

        Args:
            p: The target's law at each proposal and after the last.
            chance: Source of the coins.
        """
        ...


@dataclass(frozen=True)
class Certain:
    """Proposals that were certain, given what is known.

    Attributes:
        tokens: Target ids.
        kept: Drafter ids that they come from and that the drafter has gone on from, each with how
            many of them it takes; missing where that is not known.
    """

    tokens: list[int] = field(default_factory=list)
    kept: list[tuple[int, int]] | None = None

    def judge(self, p: Tensor, chance: Chance) -> tuple[int, Tensor]:
        """See `Draft`."""
        proposed = torch.tensor(self.tokens, dtype=torch.long, device=p.device)
        return verify(p, proposed, chance.coins(len(self.tokens), p))


@dataclass(frozen=True)
class Drawn:
    """Proposals that were drawn one by one, each from a law over some target tokens.

    Attributes:
        tokens: Target ids.
        laws: The law of each over `kept`, shape `(proposals, kept)`.
        kept: Distinct target ids; all in order if missing.
        block: Whether they are judged as a block.
    """

    tokens: list[int]
    laws: Tensor
    kept: Tensor
    block: bool

    def judge(self, p: Tensor, chance: Chance) -> tuple[int, Tensor]:
        """See `Draft`."""
        proposed = torch.tensor(self.tokens, dtype=torch.long, device=p.device)
        coins = chance.coins(len(self.tokens), p)
        laws, kept = self.laws.to(p), self.kept.to(p.device)
        return (verify_block if self.block else verify)(p, proposed, coins, laws, kept)


@dataclass(frozen=True)
class Runs:
    """Proposals that are runs of target tokens, each run chosen among several.

    Attributes:
        tokens: Target ids; the last run may be cut short.
        steps: The choices.
        lengths: Tokens of each chosen run.
    """

    tokens: list[int]
    steps: list[Choice]
    lengths: list[int]

    def judge(self, p: Tensor, chance: Chance) -> tuple[int, Tensor]:
        """See `Draft`."""
        return verify_runs(p, self.steps, chance.coins(len(self.tokens), p))


@dataclass(frozen=True)
class Weighed:
    """Proposals whose laws have few tokens each, known to the host.

    Attributes:
        tokens: Target ids.
        laws: The probability of each token that might have been there, for each proposal; those
            of one proposal add up to 1.
        kept: As of `Certain`.
    """

    tokens: list[int]
    laws: list[dict[int, float]]
    kept: list[tuple[int, int]] | None = None

    @classmethod
    def among(
        cls,
        runs: Sequence[Sequence[int]],
        masses: Sequence[float],
        chosen: int,
        kept: list[tuple[int, int]] | None = None,
    ) -> Weighed:
        """Return a run that was drawn among several, as `acceptance.verify_runs` weighs it.

        Args:
            runs: Target ids of each run.
            masses: Probability of each, up to a factor.
            chosen: The one drawn.
            kept: As of `Certain`.
        """
        laws: list[dict[int, float]] = []
        alive = list(zip(runs, masses, strict=True))
        for depth, token in enumerate(runs[chosen]):
            law: dict[int, float] = {}
            for run, mass in alive:
                if len(run) > depth:  # The latent: the chosen run does not end here.
                    law[run[depth]] = law.get(run[depth], 0.0) + mass
            total = sum(law.values())
            laws.append({other: mass / total for other, mass in law.items()})
            alive = [(run, m) for run, m in alive if len(run) > depth and run[depth] == token]
        return cls(list(runs[chosen]), laws, kept)

    def dense(self, like: Tensor) -> Tensor:
        """Return the laws over the whole vocabulary, of the type, device and last size given."""
        rows = [place for place, law in enumerate(self.laws) for _ in law]
        ids = [token for law in self.laws for token in law]
        masses = [mass for law in self.laws for mass in law.values()]
        law = torch.zeros(len(self.tokens), like.shape[-1], dtype=like.dtype)
        law[rows, ids] = torch.tensor(masses, dtype=like.dtype)
        return law.to(like.device)

    def judge(self, p: Tensor, chance: Chance) -> tuple[int, Tensor]:
        """See `Draft`."""
        proposed = torch.tensor(self.tokens, dtype=torch.long, device=p.device)
        return verify(p, proposed, chance.coins(len(self.tokens), p), self.dense(p))


def judge_together(
    drafts: Sequence[Draft], p: Tensor, chance: Chance
) -> list[tuple[int, int]] | None:
    """Return how many proposals of each draft are accepted, and the token after them.

    The same rules as each draft's own `judge`, for all rows at once and with one wait for the
    device. None if a draft is of a kind that has to be judged by itself; −1 accepted if a law is no
    numbers.

    Args:
        drafts: One for each row.
        p: The target's laws at each proposal and after the last, row after row.
        chance: Source of noise; it must serve the device.
    """
    if not all(isinstance(draft, Certain | Drawn | Runs | Weighed) for draft in drafts):
        return None
    device, size = p.device, p.shape[1]
    limits = [len(draft.tokens) for draft in drafts]
    count = max(limits)
    starts = [place + sum(limits[:place]) for place in range(len(limits))]
    padded = [draft.tokens + [0] * (count - len(draft.tokens)) for draft in drafts]
    places = [
        [start + min(i, limit) for i in range(count + 1)]
        for start, limit in zip(starts, limits, strict=True)
    ]
    said = torch.tensor([[*a, *b, c] for a, b, c in zip(places, padded, limits, strict=True)])
    said = said.to(device)
    proposed = said[:, count + 1 : -1]
    q = p.new_zeros(len(drafts), count, size)
    if count:
        q.scatter_(2, proposed[:, :, None], 1.0)  # As for proposals that were certain.
    block = False
    for row, draft in enumerate(drafts):
        if isinstance(draft, Drawn):
            law = p.new_zeros(limits[row], size)
            q[row, : limits[row]] = law.index_copy_(1, draft.kept.to(device), draft.laws.to(p))
            block = draft.block
        elif isinstance(draft, Weighed):
            q[row, : limits[row]] = draft.dense(p)
    runs = [(row, draft) for row, draft in enumerate(drafts) if isinstance(draft, Runs)]
    if runs:
        steps = [step for _, draft in runs for step in draft.steps]
        lengths = [length for _, draft in runs for length in draft.lengths]
        laws = iter(laws_of_runs(steps, lengths, p).split([sum(d.lengths) for _, d in runs]))
        for row, _ in runs:
            q[row, : limits[row]] = next(laws)[: limits[row]]
    coins, noise = p.new_empty(len(drafts), count), p.new_empty(len(drafts), size)
    chance.fill(coins, "uniform")
    chance.fill(noise, "exponential")
    everything = torch.arange(size, device=device)
    accepted, law = settle(
        p[said[:, : count + 1]], proposed, said[:, -1], coins, q, proposed, everything, block
    )
    following = (law / noise).argmax(dim=1)
    accepted = torch.where(p.isnan().any(), -1, accepted)
    both: list[list[int]] = torch.stack([accepted, following], dim=1).tolist()
    return [(taken, token) for taken, token in both]
