"""The operators that torch knows, and the way past the dispatcher where nobody listens there.

On the way through it an operator spends as long as its kernels take on short sequences. Traces,
dispatch modes (FLOP counters, selective checkpointing), transforms such as `torch.vmap` and
subclasses of tensors listen.
"""

from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode
from torch.utils.flop_counter import register_flop_formula

_PLAIN = (Tensor, torch.nn.Parameter)


def unheard(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Return whether nobody listens to what the dispatcher is asked about these tensors."""
    return (
        type(q) in _PLAIN
        and type(k) in _PLAIN
        and type(v) in _PLAIN
        and not torch.compiler.is_compiling()
        and _get_current_dispatch_mode() is None
        and not torch._C._are_functorch_transforms_active()
    )


def attend(q: Tensor, k: Tensor, v: Tensor, *options: Any, direct: bool) -> Tensor:
    """Return the output of `attention_forward`, past the dispatcher if `direct`."""
    alpha = options[1]
    learned = q.requires_grad or k.requires_grad or v.requires_grad
    output: Tensor
    if not direct:
        output, _, _ = _forward(q, k, v, *options)
    elif torch.is_grad_enabled() and (learned or (alpha is not None and alpha.requires_grad)):
        output = _Eager.apply(q, k, v, *options[:2], options[2:])
    else:
        output, _, _ = _launch_forward(q, k, v, *options)
    return output


@torch.library.custom_op("adasplash::attention_forward", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    alpha: Tensor | None,
    scale: float,
    is_causal: bool,
    left: int,
    right: int,
) -> tuple[Tensor, Tensor, Tensor]:
    return _launch_forward(q, k, v, key_mask, alpha, scale, is_causal, left, right)


def _launch_forward(q: Tensor, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    *most, left, right = inputs
    window = None if left < 0 else (left, right)
    made: tuple[Tensor, Tensor, Tensor] = _on_device(_kernels()[0].launch_forward, q, *most, window)
    return made


@cache
def _kernels() -> tuple[ModuleType, ModuleType]:
    """Return the modules that launch; only they need Triton."""
    from . import backward, forward

    return forward, backward


def _on_device(launch: Callable[..., Any], x: Tensor, *inputs: Any) -> Any:
    """Launch on the device of `x`; Triton launches on the current one."""
    if not x.is_cuda or x.get_device() == torch.cuda.current_device():
        return launch(x, *inputs)
    with torch.cuda.device_of(x):
        return launch(x, *inputs)


@_forward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    alpha: Tensor | None,
    scale: float,
    is_causal: bool,
    left: int,
    right: int,
) -> tuple[Tensor, Tensor, Tensor]:
    from .tiles import tiles_for

    tiles = tiles_for(q, v)
    n_tiles = (q.shape[2] + tiles.block_m - 1) // tiles.block_m
    n_blocks = (k.shape[2] + tiles.block_n - 1) // tiles.block_n
    output = q.new_empty(*q.shape[:-1], v.shape[-1])
    tau = torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device)
    active = torch.empty((*q.shape[:2], n_tiles, n_blocks), dtype=torch.int8, device=q.device)
    return output, tau, active


@torch.library.custom_op("adasplash::attention_backward", mutates_args=())
def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    alpha: Tensor | None,
    tau: Tensor,
    active: Tensor,
    scale: float,
    is_causal: bool,
    left: int,
    right: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _launch_backward(
        grad, q, k, v, key_mask, alpha, tau, active, scale, is_causal, left, right
    )


def _launch_backward(grad: Tensor, *inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *most, left, right = inputs
    window = None if left < 0 else (left, right)
    made: tuple[Tensor, Tensor, Tensor, Tensor] = _on_device(
        _kernels()[1].launch_backward, grad, *most, window
    )
    return made


@_backward.register_fake
def _(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    alpha: Tensor | None,
    tau: Tensor,
    active: Tensor,
    scale: float,
    is_causal: bool,
    left: int,
    right: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dalpha = torch.empty(0 if alpha is None else alpha.shape, dtype=tau.dtype, device=q.device)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dalpha


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, key_mask, alpha, *ctx.settings = inputs
    _, tau, active = output
    ctx.mark_non_differentiable(tau, active)
    ctx.save_for_backward(q, k, v, key_mask, alpha, tau, active)


def _differentiate(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    return *_gradients(_backward, ctx, grad), None, None, None, None


def _gradients(backward: Any, ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Return the gradients of q, k, v, the mask and alpha."""
    saved = ctx.saved_tensors  # once: checkpointing recomputes them
    made = backward(grad, *saved, *ctx.settings)
    if torch.is_grad_enabled():  # the graph goes on: somebody may differentiate twice
        made = _NoSecond.apply(len(made), *made, grad, *saved[:3], saved[4])
    dq, dk, dv, dalpha = made
    return dq, dk, dv, None, None if saved[4] is None else dalpha


_forward.register_autograd(_differentiate, setup_context=_save)


# Counted like torch's own attention, as if every block held weight: shapes do not tell which do.
# Registered on import: a counter copies the table of formulas when it is made.
@register_flop_formula(torch.ops.adasplash.attention_forward)  # type: ignore[untyped-decorator]
def _forward_flops(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    """Return the operations of q k^T and p v, from shapes."""
    batch, heads, seq_q, dim = q
    return int(2 * batch * heads * seq_q * k[2] * (dim + v[3]))


@register_flop_formula(torch.ops.adasplash.attention_backward)  # type: ignore[untyped-decorator]
def _backward_flops(grad: Any, q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    """Return the operations of q k^T again, dP, dV, dQ and dK, from shapes."""
    batch, heads, seq_q, dim = q
    return int(2 * batch * heads * seq_q * k[2] * (3 * dim + 2 * v[3]))


class _NoSecond(torch.autograd.Function):
    """Gradients that refuse to be differentiated, and say why."""

    @staticmethod
    def forward(ctx: Any, made: int, *inputs: Any) -> tuple[Tensor, ...]:
        return tuple(x.view_as(x) for x in inputs[:made])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError(
            "the kernels of `adasplash` have no second derivatives; use `backend='reference'`."
        )


class _Eager(torch.autograd.Function):
    """The operator without the dispatcher."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        key_mask: Tensor | None,
        alpha: Tensor | None,
        settings: tuple[Any, ...],
    ) -> Tensor:
        output, tau, active = _launch_forward(q, k, v, key_mask, alpha, *settings)
        ctx.settings = settings
        ctx.save_for_backward(q, k, v, key_mask, alpha, tau, active)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *_gradients(_launch_backward, ctx, grad), None
