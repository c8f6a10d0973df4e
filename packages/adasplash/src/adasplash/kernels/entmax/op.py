"""The public functions: checks, rows of any dimension, and the operator that torch knows."""

from typing import Any, Literal, NamedTuple, overload

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..checks import check_number
from . import reference

_KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class EntmaxAux(NamedTuple):
    """What a row's weights follow from, and how many there are.

    Args:
        tau: Threshold of `(alpha - 1) x`, float32 or float64, the shape of `x` without `dim`;
            `+inf` for rows that are `-inf` throughout.
        support_size: Number of weights above 0, int64, the same shape.
    """

    tau: Tensor
    support_size: Tensor


@overload
def entmax(
    x: Tensor,
    alpha: float | Tensor = ...,
    dim: int = ...,
    *,
    mask: Tensor | None = ...,
    return_aux: Literal[False] = ...,
) -> Tensor: ...


@overload
def entmax(
    x: Tensor,
    alpha: float | Tensor = ...,
    dim: int = ...,
    *,
    mask: Tensor | None = ...,
    return_aux: Literal[True],
) -> tuple[Tensor, EntmaxAux]: ...


def entmax(
    x: Float[Tensor, "*shape"],
    alpha: float | Tensor = 1.5,
    dim: int = -1,
    *,
    mask: Bool[Tensor, "..."] | None = None,
    return_aux: bool = False,
) -> Float[Tensor, "*shape"] | tuple[Float[Tensor, "*shape"], EntmaxAux]:
    """Return the alpha-entmax of `x`: a distribution that is exactly zero where scores are low.

    The result maximises `<p, x> + H(p)` with the Tsallis entropy of order alpha: softmax for 1,
    sparsemax for 2, sparser the higher alpha is. Differentiable twice in `x` and in `alpha`.
    Slices that are `-inf` or masked throughout give zeros; NaN gives NaN in its slice.

    Args:
        x: Scores, float16, bfloat16, float32 or float64; any shape.
        alpha: At least 1; or a tensor of values from 1 to 2 that broadcasts against `x` with size 1
            along `dim`. Values on a GPU are not looked at.
        dim: Dimension to normalise over.
        mask: True for elements that take part; broadcasts against `x`.
        return_aux: Also return thresholds and sizes of the support.

    Returns:
        Weights of the shape and dtype of `x`, and an `EntmaxAux` if asked for.

    Raises:
        TypeError: `x` is not floating point, or `mask` not bool.
        ValueError: `x` has no such dimension, or it is empty, or `alpha` is out of range or does
            not broadcast.

    Source: Peters, Niculae, Martins (2019), "Sparse Sequence-to-Sequence Models"; for the gradient
    of alpha Correia, Niculae, Martins (2019), "Adaptively Sparse Transformers".
    """
    _check(x, alpha, dim, mask)
    if mask is not None:
        x = x.masked_fill(~mask, -torch.inf)
    last = x.movedim(dim, -1)
    rows = last.reshape(-1, x.shape[dim])
    each = None
    if isinstance(alpha, Tensor):
        wide = alpha.to(x.device, reference.wide(x.dtype))
        wide = wide.expand(x.shape) if wide.ndim == 0 else wide.broadcast_to(_one(x.shape, dim))
        each = wide.movedim(dim, -1)[..., 0].reshape(-1).contiguous()
        alpha = 0.0
    run = _forward if torch.compiler.is_compiling() else _Map.apply
    p, tau = run(rows.contiguous(), each, float(alpha))
    output: Tensor = p.reshape(last.shape).movedim(-1, dim)
    if not return_aux:
        return output
    lines = last.shape[:-1]
    return output, EntmaxAux(tau.reshape(lines), (p > 0).sum(-1).reshape(lines))


def entmax15(
    x: Float[Tensor, "*shape"], dim: int = -1, *, mask: Bool[Tensor, "..."] | None = None
) -> Float[Tensor, "*shape"]:
    """Return `entmax` with alpha 1.5.

    Args:
        x: Scores.
        dim: Dimension to normalise over.
        mask: True for elements that take part.

    Raises:
        TypeError: As `entmax`.
        ValueError: As `entmax`.
    """
    return entmax(x, 1.5, dim, mask=mask)


def sparsemax(
    x: Float[Tensor, "*shape"], dim: int = -1, *, mask: Bool[Tensor, "..."] | None = None
) -> Float[Tensor, "*shape"]:
    """Return `entmax` with alpha 2: the projection onto the simplex.

    Args:
        x: Scores.
        dim: Dimension to normalise over.
        mask: True for elements that take part.

    Raises:
        TypeError: As `entmax`.
        ValueError: As `entmax`.

    Source: Martins, Astudillo (2016), "From Softmax to Sparsemax".
    """
    return entmax(x, 2.0, dim, mask=mask)


def _one(shape: torch.Size, dim: int) -> list[int]:
    """Return the shape with size 1 along `dim`."""
    sizes = list(shape)
    sizes[dim] = 1
    return sizes


