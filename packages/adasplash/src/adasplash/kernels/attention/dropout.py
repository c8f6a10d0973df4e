"""Which weights dropout keeps, from a counter: forward and backward need no stored mask.

Philox 4x32 with 7 rounds turns (key // 4, row, head of the batch, 0) under a 64-bit seed into the
random words of four neighbouring keys; `philox.py` is the same in a kernel. A weight is kept if its
word, as a signed number, is at least `cut(p)`. The reference computes the same words, so both
backends drop the same weights.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Int
from torch import Tensor

ROUNDS = 7
_WORD = 0xFFFFFFFF


def fresh_seed(device: torch.device) -> Tensor:
    """Return a seed from torch's generator of a device, int64 `[1]`; it does not wait for it."""
    return torch.randint(2**62, (1,), dtype=torch.int64, device=device)


def cut(p: float) -> int:
    """Return the least word that is kept, as a signed 32-bit number."""
    return min(round(p * 2**32), _WORD) - 2**31


def kept(
    seed: Int[Tensor, 1],
    planes: Int[Tensor, "*planes"],
    rows: Int[Tensor, " rows"],
    n_keys: int,
    p: float,
) -> Bool[Tensor, "*planes rows n_keys"]:
    """Return True where a weight is kept, as the kernels see it.

    Args:
        seed: From `fresh_seed`.
        planes: Numbers of the heads, `batch * heads + head`.
        rows: Numbers of the queries.
        n_keys: How many keys.
        p: Probability of dropping.
    """
    quads = torch.arange(-(-n_keys // 4), device=seed.device)
    state = [quads, rows[:, None], planes[..., None, None], torch.zeros_like(seed)]
    keys = [seed & _WORD, seed >> 32 & _WORD]
    for _ in range(ROUNDS):
        high, low = _product(state[0], 0xD2511F53)
        high2, low2 = _product(state[2], 0xCD9E8D57)
        state = [high2 ^ state[1] ^ keys[0], low2, high ^ state[3] ^ keys[1], low]
        keys = [(keys[0] + 0x9E3779B9) & _WORD, (keys[1] + 0xBB67AE85) & _WORD]
    words = torch.stack(torch.broadcast_tensors(*state), -1).flatten(-2)[..., :n_keys]
    return torch.where(words >= 2**31, words - 2**32, words) >= cut(p)


def _product(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """Return the upper and lower 32 bits of a product of 32-bit numbers, held as int64."""
    whole = a * b  # wraps around like unsigned numbers do; the sign that shifts in is cut off
    return whole >> 32 & _WORD, whole & _WORD
