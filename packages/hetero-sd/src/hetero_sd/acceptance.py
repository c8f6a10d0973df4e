"""The accept-or-resample step. Whatever it is given, the target's law comes out."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


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


def verify_greedy(
    choices: Int[Tensor, " positions"], proposed: Int[Tensor, " proposals"]
) -> tuple[int, int]:
    """Return how many proposals equal the target's choices, and the target's next choice.

    Args:
        choices: The target's best token at each proposal and after the last, shape `(n + 1,)`.
        proposed: Target ids, shape `(n,)`.

    Source: own.
    """
    count = len(proposed)
    accepted = int((choices[:count] == proposed).int().cumprod(0).sum())
    return accepted, int(choices[accepted])
