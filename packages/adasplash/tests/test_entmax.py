"""The dense map: properties that define it, and gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adasplash import entmax15

rows = st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=20)


@settings(max_examples=60, deadline=None)
@given(rows)
def test_it_is_a_distribution_that_satisfies_the_definition(row):
    x = torch.tensor(row, dtype=torch.float64)
    p = entmax15(x)
    assert p.min() >= 0
    assert abs(p.sum().item() - 1) < 1e-9
    # On the support x / 2 - sqrt(p) is one number, tau; off it x / 2 lies at or below tau.
    tau = (x / 2 - p.sqrt())[p > 0]
    assert (tau - tau[0]).abs().max() < 1e-7
    assert (x[p == 0] / 2 <= tau[0] + 1e-7).all()


@settings(max_examples=30, deadline=None)
@given(rows, st.floats(-20, 20))
def test_a_shift_changes_nothing_and_a_permutation_permutes(row, shift):
    x = torch.tensor(row, dtype=torch.float64)
    assert torch.allclose(entmax15(x), entmax15(x + shift), atol=1e-9)
    order = torch.randperm(len(row))
    assert torch.allclose(entmax15(x)[order], entmax15(x[order]), atol=1e-12)


def test_known_values():
    assert entmax15(torch.zeros(4)).tolist() == [0.25] * 4
    # Two scores: p = (d + sqrt(2 - d^2))^2 / 4 with d = x1 / 2, and all of it from d = 1 on.
    d = 0.6
    want = (d + (2 - d * d) ** 0.5) ** 2 / 4
    assert entmax15(torch.tensor([2 * d, 0.0], dtype=torch.float64))[0].item() == pytest.approx(
        want
    )
    assert entmax15(torch.tensor([2.0, 0.0, -1.0])).tolist() == [1.0, 0.0, 0.0]


def test_gradients_on_any_dimension():
    x = torch.randn(3, 5, 4, dtype=torch.float64, requires_grad=True)
    for dim in (0, 1, -1):
        assert torch.autograd.gradcheck(lambda x, dim=dim: entmax15(x, dim), x)


def test_masked_slices_are_zero_and_nan_stays_in_its_slice():
    x = torch.randn(3, 4)
    x[0] = -torch.inf
    x[1, 2] = torch.nan
    p = entmax15(x)
    assert p[0].eq(0).all()
    assert p[1].isnan().all()
    assert p[2].sum().item() == pytest.approx(1)
