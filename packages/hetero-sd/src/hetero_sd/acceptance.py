"""The accept-or-resample step. Whatever it is given, the target's law comes out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .chance import Chance


def verify(
    p: Float[Tensor, "positions vocab"],
    proposed: Int[Tensor, " proposals"],
    coins: Float[Tensor, " coins"],
    q: Float[Tensor, "laws kept"] | None = None,
    kept: Int[Tensor, " kept"] | None = None,
) -> tuple[int, Float[Tensor, " vocab"]]:
    """Return how many proposals are accepted, and the law of the token after them.

    With p the target's law and ψ the law that the proposal t was drawn from, t is accepted with
    probability min(1, p(t)/ψ(t)); the first rejected proposal is replaced by a draw from
    max(p − ψ, 0), normalised, and after the last accepted one a draw from p follows. Then every
    token has law p. Scan and replacement stop at the first rejection.

    Args:
        p: Law of the target at each proposal and after the last, shape `(n + 1, vocab)`, in
            [0, 1], after all logits processors. Row i is conditional on proposals before i.
        proposed: Target ids, shape `(n,)`.
        coins: Uniform on [0, 1), independent of the proposals, shape `(n,)`.
        q: The law ψ of each proposal over the ids `kept`, shape `(n, kept)`. Without it, each
            proposal was certain (ψ is a point mass).
        kept: Distinct target ids of the columns of `q`; all of them in order if missing.

    Returns:
        The number of accepted proposals, 0 to n, and the weights of the next token's law, which
        need not add up to 1.

    Raises:
        ValueError: The shapes do not belong together.

    Source: Leviathan et al. 2023, algorithm 1; Timor et al. 2025, algorithms 2 and 4.
    """
    count = len(proposed)
    if p.shape[0] != count + 1:
        raise ValueError(
            f"`p` must have one row more than there are proposals, {count + 1}; got {p.shape[0]}."
        )
    if len(coins) != count or (q is not None and len(q) != count):
        raise ValueError(
            f"`coins` and `q` must have a row for each of the {count} proposals; got {len(coins)}"
            f"{'' if q is None else f' and {len(q)}'}."
        )
    if count == 0:
        return 0, p[0]
    rows = torch.arange(count, device=p.device)
    ours = p[rows, proposed]
    if q is None:
        theirs = torch.ones_like(ours)
    elif kept is None:
        theirs = q[rows, proposed]
    else:
        column = (kept[None, :] == proposed[:, None]).int().argmax(dim=1)
        theirs = q[rows, column]
    # coin < p/ψ without dividing. A proposal that p forbids is never accepted, whatever the coin.
    accepted = int((coins * theirs < ours).int().cumprod(0).sum())
    if accepted == count:
        return count, p[count]
    law = p[accepted].clone()
    if q is None:
        law[proposed[accepted]] = 0.0
    elif kept is None:
        law = (law - q[accepted]).clamp_(min=0.0)
    else:
        law[kept] = (law[kept] - q[accepted]).clamp_(min=0.0)
    # Rounding may leave nothing where p and ψ agree: then p itself is the right law.
    return accepted, law if bool(law.sum() > 0) else p[accepted]


def verify_greedy(choices: Sequence[int], proposed: Sequence[int]) -> tuple[int, int]:
    """Return how many proposals equal the target's choices, and the target's next choice.

    Args:
        choices: The target's best token at each proposal and after the last.
        proposed: Target ids, one fewer.

    Source: own.
    """
    pairs = enumerate(zip(proposed, choices, strict=False))
    accepted = next((i for i, (t, best) in pairs if t != best), len(proposed))
    return accepted, choices[accepted]


def verify_block(
    p: Float[Tensor, "positions vocab"],
    proposed: Int[Tensor, " proposals"],
    coins: Float[Tensor, " coins"],
    q: Float[Tensor, "laws kept"],
    kept: Int[Tensor, " kept"] | None = None,
) -> tuple[int, Float[Tensor, " vocab"]]:
    """Return how many proposals are accepted when the block is judged as a whole, and what follows.

    Accepts at least as many tokens on average as `verify`, with the same law of the output. With
    π₀ = 1, πᵢ = min(1, πᵢ₋₁ p(xᵢ)/q(xᵢ)) and Aᵢ = Σ max(πᵢ p − q, 0) at the place after xᵢ, the
    prefix of length i is kept with probability Aᵢ/(Aᵢ + 1 − πᵢ), the whole block with π_n; the
    longest prefix that its own coin keeps is taken. The next token's law is max(π p − q, 0).

    Args:
        p: As for `verify`.
        proposed: As for `verify`, drawn one by one from `q`.
        coins: Uniform on [0, 1), independent of the proposals, shape `(n,)`.
        q: The law of each proposal over the ids `kept`, shape `(n, kept)`.
        kept: Distinct target ids of the columns of `q`; all of them in order if missing.

    Source: Sun et al., Block verification accelerates speculative decoding, ICLR 2025.
    """
    count = len(proposed)
    if count == 0:
        return 0, p[0]
    rows = torch.arange(count, device=p.device)
    if kept is not None:
        q = torch.zeros_like(p[:count]).index_copy_(1, kept, q.to(p.dtype))
    ratio = p[rows, proposed] / q[rows, proposed]
    share = torch.ones(count + 1, dtype=p.dtype, device=p.device)
    for i in range(count):
        share[i + 1] = (share[i] * ratio[i]).clamp(max=1.0)
    # What is left of πp beside q at the place after each prefix but the whole block.
    rest = (share[:count, None] * p[:count] - q).clamp_(min=0.0)
    mass = rest.sum(dim=1)
    keep = torch.where(mass > 0, mass / (mass + 1 - share[:count]), (share[:count] >= 1).to(p))
    bound = torch.cat([keep[1:], share[count:]])  # Of prefixes 1 to n.
    kept_prefixes = (coins < bound).nonzero()
    taken = int(kept_prefixes[-1]) + 1 if len(kept_prefixes) else 0
    if taken == count:
        return count, p[count]
    return taken, rest[taken] if bool(mass[taken] > 0) else p[taken]


@dataclass(frozen=True)
class Choice:
    """One step of a draft that is a run of target tokens, chosen among several.

    Attributes:
        runs: The target tokens of each candidate, padded with −1, shape `(candidates, longest)`;
            each has at least one.
        mass: Probability of each candidate; they add up to 1. Shape `(candidates,)`.
        chosen: The candidate that was drawn.
    """

    runs: Tensor
    mass: Tensor
    chosen: int


def verify_runs(
    p: Float[Tensor, "positions vocab"], steps: Sequence[Choice], coins: Float[Tensor, " coins"]
) -> tuple[int, Float[Tensor, " vocab"]]:
    """Return how many tokens of the chosen runs are accepted, and the law of the next token.

    The law of each proposed token is the mass of all candidates that go on with it among those
    that agree with what is accepted so far: for a run's first token a sum over the whole drafter
    vocabulary. Whether the chosen run ends where another goes on is revealed before the next coin.

    Args:
        p: Law of the target at each token of the chosen runs and after the last. With fewer rows,
            only so many tokens are judged.
        steps: The draft, in order; the law of a step may depend on all steps before it.
        coins: Uniform on [0, 1), independent of the draft; one for each token.

    Source: SLRS, Timor et al. 2025, algorithm 5, in a form of our own that costs no more than TLI.
    """
    place = 0
    for step in steps:
        run = [int(t) for t in step.runs[step.chosen] if t >= 0]
        alive = torch.ones(len(step.mass), dtype=torch.bool, device=p.device)
        for depth, token in enumerate(run):
            if place == len(p) - 1:  # There is no room for what comes after.
                return place, p[place]
            going = step.runs[:, depth].to(p.device)
            alive &= going >= 0  # The latent: the chosen run does not end here.
            mass = torch.where(alive, step.mass.to(p), 0)
            law = torch.zeros_like(p[0]).index_add_(0, going.clamp(min=0), mass)
            law /= law.sum()
            if float(coins[place]) * float(law[token]) >= float(p[place, token]):
                rest = (p[place] - law).clamp_(min=0.0)
                return place, rest if bool(rest.sum() > 0) else p[place]
            place += 1
            alive &= going == token
    return place, p[place]


def laws_of_runs(
    steps: Sequence[Choice], lengths: Sequence[int], like: Tensor
) -> Float[Tensor, "tokens vocab"]:
    """Return the law of each token of the chosen runs, as `verify_runs` judges them.

    Nothing is waited for: no shape depends on a value on the device.

    Args:
        steps: The choices.
        lengths: Tokens of each chosen run.
        like: A tensor of the type, device and last size wanted.
    """
    groups: dict[int, list[int]] = {}  # Choices among the same runs are weighed together.
    for place, step in enumerate(steps):
        groups.setdefault(id(step.runs), []).append(place)
    laws: list[Tensor] = []
    line_of: dict[tuple[int, int], int] = {}  # Of a choice's token, among all laws.
    for places in groups.values():
        runs = steps[places[0]].runs.to(like.device)
        mass = torch.stack([steps[place].mass for place in places]).to(like)
        chosen = runs[torch.tensor([steps[place].chosen for place in places]).to(like.device)]
        for depth in range(max(lengths[place] for place in places)):
            going = runs[:, depth]
            mass = torch.where(going >= 0, mass, 0)  # The latent: the run does not end here.
            law = mass.new_zeros(len(places), like.shape[-1])
            law.index_add_(1, going.clamp(min=0), mass)
            first = len(line_of)
            line_of |= {(place, depth): first + i for i, place in enumerate(places)}
            laws.append(law / law.sum(dim=1, keepdim=True))
            mass = torch.where(going == chosen[:, depth, None], mass, 0)
    order = [line_of[place, d] for place, length in enumerate(lengths) for d in range(length)]
    return torch.cat(laws)[torch.tensor(order).to(like.device)]


def accepts(coin: float, p: float, q: float) -> bool:
    """Return whether a proposal of the law q is accepted where the target's law is p."""
    return coin * q < p


