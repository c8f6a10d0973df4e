"""Inputs, the float64 oracle and the error budget that tests and benchmarks share."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def random_inputs(
    batch: int,
    heads: int,
    heads_kv: int,
    seq_q: int,
    seq_k: int,
    dim_head: int,
    dim_value: int | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    scale: float = 2.0,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return random q, k and v; a larger `scale` of q makes the weights sparser."""
    generator = torch.Generator(device).manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    q = draw(batch, heads, seq_q, dim_head) * scale
    k = draw(batch, heads_kv, seq_k, dim_head)
    v = draw(batch, heads_kv, seq_k, dim_value or dim_head)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def clustered_inputs(
    batch: int,
    heads: int,
    length: int,
    dim_head: int,
    gain: float,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k and v whose tokens share a topic for 64 tokens: whole blocks lose their weight.

    Independent tokens rarely leave a block empty; text does. A higher `gain` of the topic makes
    fewer blocks hold weight.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    topics = draw(batch, heads, max(2, length // 64 // 4), dim_head)
    topics = topics / topics.norm(dim=-1, keepdim=True) * dim_head**0.5
    blocks = -(-length // 64)
    chosen = torch.randint(topics.shape[2], (blocks,), generator=generator, device=device)
    topic = topics[:, :, chosen].repeat_interleave(64, dim=2)[:, :, :length]
    q, k = (gain**0.5 * topic + draw(batch, heads, length, dim_head) for _ in range(2))
    return q.to(dtype), k.to(dtype), draw(batch, heads, length, dim_head).to(dtype)


def local_inputs(
    batch: int,
    heads: int,
    length: int,
    dim_head: int,
    gain: float,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    reach: int = 256,
    sinks: int = 4,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k and v of heads that look near by and at the first tokens.

    A direction that all tokens share wanders off within `reach` tokens; the first `sinks` keys lie
    along one that every query has a part of. A higher `gain` makes fewer blocks hold weight, down
    to those on the diagonal and the first.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    def long(x: Tensor) -> Tensor:
        scaled: Tensor = x / x.norm(dim=-1, keepdim=True) * dim_head**0.5
        return scaled

    # A sum of past noise, the older the less, as a product of spectra.
    fading = torch.exp(-torch.arange(length, device=device) / reach)
    spectrum = torch.fft.rfft(draw(batch, heads, length, dim_head), 2 * length, dim=2)
    spectrum *= torch.fft.rfft(fading, 2 * length)[:, None]
    near = long(torch.fft.irfft(spectrum, 2 * length, dim=2)[:, :, :length])
    sink = long(draw(batch, heads, 1, dim_head))
    q, k = (draw(batch, heads, length, dim_head) for _ in range(2))
    q, k = q + gain**0.5 * (near + sink), k + gain**0.5 * near
    k[:, :, :sinks] = gain**0.5 * sink
    return q.to(dtype), k.to(dtype), draw(batch, heads, length, dim_head).to(dtype)


def oracle_weights(
    q: Float[Tensor, "batch heads seq_q dim_head"],
    k: Float[Tensor, "batch heads_kv seq_k dim_head"],
    is_causal: bool,
    mask: Bool[Tensor, "batch seq_k"] | None = None,
    scale: float | None = None,
    alpha: float = 1.5,
) -> Float[Tensor, "batch heads seq_q seq_k"]:
    """Return the dense weights in float64, tau found by 100 bisections: no code of the package."""
    q, k = q.double(), k.double().repeat_interleave(q.shape[1] // k.shape[1], 1)
    z = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    z, power = (alpha - 1) * z, 1 / (alpha - 1)
    seq_q, seq_k = z.shape[-2:]
    if is_causal:
        rows = torch.arange(seq_q, device=z.device)[:, None]
        hidden = torch.arange(seq_k, device=z.device) > rows + seq_k - seq_q
        z = z.masked_fill(hidden, -torch.inf)
    if mask is not None:
        z = z.masked_fill(~mask[:, None, None], -torch.inf)
    empty = z.amax(-1, keepdim=True) == -torch.inf
    high = z.amax(-1, keepdim=True).masked_fill(empty, 0.0)
    low = high - 1
    for _ in range(100):
        middle = (low + high) / 2
        inside = (z - middle).clamp_min(0).pow(power).sum(-1, keepdim=True) >= 1
        low, high = torch.where(inside, middle, low), torch.where(inside, high, middle)
    return (z - low).clamp_min(0).pow(power)


def oracle_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    is_causal: bool,
    mask: Tensor | None = None,
    scale: float | None = None,
    grad: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Return output and, for a gradient of it, those of q, k and v; all in float64.

    The gradients are written out with the Jacobian of the weights, `diag(u) - u u^T / sum(u)`.
    """
    p = oracle_weights(q, k, is_causal, mask, scale)
    group = q.shape[1] // k.shape[1]
    q, k, v = (x.double() for x in (q, k, v))
    keys, values = (x.repeat_interleave(group, 1) for x in (k, v))
    output = p @ values
    if grad is None:
        return (output,)
    grad = grad.double()
    u = p.sqrt()
    dp = grad @ values.transpose(-1, -2)
    total = u.sum(-1, keepdim=True)
    ds = u * (dp - (u * dp).sum(-1, keepdim=True) / total.masked_fill(total == 0, 1))
    ds = ds * (q.shape[-1] ** -0.5 if scale is None else scale)
    dk, dv = ds.transpose(-1, -2) @ q, p.transpose(-1, -2) @ grad
    dk, dv = (x.unflatten(1, (-1, group)).sum(2) for x in (dk, dv))
    return output, ds @ keys, dk, dv


def relative_error(x: Tensor, want: Tensor) -> float:
    """Return the norm of the difference over the norm of what was wanted; NaN never passes."""
    difference = (x.double() - want.double()).norm()
    return float(difference / want.double().norm().clamp_min(1e-30))


@torch.no_grad()
def attention_inputs(model: Any, *inputs: Any, **options: Any) -> list[tuple[Tensor, ...]]:
    """Return q, k and v of every layer of a transformers model that attends with "adasplash"."""
    from transformers import AttentionInterface, AttentionMaskInterface

    from .integration import attention_forward, make_mask

    found: list[tuple[Tensor, ...]] = []

    def attend(module: Any, *heads: Any, **extra: Any) -> tuple[Tensor, None]:
        found.append(heads[:3])
        return attention_forward(module, *heads, **extra)

    AttentionInterface.register("adasplash-recorder", attend)
    AttentionMaskInterface.register("adasplash-recorder", make_mask)
    before = model.config._attn_implementation
    model.set_attn_implementation("adasplash-recorder")
    try:
        model(*inputs, **options)
    finally:
        model.set_attn_implementation(before)
    return found
