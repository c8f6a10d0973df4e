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

from .terms import PLAIN, Terms, brought_close

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


def attend(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, alpha: Tensor | None,
    settings: tuple[Any, ...], terms: Terms = PLAIN, *, direct: bool,
) -> Tensor:  # fmt: skip
    """Return the output of the operator, past the dispatcher if `direct`.

    Args:
        q: As for `forward.launch_forward`, as are those below.
        k: Keys.
        v: Values.
        key_mask: True for visible keys, contiguous.
        alpha: Of every head; None for 1.5.
        settings: Scale, causality, and how far a row sees to both sides, -1 and -1 for all.
        terms: What else there is.
        direct: Whether nobody listens; see `unheard`.
    """
    learned = (x is not None and x.requires_grad for x in (q, k, v, alpha, *terms[:2]))
    output: Tensor
    if not direct:
        transformed = torch._C._are_functorch_transforms_active()
        run = _Transformed.apply if transformed else _forward
        output, _, _ = run(q, k, v, key_mask, alpha, *settings, *terms)
    elif torch.is_grad_enabled() and any(learned):
        output = _Eager.apply(q, k, v, key_mask, alpha, *terms[:2], settings, terms)
    else:
        output, _, _ = _launch_forward(q, k, v, key_mask, alpha, *settings, *terms)
    return output


_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor? key_mask, Tensor? alpha"
_SETTINGS = (  # the latter ones are the fields of `Terms`
    "float scale, bool is_causal, SymInt left, SymInt right, Tensor? slopes=None, "
    "Tensor? bias=None, Tensor? seed=None, Tensor? bounds_q=None, Tensor? bounds_k=None, "
    "float softcap=0.0, float dropout=0.0, SymInt max_q=0, SymInt max_k=0"
)
_N_SETTINGS = 4  # before the terms


@torch.library.custom_op(
    "adasplash::attention_forward",
    mutates_args=(),
    schema=f"({_INPUTS}, {_SETTINGS}) -> (Tensor, Tensor, Tensor)",
)
def _forward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _launch_forward(*inputs)


