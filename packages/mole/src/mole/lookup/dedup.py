"""Repeated token ids: a lookup expert's output depends on the id alone, so compute it once."""

from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from ..kernels.mix import segments


def distinct_ids(
    ids: Int[Tensor, "batch seq_q"], vocab_size: int, multiple: int = 1
) -> tuple[Int[Tensor, " distinct"], Int[Tensor, "batch seq_q"]]:
    """Return the ids to evaluate and, for every token, its position among them.

    Where the batch has at least as many tokens as the vocabulary has ids, all ids are returned:
    shapes then depend on no data, so nothing waits for the device and `torch.compile` needs one
    graph. Smaller batches return their distinct ids in ascending order.

    Args:
        ids: Token ids, in `[0, vocab_size)`.
        vocab_size: Number of ids.
        multiple: Pad the distinct ids, with id 0, to a multiple of this: few shapes to compile.

    Source: own.
    """
    if ids.numel() >= vocab_size:
        return torch.arange(vocab_size, device=ids.device), ids
    distinct, inverse = torch.unique(ids, return_inverse=True)
    padding = -len(distinct) % multiple
    return torch.nn.functional.pad(distinct, (0, padding)), inverse


class Repeats(NamedTuple):
    """Which distinct id is each token's, and each id's tokens: what every layer needs.

    Attributes:
        inverse: For every token its position among the distinct ids, flattened.
        order: The tokens sorted by it.
        starts: Where each id's run begins in `order`, and the end.
    """

    inverse: Int[Tensor, " tokens"]
    order: Int[Tensor, " tokens"]
    starts: Int[Tensor, " edges"]

    @classmethod
    def of(cls, inverse: Int[Tensor, "batch seq_q"], distinct: int) -> "Repeats":
        """Return the repeats for an inverse index."""
        flat = inverse.flatten()
        return cls(flat, *segments(flat, distinct))


__all__ = ["Repeats", "distinct_ids"]
