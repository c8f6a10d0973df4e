"""The linear layer that ends a block."""

from torch import nn


class ResidualLinear(nn.Linear):
    """A linear layer that writes into the residual stream; initialised smaller."""


__all__ = ["ResidualLinear"]
