"""The threshold in plain PyTorch, against bisection in float64."""

import pytest
import torch

from adasplash.kernels import newton

SHAPE = 16, 300
SPREAD = torch.arange(SHAPE[1], dtype=torch.float64).expand(SHAPE)


def _rows(name):
    torch.manual_seed(0)
    noise = torch.randn(SHAPE, dtype=torch.float64)
    share = torch.rand(SHAPE[0], 1, dtype=torch.float64)
    return {
        "nearly equal": 0.1 * noise,
        "normal": noise,
        "far apart": 50 * noise,
        "tied": torch.zeros_like(noise),
        "two values": torch.where(noise > 0, 0.0, -2 * share),
        "heavy tails": noise / torch.randn_like(noise),
        "steps": -SPREAD * share,
        "crowded at the top": -share * 4 * (1 - 0.7**SPREAD),
    }[name]


def _bisected(z, alpha):
    high = z.amax(-1, keepdim=True)
    low = high - 1
    for _ in range(80):
        middle = (low + high) / 2
        more = (z - middle).clamp_min(0).pow(1 / (alpha - 1)).sum(-1, keepdim=True) >= 1
        low, high = torch.where(more, middle, low), torch.where(more, high, middle)
    return low[:, 0]


@pytest.mark.parametrize("name", ["nearly equal", "normal", "far apart", "tied", "two values",
                                  "heavy tails", "steps", "crowded at the top"])  # fmt: skip
@pytest.mark.parametrize("alpha", [1.01, 1.3, 1.5, 1.8, 2.0])
def test_it_equals_bisection_whether_it_may_stop_early_or_not(name, alpha, monkeypatch):
    z = _rows(name) * (alpha - 1)
    want = _bisected(z, alpha)
    size = 1 + want.abs()
    for dtype, rounding in ((torch.float64, 1e-15), (torch.float32, 5e-7)):
        found = [newton.threshold(z.to(dtype), each)
                 for each in (alpha, torch.full((SHAPE[0], 1), alpha, dtype=dtype))]  # fmt: skip
        monkeypatch.setattr(newton, "_may_look", lambda x: False)
        found.append(newton.threshold(z.to(dtype), alpha))
        monkeypatch.undo()
        for tau in found:
            assert tau.dtype == dtype
            assert ((tau - want).abs() / size).max() < rounding + 3e-16


@pytest.mark.parametrize("alpha", [1.3, 1.5, 2.0])
def test_rows_without_a_score_and_with_a_nan(alpha):
    z = torch.randn(4, 9)
    z[1], z[2, 3], z[3, 2] = -torch.inf, torch.nan, -torch.inf
    tau = newton.threshold(z, alpha)
    assert tau[1] == torch.inf
    assert tau[2].isnan()
    power = 1 / (alpha - 1)
    assert (z[[0, 3]] - tau[[0, 3], None]).clamp_min(0).pow(power).sum(-1).sub(1).abs().max() < 1e-5
