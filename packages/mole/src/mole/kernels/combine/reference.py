"""The combine operation in plain PyTorch: the oracle of the kernel, and the CPU path."""

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

# The 16 values of NF4: normalised quantiles of a normal distribution (Dettmers et al. 2023,
# appendix E).
NF4_CODEBOOK = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


def dequantise(
    codes: Shaped[Tensor, "*vectors stored"],
    scales: Float[Tensor, "*vectors blocks"] | None,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "*vectors dim"]:
    """Return the vectors that stored codes stand for.

    Args:
        codes: Plain floating-point values; or int8 codes; or uint8 pairs of NF4 codes, where byte
            `i` holds element `i` in its low half and element `i + stored` in its high half.
        scales: One factor for every block of `dim / blocks` elements; None for plain values.
        dtype: Type of the result.

    Source: own; the NF4 code is Dettmers et al. 2023 (arXiv 2305.14314), appendix E.
    """
    if scales is None:
        return codes.to(dtype)
    if codes.dtype == torch.uint8:
        nibbles = torch.cat((codes & 15, codes >> 4), dim=-1)
        codes = torch.tensor(NF4_CODEBOOK, device=codes.device)[nibbles.int()]
    blocks = codes.to(scales.dtype if scales.dtype == torch.float64 else torch.float32).unflatten(
        -1, (scales.shape[-1], -1)
    )
    decoded: Tensor = (blocks * scales[..., None]).flatten(-2).to(dtype)
    return decoded


def combine_reference(
    logits: Float[Tensor, "tokens experts"],
    values: Shaped[Tensor, "tokens experts stored"],
    residual: Float[Tensor, "tokens dim"],
    scales: Float[Tensor, "tokens experts blocks"] | None = None,
) -> Float[Tensor, "tokens dim"]:
    """Return `residual + sum_j softmax(logits)_j dequantise(values_j)`; differentiable.

    The softmax is computed in float32 (float64 for float64 logits), the sum in the wider of the
    types of `values` and `residual`; for codes, in that of `residual`.

    Source: Jie et al. 2025 (arXiv 2503.15798), equation 6.
    """
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    gates = torch.softmax(logits, dim=-1, dtype=wide)
    if scales is not None:
        values = dequantise(values, scales, residual.dtype)
    elif values.dtype != residual.dtype:
        values = values.to(torch.promote_types(values.dtype, residual.dtype))
    gates = gates.to(values.dtype)[:, None]
    if values.dtype == residual.dtype and not torch.is_autocast_enabled(residual.device.type):
        return torch.baddbmm(residual[:, None], gates, values).squeeze(1)
    return residual + torch.matmul(gates, values).squeeze(1)


__all__ = ["NF4_CODEBOOK", "combine_reference", "dequantise"]
