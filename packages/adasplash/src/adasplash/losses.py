"""Fenchel-Young losses whose predictions are alpha-entmax distributions.

    L(s, c) = (p - e_c) . s + H(p)
    p = entmax(s),  H(p) = (1 - sum p ** alpha) / (alpha (alpha - 1))

The gradient is `p - e_c`. The loss is zero, and stays so, once the score of the class exceeds every
other one by 1 / (alpha - 1); alpha 1 is cross entropy, which never is.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from .kernels.checks import check_number
from .kernels.entmax import entmax
from .kernels.entmax.reference import wide

Reduction = Literal["mean", "sum", "none"]


def entmax_loss(
    x: Float[Tensor, "*shape classes"],
    target: Int[Tensor, "*shape"],
    alpha: float = 1.5,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
) -> Float[Tensor, ...]:
    """Return the Fenchel-Young loss of alpha-entmax.

    Args:
        x: Scores of the classes.
        target: Right class of every row.
        alpha: 1 (cross entropy) to 2 (sparsemax loss), or above.
        ignore_index: Rows with this target count for nothing.
        reduction: "mean" over the rows that count, NaN where none does, "sum", or "none", which
            keeps the shape of `target`, with 0 for ignored rows.

    Raises:
        TypeError: `target` does not hold integers.
        ValueError: Shapes, `alpha` or `reduction` do not fit, or a class is out of range (checked
            on the CPU).

    Source: Blondel, Martins, Niculae (2020), "Learning with Fenchel-Young losses".
    """
    _check_settings(alpha, reduction)
    if target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
        raise TypeError(f"`target` must hold numbers of classes, integers; got {target.dtype}.")
    if target.shape != x.shape[:-1]:
        raise ValueError(
            f"`target` must have shape {tuple(x.shape[:-1])}, that of `x` without its last axis, "
            f"the classes; got {tuple(target.shape)}."
        )
    counts = target != ignore_index
    classes = x.shape[-1]
    if target.device.type == "cpu" and not torch.compiler.is_compiling():
        wrong = counts & ((target < 0) | (target >= classes))
        if bool(wrong.any()):
            raise ValueError(
                f"`target` must be below {classes}, the classes of `x`, and at least 0; got "
                f"{int(target[wrong][0])}."
            )
    rows = x.reshape(-1, classes)
    chosen = target.masked_fill(~counts, 0).reshape(-1, 1)
    if alpha == 1:
        wider = rows.to(wide(rows.dtype))
        losses = (wider.logsumexp(-1) - wider.gather(-1, chosen)[:, 0]).to(x.dtype)
    else:
        losses = _FenchelYoung.apply(rows, chosen, float(alpha))[0]
    losses = losses.reshape(target.shape).masked_fill(~counts, 0.0)
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.sum() / counts.sum()


def _check_settings(alpha: float, reduction: str) -> None:
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"`reduction` must be 'mean', 'sum' or 'none'; got {reduction!r}.")
    check_number("alpha", alpha)
    if not alpha >= 1:
        raise ValueError(f"`alpha` must be at least 1; got {alpha}.")


class _FenchelYoung(torch.autograd.Function):
    """The loss of rows, and their weights: these maximise it, so it needs no derivative of them."""

    generate_vmap_rule = True

    @staticmethod
    def forward(rows: Tensor, chosen: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
        p = entmax(rows, alpha)
        score, weight = rows.to(wide(rows.dtype)), p.to(wide(rows.dtype))
        # Differences of scores are small where the scores are not.
        gap = score - score.gather(-1, chosen)
        inner = torch.where(weight > 0, weight * gap, 0.0 * weight).sum(-1)
        entropy = (1 - weight.pow(alpha).sum(-1)) / (alpha * (alpha - 1))
        return (inner + entropy).to(rows.dtype), p

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        rows, chosen, ctx.alpha = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(rows, chosen, output[1])
        ctx.save_for_forward(chosen, output[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, None, None]:
        rows, chosen, p = ctx.saved_tensors
        if torch.is_grad_enabled():  # the gradient will be differentiated
            p = entmax(rows, ctx.alpha)
        one = torch.zeros_like(p).scatter(-1, chosen, 1.0)
        return (p - one) * grad[:, None], None, None

    @staticmethod
    def jvp(ctx: Any, rows: Tensor, *_: None) -> tuple[Tensor, None]:
        chosen, p = ctx.saved_tensors
        return (p * rows).sum(-1) - rows.gather(-1, chosen)[:, 0], None


class EntmaxLoss(nn.Module):
    """`entmax_loss` as a module.

    Args:
        alpha: As `entmax_loss`, as are the others.
        ignore_index: Target to ignore.
        reduction: "mean", "sum" or "none".
    """

    def __init__(
        self, alpha: float = 1.5, ignore_index: int = -100, reduction: Reduction = "mean"
    ) -> None:
        super().__init__()
        _check_settings(alpha, reduction)
        self.alpha, self.ignore_index, self.reduction = alpha, ignore_index, reduction

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        """Return the loss of scores (..., classes) and classes (...)."""
        return entmax_loss(x, target, self.alpha, self.ignore_index, self.reduction)

    def extra_repr(self) -> str:
        """Return the settings, for `repr`."""
        return f"alpha={self.alpha}, ignore_index={self.ignore_index}, reduction={self.reduction!r}"


class SparsemaxLoss(EntmaxLoss):
    """`EntmaxLoss` with alpha 2.

    Args:
        ignore_index: Target to ignore.
        reduction: "mean", "sum" or "none".
    """

    def __init__(self, ignore_index: int = -100, reduction: Reduction = "mean") -> None:
        super().__init__(2.0, ignore_index, reduction)


class Entmax15Loss(EntmaxLoss):
    """`EntmaxLoss` with alpha 1.5.

    Args:
        ignore_index: Target to ignore.
        reduction: "mean", "sum" or "none".
    """

    def __init__(self, ignore_index: int = -100, reduction: Reduction = "mean") -> None:
        super().__init__(1.5, ignore_index, reduction)
