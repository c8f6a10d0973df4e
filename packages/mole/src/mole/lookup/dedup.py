"""Repeated token ids: a lookup expert's output depends on the id alone, so compute it once."""

import torch
from jaxtyping import Int
from torch import Tensor


def distinct_ids(
    ids: Int[Tensor, "batch seq_q"], vocab_size: int
) -> tuple[Int[Tensor, " distinct"], Int[Tensor, "batch seq_q"]]:
    """Return the ids to evaluate and, for every token, its position among them.

    Where the batch has at least as many tokens as the vocabulary has ids, all ids are returned:
    shapes then depend on no data, so nothing waits for the device and `torch.compile` needs one
    graph. Smaller batches return their distinct ids in ascending order.

    Args:
        ids: Token ids, in `[0, vocab_size)`.
        vocab_size: Number of ids.

    Source: own.
    """
    if ids.numel() >= vocab_size:
        return torch.arange(vocab_size, device=ids.device), ids
    distinct, inverse = torch.unique(ids, return_inverse=True)
    return distinct, inverse


__all__ = ["distinct_ids"]
