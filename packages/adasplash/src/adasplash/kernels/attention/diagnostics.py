"""What the weights of an attention look like: thresholds, supports and blocks; a diagnostic.

Computed from q and k by the plain PyTorch of `reference`, on a GPU too, a tile of rows at a time:
memory is O(seq_k * tile), time that of one more pass over all scores.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from . import reference

_BLOCK = 64  # rows and keys of the blocks that the kernels skip


class AttentionAux(NamedTuple):
    """What the weights of `adasplash` follow from, and how many there are; without gradients.

    All of it is about the weights before dropout, computed in float32 (float64 for float64 inputs).
    Where the output comes from the kernels, they may decide otherwise about a key whose score lies
    within rounding of the threshold.

    Args:
        tau: Thresholds of `(alpha - 1) * scores`, float32 (float64 for float64 inputs),
            `[batch, heads, seq_q]`, or `[tokens_q, heads]` of packed sequences; `+inf` for rows
            without a visible key, NaN for rows that see a NaN (with an empty support).
        support_size: Number of keys with a weight above 0, int64, the same shape.
        block_density: Share of the 64x64 blocks with a visible key that hold any weight, float32,
            `[batch, heads]`, or `[sequences, heads]` of packed sequences, each cut into blocks from
            its first token on; 0 where nothing is visible. A bias of `-inf` hides a key, too.
    """

    tau: Tensor
    support_size: Tensor
    block_density: Tensor


@torch.no_grad()
def attention_aux(
    q: Tensor,
    k: Tensor,
    alpha: float | Tensor,
    options: reference.Options,
    row_mask: Tensor | None = None,
) -> AttentionAux:
    """Return the thresholds, supports and block density of arguments as checked by `op.adasplash`.

    Args:
        q: `[batch, heads, seq_q, dim_head]`; `[tokens_q, heads, dim_head]` if options have bounds.
        k: `[batch, heads_kv, seq_k, dim_head]` or `[tokens_k, heads_kv, dim_head]`.
        alpha: Above 1.
        options: What shapes the scores.
        row_mask: True for rows that are not padding, `[batch, seq_q]`.
    """
    with torch.autocast(q.device.type, enabled=False):
        if options.bounds_q is None:
            return _dense(q, k, alpha, options, row_mask)
        dtype = torch.promote_types(q.dtype, torch.float32)
        tau = torch.full(q.shape[:2], torch.inf, dtype=dtype, device=q.device)
        size = torch.zeros(q.shape[:2], dtype=torch.int64, device=q.device)
        density = torch.zeros(len(options.bounds_q) - 1, q.shape[1], device=q.device)
        its = options._replace(bounds_q=None, bounds_k=None)
        for i, (rows, keys) in enumerate(reference.sequences(options)):
            if keys.start < keys.stop:
                its_q, its_k = (x.transpose(0, 1)[None] for x in (q[rows], k[keys]))
                found = _dense(its_q, its_k, alpha, its, None)
                tau[rows], size[rows] = found.tau[0].T, found.support_size[0].T
                density[i] = found.block_density[0]
        return AttentionAux(tau, size, density)


def _dense(
    q: Tensor,
    k: Tensor,
    alpha: float | Tensor,
    options: reference.Options,
    row_mask: Tensor | None,
) -> AttentionAux:
    """Return the same for tensors of 4 dimensions without packed sequences."""
    keys, alpha, options = reference.widen(q, k, alpha, options)
    tau = torch.empty(q.shape[:3], dtype=keys.dtype, device=q.device)
    size = torch.empty(q.shape[:3], dtype=torch.int64, device=q.device)
    visible = torch.zeros(q.shape[:2], dtype=torch.int64, device=q.device)
    heavy = torch.zeros_like(visible)
    bias = options.bias
    for start in range(0, q.shape[2], reference.TILE):
        part = slice(start, min(start + reference.TILE, q.shape[2]))
        places = torch.arange(part.start, part.stop, device=q.device) + k.shape[2] - q.shape[2]
        its = options._replace(bias=None if bias is None else bias[:, :, part])
        scores = reference.tile_scores(q[:, :, part].to(keys.dtype), keys, places, its)
        if row_mask is not None:
            scores = scores.masked_fill(~row_mask[:, None, part, None], -torch.inf)
        x, tau[:, :, part] = reference.excess(scores, alpha)
        held = x.pow(1.0 / (alpha - 1.0)) > 0.0  # near alpha 1 the power of a small number is 0
        size[:, :, part] = held.sum(-1)
        visible += _blocks(scores != -torch.inf)
        heavy += _blocks(held)
    return AttentionAux(tau, size, heavy.float() / visible.clamp_min(1))


def _blocks(x: Tensor) -> Tensor:
    """Return how many 64x64 blocks of `[batch, heads, rows, keys]` hold a True."""
    rows, keys = (-size % _BLOCK for size in x.shape[2:])
    whole = pad(x, (0, keys, 0, rows))
    blocks: Tensor = whole.unflatten(3, (-1, _BLOCK)).unflatten(2, (-1, _BLOCK))
    return blocks.any(5).any(3).sum((2, 3))