def residual(
    p: Float[Tensor, " vocab"], weigh: Callable[[int], float], chance: Chance
) -> Float[Tensor, " vocab"]:
    """Return weights with one token drawn from max(p − ψ, 0), for a ψ known token by token.

    Draws from p and keeps the draw with probability 1 − ψ/p, else draws again. On average that
    takes as many draws as it takes proposals until one is rejected.

    Args:
        p: The target's law.
        weigh: Returns ψ of a token.
        chance: Source of the draws.

    Source: own.
    """
    drawn = torch.zeros_like(p)
    for _ in range(1000):  # Where p and ψ agree up to rounding, p itself is the right law.
        (token,) = chance.draw(p[None])
        share = float(p[token])
        if float(chance.coins(1, p)) * share < share - weigh(token):
            break
    drawn[token] = 1.0
    return drawn


def settle(
    p: Float[Tensor, "rows positions vocab"],
    proposed: Int[Tensor, "rows proposals"],
    limits: Int[Tensor, " rows"],
    coins: Float[Tensor, "rows proposals"],
    q: Float[Tensor, "rows proposals kept"],
    columns: Int[Tensor, "rows proposals"],
    kept: Int[Tensor, " kept"],
    block: bool,
) -> tuple[Int[Tensor, " rows"], Float[Tensor, "rows vocab"]]:
    """Return for each row how many proposals are accepted, and weights of the next token's law.

    The same rules as `verify` and `verify_block`, for many rows and with nothing to wait for: no
    shape and no branch depends on a value.

    Args:
        p: As for `verify`, for each row.
        proposed: Target ids.
        limits: How many of a row's proposals count, 0 to their number.
        coins: Uniform on [0, 1).
        q: The law of each proposal over `kept`.
        columns: The column of each proposal in `q`.
        kept: Distinct target ids of the columns.
        block: Whether drafts are judged as blocks.
    """
    rows, count = proposed.shape
    row = torch.arange(rows, device=p.device)
    place = torch.arange(count, device=p.device)
    if count:
        ours = p[:, :count].gather(2, proposed[:, :, None])[:, :, 0]
        theirs = q.gather(2, columns[:, :, None])[:, :, 0]
        share = torch.ones(rows, count + 1, dtype=p.dtype, device=p.device)
        if block:
            for i in range(count):
                share[:, i + 1] = (share[:, i] * ours[:, i] / theirs[:, i]).clamp(max=1.0)
            known = p[:, :count, kept]
            rest = (share[:, :count, None] * known - q).clamp(min=0.0).sum(dim=2)
            rest = rest + share[:, :count] * (1 - known.sum(dim=2)).clamp(min=0.0)
            whole = (share[:, :count] >= 1).to(p.dtype)
            keep = torch.where(rest > 0, rest / (rest + 1 - share[:, :count]), whole)
            keep = torch.cat([keep[:, 1:], share[:, count:]], dim=1)  # Of prefixes 1 to n.
            last = place + 1 == limits[:, None]
            bound = torch.where(last, share[:, 1:], keep)
            length = torch.where((coins < bound) & (place < limits[:, None]), place + 1, 0)
            accepted = length.amax(dim=1)
        else:
            fits = (coins * theirs < ours) & (place < limits[:, None])
            accepted = fits.long().cumprod(dim=1).sum(dim=1)
        law = p[row, accepted]
        less = q[row, accepted.clamp(max=count - 1)]
        left = (share[row, accepted, None] * law).index_add(1, kept, -less).clamp(min=0.0)
        rejected = (accepted < limits) & (left.sum(dim=1) > 0)
        law = torch.where(rejected[:, None], left, law)
    else:
        accepted = torch.zeros(rows, dtype=torch.long, device=p.device)
        law = p[:, 0]
    return accepted, law
