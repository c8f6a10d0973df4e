import random

import numpy as np
import pytest
import torch

from fourfold_common import seed_everything


def _draws() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_the_same_seed_repeats_every_generator() -> None:
    first_generator = seed_everything(7)
    first = _draws()
    second_generator = seed_everything(7)
    assert _draws() == first
    assert torch.rand((), generator=first_generator) == torch.rand((), generator=second_generator)


def test_another_seed_differs() -> None:
    seed_everything(7)
    first = _draws()
    seed_everything(8)
    assert all(a != b for a, b in zip(first, _draws(), strict=True))


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_out_of_range_is_refused(seed: int) -> None:
    with pytest.raises(ValueError, match=rf"`seed` must be between .*; got {seed}"):
        seed_everything(seed)