def _check(x: Tensor, alpha: float | Tensor, dim: int, mask: Tensor | None) -> None:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"`x` must be a floating point tensor; got {got}.")
    if not isinstance(dim, int):
        raise TypeError(f"`dim` must be a whole number; got {dim!r}.")
    if x.ndim == 0:
        raise ValueError("`x` must have at least one dimension; got a scalar.")
    if not -x.ndim <= dim < x.ndim:
        raise ValueError(f"`dim` must be between {-x.ndim} and {x.ndim - 1}; got {dim}.")
    if x.shape[dim] == 0:
        raise ValueError(f"`x` must have at least one element along `dim` {dim}; got none.")
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"`mask` must be a bool tensor, True for what takes part; got {got}.")
        pairs = zip(reversed(mask.shape), reversed(x.shape), strict=False)
        if mask.ndim > x.ndim or any(size not in (1, full) for size, full in pairs):
            raise ValueError(
                f"`mask` must broadcast to {tuple(x.shape)}, the shape of `x`; got "
                f"{tuple(mask.shape)}."
            )
    if not isinstance(alpha, Tensor):
        check_number("alpha", alpha)
        if not alpha >= 1:
            raise ValueError(f"`alpha` must be at least 1; got {alpha}.")
        return
    want = _one(x.shape, dim)
    sizes = zip(reversed(alpha.shape), reversed(want), strict=False)
    if alpha.ndim > x.ndim or any(size not in (1, full) for size, full in sizes):
        raise ValueError(
            f"`alpha` must broadcast to {tuple(want)}, `x` with size 1 along `dim`; got "
            f"{tuple(alpha.shape)}."
        )
    # Values on a GPU are not looked at: that would wait for the device. No trace can either.
    visible = alpha.device.type == "cpu" and not torch.compiler.is_compiling()
    if visible and not bool(((alpha >= 1) & (alpha <= 2)).all()):
        raise ValueError(f"`alpha` must be from 1 to 2 as a tensor; got {alpha.tolist()}.")


def _fits(rows: Tensor, each: Tensor | None, alpha: float) -> bool:
    """Return whether the kernels compute this; for alpha above 2 bisection does, in float64."""
    from fourfold_common import triton_status

    known = rows.dtype in _KERNEL_DTYPES and len(rows) > 0 and (each is not None or alpha <= 2)
    return rows.is_cuda and known and triton_status().importable


@torch.library.custom_op("adasplash::entmax_forward", mutates_args=())
def _forward(rows: Tensor, each: Tensor | None, alpha: float) -> tuple[Tensor, Tensor]:
    if not _fits(rows, each, alpha):
        p, tau = reference.forward(rows, alpha if each is None else each)
        return p, tau
    from .kernel import launch_forward

    with torch.cuda.device_of(rows):
        return launch_forward(rows, each, alpha)


@_forward.register_fake
def _(rows: Tensor, each: Tensor | None, alpha: float) -> tuple[Tensor, Tensor]:
    tau = rows.new_empty(rows.shape[0], dtype=reference.wide(rows.dtype))
    return torch.empty_like(rows), tau


@torch.library.custom_op("adasplash::entmax_backward", mutates_args=())
def _backward(p: Tensor, grad: Tensor, each: Tensor | None, alpha: float) -> Tensor:
    if not _fits(p, each, alpha):
        return reference.backward(p, grad, alpha if each is None else each).to(p.dtype)
    from .kernel import launch_backward

    with torch.cuda.device_of(p):
        return launch_backward(p, grad.contiguous(), each, alpha)


@_backward.register_fake
def _(p: Tensor, grad: Tensor, each: Tensor | None, alpha: float) -> Tensor:
    return torch.empty_like(p)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, each, ctx.alpha = inputs
    p, tau = output
    ctx.mark_non_differentiable(tau)
    ctx.save_for_backward(p, each)


def _differentiate(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor, Tensor | None, None]:
    p, each = ctx.saved_tensors
    alpha = ctx.alpha if each is None else each
    if torch.is_grad_enabled():  # the gradient will be differentiated: in plain PyTorch
        dx = reference.backward(p, grad, alpha).to(p.dtype)
    else:
        dx = _backward(p, grad, each, ctx.alpha)
    if each is None or not ctx.needs_input_grad[1]:
        return dx, None, None
    return dx, reference.backward_alpha(p, grad, each), None


_forward.register_autograd(_differentiate, setup_context=_save)


class _Map(torch.autograd.Function):
    """The operator for `torch.func` and forward mode, which do not take the formula above."""

    generate_vmap_rule = True
    backward = staticmethod(_differentiate)

    @staticmethod
    def forward(rows: Tensor, each: Tensor | None, alpha: float) -> tuple[Tensor, Tensor]:
        made: tuple[Tensor, Tensor] = _forward(rows, each, alpha)
        return made

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        _save(ctx, inputs, output)
        ctx.save_for_forward(output[0], inputs[1])

    @staticmethod
    def jvp(ctx: Any, rows: Tensor | None, each: Tensor | None, _: None) -> tuple[Tensor, None]:
        p, alpha = ctx.saved_tensors
        moved = torch.zeros_like(p) if rows is None else rows
        change = reference.tangent(p, moved, ctx.alpha if alpha is None else alpha, each)
        return change.to(p.dtype), None


__all__ = ["EntmaxAux", "entmax", "entmax15", "sparsemax"]
