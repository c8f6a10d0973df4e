"""Building blocks for models: the map, alpha as a parameter or on a schedule, and attention."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from .kernels.attention import adasplash
from .kernels.attention.checks import check_alpha
from .kernels.checks import check_number
from .kernels.entmax import entmax


class Entmax(nn.Module):
    """`entmax` as a module.

    Args:
        alpha: At least 1.
        dim: Dimension to normalise over.

    Raises:
        TypeError: `alpha` is no number.
        ValueError: `alpha` is below 1.
    """

    def __init__(self, alpha: float = 1.5, dim: int = -1) -> None:
        super().__init__()
        check_number("alpha", alpha)
        if not alpha >= 1:
            raise ValueError(f"`alpha` must be at least 1; got {alpha}.")
        self.alpha, self.dim = alpha, dim

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the weights of `x`."""
        return entmax(x, self.alpha, self.dim, mask=mask)

    def extra_repr(self) -> str:
        """Return the settings, for `repr`."""
        return f"alpha={self.alpha}, dim={self.dim}"


class AlphaParam(nn.Module):
    """One learnable alpha for each head, kept inside (1, 2).

    `alpha = 1 + sigmoid(raw)`: no step of an optimiser leaves the interval, and `raw` is saved with
    the model. Near its ends the gradient fades, so begin between them.

    Args:
        n_heads: Number of heads.
        initial: First value of every head, above 1 and below 2.

    Raises:
        ValueError: An argument is out of range.

    Source: Correia, Niculae, Martins (2019), section 3.2.
    """

    def __init__(self, n_heads: int, initial: float = 1.5) -> None:
        super().__init__()
        if n_heads < 1:
            raise ValueError(f"`n_heads` must be at least 1; got {n_heads}.")
        if not 1 < initial < 2:
            raise ValueError(f"`initial` must be above 1 and below 2; got {initial}.")
        self.raw = nn.Parameter(torch.full((n_heads,), math.log((initial - 1) / (2 - initial))))

    def forward(self) -> Float[Tensor, " heads"]:
        """Return alpha of every head."""
        return 1 + self.raw.sigmoid()


class AlphaSchedule:
    """Alpha by training step: from nearly softmax to its final value along a straight line.

    Weights that are zero learn nothing; beginning near softmax lets every score learn first.
    `schedule(step)` is a plain number: give it to `adasplash` or to an `EntmaxAttention`.

    Args:
        start: First value, at least 1.
        end: Last value, 1 to 2.
        steps: Steps from the first to the last; 0 begins at the end.

    Raises:
        ValueError: An argument is out of range.

    Source: AdaSplash (arXiv 2502.12082), whose long trainings anneal alpha from 1.01.
    """

    def __init__(self, start: float = 1.01, end: float = 1.5, steps: int = 1000) -> None:
        for name, value in (("start", start), ("end", end)):
            if not 1 <= value <= 2:
                raise ValueError(f"`{name}` must be from 1 to 2; got {value}.")
        if steps < 0:
            raise ValueError(f"`steps` must be at least 0; got {steps}.")
        self.start, self.end, self.steps = start, end, steps

    def __call__(self, step: int) -> float:
        """Return alpha at a step, counted from 0."""
        share = 1.0 if self.steps == 0 else min(max(step, 0) / self.steps, 1.0)
        return self.start + share * (self.end - self.start)


class EntmaxAttention(nn.Module):
    """Multi-head self-attention with alpha-entmax weights.

    Args:
        dim: Size of a token's vector.
        n_heads: Number of heads, a divisor of `dim`.
        n_heads_kv: Number of heads of keys and values, a divisor of `n_heads`; as many if None.
        alpha: 1 to 2, or "learned": an `AlphaParam` that begins at 1.5. Assign another number to
            the attribute `alpha` between steps to follow an `AlphaSchedule`.
        is_causal: Whether a token sees itself and earlier ones only.
        bias: Whether the projections have a bias.

    Raises:
        ValueError: The numbers of heads do not divide, or `alpha` is out of range.
    """

    alpha: float | AlphaParam

    def __init__(
        self,
        dim: int,
        n_heads: int,
        n_heads_kv: int | None = None,
        *,
        alpha: float | str = 1.5,
        is_causal: bool = True,
        bias: bool = False,
    ) -> None:
        super().__init__()
        kv = n_heads if n_heads_kv is None else n_heads_kv
        if n_heads < 1 or dim % n_heads:
            raise ValueError(f"`n_heads` must divide `dim` {dim}; got {n_heads}.")
        if kv < 1 or n_heads % kv:
            raise ValueError(f"`n_heads_kv` must divide `n_heads` {n_heads}; got {kv}.")
        if isinstance(alpha, str) and alpha != "learned":
            raise ValueError(f"`alpha` must be a number or 'learned'; got {alpha!r}.")
        if not isinstance(alpha, str):
            check_alpha(alpha, (1, n_heads))
        self.n_heads, self.n_heads_kv, self.is_causal = n_heads, kv, is_causal
        self.alpha = AlphaParam(n_heads) if isinstance(alpha, str) else alpha
        size = dim // n_heads
        self.q_proj = nn.Linear(dim, n_heads * size, bias=bias)
        self.k_proj = nn.Linear(dim, kv * size, bias=bias)
        self.v_proj = nn.Linear(dim, kv * size, bias=bias)
        self.o_proj = nn.Linear(n_heads * size, dim, bias=bias)

    def forward(
        self,
        x: Float[Tensor, "batch tokens dim"],
        key_padding_mask: Bool[Tensor, "batch tokens"] | None = None,
    ) -> Float[Tensor, "batch tokens dim"]:
        """Return what every token gathers.

        Args:
            x: Vectors of the tokens.
            key_padding_mask: True for tokens to attend to.
        """
        alpha = self.alpha() if isinstance(self.alpha, AlphaParam) else self.alpha
        q = self.q_proj(x).unflatten(-1, (self.n_heads, -1)).transpose(1, 2)
        k, v = (
            projection(x).unflatten(-1, (self.n_heads_kv, -1)).transpose(1, 2)
            for projection in (self.k_proj, self.v_proj)
        )
        output = adasplash(
            q, k, v, alpha, is_causal=self.is_causal, key_padding_mask=key_padding_mask
        )
        result: Tensor = self.o_proj(output.transpose(1, 2).flatten(2))
        return result
