"""The names of the package `adasplash` 0.2.2 that the paper's authors publish, over this engine.

Signatures and defaults are theirs. Numbers of iterations, histograms and fast mathematics are taken
and change nothing: thresholds are always solved to rounding. Devices, lengths, head sizes and
strides are those of this package, wider than theirs.
"""

from __future__ import annotations

from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from .kernels.attention import adasplash
from .kernels.entmax import entmax


def adasplash_v1(
    q: Float[Tensor, "batch heads seq dim_head"],
    k: Float[Tensor, "batch heads_kv seq dim_head"],
    v: Float[Tensor, "batch heads_kv seq dim_value"],
    alpha: float = 1.5,
    is_causal: bool = False,
    varlen: Int[Tensor, " batch"] | None = None,
    niter: int = 10,
) -> Float[Tensor, "batch heads seq dim_value"]:
    """Return `adasplash(q, k, v, alpha, is_causal, varlen)`; not causal unless asked.

    Args:
        q: As for `adasplash`, as are the others.
        k: Keys.
        v: Values.
        alpha: From 1 to 2.
        is_causal: Whether a row sees no later keys.
        varlen: Length of every sequence.
        niter: Has no effect.
    """
    return adasplash(q, k, v, alpha, is_causal, varlen)


def adasplash_v2(
    q: Float[Tensor, "batch heads seq dim_head"],
    k: Float[Tensor, "batch heads_kv seq dim_head"],
    v: Float[Tensor, "batch heads_kv seq dim_value"],
    niter: int = 1,
    varlen: Int[Tensor, " batch"] | None = None,
) -> Float[Tensor, "batch heads seq dim_value"]:
    """Return causal attention with alpha 1.5.

    Args:
        q: As for `adasplash`, as are the others.
        k: Keys.
        v: Values.
        niter: Has no effect.
        varlen: Length of every sequence.
    """
    return adasplash(q, k, v, varlen=varlen)


adasplash2 = adasplash_v2
adasplash_no_block_mask = adasplash_v1


def triton_entmax(
    x: Float[Tensor, "... n"],
    alpha: float = 1.5,
    n_iter: int = 2,
    use_histogram: bool = True,
    fast_math: bool = False,
) -> Float[Tensor, "... n"]:
    """Return `entmax(x, alpha)` over the last axis.

    Args:
        x: Scores.
        alpha: Above 1.
        n_iter: Has no effect.
        use_histogram: Has no effect.
        fast_math: Has no effect.
    """
    return entmax(x, alpha)


def triton_entmax_v1(
    x: Float[Tensor, "... n"], alpha: float = 1.5, n_iter: int = 10, fast_math: bool = True
) -> Float[Tensor, "... n"]:
    """Return `entmax(x, alpha)` over the last axis.

    Args:
        x: Scores.
        alpha: Above 1.
        n_iter: Has no effect.
        fast_math: Has no effect.
    """
    return entmax(x, alpha)


triton_entmax_v2 = triton_entmax


def triton_sparsemax(x: Float[Tensor, "... n"], **kwargs: Any) -> Float[Tensor, "... n"]:
    """Return `entmax(x, 2.0)` over the last axis.

    Args:
        x: Scores.
        **kwargs: As for `triton_entmax`, but for `alpha`.
    """
    return triton_entmax(x, 2.0, **kwargs)


def triton_entmax15(x: Float[Tensor, "... n"], **kwargs: Any) -> Float[Tensor, "... n"]:
    """Return `entmax(x, 1.5)` over the last axis.

    Args:
        x: Scores.
        **kwargs: As for `triton_entmax`, but for `alpha`.
    """
    return triton_entmax(x, 1.5, **kwargs)
