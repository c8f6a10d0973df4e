"""The combine operation: checks, choice of backend, registration for `torch.compile`."""

import logging
from functools import cache
from importlib import import_module
from typing import Literal

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from fourfold_common import triton_status

from .reference import (
    NF3_CODEBOOK,
    NF4_CODEBOOK,
    combine_norm_reference,
    combine_reference,
)

_logger = logging.getLogger(__name__)

Backend = Literal["auto", "triton", "reference"]


def combine(
    logits: Float[Tensor, "tokens experts"],
    values: Shaped[Tensor, "rows experts stored"],
    residual: Float[Tensor, "tokens dim"],
    scales: Float[Tensor, "rows experts blocks"] | None = None,
    backend: Backend = "auto",
    index: Int[Tensor, " tokens"] | None = None,
) -> Float[Tensor, "tokens dim"]:
    """Return `residual + sum_j softmax(logits)_j v_j`, where `v_j` are looked-up vectors.

    Args:
        logits: The router's logits, one for every expert.
        values: The vectors, as floating-point numbers (`stored = dim`), as int8 codes
            or float8 codes (`stored = dim`), as uint8 pairs of NF4 codes (`stored = dim / 2`) or
            as uint8 planes of NF3 codes (`stored = 3 dim / 8`).
        residual: What the weighted sum is added to.
        scales: For codes: one factor for every block of `dim / blocks` elements.
        backend: `"triton"` (CUDA, no gradient; or any device in Triton's interpreter),
            `"reference"` (PyTorch, differentiable), or `"auto"`: Triton for CUDA tensors that need
            no gradient, else the reference.
        index: Row of `values` and `scales` that is each token's, where tokens share rows; not
            checked against their number. If None every token has the row of its own number.

    Raises:
        ValueError: Shapes do not fit each other, scales are missing or superfluous, the backend is
            unknown, or it cannot run here.
        TypeError: `values` are of a type that is not supported.

    Source: Jie et al. 2025 (arXiv 2503.15798), equation 6.
    """
    _check(logits, values, residual, scales, index)
    if backend == "auto":
        return dispatch(logits, values, residual, scales, index)
    if backend == "reference":
        return combine_reference(logits, values, residual, scales, index)
    if backend != "triton":
        raise ValueError(f"`backend` must be 'auto', 'triton' or 'reference'; got {backend!r}.")
    status = triton_status()
    if not status.importable:
        raise ValueError(f"`backend` 'triton' needs Triton, which is missing: {status.reason}")
    if not (residual.is_cuda or status.interpreting):
        raise ValueError(
            f"`backend` 'triton' needs CUDA tensors; got {residual.device.type} tensors. "
            "Use 'reference', or set TRITON_INTERPRET=1 before the first import to debug."
        )
    if _needs_gradient(logits, values, residual):
        raise ValueError("`backend` 'triton' has no gradient; use 'reference' or `torch.no_grad`.")
    combined: Tensor = _combine_triton(logits, values, residual, scales, index)
    return combined


def dispatch(
    logits: Tensor,
    values: Tensor,
    residual: Tensor,
    scales: Tensor | None,
    index: Tensor | None = None,
) -> Tensor:
    """Return what `combine` does with the backend `"auto"`, for arguments known to be right.

    A decoding step runs this once a layer, where the checks would cost as much as the mathematics.
    Logits and residual may have the tokens' batch and position in axes of their own.
    """
    wanted = residual.is_cuda and not _needs_gradient(logits, values, residual)
    if wanted and (torch.compiler.is_compiling() or _triton_works()):
        flat = logits.flatten(0, -2), values, residual.flatten(0, -2), scales, index
        combined: Tensor = _combine_triton(*flat)
        return combined.view_as(residual)
    return combine_reference(logits, values, residual, scales, index)


@cache
def _triton_works() -> bool:
    """Return whether Triton can be imported; log the reason once if it cannot."""
    status = triton_status()
    if not status.importable:
        _logger.debug("combine runs on the PyTorch reference: %s", status.reason)
    return status.importable


