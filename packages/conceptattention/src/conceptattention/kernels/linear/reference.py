"""The same computation in torch: what the kernel is tested against."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .op import Norm


def activate(x: Tensor, name: str) -> Tensor:
    """Return "silu", "gelu" or "gelu_tanh" of x, or of half of it times the rest for "swiglu"."""
    if name == "swiglu":
        gate, x = x.chunk(2, dim=-1)
        return F.silu(gate) * x
    if name == "silu":
        return F.silu(x)
    if name in ("gelu", "gelu_tanh"):
        return F.gelu(x, approximate="tanh" if name == "gelu_tanh" else "none")
    return x


def few_row_linear(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor] | None = None,
    *,
    norm: Norm | None = None,
    act_in: str = "none",
    act_out: str = "none",
    gate: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Return what `op.few_row_linear` returns, rounded after every step."""
    x = activate(x, act_in)
    if norm is not None:
        if norm.eps is not None:
            x = F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps)
        if norm.scale is not None and norm.shift is not None:
            x = torch.addcmul(norm.shift, x, 1 + norm.scale)
    made = []
    for index, weight in enumerate(weights):
        y = activate(F.linear(x, weight, None if biases is None else biases[index]), act_out)
        y = y if gate is None else y * gate
        made.append(y if residual is None else y + residual)
    return torch.stack(made)
