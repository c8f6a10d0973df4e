"""The public function: checks, choice of the backend, and the operators that torch knows."""

import logging
import math
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fourfold_common import triton_status

from . import reference

_logger = logging.getLogger(__name__)
_MAX_DIM = 256
_KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_DTYPES = (*_KERNEL_DTYPES, torch.float64)


def adasplash(
    q: Float[Tensor, "batch heads seq_q dim_head"],
    k: Float[Tensor, "batch heads_kv seq_k dim_head"],
    v: Float[Tensor, "batch heads_kv seq_k dim_value"],
    alpha: float = 1.5,
    is_causal: bool = True,
    *,
    scale: float | None = None,
    key_padding_mask: Bool[Tensor, "batch seq_k"] | None = None,
    backend: Literal["auto", "triton", "reference"] = "auto",
) -> Float[Tensor, "batch heads seq_q dim_value"]:
    """Return attention whose weights are the alpha-entmax of the scores, most of them exactly zero.

    The weights of row i are `p = relu(z - tau_i) ** 2` with `z = scale / 2 * q_i k^T` and `tau_i`
    such that they sum to 1. Differentiable in q, k and v; deterministic. A row without a visible
    key gives zeros and zero gradients; a NaN stays in the rows that see it. Under autocast q, k and
    v are cast to its dtype, as in torch's own attention.

    Args:
        q: Queries, float16, bfloat16, float32 or (reference only) float64. Any strides.
        k: Keys, dtype and device of `q`; `heads` is a multiple of `heads_kv`.
        v: Values, dtype and device of `q`; `dim_value` may differ from `dim_head`.
        alpha: 1.5 in this version.
        is_causal: Row i sees keys up to `i + seq_k - seq_q` (aligned at the last).
        scale: Factor of the scores; `dim_head ** -0.5` if None.
        key_padding_mask: True for keys to attend to; holes are allowed.
        backend: `"triton"` runs the kernels, `"reference"` plain PyTorch; `"auto"` the kernels for
            CUDA tensors when Triton can be imported, else the reference. A backend that was asked
            for is never replaced by the other.

    Returns:
        The output, in the dtype of `q`.

    Raises:
        TypeError: A dtype is not supported, or dtypes differ.
        ValueError: Shapes, devices or an option do not fit, or the backend cannot run here.

    Source: AdaSplash (arXiv 2502.12082), equations 5 to 9.
    """
    if torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    _check(q, k, v, alpha, scale, key_padding_mask)
    chosen = _choose(backend, q)
    factor = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if q.numel() == 0:
        # No rows: an empty output that still belongs to the graph.
        return q.new_zeros(*q.shape[:-1], v.shape[-1]) + 0 * (q.sum() + k.sum() + v.sum())
    if chosen == "reference":
        return reference.attention(q, k, v, key_padding_mask, factor, is_causal)
    if factor < 0.0:  # the kernels take the maximum before they scale
        q, factor = -q, -factor
    mask = None if key_padding_mask is None else key_padding_mask.contiguous()
    output: Tensor = _forward(q, k, v, mask, factor, is_causal)[0]
    return output


def _check(
    q: Tensor, k: Tensor, v: Tensor, alpha: float, scale: float | None, mask: Tensor | None
) -> None:
    """Refuse what the backends cannot compute, naming the argument, its value and the remedy."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise ValueError(f"`{name}` must have 4 dimensions; got shape {tuple(x.shape)}.")
        if x.dtype not in _DTYPES:
            allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES)
            raise TypeError(f"`{name}` must be one of {allowed}; got {x.dtype}.")
        if x.dtype != q.dtype:
            raise TypeError(f"`{name}` must be {q.dtype} as `q` is; got {x.dtype}.")
        if x.device != q.device:
            raise ValueError(f"`{name}` must be on {q.device} as `q` is; got {x.device}.")
        if x.shape[0] != q.shape[0]:
            raise ValueError(
                f"`{name}` must have `batch` {q.shape[0]} as `q` does; got {x.shape[0]}."
            )
        if not 1 <= x.shape[3] <= _MAX_DIM:
            raise ValueError(
                f"`{name}` must have a last size of 1 to {_MAX_DIM}; got {x.shape[3]}."
            )
    if k.shape[3] != q.shape[3]:
        raise ValueError(f"`k` must have `dim_head` {q.shape[3]} as `q` does; got {k.shape[3]}.")
    if v.shape[1:3] != k.shape[1:3]:
        raise ValueError(
            f"`v` must have `heads_kv` and `seq_k` {tuple(k.shape[1:3])} as `k` does; "
            f"got {tuple(v.shape[1:3])}."
        )
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"`k` must have a number of heads that divides {q.shape[1]}, the heads of `q`; "
            f"got {k.shape[1]}."
        )
    if k.shape[2] == 0:
        raise ValueError("`k` must hold at least one key; got `seq_k` 0.")
    if alpha != 1.5:
        raise ValueError(f"`alpha` must be 1.5 in this version; got {alpha}.")
    if scale is not None and not math.isfinite(scale):
        raise ValueError(f"`scale` must be finite; got {scale}.")
    if mask is not None:
        if mask.dtype != torch.bool:
            raise TypeError(f"`key_padding_mask` must be bool, True for keys; got {mask.dtype}.")
        if mask.shape != (q.shape[0], k.shape[2]):
            raise ValueError(
                f"`key_padding_mask` must have shape {(q.shape[0], k.shape[2])}, `batch` and "
                f"`seq_k`; got {tuple(mask.shape)}."
            )
        if mask.device != q.device:
            raise ValueError(f"`key_padding_mask` must be on {q.device}; got {mask.device}.")


def _choose(backend: str, q: Tensor) -> str:
    """Return the backend to run; raise if the one asked for cannot."""
    if backend not in ("auto", "triton", "reference"):
        raise ValueError(f"`backend` must be 'auto', 'triton' or 'reference'; got {backend!r}.")
    if backend == "reference" or (backend == "auto" and not q.is_cuda):
        return "reference"
    status = triton_status()
    problem = ""
    if not status.importable:
        problem = f"Triton cannot be imported ({status.reason})"
    elif not q.is_cuda and not status.interpreting:
        problem = f"Triton needs CUDA tensors, or TRITON_INTERPRET=1; `q` is on {q.device}"
    elif q.dtype not in _KERNEL_DTYPES:
        problem = f"the kernels do not compute {q.dtype}"
    if not problem:
        return "triton"
    if backend == "triton":
        raise ValueError(f"`backend` 'triton' cannot run here: {problem}; use 'reference'.")
    _logger.debug("using the reference: %s", problem)
    return "reference"


@torch.library.custom_op("adasplash::attention_forward", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float, is_causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    from .forward import launch_forward

    return launch_forward(q, k, v, key_mask, scale, is_causal)


@_forward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float, is_causal: bool
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
    tau: Tensor,
    active: Tensor,
    scale: float,
    is_causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    from .backward import launch_backward

    return launch_backward(grad, q, k, v, key_mask, tau, active, scale, is_causal)


@_backward.register_fake
def _(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    tau: Tensor,
    active: Tensor,
    scale: float,
    is_causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, key_mask, ctx.scale, ctx.is_causal = inputs
    _, tau, active = output
    ctx.mark_non_differentiable(tau, active)
    ctx.save_for_backward(q, k, v, key_mask, tau, active)


def _differentiate(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    q, k, v, key_mask, tau, active = ctx.saved_tensors
    gradients = _backward(grad, q, k, v, key_mask, tau, active, ctx.scale, ctx.is_causal)
    return *gradients, None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)
