"""Half formats at alpha 1.5: weights divided by their sum, and a guess of delta in the backward."""

import pytest
import torch

from adasplash.kernels.attention import backward, forward, solver
from adasplash.kernels.attention import threshold as module
from adasplash.testing import oracle_attention, random_inputs, relative_error

ROWS, KEYS, SCALE = 70, 700, 0.25  # more blocks than delta is guessed from


def _run(q, k, v, grad):
    plain = (q, k, v, None, None)
    output, tau, active = forward.launch_forward(*plain, SCALE, False, None)
    rest = backward.launch_backward(grad, *plain, tau, active, SCALE, False, None)
    return output, *rest[:3], tau


def _far(size, device):
    """Return inputs of which `size` shapes the scores: from all alike to a few that stand out."""
    q, k, v = random_inputs(1, 2, 1, ROWS, KEYS, 16, dtype=torch.float16, device=device, scale=size)
    return q, k, v + 2.0, torch.randn(1, 2, ROWS, 16, device=device).half()


@pytest.mark.parametrize("size", [0.02, 1.0, 8.0])
def test_long_rows_are_as_exact_as_their_format(size, device):
    q, k, v, grad = _far(size, device)
    found = _run(q, k, v, grad)
    want = oracle_attention(q, k, v, False, None, SCALE, grad)
    for x, y in zip(found, want, strict=False):
        assert relative_error(x, y) < 2e-3


def test_a_guess_of_delta_from_some_blocks_is_mended(device):
    """Where the values of the blocks it is guessed from differ from all others."""
    q, k, v, grad = _far(0.5, device)
    v[:, :, : KEYS // 2] += 20.0
    found = _run(q, k, v, grad)
    want = oracle_attention(q, k, v, False, None, SCALE, grad)
    for x, y in zip(found, want, strict=False):
        assert relative_error(x, y) < 4e-3


@pytest.mark.parametrize("alpha", [1.05, 1.25, 1.7, 2.0])
def test_the_last_step_of_other_alphas_needs_no_look_at_where_it_ends(alpha, device, monkeypatch):
    q, k, v, _ = _far(2.0, device)
    alphas = torch.full((1, 2), alpha, device=device)

    plain = (q, k, v, None, alphas, SCALE, False, None)
    z = (q.double() @ k.double().mT) * (SCALE * (alpha - 1))

    def off():
        tau = forward.launch_forward(*plain)[1].double()
        sums = (z - tau[..., None]).clamp_min(0).pow(1 / (alpha - 1)).sum(-1)
        return (sums - 1).abs().max()

    assert off() < 1e-4 * (1 + 1 / (alpha - 1))  # what a look takes for good
    monkeypatch.setitem(solver.TRUST, torch.float16, 1e3)  # any step is the last
    assert off() > 1e-3


@pytest.mark.parametrize("size", [0.02, 1.0, 8.0])
def test_the_output_goes_on_where_the_threshold_stopped_too_early(size, device, monkeypatch):
    q, k, v, grad = _far(size, device)
    exact = _run(q, k, v, grad)[-1]
    monkeypatch.setattr(module, "MAX_PASSES", 1)
    monkeypatch.setitem(solver.SLACK, torch.float16, 1e-4)
    found = _run(q, k, v, grad)
    want = oracle_attention(q, k, v, False, None, SCALE, grad)
    assert relative_error(found[0], want[0]) < 1e-3
    assert (found[-1] - exact).abs().max() < 1e-3
