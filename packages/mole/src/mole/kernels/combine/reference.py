"""The combine operation in plain PyTorch: the oracle of the kernel, and the CPU path."""

import torch
from jaxtyping import Float, Int, Shaped
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


# The 8 values of NF3: the same construction for 3 bits (own derivation).
NF3_CODEBOOK = (-1.0, -0.53502, -0.24693, 0.0, 0.18334, 0.38199, 0.62299, 1.0)


def unpack3(codes: Shaped[Tensor, "*vectors stored"]) -> Shaped[Tensor, "*vectors dim"]:
    """Return the 3-bit codes, one a byte, of vectors packed as `dequantise` describes."""
    quarter = codes.shape[-1] * 2 // 3
    low, high = codes[..., :quarter], codes[..., quarter:]
    low = torch.cat([low >> shift & 3 for shift in (0, 2, 4, 6)], dim=-1)
    high = torch.cat([high >> shift & 1 for shift in range(8)], dim=-1)
    return low | high << 2


def dequantise(
    codes: Shaped[Tensor, "*vectors stored"],
    scales: Float[Tensor, "*vectors blocks"] | None,
    dtype: torch.dtype = torch.float32,
    bits: int = 4,
) -> Float[Tensor, "*vectors dim"]:
    """Return the vectors that stored codes stand for.

    Args:
        codes: Plain floating-point values; or int8 or float8 codes; or uint8 pairs of NF4 codes,
            where byte `i` holds element `i` in its low half and element `i + stored` in its high
            half; or uint8 NF3 codes: `dim / 4` bytes with the two low bits of the four quarters,
            then `dim / 8` bytes with the high bits of the eight eighths.
        scales: One factor for every block of `dim / blocks` elements; None for plain values.
        dtype: Type of the result.
        bits: Bits of a uint8 code, 4 or 3.

    Source: own; the NF4 code is Dettmers et al. 2023 (arXiv 2305.14314), appendix E.
    """
    if scales is None:
        return codes.to(dtype)
    if codes.dtype == torch.uint8:
        book = NF4_CODEBOOK if bits == 4 else NF3_CODEBOOK
        picks = torch.cat((codes & 15, codes >> 4), dim=-1) if bits == 4 else unpack3(codes)
        codes = torch.tensor(book, device=codes.device)[picks.int()]
    blocks = codes.to(scales.dtype if scales.dtype == torch.float64 else torch.float32).unflatten(
        -1, (scales.shape[-1], -1)
    )
    decoded: Tensor = (blocks * scales[..., None]).flatten(-2).to(dtype)
    return decoded


def combine_reference(
    logits: Float[Tensor, "*batch experts"],
    values: Shaped[Tensor, "rows experts stored"],
    residual: Float[Tensor, "*batch dim"],
    scales: Float[Tensor, "rows experts blocks"] | None = None,
    index: Int[Tensor, " tokens"] | None = None,
) -> Float[Tensor, "*batch dim"]:
    """Return `residual + sum_j softmax(logits)_j dequantise(values_j)`; differentiable.

    The rows of `values` are the tokens of the batch, flattened, or `index` says which row is each
    token's.
    The softmax is computed in float32 (float64 for float64 logits), the sum in the wider of the
    types of `values` and `residual`; for codes, in that of `residual`.

    Source: Jie et al. 2025 (arXiv 2503.15798), equation 6.
    """
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    gates = torch.softmax(logits, dim=-1, dtype=wide)
    if scales is not None:
        bits = 8 * values.shape[2] // residual.shape[-1]
        values = dequantise(values, scales, residual.dtype, bits)
    elif values.dtype != residual.dtype:
        values = values.to(torch.promote_types(values.dtype, residual.dtype))
    if index is not None:
        values = values[index]
    tokens, experts, dim = values.shape
    gates = gates.to(values.dtype).reshape(tokens, 1, experts)
    if values.dtype == residual.dtype and not torch.is_autocast_enabled(residual.device.type):
        return torch.baddbmm(residual.reshape(tokens, 1, dim), gates, values).view_as(residual)
    return residual + torch.matmul(gates, values).view_as(residual)


def combine_norm_reference(
    logits: Float[Tensor, "tokens experts"],
    values: Shaped[Tensor, "tokens experts stored"],
    residual: Float[Tensor, "tokens dim"],
    update: Float[Tensor, "tokens dim"],
    weight: Float[Tensor, " dim"],
    eps: float,
    scales: Float[Tensor, "tokens experts blocks"] | None = None,
) -> tuple[Float[Tensor, "tokens dim"], Float[Tensor, "tokens dim"]]:
    """Return `combine(..., residual + update)` and its RMSNorm with `weight`.

    Source: Jie et al. 2025 (arXiv 2503.15798), equation 6, and the norm that follows it.
    """
    hidden = combine_reference(logits, values, residual + update, scales)
    return hidden, torch.nn.functional.rms_norm(hidden, weight.shape, weight, eps)


__all__ = [
    "NF3_CODEBOOK",
    "NF4_CODEBOOK",
    "combine_norm_reference",
    "combine_reference",
    "dequantise",
    "unpack3",
]
