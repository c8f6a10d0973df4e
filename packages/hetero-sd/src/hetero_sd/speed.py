"""How much faster speculative decoding can be: a model of its speed.

A round drafts `lookahead` tokens, each accepted with probability `acceptance` if all before it
were, and brings one token more than are accepted. In units of a plain step of the target, it costs
`lookahead * c` for the drafter, `verify` for the target's pass over all of them, and `overhead`.
"""

from __future__ import annotations

DEEPEST = 64  # Longest draft that `best_speedup` looks at.


def expected_tokens(acceptance: float, lookahead: int) -> float:
    """Return the tokens that a round brings on average, between 1 and `lookahead + 1`.

    Args:
        acceptance: Probability that a proposal is accepted, in [0, 1].
        lookahead: Tokens drafted a round, 0 or more.

    Raises:
        ValueError: An argument is out of range.

    Source: Leviathan et al., Fast Inference from Transformers via Speculative Decoding, eq. 1.
    """
    if not 0 <= acceptance <= 1 or lookahead < 0:
        raise ValueError(
            "`acceptance` must be in [0, 1] and `lookahead` 0 or more; got "
            f"{acceptance} and {lookahead}."
        )
    return sum(acceptance**i for i in range(lookahead + 1))


def speedup(
    acceptance: float, lookahead: int, c: float, verify: float = 1.0, overhead: float = 0.0
) -> float:
    """Return the speed over plain decoding that the model predicts.

    Args:
        acceptance: Probability that a proposal is accepted, in [0, 1].
        lookahead: Tokens drafted a round, 0 or more.
        c: Cost of a drafter step, in plain steps of the target.
        verify: Cost of the target's pass over a draft, in plain steps.
        overhead: Cost of what else a round does, in plain steps.

    Raises:
        ValueError: `acceptance` or `lookahead` is out of range.
    """
    return expected_tokens(acceptance, lookahead) / (lookahead * c + verify + overhead)


def best_speedup(acceptance: float, c: float, overhead: float = 0.0) -> tuple[float, int]:
    """Return the largest predicted speed over plain decoding, and its lookahead.

    Args:
        acceptance: Probability that a proposal is accepted, in [0, 1].
        c: Cost of a drafter step, in plain steps of the target.
        overhead: Cost of what else a round does, in plain steps.
    """
    rated = ((speedup(acceptance, n, c, overhead=overhead), n) for n in range(1, DEEPEST + 1))
    return max(rated, key=lambda entry: (entry[0], -entry[1]))
