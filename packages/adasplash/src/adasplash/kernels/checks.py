"""What every public function refuses, naming the argument and its value."""

import torch
from torch import Tensor


def check_tensor(name: str, x: object, *, whole: bool = False) -> None:
    """Refuse what is no tensor; `whole`: or does not hold integers."""
    if not isinstance(x, Tensor):
        raise TypeError(f"`{name}` must be a tensor; got {type(x).__name__}.")
    if whole and (x.is_floating_point() or x.is_complex() or x.dtype == torch.bool):
        raise TypeError(f"`{name}` must hold integers; got {x.dtype}.")


def check_number(name: str, x: object, *, tensor: bool = False) -> None:
    """Refuse what is no number, True and False among it.

    `tensor`: one that holds a number and needs no gradient, which would be lost, is taken for it.
    """
    if isinstance(x, Tensor):
        if not (tensor and x.ndim == 0 and not x.requires_grad):
            raise TypeError(f"`{name}` must be a number; got a tensor of shape {tuple(x.shape)}.")
    elif isinstance(x, bool) or not (
        isinstance(x, float | int) or torch.compiler.is_compiling() or hasattr(x, "__float__")
    ):
        raise TypeError(f"`{name}` must be a number; got {x!r}.")
