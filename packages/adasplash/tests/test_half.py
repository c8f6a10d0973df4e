"""What half formats take at alpha 1.5, one sweep for dQ; and maxima of scores by their bits."""

import pytest
import torch

from adasplash.kernels.attention import forward, screen, sweep
from adasplash.kernels.attention.backward import launch_backward
from adasplash.kernels.attention.tiles import pose
from adasplash.testing import (
    clustered_inputs,
    oracle_attention,
    oracle_weights,
    random_inputs,
    relative_error,
)

CASES = [(150, 150, 16, True), (70, 100, 32, False)]


def _inputs(seq_q, seq_k, dim, gain, device, offset=0.0):
    longer = max(seq_q, seq_k)
    q, k, v = clustered_inputs(1, 2, longer, dim, gain, dtype=torch.float16, device=device)
    return q[:, :, :seq_q], k[:, :1, :seq_k], v[:, :1, :seq_k] + offset


@pytest.mark.parametrize(("seq_q", "seq_k", "dim", "causal"), CASES)
@pytest.mark.parametrize("offset", [0.0, 3.0])
def test_one_sweep_gives_the_gradient_of_two(
    seq_q, seq_k, dim, causal, offset, device, monkeypatch
):
    """Values far from zero, too: what they have in common must cancel before it is rounded."""
    q, k, v = _inputs(seq_q, seq_k, dim, 2.0, device, offset)
    arguments = (q, k, v, None, None, dim**-0.5, causal, None)
    assert sweep.fits(pose(*arguments))
    output, tau, active = forward.launch_forward(*arguments)
    grad = torch.randn_like(output)
    rest = (None, None, tau, active, dim**-0.5, causal, None)
    found = launch_backward(grad, q, k, v, *rest)[:3]
    monkeypatch.setattr(sweep, "fits", lambda problem: False)
    two = launch_backward(grad, q, k, v, *rest)[:3]
    want = oracle_attention(q, k, v, causal, grad=grad)[1:]
    assert relative_error(found[0], want[0]) < 2 * relative_error(two[0], want[0])
    for x, y in zip(found[1:], two[1:], strict=True):
        assert relative_error(x, y.double()) < 1e-3


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
