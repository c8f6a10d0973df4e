"""What half formats take at alpha 1.5: one kernel for tau and output, one sweep for dQ, maxima by bits."""

import pytest
import torch

from adasplash.kernels.attention import forward, fused, screen, sweep
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
@pytest.mark.parametrize("gain", [0.0, 4.0])
@pytest.mark.parametrize("masked", [False, True])
def test_the_fused_kernel_gives_what_two_give(
    seq_q, seq_k, dim, causal, gain, masked, device, monkeypatch
):
    q, k, v = _inputs(seq_q, seq_k, dim, gain, device)
    mask = torch.rand(1, seq_k, device=device) > 0.3 if masked else None
    arguments = (q, k, v, mask, None, dim**-0.5, causal, None)
    assert fused.fits(pose(*arguments))
    output, tau, active = forward.launch_forward(*arguments)
    monkeypatch.setattr(fused, "fits", lambda problem: False)
    want, want_tau, want_active = forward.launch_forward(*arguments)
    exact = oracle_attention(q, k, v, causal, mask)[0]
    assert relative_error(output, exact) < 1.2 * relative_error(want, exact) + 1e-5
    known = want_tau.isfinite()
    assert torch.equal(tau.isfinite(), known)
    assert torch.allclose(tau[known], want_tau[known], atol=2e-5)
    assert (active >= want_active).all()


def test_the_fused_kernel_ends_where_all_scores_are_alike(device):
    q, k = torch.zeros(2, 1, 1, 130, 16, dtype=torch.float16, device=device).unbind(0)
    v = torch.randn(1, 1, 130, 16, device=device).half()
    output = forward.launch_forward(q, k, v, None, None, 0.25, False, None)[0]
    assert torch.allclose(output.float(), v.float().mean(2, keepdim=True), atol=2e-3)


@pytest.mark.parametrize("passes", [1, 2])
def test_the_last_pass_gives_an_output_even_if_tau_is_not_found(passes, device, monkeypatch):
    monkeypatch.setattr(fused, "MAX_PASSES", passes + 1)
    q, k, v = _inputs(130, 130, 16, 0.0, device)
    output = forward.launch_forward(q, k, v, None, None, 0.25, True, None)[0]
    assert relative_error(output, oracle_attention(q, k, v, True)[0]) < 0.3


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
