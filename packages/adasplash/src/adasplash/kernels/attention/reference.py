"""Alpha-entmax attention in plain PyTorch: the oracle of the tests and the CPU path.

Query rows are taken a tile at a time and recomputed in the backward, so memory is O(seq_k * tile)
beside inputs and outputs. Half precision is computed in float32, float64 in float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..newton import power_of, threshold
from .dropout import kept

TILE = 128  # query rows at a time; whole blocks of 64


class Options(NamedTuple):
    """What shapes the scores beside q and k; as documented in `op.adasplash`."""

    scale: float
    is_causal: bool = False
    key_mask: Tensor | None = None
    window: tuple[int, int] | None = None
    softcap: float | None = None
    slopes: Tensor | None = None  # [heads] or [batch, heads]
    bias: Tensor | None = None  # to [batch, heads, seq_q, seq_k]; -inf and finfo.min hide keys
    dropout: float = 0.0
    seed: Tensor | None = None  # of the dropout, int64 [1]
    bounds_q: Tensor | None = None  # of packed sequences, int [sequences + 1]
    bounds_k: Tensor | None = None
    max_q: int = 0  # the longest of them at most; 0 if that is not known
    max_k: int = 0
    first_row: int = 0  # number of the first row among the tokens of packed sequences

    @property
    def plain(self) -> bool:
        """Whether nothing but scale and causality shapes the scores."""
        shaping = self.slopes, self.bias, self.softcap, self.window, self.key_mask
        return all(x is None for x in shaping)


def attention(q: Tensor, k: Tensor, v: Tensor, alpha: float | Tensor, options: Options) -> Tensor:
    """Return the output of the attention; arguments as checked by `op.adasplash`."""
    keys, alpha, options = widen(q, k, alpha, options)
    values = v.to(keys.dtype).repeat_interleave(q.shape[1] // v.shape[1], 1)
    seq_q, seq_k = q.shape[2], k.shape[2]
    shift, bias, mask = seq_k - seq_q, options.bias, options.key_mask

    def attend(
        rows: Tensor, tile: Tensor, keys: Tensor, values: Tensor, mask: Any, alpha: Any,
        slopes: Any, bias: Any,
    ) -> Tensor:  # fmt: skip
        its = options._replace(key_mask=mask, slopes=slopes, bias=bias)
        weights = entmax_weights(tile_scores(tile, keys, rows + shift, its), alpha)
        if options.seed is not None:
            planes = torch.arange(q.shape[0] * q.shape[1], device=q.device).view(q.shape[:2])
            its_rows = rows + options.first_row
            keep = kept(options.seed, planes, its_rows, keys.shape[2], options.dropout)
            weights = weights.masked_fill(~keep, 0.0) / (1.0 - options.dropout)
        return weights @ values

    # What is exported for any length is one tile.
    known = isinstance(seq_q, int) and isinstance(seq_k, int)
    recomputed = _is_recomputed()
    outputs = []
    for start in range(0, seq_q, TILE) if known else [0]:
        stop = min(start + TILE, seq_q) if known else seq_q
        # Under a causal mask nobody in the tile sees what lies behind its last row.
        end = min(max(stop + shift, 1), seq_k) if known and options.is_causal else seq_k
        inputs = (
            torch.arange(start, stop, device=q.device), q[:, :, start:stop].to(keys.dtype),
            keys[:, :, :end], values[:, :, :end], None if mask is None else mask[:, :end], alpha,
            options.slopes, None if bias is None else bias[:, :, start:stop, :end],
        )  # fmt: skip
        output = (
            checkpoint(attend, *inputs, use_reentrant=False, preserve_rng_state=False)
            if recomputed
            else attend(*inputs)
        )
        outputs.append(output.to(q.dtype))
    return torch.cat(outputs, 2)


def _is_recomputed() -> bool:
    """Return whether a backward computes tiles again; exports and transforms cannot."""
    return (
        torch.is_grad_enabled()
        and not torch.compiler.is_exporting()
        and not torch._C._are_functorch_transforms_active()
    )


def widen(
    q: Tensor, k: Tensor, alpha: float | Tensor, options: Options
) -> tuple[Tensor, float | Tensor, Options]:
    """Return the keys of every query head, alpha and options, ready for tiles of scores.

    Tensors are at least float32. Alpha and slopes have shape `[batch, heads, 1, 1]`, the bias
    `[batch, heads, seq_q, seq_k]`.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    keys = k.to(wide).repeat_interleave(q.shape[1] // k.shape[1], 1)
    if isinstance(alpha, Tensor):
        alpha = alpha.to(q.device, wide).expand(q.shape[:2])[..., None, None]
    slopes, bias = options.slopes, options.bias
    if slopes is not None:
        slopes = slopes.to(q.device, wide).expand(q.shape[:2])[..., None, None]
    if bias is not None:
        bias = bias.masked_fill(bias <= torch.finfo(bias.dtype).min, -torch.inf)
        bias = bias.to(q.device, wide).expand(*q.shape[:3], k.shape[2])
    return keys, alpha, options._replace(slopes=slopes, bias=bias)


def tile_scores(tile: Tensor, keys: Tensor, places: Tensor, options: Options) -> Tensor:
    """Return the scores of some rows with every option but dropout, `-inf` for hidden keys.

    Args:
        tile: Queries, `[batch, heads, rows, dim_head]`.
        keys: `[batch, heads, seq_k, dim_head]`.
        places: At which key every row stands, `[rows]`.
        options: As `widen` returns them, the bias that of these rows.
    """
    scores = tile @ keys.mT * options.scale
    if options.softcap is not None:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    distance = torch.arange(keys.shape[2], device=keys.device) - places[:, None]
    if options.slopes is not None:
        scores = scores - options.slopes * distance.abs()
    if options.bias is not None:
        scores = scores + options.bias
    return scores.masked_fill(_hidden(distance, options), -torch.inf)


def sequences(options: Options) -> Iterator[tuple[slice, slice]]:
    """Yield the rows and the keys of every packed sequence; waits for the device of the bounds."""
    bounds = (options.bounds_q, options.bounds_k)
    rows, keys = (pairwise(x.tolist()) for x in bounds if x is not None)
    for its_rows, its_keys in zip(rows, keys, strict=True):
        yield slice(*its_rows), slice(*its_keys)


def _hidden(distance: Tensor, options: Options) -> Tensor:
    """Return which keys a row must not see, given their distance to it, `[seq_q, seq_k]` or so."""
    hidden = torch.zeros_like(distance, dtype=torch.bool)
    if options.is_causal:
        hidden = distance > 0
    if options.window is not None:
        left, right = options.window
        if left >= 0:
            hidden = hidden | (distance < -left)
        if right >= 0:
            hidden = hidden | (distance > right)
    if options.key_mask is not None:
        hidden = hidden | ~options.key_mask[:, None, None, :]
    return hidden


def entmax_weights(scores: Tensor, alpha: float | Tensor) -> Tensor:
    """Return the alpha-entmax over the last axis, differentiable in scores and alpha.

    Rows that are `-inf` throughout give zeros.

    Args:
        scores: Float32 or float64.
        alpha: From 1 to 2, or a tensor above 1 that broadcasts to the scores.
    """
    if isinstance(alpha, float) and alpha == 1.0:
        empty = scores.amax(-1, keepdim=True) == -torch.inf
        # Zeros where there is nothing to weigh, before the softmax: no NaN in the gradient.
        return scores.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0)
    weights: Tensor = _Weights.apply(scores, alpha)
    return weights


