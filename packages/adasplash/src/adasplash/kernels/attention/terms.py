"""What an attention may have beside causality, window, key mask, scale and alpha."""

from typing import NamedTuple

from torch import Tensor


class Terms(NamedTuple):
    """ALiBi, bias, packed sequences, cap and dropout, as the operator takes them, in its order.

    Args:
        slopes: Of ALiBi, float32 `[batch, heads]`, contiguous.
        bias: Added to the scores, `[batch or 1, heads or 1, seq_q or 1, seq_k or 1]`.
        seed: Of the dropout, int64 `[1]`, on the device: a replay of a graph may find another one.
        bounds_q: Where packed sequences begin and the last one ends, int32 `[sequences + 1]`,
            contiguous; q, k and v are then `[1, heads, tokens, dim]`.
        bounds_k: The same for keys.
        softcap: Bound of the scaled products; 0 for none.
        dropout: Probability of dropping a weight.
        max_q: Queries of the longest sequence at most; 0 if that is not known.
        max_k: The same for keys.
    """

    slopes: Tensor | None = None
    bias: Tensor | None = None
    seed: Tensor | None = None
    bounds_q: Tensor | None = None
    bounds_k: Tensor | None = None
    softcap: float = 0.0
    dropout: float = 0.0
    max_q: int = 0
    max_k: int = 0

    @property
    def form(self) -> int:
        """The bits of `scores.py`."""
        given = self.softcap, self.slopes is not None, self.bias is not None, self.n_seq
        return sum(bool(present) << bit for bit, present in enumerate(given))

    @property
    def n_seq(self) -> int:
        """How many packed sequences; 0 if there are none."""
        return 0 if self.bounds_q is None else self.bounds_q.shape[0] - 1


PLAIN = Terms()
