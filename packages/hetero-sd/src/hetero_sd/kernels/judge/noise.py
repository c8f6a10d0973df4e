"""Noise from a counter: Philox 4x32-10 in PyTorch, number for number as the kernels draw it.

A number depends on the key, the round, the stream, the row and its index alone. Key and round live
on the device, so that each replay of a graph draws anew. Uniform numbers are (bits + 1/2) / 2³².

Source: Salmon et al., Parallel random numbers: as easy as 1, 2, 3, SC 2011.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

FOLLOWING, COINS, DRAFT = 0, 1, 2  # Streams: the next token, the coins, a draft's step 0.
HIGHEST = 1 - 2.0**-24  # Uniform numbers stay below 1.
_A, _B = 0xD2511F53, 0xCD9E8D57
_KEY_A, _KEY_B = 0x9E3779B9, 0xBB67AE85
_LOW = 0xFFFFFFFF


def philox(state: Int[Tensor, 2], stream: int, rows: int, count: int) -> Int[Tensor, "rows count"]:
    """Return 32 random bits for each index of each row, in int64.

    Args:
        state: Key and round.
        stream: Tells apart what is drawn in one round.
        rows: Rows, from 0 on.
        count: Indices, from 0 on.
    """
    device = state.device
    c0 = torch.arange(count, device=device).expand(rows, count)
    c1 = (state[1] & _LOW).expand(rows, count)
    c2 = torch.full((rows, count), stream, device=device)
    c3 = torch.arange(rows, device=device)[:, None].expand(rows, count)
    k0, k1 = state[0] & _LOW, (state[0] >> 32) & _LOW
    for _ in range(10):
        high_b, low_b = _product(c2, _B)
        high_a, low_a = _product(c0, _A)
        c0, c1, c2, c3 = high_b ^ c1 ^ k0, low_b, high_a ^ c3 ^ k1, low_a
        k0, k1 = (k0 + _KEY_A) & _LOW, (k1 + _KEY_B) & _LOW
    return c0


def _product(x: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """Return the upper and lower 32 bits; int64 wraps, which leaves both as they are."""
    product = x * factor
    return (product >> 32) & _LOW, product & _LOW


def uniform(
    state: Int[Tensor, 2], stream: int, rows: int, count: int, dtype: torch.dtype
) -> Float[Tensor, "rows count"]:
    """Return numbers uniform on (0, 1)."""
    bits = philox(state, stream, rows, count)
    return ((bits.to(dtype) + 0.5) * 2.0**-32).clamp(max=HIGHEST)


def exponential(
    state: Int[Tensor, 2], stream: int, rows: int, count: int, dtype: torch.dtype
) -> Float[Tensor, "rows count"]:
    """Return exponentially distributed numbers with mean 1, all above 0."""
    return -torch.log1p(-uniform(state, stream, rows, count, dtype))
