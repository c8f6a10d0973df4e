"""The mix operation in plain PyTorch: the oracle of the kernels, and the CPU path."""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def mix_reference(
    gates: Float[Tensor, "tokens experts"],
    values: Float[Tensor, "distinct experts dim"],
    inverse: Int[Tensor, " tokens"],
) -> Float[Tensor, "tokens dim"]:
    """Return `sum_j gates[t, j] values[inverse[t], j]`; differentiable.

    Source: Jie et al. 2025 (arXiv 2503.15798), equation 6.
    """
    picked = torch.nn.functional.embedding(inverse, values.flatten(1)).view(-1, *values.shape[1:])
    return torch.matmul(gates[:, None], picked).squeeze(1)


def segment_sum_reference(
    gates: Float[Tensor, "tokens experts"],
    grad: Float[Tensor, "tokens dim"],
    inverse: Int[Tensor, " tokens"],
    distinct: int,
) -> Float[Tensor, "distinct experts dim"]:
    """Return, for every distinct id, the sum of `gates[t, j] grad[t]` over its tokens.

    Source: own; the gradient of `mix_reference` with respect to `values`.
    """
    terms = gates[:, :, None] * grad[:, None]
    return terms.new_zeros(distinct, *terms.shape[1:]).index_add(0, inverse, terms)


__all__ = ["mix_reference", "segment_sum_reference"]
