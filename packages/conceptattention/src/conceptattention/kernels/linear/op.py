"""The public operation: check what the kernel can take, and launch it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor

from ..launch import SHARED, cdiv, launch, power_of_2

MAX_ROWS, MAX_NORMED = 64, 16384
Activation = Literal["none", "silu", "gelu", "gelu_tanh", "swiglu"]


@dataclass(frozen=True)
class Norm:
    """Layer normalisation of the rows, then `* (1 + scale) + shift`.

    Args:
        scale: (images, 1, features), with `shift`; None for no modulation.
        shift: (images, 1, features).
        eps: Of the normalisation; None to modulate without one.
        weight: (features,), of an affine normalisation.
        bias: (features,), with `weight`.
    """

    scale: Tensor | None = None
    shift: Tensor | None = None
    eps: float | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None


@cache
def tile(features: int, rows: int, size: int) -> dict[str, int]:
    """Return tile sizes and launch options for numbers of `size` bytes.

    The best ones on an H100 for the layers of Flux.1, where they fit into 99 KB of shared memory.
    """
    block_n, stages = (16, 6) if features >= 8192 else (32, 4)
    block_k = 512 // size
    while (stages - 1) * (block_n + power_of_2(max(rows, 8))) * block_k * size > SHARED:
        block_k //= 2
    return {"BLOCK_N": block_n, "BLOCK_K": block_k, "num_warps": 2, "num_stages": stages}


def few_row_linear(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor] | None = None,
    *,
    norm: Norm | None = None,
    act_in: Activation = "none",
    act_out: Activation = "none",
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    options: dict[str, int] | None = None,
) -> Tensor:
    """Return linear layers of a few rows, with what stands before and after them.

    Args:
        x: (images, tokens, features), at most 64 rows in all; twice the features for "swiglu".
        weights: One to three of one shape (columns, features), contiguous, of x's dtype.
        biases: One (columns,) for each weight.
        norm: What is done to x first; of at most 16,384 features.
        act_in: Activation of x, before `norm`.
        act_out: Activation of the products; not "swiglu".
        gate: (images, 1, columns), multiplies the result.
        residual: (images, tokens, columns), is added last.
        options: Instead of `tile`, to tune.

    Returns:
        (weights, images, tokens, columns) in x's dtype; products are summed in float32.
    """
    images, tokens = x.shape[:2]
    columns, features = weights[0].shape
    rows = images * tokens
    x = x.contiguous()
    if norm is not None or act_in != "none":
        x = prepare(x, norm or Norm(), act_in, features)
    y = torch.empty(len(weights), images, tokens, columns, device=x.device, dtype=x.dtype)
    first, second, third = (*weights, *weights[:1], *weights[:1])[:3]
    given = [first] * 3 if biases is None else [*biases, *biases[:1], *biases[:1]][:3]
    gated = x if gate is None else _each(gate, images)
    options = options or tile(features, rows, x.element_size())
    launch(
        _kernels().few_rows, (cdiv(columns, options["BLOCK_N"]), len(weights)),
        x, first, second, third, *given, y, gated,
        x if residual is None else residual.contiguous(),
        rows, tokens, features, columns, gated.stride(0),
        ACT=act_out, BIAS=biases is not None, GATE=gate is not None,
        RESIDUAL=residual is not None,
        EVEN=columns % options["BLOCK_N"] == 0 and features % options["BLOCK_K"] == 0,
        R=max(8, power_of_2(rows)), **options,
    )  # fmt: skip
    return y


def prepare(x: Tensor, norm: Norm, act: Activation, features: int) -> Tensor:
    """Return activated, normalised and modulated rows, (images, tokens, features)."""
    images, tokens = x.shape[:2]
    y = x.new_empty(images, tokens, features)
    scale, shift = (x if part is None else _each(part, images) for part in (norm.scale, norm.shift))
    block = 1024 if norm.eps is None else power_of_2(features)
    launch(
        _kernels().prepare_rows, (images * tokens, cdiv(features, block)),
        x, y, scale, shift, x if norm.weight is None else norm.weight,
        x if norm.bias is None else norm.bias, tokens, features, scale.stride(0), shift.stride(0),
        float(norm.eps or 0.0), NORM=norm.eps is not None, AFFINE=norm.weight is not None,
        MODULATE=norm.scale is not None, ACT=act, BLOCK=block, num_warps=8 if block > 2048 else 4,
    )  # fmt: skip
    return y


@cache
def _kernels() -> Any:
    from . import kernel  # needs Triton

    return kernel


def _each(part: Tensor, images: int) -> Tensor:
    """Return one row per image, of contiguous features."""
    part = part if part.stride(-1) == 1 else part.contiguous()
    return part if len(part) == images else part.expand(images, -1, -1)
