"""Pairs of tiles of queries that see most of their keys: the device finds them."""

import pytest
import torch

from adasplash.kernels.attention import backward, forward, pairs
from adasplash.kernels.attention.screen import screen
from adasplash.kernels.attention.threshold import threshold
from adasplash.kernels.attention.tiles import Problem, pose
from adasplash.testing import clustered_inputs, oracle_attention, relative_error


def _run(q, k, v, grad, causal, mask=None):
    fixed = 0.25, causal, None
    output, tau, active = forward.launch_forward(q, k, v, mask, None, *fixed)
    rest = backward.launch_backward(grad, q, k, v, mask, None, tau, active, *fixed)
    return (output, *rest[:3]), active


def _inputs(rows, keys, device, dim=16):
    q, k, v = clustered_inputs(
        1, 2, max(rows, keys), dim, 0.0, dtype=torch.float16, device=device, seed=2
    )
    q, k, v = q[:, :, :rows], k[:, :1, :keys], v[:, :1, :keys]
    return q, k, v, torch.randn(q.shape, device=device).half()


@pytest.mark.parametrize(
    ("rows", "keys", "causal"),
    [(256, 256, True), (300, 300, True), (130, 200, False), (256, 130, True)],
)
@pytest.mark.parametrize("masked", [False, True])
def test_dense_pairs_are_as_exact(rows, keys, causal, masked, device, monkeypatch):
    q, k, v, grad = _inputs(rows, keys, device)
    mask = torch.ones(1, keys, dtype=torch.bool, device=device)
    mask[:, 70:90] = mask[:, :65] = False
    mask = mask if masked else None
    assert pose(q, k, v, mask, None, 0.25, causal, None).paired
    found, active = _run(q, k, v, grad, causal, mask)
    want = oracle_attention(q, k, v, causal, mask, 0.25, grad)
    monkeypatch.setattr(Problem, "paired", False)
    alone, its_active = _run(q, k, v, grad, causal, mask)
    assert torch.equal(active, its_active)
    for x, y, z in zip(found, want, alone, strict=True):
        assert relative_error(x, y) < 2e-3
        assert relative_error(x, z) < 1e-3


def test_each_tile_is_computed_once(device):
    """By the kernels for lists or by that for pairs: poisoned memory shows what either leaves out.

    Every second block of keys is far from the first two tiles of queries, so these are not dense.
    """
    q, k, v, _ = _inputs(300, 330, device)
    far = (torch.arange(330, device=device) // 64 % 2 == 1)[:, None]
    q[..., :1] = 1.0
    q[:, :, :128, :1] = 40.0
    k[..., :1] = torch.where(far, -1.0, 0.0).half()
    problem = pose(q, k, v, None, None, 0.25, False, None)
    candidates = screen(problem)
    tau, _slope = threshold(problem, candidates)
    mine = [bool(x.isfinite().all()) for x in tau[0, 0].split(64)]
    assert mine == [True, True, False, False, True]  # the last has no neighbour
    assert tau[0, 0, 128:256].isnan().all()
    output = torch.full_like(q, torch.nan)
    active = torch.zeros(candidates.listed.shape, dtype=torch.int8, device=device)
    pairs.dense_pairs(problem, candidates, tau, output, active)
    assert output[:, :, 128:256].isfinite().all()
    assert output[:, :, :128].isnan().all()
    assert output[:, :, 256:].isnan().all()


def test_pairs_go_on_where_the_threshold_stopped_too_early(device, monkeypatch):
    q, k, v, grad = _inputs(256, 256, device)
    monkeypatch.setattr(pairs, "MAX_PASSES", 1)
    monkeypatch.setitem(pairs.SLACK, torch.float16, 1e-4)
    found, _ = _run(q, k, v, grad, True)
    want = oracle_attention(q, k, v, True, None, 0.25, grad)
    for x, y in zip(found, want, strict=True):
        assert relative_error(x, y) < 1e-3


def test_a_nan_stays_in_its_row(device):
    q, k, v, _ = _inputs(256, 256, device)
    q[0, 0, 70] = torch.nan
    output = forward.launch_forward(q, k, v, None, None, 0.25, True, None)[0]
    assert output[0, 0, 70].isnan().all()
    output[0, 0, 70] = 0.0
    assert output.isfinite().all()
