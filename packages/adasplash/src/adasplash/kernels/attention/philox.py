"""The random words of a tile; which weights they keep is in `dropout.py`."""

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl

from .dropout import ROUNDS

_ROUNDS = tl.constexpr(ROUNDS)


@triton.jit
@no_type_check
def words(seed, plane, first, start, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return a signed word for every weight of a tile, `[BLOCK_M, BLOCK_N]`.

    One call of the generator serves four keys, so `start` must be a multiple of four.
    """
    rows = first + tl.arange(0, BLOCK_M)[:, None]
    quads = start // 4 + tl.arange(0, BLOCK_N // 4)[None, :]
    zero = rows * 0 + quads * 0
    a, b, c, d = tl.philox(seed, zero + quads, zero + rows, zero + plane, zero, _ROUNDS)
    joined = tl.join(tl.join(a, c), tl.join(b, d)).reshape([BLOCK_M, BLOCK_N])
    return joined.to(tl.int32, bitcast=True)
