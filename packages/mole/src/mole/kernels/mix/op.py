"""The mix operation: choice of backend, gradient, registration for `torch.compile`."""

from importlib import import_module
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fourfold_common import triton_status

from .reference import mix_reference, segment_sum_reference

Backend = Literal["auto", "triton", "reference"]


def segments(
    inverse: Int[Tensor, " tokens"], distinct: int
) -> tuple[Int[Tensor, " tokens"], Int[Tensor, " edges"]]:
    """Return the tokens sorted by id and where each id's run of them starts; shared by all layers.

    Args:
        inverse: For every token, which of the distinct ids is its own.
        distinct: Number of distinct ids; the result has one edge more.
    """
    ordered, order = torch.sort(inverse, stable=True)
    edges = torch.arange(distinct + 1, device=inverse.device, dtype=inverse.dtype)
    return order, torch.searchsorted(ordered, edges)


def mix(
    gates: Float[Tensor, "tokens experts"],
    values: Float[Tensor, "distinct experts dim"],
    inverse: Int[Tensor, " tokens"],
    order: Int[Tensor, " tokens"],
    starts: Int[Tensor, " edges"],
    bank: Float[Tensor, "distinct experts dim"] | None = None,
    backend: Backend = "auto",
) -> Float[Tensor, "tokens dim"]:
    """Return `sum_j gates[t, j] values[inverse[t], j]`; differentiable in gates and values.

    Nothing of the size tokens x experts x dim is ever stored on a GPU.

    Args:
        gates: Weights of the experts.
        values: The experts' outputs for the distinct ids; type of the result.
        inverse: For every token, which of the distinct ids is its own.
        order: First result of `segments`.
        starts: Second result of `segments`.
        bank: Given, the gradient of `values` is not returned but added to this float32 buffer:
            the way to sum it over the batches of a step.
        backend: `"triton"`, `"reference"` (PyTorch), or `"auto"`: Triton for CUDA tensors.

    Raises:
        ValueError: The backend cannot run here.

    Source: Jie et al. 2025 (arXiv 2503.15798), equation 6; the segment sum is own.
    """
    use = values.is_cuda if backend == "auto" else backend == "triton"
    if use and not (values.is_cuda or triton_status().interpreting):
        raise ValueError(f"`backend` 'triton' needs CUDA tensors; got {values.device.type}.")
    if not use and bank is None:
        return mix_reference(gates, values, inverse)
    mixed: Tensor = _mix(gates, values, inverse, order, starts, bank, use)
    return mixed


@torch.library.custom_op("mole::mix", mutates_args=())
def _mix(
    gates: torch.Tensor,
    values: torch.Tensor,
    inverse: torch.Tensor,
    order: torch.Tensor,
    starts: torch.Tensor,
    bank: torch.Tensor | None,
    use_triton: bool,
) -> torch.Tensor:
    if not use_triton:
        return mix_reference(gates.to(values.dtype), values, inverse)
    kernel = import_module(".kernel", __package__)
    mixed: Tensor = kernel._launch_mix(
        gates.contiguous(), values.contiguous(), inverse.contiguous()
    )
    return mixed


@_mix.register_fake
def _(
    gates: torch.Tensor,
    values: torch.Tensor,
    inverse: torch.Tensor,
    order: torch.Tensor,
    starts: torch.Tensor,
    bank: torch.Tensor | None,
    use_triton: bool,
) -> torch.Tensor:
    return values.new_empty(inverse.shape[0], values.shape[2])


@torch.library.custom_op("mole::mix_backward", mutates_args=("bank",))
def _mix_backward(
    grad: torch.Tensor,
    gates: torch.Tensor,
    values: torch.Tensor,
    inverse: torch.Tensor,
    order: torch.Tensor,
    starts: torch.Tensor,
    bank: torch.Tensor | None,
    use_triton: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients of gates and values; the latter is empty where `bank` took it."""
    distinct = values.shape[0]
    if not use_triton:
        picked = values[inverse]
        sums = segment_sum_reference(gates.to(grad.dtype), grad, inverse, distinct)
        if bank is not None:
            bank += sums
            sums = values.new_empty(0, *values.shape[1:])
        return (picked @ grad[..., None]).squeeze(-1).to(gates.dtype), sums
    kernel = import_module(".kernel", __package__)
    grad, gates, values, inverse = (t.contiguous() for t in (grad, gates, values, inverse))
    gates_grad: Tensor = kernel._launch_gates_grad(grad, values, inverse, gates.dtype)
    sums = values.new_empty(values.shape if bank is None else (0, *values.shape[1:]))
    kernel._launch_segment_sum(gates, grad, order, starts, sums, bank)
    return gates_grad, sums


@_mix_backward.register_fake
def _(
    grad: torch.Tensor,
    gates: torch.Tensor,
    values: torch.Tensor,
    inverse: torch.Tensor,
    order: torch.Tensor,
    starts: torch.Tensor,
    bank: torch.Tensor | None,
    use_triton: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    rows = values.shape[0] if bank is None else 0
    return torch.empty_like(gates), values.new_empty(rows, *values.shape[1:])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    gates, values, inverse, order, starts, ctx.bank, ctx.use_triton = inputs
    ctx.save_for_backward(gates, values, inverse, order, starts)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    gates_grad, values_grad = _mix_backward(grad, *ctx.saved_tensors, ctx.bank, ctx.use_triton)
    return gates_grad, values_grad if ctx.bank is None else None, None, None, None, None, None


_mix.register_autograd(_backward, setup_context=_setup)


__all__ = ["mix", "segments"]
