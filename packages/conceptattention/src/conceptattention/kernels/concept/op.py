"""The public operations: check what the kernels can take, and launch them."""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference

MAX_CONCEPTS = 16
Rotary = tuple[Tensor, Tensor] | None


def usable(tensor: Tensor, concepts: int) -> str | None:
    """Return None when the kernels can take these inputs, else the reason why not.

    Args:
        tensor: Keys (batch, heads, patches, dim_head).
        concepts: Number of concepts.
    """
    from fourfold_common import triton_status

    dim = tensor.shape[-1]
    if concepts > MAX_CONCEPTS:
        return f"more than {MAX_CONCEPTS} concepts ({concepts})"
    if dim not in (16, 32, 64, 128):
        return f"a head size of {dim}; known are 16, 32, 64, 128"
    if tensor.stride(-1) != 1:
        return "keys whose features are not contiguous"
    status = triton_status()
    if not status.importable:
        return status.reason
    if tensor.device.type != "cuda" and not status.interpreting:
        return f"tensors on {tensor.device.type}"
    return None


def concept_attention(
    q: Tensor, k: Tensor | None, v: Tensor | None, keys: Tensor, values: Tensor, rotary: Rotary
) -> Tensor:
    """Return `reference.concept_attention`, computed by the kernels."""
    import triton

    from .kernel import merge_attention, partial_attention

    batch, heads, concepts, dim = q.shape
    patches, planes = keys.shape[2], batch * heads
    q, keys, values = q.contiguous(), keys.to(q.dtype), values.to(q.dtype)
    block = 64
    # Enough programs to fill the device, each with at least two blocks of patches.
    splits = max(1, min(triton.cdiv(patches, 2 * block), triton.cdiv(512, planes)))
    per_split = triton.cdiv(triton.cdiv(patches, splits), block) * block
    splits = triton.cdiv(patches, per_split)
    rows = MAX_CONCEPTS
    part = torch.empty(planes, splits, rows, dim, device=q.device, dtype=torch.float32)
    top, total = (
        torch.empty(planes, splits, rows, device=q.device, dtype=torch.float32) for _ in range(2)
    )
    cos, sin = (part, part) if rotary is None else (half.float().contiguous() for half in rotary)
    scale = dim**-0.5
    partial_attention[(planes, splits)](
        q, keys, values, cos, sin, part, top, total,
        *keys.stride()[:3], *values.stride()[:3],
        heads, concepts, patches, scale, splits, per_split,
        ROTARY=rotary is not None, R=rows, D=dim, BLOCK=block,
    )  # fmt: skip
    out = torch.empty_like(q)
    own = k is not None and v is not None
    merge_attention[(planes,)](
        q, k.contiguous() if k is not None else q, v.contiguous() if v is not None else q,
        part, top, total, out, concepts, scale, splits, SELF=own, R=rows, D=dim,
    )  # fmt: skip
    return out


def add_scores(
    concepts: Tensor, patches: Tensor, raw: Tensor, soft: Tensor,
    count: int, temperature: float, scale: float, cosine: bool,
) -> None:  # fmt: skip
    """Do what `reference.add_scores` does, by the kernel; float32 means must be contiguous."""
    import triton

    from .kernel import score_patches

    batch, number, dim = concepts.shape
    if patches.stride(-1) != 1:
        patches = patches.contiguous()
    block = 32
    score_patches[(batch, triton.cdiv(patches.shape[1], block))](
        concepts.to(patches.dtype).contiguous(), patches, raw, soft,
        *patches.stride()[:2], number, patches.shape[1], dim, count, temperature, scale,
        COSINE=cosine, R=MAX_CONCEPTS, BLOCK_N=block, BLOCK_D=128 if dim >= 128 else 32,
    )  # fmt: skip


__all__ = ["MAX_CONCEPTS", "add_scores", "concept_attention", "reference", "usable"]
