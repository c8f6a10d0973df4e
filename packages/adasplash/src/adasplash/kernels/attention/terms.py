"""What an attention may have beside causality, window, key mask, scale and alpha."""

from typing import NamedTuple

from torch import Tensor
from torch.nn.functional import pad


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
        """The bits of `scores.py`; of a launch, as a trace cannot know where a bias lies."""
        close = self.bias is not None and not self.n_seq and is_close(self.bias)
        given = self.softcap, self.slopes is not None, self.bias is not None, self.n_seq, close
        return sum(bool(present) << bit for bit, present in enumerate(given))

    @property
    def bare(self) -> bool:
        """Whether there is nothing but a cap."""
        return self.slopes is None and self.bias is None and not self.n_seq and not self.dropout

    @property
    def n_seq(self) -> int:
        """How many packed sequences; 0 if there are none."""
        return 0 if self.bounds_q is None else self.bounds_q.shape[0] - 1


_AT_ONCE = 8  # keys whose biases are read together; as in `scores.py`


def is_close(bias: Tensor) -> bool:
    """Return whether neighbouring keys of a bias can be read together, up to the last ones."""
    strides = zip(bias.stride()[:-1], bias.shape[:-1], strict=True)
    return (
        bias.stride(-1) == 1
        and all(stride % _AT_ONCE == 0 for stride, size in strides if size > 1)
        and bias.data_ptr() % (_AT_ONCE * bias.element_size()) == 0
        # Beyond the last key of the last row there may be no memory.
        and (bias.shape[-1] % _AT_ONCE == 0 or bias.storage_offset() + _span(bias) <= _held(bias))
    )


def _span(bias: Tensor) -> int:
    """Return how far a bias reaches, its last row as long as what is read of it."""
    whole = zip(bias.stride()[:-1], bias.shape[:-1], strict=True)
    return sum(stride * (size - 1) for stride, size in whole) + _wide(bias.shape[-1])


def _held(bias: Tensor) -> int:
    return bias.untyped_storage().nbytes() // bias.element_size()


def _wide(keys: int) -> int:
    return -(-keys // _AT_ONCE) * _AT_ONCE


def brought_close(bias: Tensor | None) -> Tensor | None:
    """Return a bias as `is_close` wants it: itself, or a copy of what it holds once."""
    if bias is None or bias.shape[-1] == 1 or is_close(bias):
        return bias
    once = bias[tuple(slice(None if stride else 1) for stride in bias.stride())]
    keys = bias.shape[-1]
    if once.shape[-1] == 1:
        once = once.expand(*once.shape[:-1], keys)
    return pad(once, (0, _wide(keys) - keys)).contiguous()[..., :keys].expand(bias.shape)


PLAIN = Terms()
