"""The screening: bounds that hold, lists that miss nothing, scores beyond float16, parts."""

import pytest
import torch

from adasplash.kernels.attention import screen as module
from adasplash.kernels.attention.forward import launch_forward
from adasplash.kernels.attention.tiles import pose
from adasplash.testing import clustered_inputs, oracle_weights, random_inputs


def _threshold_of(q, k, causal):
    """Return tau in float64, from the dense weights of the oracle: z - sqrt(p) where p > 0."""
    weights = oracle_weights(q, k, causal)
    z = q.double() @ k.double().mT * q.shape[-1] ** -0.5 / 2
    return (z - weights.sqrt()).masked_fill(weights == 0, -torch.inf).amax(-1), weights


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("gain", [0.0, 4.0])
def test_bounds_lie_below_tau_and_lists_hold_every_weight(gain, causal, device):
    q, k, v = clustered_inputs(1, 2, 300, 16, gain, dtype=torch.float32, device=device)
    problem = pose(q, k, v, None, None, 0.25, causal, None)
    found, tiles = module.screen(problem), problem.tiles
    tau, weights = _threshold_of(q, k, causal)
    assert (found.bound <= tau + 1e-5).all()
    assert (found.bound >= found.top - 1).all()
    assert (found.bound - tau).abs().mean() < 0.7 * (found.top - 1 - tau).abs().mean()
    for head in range(2):
        for tile, count in enumerate(found.length[0, head].tolist()):
            listed = found.listed[0, head, tile, :count].tolist()
            assert listed == sorted(set(listed), reverse=True)
            part = weights[0, head, tile * tiles.block_m : (tile + 1) * tiles.block_m]
            blocks = part.split(tiles.block_n, 1)
            active = [i for i, block in enumerate(blocks) if block.max() > 1e-8]
            assert set(active) <= set(listed)


def test_lists_of_clustered_keys_are_short(device):
    q, k, v = clustered_inputs(1, 1, 512, 16, 8.0, dtype=torch.float16, device=device)
    problem = pose(q, k, v, None, None, 0.25, True, None)
    count, whole = (module.screen(problem, skip=skip).length.sum() for skip in (True, False))
    assert count < 0.7 * whole


def test_screening_in_parts_changes_nothing(device, monkeypatch):
    q, k, v = random_inputs(2, 3, 1, 150, 170, 16, scale=8.0, device=device)
    arguments = (q, k, v, None, None, 0.25, True, None)
    whole = launch_forward(*arguments)
    monkeypatch.setattr(module, "_ROOM", 3000)
    for x, y in zip(launch_forward(*arguments), whole, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("size", [1e5, -1e5])
def test_scores_beyond_float16_are_not_lost(size, device):
    q, k, v = random_inputs(1, 1, 1, 70, 70, 16, device=device)
    q[..., 0], k[..., 0] = 1.0, size
    output, _, active = launch_forward(q, k, v, None, None, 2.0, False, None)
    assert active.any(-1).all()
    # Float32 has steps of 0.008 there.
    want = oracle_weights(q, k, False, scale=2.0) @ v.double()
    assert (output.double() - want).abs().max() < 0.1