def excess(scores: Tensor, alpha: float | Tensor) -> tuple[Tensor, Tensor]:
    """Return `relu((alpha - 1) scores - tau)`, whose power is the weight, and tau of every row."""
    z = scores * (alpha - 1.0)
    tau = threshold(z, alpha)
    return (z - tau[..., None]).clamp_min(0.0), tau


class _Weights(torch.autograd.Function):
    """The map with its Jacobian `diag(u) - u u^T / sum(u)`, where `u = p ** (2 - alpha)`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(scores: Tensor, alpha: float | Tensor) -> Tensor:
        return excess(scores, alpha)[0].pow(1.0 / (alpha - 1.0))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float | Tensor], output: Tensor) -> None:
        alpha = inputs[1] if isinstance(inputs[1], Tensor) else None
        ctx.save_for_backward(output, alpha)
        ctx.save_for_forward(output, alpha)
        ctx.number = inputs[1] if alpha is None else None

    @staticmethod
    def jvp(ctx: Any, scores: Tensor | None, alpha: Tensor | None) -> Tensor:
        p, degree = ctx.saved_tensors
        if scores is None or alpha is not None:
            raise NotImplementedError("attention has no forward-mode derivative of `alpha`.")
        u = power_of(p, 2.0 - (ctx.number if degree is None else degree))
        total = u.sum(-1, keepdim=True)
        mean = (u * scores).sum(-1, keepdim=True) / total.masked_fill(total == 0, 1.0)
        return u * (scores - mean)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        p, alpha = ctx.saved_tensors
        # From p, an output, so that second derivatives go through it; NaN stays.
        held = ~(p <= 0.0)
        safe = torch.where(held, p, 1.0)
        u = safe.pow(2.0 - (ctx.number if alpha is None else alpha)).masked_fill(~held, 0.0)
        total = u.sum(-1, keepdim=True)
        delta = (u * grad).sum(-1, keepdim=True) / total.masked_fill(total == 0, 1.0)
        grad_scores = u * (grad - delta)
        if alpha is None or not ctx.needs_input_grad[1]:
            return grad_scores, None
        entropy = p * safe.log()
        grad_alpha = p * (grad - delta) / (alpha - 1.0) - entropy * (grad - delta)
        return grad_scores, (grad_alpha / (alpha - 1.0)).sum_to_size(alpha.shape)
