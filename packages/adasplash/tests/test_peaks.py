"""Maxima of scores by their bits."""

import pytest
import torch

from adasplash.kernels.attention import forward, screen
from adasplash.kernels.attention.tiles import pose
from adasplash.testing import oracle_attention, oracle_weights, random_inputs, relative_error


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_scores_all_alike_give_the_mean(dtype, device):
    q, k = torch.zeros(2, 1, 1, 130, 16, dtype=dtype, device=device).unbind(0)
    v = torch.randn(1, 1, 130, 16, device=device).to(dtype)
    output = forward.launch_forward(q, k, v, None, None, 0.25, False, None)[0]
    assert relative_error(output, oracle_attention(q, k, v, False)[0]) < 4e-3


@pytest.mark.parametrize("sign", [-1, 1])
def test_rows_without_a_positive_score_lose_no_block(sign, device):
    """Bits order positive numbers only; the diagonal's tile is compared as numbers are."""
    q, k, v = random_inputs(1, 1, 1, 300, 300, 16, device=device)
    q, k = q.abs(), sign * k.abs()
    found = screen.screen(pose(q, k, v, None, None, 0.25, True, None))
    z = (q.double() @ k.double().mT / 8).masked_fill(
        torch.ones(300, 300, device=device).triu(1).bool(), -torch.inf
    )
    assert torch.allclose(found.top.double(), z.amax(-1), atol=1e-5)
    output = forward.launch_forward(q, k, v, None, None, 0.25, True, None)[0]
    assert relative_error(output, oracle_weights(q, k, True) @ v.double()) < 1e-5


def test_a_nan_far_from_the_diagonal_is_seen(device):
    q, k, v = random_inputs(1, 1, 1, 300, 300, 16, dtype=torch.float16, device=device, scale=4.0)
    k[0, 0, 5] = torch.nan
    output = forward.launch_forward(q, k, v, None, None, 0.25, True, None)[0]
    assert output[0, 0, 5:].isnan().all()
    assert output[0, 0, :5].isfinite().all()
