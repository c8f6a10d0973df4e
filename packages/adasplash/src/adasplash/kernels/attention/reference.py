"""1.5-entmax attention in plain PyTorch: the oracle of the tests and the CPU path.

Query rows are taken a tile at a time, so memory is O(seq_k * tile) beside inputs and outputs. Half
precision is computed in float32, float64 in float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ...entmax import threshold15

_TILE = 128  # query rows at a time


def attention(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float, is_causal: bool
) -> Tensor:
    """Return the output of the attention; arguments as checked by `op.adasplash`."""
    output: Tensor = _Attention.apply(q, k, v, key_mask, scale, is_causal)
    return output


def half_scores(
    q: Tensor,
    k: Tensor,
    key_mask: Tensor | None,
    scale: float,
    is_causal: bool,
    start: int,
    seq_q: int,
) -> Tensor:
    """Return `scale / 2 * q k^T` with -inf where a key is hidden, for rows from `start` on.

    Args:
        q: Query rows `[batch, heads, tile, dim_head]`.
        k: Keys, heads repeated as for `q`, `[batch, heads, seq_k, dim_head]`.
        key_mask: True for keys to attend to, `[batch, seq_k]`.
        scale: Factor of the scores.
        is_causal: Row i sees keys up to `i + seq_k - seq_q`.
        start: Index of the first row.
        seq_q: Number of rows in all.
    """
    scores = q @ k.transpose(-1, -2) * (scale / 2)
    if key_mask is not None:
        scores = scores.masked_fill(~key_mask[:, None, None, :], -torch.inf)
    if is_causal:
        rows = torch.arange(start, start + q.shape[2], device=q.device)[:, None]
        keys = torch.arange(k.shape[2], device=q.device)
        scores = scores.masked_fill(keys > rows + (k.shape[2] - seq_q), -torch.inf)
    return scores


class _Attention(torch.autograd.Function):
    """Tiled forward and backward; only tau is kept of the weights."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        key_mask: Tensor | None,
        scale: float,
        causal: bool,
    ) -> Tensor:
        ctx.settings = (key_mask, scale, causal)
        output = q.new_empty(*q.shape[:-1], v.shape[-1])
        tau = torch.empty(q.shape[:-1], dtype=_wide(q.dtype), device=q.device)
        values = _repeat(v, q)
        for rows, half in _tiles(q, k, *ctx.settings):
            tau[:, :, rows] = threshold15(half)
            weights = (half - tau[:, :, rows, None]).clamp_min(0.0).square()
            output[:, :, rows] = (weights @ values).to(q.dtype)
        ctx.save_for_backward(q, k, v, tau)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, tau = ctx.saved_tensors
        _, scale, _ = ctx.settings
        grad = grad.to(tau.dtype)
        queries, keys, values = q.to(tau.dtype), _repeat(k, q), _repeat(v, q)
        grad_q, grad_k, grad_v = (torch.zeros_like(x) for x in (queries, keys, values))
        for rows, half in _tiles(q, k, *ctx.settings):
            root = (half - tau[:, :, rows, None]).clamp_min(0.0)
            grad_p = grad[:, :, rows] @ values.transpose(-1, -2)
            total = root.sum(-1, keepdim=True)
            delta = (root * grad_p).sum(-1, keepdim=True) / total.masked_fill(total == 0, 1.0)
            grad_s = root * (grad_p - delta) * scale
            grad_q[:, :, rows] = grad_s @ keys
            grad_k += grad_s.transpose(-1, -2) @ queries[:, :, rows]
            grad_v += root.square().transpose(-1, -2) @ grad[:, :, rows]
        folded = (_fold(x, k).to(k.dtype) for x in (grad_k, grad_v))
        return grad_q.to(q.dtype), *folded, None, None, None


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _repeat(x: Tensor, q: Tensor) -> Tensor:
    """Return `x` in the precision of the sums, its heads repeated for the query heads."""
    return x.to(_wide(x.dtype)).repeat_interleave(q.shape[1] // x.shape[1], dim=1)


def _fold(x: Tensor, k: Tensor) -> Tensor:
    """Return gradients per query head summed into those per key head."""
    folded: Tensor = x.unflatten(1, (k.shape[1], -1)).sum(2)
    return folded


def _tiles(
    q: Tensor, k: Tensor, key_mask: Tensor | None, scale: float, causal: bool
) -> Iterator[tuple[slice, Tensor]]:
    """Yield the rows of every tile and their half scores."""
    seq_q, keys = q.shape[2], _repeat(k, q)
    for start in range(0, seq_q, _TILE):
        rows = slice(start, min(start + _TILE, seq_q))
        tile = q[:, :, rows].to(keys.dtype)
        yield rows, half_scores(tile, keys, key_mask, scale, causal, start, seq_q)