def _needs_gradient(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _check(
    logits: Tensor,
    values: Tensor,
    residual: Tensor,
    scales: Tensor | None,
    index: Tensor | None = None,
) -> None:
    """Raise an error that names the argument that does not fit."""
    tokens, dim = residual.shape
    if index is not None and index.shape != (tokens,):
        raise ValueError(f"`index` must have shape {(tokens,)}; got {tuple(index.shape)}.")
    wanted = (tokens if index is None else len(values), logits.shape[1])
    if logits.shape[0] != tokens:
        raise ValueError(
            f"`logits` must have {tokens} tokens as `residual` does; got {logits.shape[0]}."
        )
    if values.shape[:2] != wanted:
        raise ValueError(
            f"`values` must have (tokens, experts) {wanted} as `logits` does; "
            f"got {tuple(values.shape[:2])}."
        )
    coded = values.dtype in (torch.int8, torch.uint8, torch.float8_e4m3fn)
    if not coded and not values.dtype.is_floating_point:
        raise TypeError(
            f"`values` must be floating point, int8 or uint8 (NF4 or NF3); got {values.dtype}."
        )
    stored = dim // 2 if values.dtype == torch.uint8 else dim
    nf3 = values.dtype == torch.uint8 and 8 * values.shape[2] == 3 * dim
    if values.shape[2] != stored and not nf3:
        raise ValueError(
            f"`values` must store {stored} {values.dtype} elements a vector for `dim` {dim}; "
            f"got {values.shape[2]}."
        )
    if coded != (scales is not None):
        raise ValueError(
            f"`scales` must {'be given for codes' if coded else 'be None for plain values'}; "
            f"`values` are {values.dtype}."
        )
    if scales is not None and (scales.shape[:2] != wanted or dim % scales.shape[2]):
        raise ValueError(
            f"`scales` must have shape {wanted} + (a divisor of `dim` {dim},); "
            f"got {tuple(scales.shape)}."
        )


@torch.library.custom_op("mole::combine", mutates_args=())
def _combine_triton(
    logits: torch.Tensor,
    values: torch.Tensor,
    residual: torch.Tensor,
    scales: torch.Tensor | None,
    index: torch.Tensor | None = None,
) -> torch.Tensor:
    kernel = import_module(".kernel", __package__)
    logits, values, residual = (_unit_stride(t) for t in (logits, values, residual))
    scales = None if scales is None else _unit_stride(scales)
    launched: Tensor = kernel._launch_forward(
        logits, values, residual, scales, _codebook(residual.device), index
    )
    return launched


@_combine_triton.register_fake
def _(
    logits: torch.Tensor,
    values: torch.Tensor,
    residual: torch.Tensor,
    scales: torch.Tensor | None,
    index: torch.Tensor | None = None,
) -> torch.Tensor:
    return torch.empty(residual.shape, dtype=residual.dtype, device=residual.device)


def combine_norm(
    logits: Float[Tensor, "tokens experts"],
    values: Shaped[Tensor, "tokens experts stored"],
    residual: Float[Tensor, "tokens dim"],
    update: Float[Tensor, "tokens dim"],
    weight: Float[Tensor, " dim"],
    eps: float,
    scales: Float[Tensor, "tokens experts blocks"] | None = None,
    backend: Backend = "auto",
) -> tuple[Float[Tensor, "tokens dim"], Float[Tensor, "tokens dim"]]:
    """Return `combine(logits, values, residual + update, scales)` and its RMSNorm.

    What ends one layer and starts the next while decoding, in one launch: no more launches than a
    dense model has. The sum is not rounded in between, and there is no gradient on a GPU.

    Args:
        logits: The router's logits, one for every expert.
        values: The vectors, as `combine` takes them.
        residual: The residual stream.
        update: What the feed-forward block adds to it.
        weight: Weight of the norm.
        eps: Added to the mean square.
        scales: For codes: one factor for every block.
        backend: As `combine` has it.

    Raises:
        ValueError: As `combine`.
        TypeError: As `combine`.

    Source: Jie et al. 2025 (arXiv 2503.15798), equation 6; the fusion is own.
    """
    if not torch.compiler.is_compiling():
        _check(logits, values, residual, scales)
    wanted = residual.is_cuda if backend == "auto" else backend == "triton"
    if wanted and (torch.compiler.is_compiling() or _triton_works()):
        found: tuple[Tensor, Tensor] = _combine_norm_triton(
            logits, values, residual, update, weight, eps, scales
        )
        return found
    return combine_norm_reference(logits, values, residual, update, weight, eps, scales)


@torch.library.custom_op("mole::combine_norm", mutates_args=())
def _combine_norm_triton(
    logits: torch.Tensor,
    values: torch.Tensor,
    residual: torch.Tensor,
    update: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    scales: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    kernel = import_module(".norm", __package__)
    logits, values, residual, update = map(_unit_stride, (logits, values, residual, update))
    scales = None if scales is None else _unit_stride(scales)
    launched: tuple[Tensor, Tensor] = kernel._launch_norm(
        logits, values, residual, update, weight, eps, scales, _codebook(residual.device)
    )
    return launched


@_combine_norm_triton.register_fake
def _(
    logits: torch.Tensor,
    values: torch.Tensor,
    residual: torch.Tensor,
    update: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    scales: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    return residual.new_empty(residual.shape), residual.new_empty(residual.shape)


def _unit_stride(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


@cache
def _codebook(device: torch.device) -> Tensor:
    return torch.tensor(NF4_CODEBOOK + NF3_CODEBOOK, dtype=torch.float32, device=device)


__all__ = ["combine", "combine_norm", "dispatch"]
