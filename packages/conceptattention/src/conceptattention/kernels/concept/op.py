"""The public operations: check what the kernels can take, and launch them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor

from ..launch import SHARED, cdiv, launch, power_of_2
from . import reference

MAX_CONCEPTS = 64
Rotary = tuple[Tensor, Tensor] | None


@dataclass(frozen=True)
class HeadNorm:
    """Normalisation over the features of a head.

    Args:
        kind: "rms" divides by the root mean square, "layer" subtracts the mean first.
        weight: (dim_head,).
        eps: Added to the mean square.
        bias: (dim_head,).
    """

    kind: Literal["rms", "layer"]
    weight: Tensor
    eps: float
    bias: Tensor | None = None


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
    if tensor.device.type != "cuda":
        return None if status.interpreting else f"tensors on {tensor.device.type}"
    properties = torch.cuda.get_device_properties(tensor.device)
    shared = getattr(properties, "shared_memory_per_block_optin", SHARED)
    if shared < SHARED:
        return f"{shared} bytes of shared memory a block; the kernels need {SHARED}"
    return None


def concept_attention(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    keys: Tensor,
    values: Tensor,
    rotary: Rotary,
    norms: tuple[HeadNorm | None, HeadNorm | None] = (None, None),
    options: dict[str, int] | None = None,
) -> Tensor:
    """Return `reference.concept_attention`, computed by the kernels.

    Args:
        q: Queries (batch, heads, concepts, dim_head), before `norms`.
        k: The concepts' own keys, before `norms`; None where concepts do not meet.
        v: Their values.
        keys: Of the patches, (batch, heads, patches, dim_head).
        values: Of the patches.
        rotary: Cosines and sines of the patches' positions, (patches, dim_head), or every second of
            them, (patches, dim_head / 2), which saves picking them.
        norms: What is done to queries and to the concepts' keys first.
        options: Number of splits, block of patches and options of the launch, to tune.
    """
    batch, heads, concepts, dim = q.shape
    patches, planes = keys.shape[2], batch * heads
    own = k is not None and v is not None
    if k is None or v is None:
        k = v = q
    if not (q.stride() == k.stride() == v.stride() and q.stride(-1) == 1):
        q, k, v = (part.contiguous() for part in (q, k, v))
    keys, values = keys.to(q.dtype), values.to(q.dtype)
    if options is None:
        wide = q.dtype == torch.float32 or concepts > 16  # more shared memory
        options = {"block": 32, "programs": 264, "num_warps": 4, "num_stages": 2 if wide else 3}
    block = options["block"]
    # Enough programs to fill the device, each with at least two blocks of patches.
    splits = max(1, min(cdiv(patches, 2 * block), cdiv(options["programs"], planes), 64))
    per_split = cdiv(cdiv(patches, splits), block) * block
    splits = cdiv(patches, per_split)
    lines = planes * concepts * splits
    part = torch.empty(lines, dim, device=q.device, dtype=torch.float32)
    top, total = (torch.empty(lines, device=q.device, dtype=torch.float32) for _ in range(2))
    cos, sin = (part, part) if rotary is None else halved(rotary, dim)
    q_norm, k_norm = norms
    scale = dim**-0.5
    rows = max(16, power_of_2(concepts))
    launch(
        _kernels().partial_attention, (planes, splits),
        q, keys, values, cos, sin, part, top, total, *_norm_tensors(q_norm, q),
        *q.stride()[:3], *keys.stride()[:3], *values.stride()[:3],
        heads, concepts, patches, splits, per_split, scale, q_norm.eps if q_norm else 0.0,
        NORM=q_norm.kind if q_norm else "none", NORM_BIAS=_has_bias(q_norm),
        ROTARY=rotary is not None, R=rows, D=dim, BLOCK=block,
        num_warps=options["num_warps"], num_stages=options["num_stages"],
    )  # fmt: skip
    out = torch.empty(batch, concepts, heads, dim, device=q.device, dtype=q.dtype)
    launch(
        _kernels().merge_attention, (planes, concepts),
        q, k, v, part, top, total, out, *_norm_tensors(q_norm, q), *_norm_tensors(k_norm, q),
        *q.stride()[:3], heads, concepts, splits, scale,
        q_norm.eps if q_norm else 0.0, k_norm.eps if k_norm else 0.0,
        SELF=own, Q_NORM=q_norm.kind if q_norm else "none", Q_BIAS=_has_bias(q_norm),
        K_NORM=k_norm.kind if k_norm else "none", K_BIAS=_has_bias(k_norm),
        R=power_of_2(concepts), D=dim, S=power_of_2(splits),
    )  # fmt: skip
    return out.transpose(1, 2)


def halved(rotary: tuple[Tensor, Tensor], dim: int) -> tuple[Tensor, Tensor]:
    """Return float32 cosines and sines (patches, dim_head / 2), one for each pair of features."""
    if rotary[0].shape[-1] < dim:
        return rotary
    cos, sin = (half[:, ::2].float().contiguous() for half in rotary)
    return cos, sin


@cache
def _kernels() -> Any:
    from . import kernel  # needs Triton

    return kernel


def _has_bias(norm: HeadNorm | None) -> bool:
    return norm is not None and norm.bias is not None


def _norm_tensors(norm: HeadNorm | None, unused: Tensor) -> tuple[Tensor, Tensor]:
    if norm is None:
        return unused, unused
    return norm.weight, unused if norm.bias is None else norm.bias


def add_scores(
    concepts: Tensor, patches: Tensor, raw: Tensor, soft: Tensor,
    count: int, temperature: float, scale: float, cosine: bool,
    options: dict[str, int] | None = None,
) -> None:  # fmt: skip
    """Do what `reference.add_scores` does, by the kernel; float32 means must be contiguous."""
    batch, number, dim = concepts.shape
    if patches.stride(-1) != 1:
        patches = patches.contiguous()
    if options is None:
        block_d = 512 // patches.element_size() if dim >= 512 else 32
        options = {"BLOCK_N": 16, "BLOCK_D": block_d, "num_warps": 2, "num_stages": 3}
    launch(
        _kernels().score_patches, (batch, cdiv(patches.shape[1], options["BLOCK_N"])),
        concepts.to(patches.dtype).contiguous(), patches, raw, soft,
        *patches.stride()[:2], number, patches.shape[1], dim,
        float(count), float(temperature), float(scale),
        COSINE=cosine, R=max(16, power_of_2(number)), **options,
    )  # fmt: skip


__all__ = [
    "MAX_CONCEPTS", "HeadNorm", "add_scores", "concept_attention", "halved", "reference", "usable"
]  # fmt: skip
