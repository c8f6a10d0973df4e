"""Inputs, error budgets and checks that tests, benchmarks and training scripts share."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from .kernels.combine.op import Backend, combine, combine_norm
from .kernels.combine.reference import combine_reference, dequantise
from .lut.format import LutMeta, LutRows

_EPS = {torch.float32: 2.0**-23, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}


def make_combine_inputs(
    tokens: int,
    experts: int,
    dim: int,
    dtype: torch.dtype = torch.float32,
    fmt: str = "fp32",
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> dict[str, Tensor | None]:
    """Return random arguments of `combine`.

    Args:
        tokens: Number of tokens.
        experts: Number of lookup experts.
        dim: Width of a vector; even for `"nf4"`, a multiple of 8 for `"nf3"`.
        dtype: Type of logits and residual.
        fmt: Format of the looked-up vectors, one of `mole.lut.FORMATS`.
        device: Where the result goes.
        seed: Seed of the values.
    """
    generator = torch.Generator().manual_seed(seed)
    meta = LutMeta(tokens, 1, experts, dim, fmt, tokens, (), "")
    values = torch.randn(tokens, 1, experts, dim, generator=generator)
    rows = LutRows.encode(values, meta)
    return {
        "logits": (2 * torch.randn(tokens, experts, generator=generator)).to(device, dtype),
        "values": rows.codes[:, 0].to(device),
        "residual": torch.randn(tokens, dim, generator=generator).to(device, dtype),
        "scales": None if rows.scales is None else rows.scales[:, 0].to(device),
    }


def combine_float64(
    logits: Tensor, values: Tensor, residual: Tensor, scales: Tensor | None
) -> Float[Tensor, "tokens dim"]:
    """Return the combination of the very same inputs, computed in float64."""
    wide = None if scales is None else scales.double()
    vectors = dequantise(values, wide, torch.float64, 8 * values.shape[2] // residual.shape[1])
    return combine_reference(logits.double(), vectors, residual.double())


def combine_budget(exact: Tensor, dtype: torch.dtype) -> Float[Tensor, "tokens dim"]:
    """Return the largest error allowed for every element of a combination.

    The kernel accumulates in float32 and rounds once to `dtype`: half a unit in the last place of
    the result, and a few of float32 for the softmax and the sum, whose terms are of order one.
    """
    return 0.51 * _EPS[dtype] * exact.abs() + 16 * _EPS[torch.float32]


def check_combine(device: torch.device | str, backend: Backend = "triton") -> list[dict[str, Any]]:
    """Return, for many shapes, types and formats, how far `combine` is from float64.

    Every format meets every shape, in one type or another: to compile is what takes time here.
    Every entry has the case, `error` (largest, relative to the budget: at most 1 is right) and
    `absolute` (largest absolute error).

    Args:
        device: Where to run; bfloat16 is left out on the CPU, whose interpreter cannot compute it.
        backend: Backend to check.
    """
    cuda = torch.device(device).type == "cuda"
    cases = []
    small, large = ((1, 4, 128), (3, 5, 72)), ((17, 16, 768), (2, 1, 1024))
    shapes = {torch.float32: small, torch.float16: large}
    if cuda:
        shapes[torch.bfloat16] = (small[0], large[0])
    for dtype, some in shapes.items():
        for fmt in ("fp32", "fp16", *(("bf16",) if cuda else ()), "int8", "fp8", "nf4", "nf3"):
            for tokens, experts, dim in some:
                inputs = make_combine_inputs(tokens, experts, dim, dtype, fmt, device)
                exact = combine_float64(**inputs)  # type: ignore[arg-type]
                with torch.no_grad():
                    found = combine(**inputs, backend=backend)  # type: ignore[arg-type]
                gap = (found.double() - exact).abs()
                gap = torch.maximum(gap, _norm_gap(inputs, exact, dtype, backend))
                cases.append(
                    {
                        "dtype": str(dtype).removeprefix("torch."),
                        "format": fmt,
                        "tokens": tokens,
                        "experts": experts,
                        "dim": dim,
                        "absolute": gap.max().item(),
                        "error": (gap / combine_budget(exact, dtype)).max().item(),
                    }
                )
    return cases


def _norm_gap(
    inputs: dict[str, Tensor | None], exact: Tensor, dtype: torch.dtype, backend: Backend
) -> Float[Tensor, "tokens dim"]:
    """Return how far `combine_norm` is from float64, in units of the combination's budget."""
    residual = inputs["residual"]
    if residual is None:
        raise TypeError("`inputs` must have a residual.")
    weight = torch.linspace(0.5, 1.5, residual.shape[1], device=residual.device, dtype=dtype)
    update = torch.ones_like(residual)
    with torch.no_grad():
        hidden, normed = combine_norm(
            **inputs,  # type: ignore[arg-type]
            update=update,
            weight=weight,
            eps=1e-5,
            backend=backend,
        )
    wide = exact + 1
    scale = wide.square().mean(1, keepdim=True).add(1e-5).rsqrt() * weight.double()
    norms = wide * scale
    budget = combine_budget(exact, dtype)
    first = (hidden.double() - wide).abs() / combine_budget(wide, dtype)
    # The norm divides by a mean square, whose relative error is that of a sum in float32.
    second = (normed.double() - norms).abs() / (
        0.51 * _EPS[dtype] * norms.abs() + 16 * _EPS[torch.float32] * (norms.abs() + scale)
    )
    return torch.maximum(first, second) * budget


__all__ = ["check_combine", "combine_budget", "combine_float64", "make_combine_inputs"]
