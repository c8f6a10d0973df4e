"""One call that makes a program repeatable."""

from __future__ import annotations

import random
import sys

import torch


def seed_everything(seed: int) -> torch.Generator:
    """Seed Python, NumPy (when it is loaded) and torch; return a CPU generator with that seed.

    For programs only: library functions take a `torch.Generator` and leave global state alone.
    `seed` is 0 to 2**32 - 1, NumPy's range; else ValueError.
    """
    if not 0 <= seed < 2**32:
        raise ValueError(f"`seed` must be between 0 and 2**32 - 1; got {seed}.")
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed)
    torch.manual_seed(seed)
    return torch.Generator().manual_seed(seed)