def _launch_forward(q: Tensor, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return output, tau and the bits of the blocks that hold weight."""
    made: tuple[Tensor, Tensor, Tensor] = _on_device(
        _kernels()[0].launch_forward, q, *inputs[:6], *_window_and_terms(*inputs[6:])
    )
    return made


def _window_and_terms(left: int, right: int, *terms: Any) -> tuple[tuple[int, int] | None, Terms]:
    made = Terms(*terms)
    made = made._replace(bias=brought_close(made.bias))
    return None if left < 0 else (left, right), made


@cache
def _kernels() -> tuple[ModuleType, ModuleType]:
    """Return the modules that launch; only they need Triton."""
    from . import backward, forward

    return forward, backward


def _on_device(launch: Callable[..., Any], x: Tensor, *inputs: Any, **options: Any) -> Any:
    """Launch on the device of `x`; Triton launches on the current one."""
    if not x.is_cuda or x.get_device() == torch.cuda.current_device():
        return launch(x, *inputs, **options)
    with torch.cuda.device_of(x):
        return launch(x, *inputs, **options)


@_forward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Any, alpha: Any,
    scale: float, is_causal: bool, left: int, right: int, *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    from .tiles import marks_of, tiles_for

    terms = Terms(*rest)
    n_tiles, n_blocks = marks_of(q.shape, k.shape[2], tiles_for(q, v), terms.n_seq, terms.max_k)
    output = q.new_empty(*q.shape[:-1], v.shape[-1])
    tau = torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device)
    shape = *q.shape[:2], n_tiles, (n_blocks + 7) // 8
    return output, tau, torch.empty(shape, dtype=torch.uint8, device=q.device)


@torch.library.custom_op(
    "adasplash::attention_backward",
    mutates_args=(),
    schema=f"(Tensor grad, {_INPUTS}, Tensor tau, Tensor bits, bool bias_grad, {_SETTINGS}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _backward(*inputs: Any) -> tuple[Tensor, ...]:
    return _launch_backward(*inputs)


def _launch_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, alpha: Tensor | None,
    tau: Tensor, bits: Tensor, bias_grad: bool, scale: float, is_causal: bool, *rest: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    made: tuple[Tensor, ...] = _on_device(
        _kernels()[1].launch_backward, grad, q, k, v, key_mask, alpha, tau, bits, scale,
        is_causal, *_window_and_terms(*rest), bias_grad=bias_grad,
    )  # fmt: skip
    return made


@_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, key_mask: Any, alpha: Tensor | None,
    tau: Tensor, bits: Tensor, bias_grad: bool,
    scale: float, is_causal: bool, left: int, right: int, *rest: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    terms, heads = Terms(*rest), q.shape[:2]
    return (
        q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape),
        tau.new_empty(0 if alpha is None else heads),
        tau.new_empty(0 if terms.slopes is None else heads),
        terms.bias.new_empty(terms.bias.shape) if bias_grad and terms.bias is not None
        else tau.new_empty(0),
    )  # fmt: skip


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, key_mask, alpha, *rest = inputs
    settings, terms = rest[:_N_SETTINGS], Terms(*rest[_N_SETTINGS:])
    _, tau, bits = output
    ctx.mark_non_differentiable(tau, bits)
    _keep(ctx, (q, k, v, key_mask, alpha, tau, bits), tuple(settings), terms)


def _keep(ctx: Any, tensors: tuple[Any, ...], settings: tuple[Any, ...], terms: Terms) -> None:
    """Keep what the backward needs; tensors where checkpointing and hooks find them."""
    ctx.settings, ctx.numbers = settings, terms[_N_TENSORS:]
    ctx.save_for_backward(*tensors, *terms[:_N_TENSORS])


_N_TENSORS = 5  # of the terms


def _gradients(backward: Any, ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Return the gradients of q, k, v, the mask, alpha, slopes and bias."""
    saved = ctx.saved_tensors  # once: checkpointing recomputes them
    main, given = saved[:7], saved[7:]
    bias_grad = given[1] is not None and given[1].requires_grad
    with torch.no_grad():
        made = backward(grad, *main, bias_grad, *ctx.settings, *given, *ctx.numbers)
    if torch.is_grad_enabled():  # the graph goes on: somebody may differentiate twice
        made = _NoSecond.apply(len(made), *made, grad, *main[:3], main[4], *given[:2])
    dq, dk, dv, *others = made
    wanted = main[4] is not None, given[0] is not None, bias_grad
    dalpha, dslopes, dbias = (x if there else None for x, there in zip(others, wanted, strict=True))
    return dq, dk, dv, None, dalpha, dslopes, dbias


def _differentiate(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    *first, dslopes, dbias = _gradients(_backward, ctx, grad)
    rest = len(PLAIN) - 2
    return *first, *[None] * _N_SETTINGS, dslopes, dbias, *[None] * rest


_forward.register_autograd(_differentiate, setup_context=_save)


# Counted like torch's own attention, as if every block held weight: shapes do not tell which do.
# Registered on import: a counter copies the table of formulas when it is made.
# Packed sequences count as if all were as long as the longest.
@register_flop_formula(torch.ops.adasplash.attention_forward)  # type: ignore[untyped-decorator]
def _forward_flops(q: Any, k: Any, v: Any, *rest: Any, **_: Any) -> int:
    """Return the operations of q k^T and p v, from shapes."""
    return int(2 * _n_scores(q, k, rest[2 + _N_SETTINGS :]) * (q[3] + v[3]))


@register_flop_formula(torch.ops.adasplash.attention_backward)  # type: ignore[untyped-decorator]
def _backward_flops(grad: Any, q: Any, k: Any, v: Any, *rest: Any, **_: Any) -> int:
    """Return the operations of q k^T again, dP, dV, dQ and dK, from shapes."""
    return int(2 * _n_scores(q, k, rest[5 + _N_SETTINGS :]) * (3 * q[3] + 2 * v[3]))


def _n_scores(q: Any, k: Any, rest: Any) -> int:
    """Return the number of scores of all heads; `rest` are the terms, shapes for tensors."""
    terms = Terms(*rest)
    whole = q[0] * q[2] * k[2]
    if terms.bounds_q is not None and terms.max_q and terms.max_k:
        whole = min(whole, (terms.bounds_q[0] - 1) * terms.max_q * terms.max_k)
    return int(q[1] * whole)


class _NoSecond(torch.autograd.Function):
    """Gradients that refuse to be differentiated, and say why."""

    generate_vmap_rule = True

    @staticmethod
    def forward(made: int, *inputs: Any) -> tuple[Tensor, ...]:
        return tuple(x.view_as(x) for x in inputs[:made])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Keep nothing."""

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError(
            "the kernels of `adasplash` have no second derivatives; use `backend='reference'`."
        )


def _refuse_forward_mode(ctx: Any, *tangents: Any) -> Any:
    raise NotImplementedError(
        "the kernels of `adasplash` have no forward-mode derivatives; use `backend='reference'`."
    )


class _Transformed(torch.autograd.Function):
    """The operator under `torch.func`, which does not take the formula registered above."""

    generate_vmap_rule = True
    setup_context = staticmethod(_save)
    backward = staticmethod(_differentiate)
    jvp = staticmethod(_refuse_forward_mode)

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        made: tuple[Tensor, Tensor, Tensor] = _forward(*inputs)
        return made


class _Eager(torch.autograd.Function):
    """The operator without the dispatcher."""

    jvp = staticmethod(_refuse_forward_mode)

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        key_mask: Tensor | None,
        alpha: Tensor | None,
        slopes: Tensor | None,
        bias: Tensor | None,
        settings: tuple[Any, ...],
        terms: Terms,
    ) -> Tensor:
        output, tau, bits = _launch_forward(q, k, v, key_mask, alpha, *settings, *terms)
        _keep(ctx, (q, k, v, key_mask, alpha, tau, bits), settings, terms)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *_gradients(_launch_backward, ctx, grad), None, None
