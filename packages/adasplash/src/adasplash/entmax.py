"""Dense 1.5-entmax over one dimension of a tensor."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


def entmax15(x: Float[Tensor, "*shape"], dim: int = -1) -> Float[Tensor, "*shape"]:
    """Return the 1.5-entmax of `x`: a distribution with exact zeros.

    The result is `p = relu(x / 2 - tau) ** 2`, where `tau` makes it sum to 1; it maximises
    `<p, x> + H(p)` with the Tsallis entropy of order 1.5. Slices that are `-inf` throughout give
    zeros; NaN gives NaN in its slice.

    Args:
        x: Scores, float16, bfloat16, float32 or float64; any shape.
        dim: Dimension to normalise over.

    Returns:
        Weights of the shape and dtype of `x`.

    Raises:
        TypeError: `x` is not floating point.
        ValueError: `x` has no such dimension, or it is empty.

    Source: Peters, Niculae, Martins (2019), "Sparse Sequence-to-Sequence Models", algorithm 2.
    """
    if not x.is_floating_point():
        raise TypeError(f"`x` must be floating point; got {x.dtype}.")
    if not -x.ndim <= dim < x.ndim:
        raise ValueError(f"`dim` must be between {-x.ndim} and {x.ndim - 1}; got {dim}.")
    if x.shape[dim] == 0:
        raise ValueError(f"`x` must have at least one element along `dim` {dim}; got none.")
    output: Tensor = _Entmax15.apply(x, dim)
    return output


def threshold15(z: Float[Tensor, "*rows keys"]) -> Float[Tensor, "*rows"]:
    """Return `tau` with `sum(relu(z - tau) ** 2) == 1` for every row, by sorting.

    With the largest k values as support, `tau` solves a quadratic: for their mean and their sum of
    squared deviations ss, `tau = mean - sqrt((1 - ss) / k)`. The support is the largest k for which
    `tau` lies below the k-th value. Rows that are `-inf` throughout give `+inf`.

    Args:
        z: Half the scores, float32 or float64.
    """
    top = z.amax(dim=-1, keepdim=True)
    empty = top == -torch.inf
    # Values more than 1 below the largest are never in the support: clamping keeps sums finite.
    ordered = (z - top.masked_fill(empty, 0.0)).clamp_min(-2.0).sort(dim=-1, descending=True)[0]
    count = torch.arange(1, z.shape[-1] + 1, device=z.device, dtype=z.dtype)
    mean = ordered.cumsum(-1) / count
    deviation = ordered.square().cumsum(-1) - count * mean.square()
    tau = mean - ((1.0 - deviation) / count).clamp_min(0.0).sqrt()
    support = (tau <= ordered).sum(-1, keepdim=True).clamp_min(1)
    found = tau.gather(-1, support - 1) + top
    return found.masked_fill(empty, torch.inf).squeeze(-1)


class _Entmax15(torch.autograd.Function):
    """The forward solves for tau; the backward is `diag(u) - u u^T / sum(u)` with `u = sqrt(p)`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int) -> Tensor:
        z = x.movedim(dim, -1).to(torch.promote_types(x.dtype, torch.float32)) / 2
        root = (z - threshold15(z)[..., None]).clamp_min(0.0)
        ctx.dim = dim
        ctx.save_for_backward(root.to(x.dtype))
        return root.square().to(x.dtype).movedim(-1, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (root,) = ctx.saved_tensors
        weighted = root * grad.movedim(ctx.dim, -1)
        total = root.sum(-1, keepdim=True)
        mean = weighted.sum(-1, keepdim=True) / total.masked_fill(total == 0, 1.0)
        return (weighted - root * mean).movedim(-1, ctx.dim), None
