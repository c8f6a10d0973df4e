"""Linear layers of a few rows, with norm, modulation, activation, gate and residual in one read."""

from . import reference
from .op import MAX_NORMED, MAX_ROWS, Activation, Norm, few_row_linear

__all__ = ["MAX_NORMED", "MAX_ROWS", "Activation", "Norm", "few_row_linear", "reference"]
