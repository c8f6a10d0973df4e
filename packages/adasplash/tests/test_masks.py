"""Key masks and windows: blocks that they leave alone or hide as a whole are not asked by keys."""

import pytest
import torch

from adasplash.kernels.attention import backward, forward, screen
from adasplash.kernels.attention.mask import summarize
from adasplash.kernels.attention.tiles import pose
from adasplash.testing import oracle_attention, random_inputs, relative_error

ROWS, KEYS, SCALE = 90, 200, 0.25


def _run(q, k, v, grad, mask, causal=True, window=None):
    fixed = SCALE, causal, window
    output, tau, active = forward.launch_forward(q, k, v, mask, None, *fixed)
    rest = backward.launch_backward(grad, q, k, v, mask, None, tau, active, *fixed)
    return output, *rest[:3]


def _inputs(device, dtype=torch.float32):
    q, k, v = random_inputs(2, 1, 1, ROWS, KEYS, 16, dtype=dtype, device=device)
    return q, k, v, torch.randn(q.shape, device=device).to(dtype)


def _mask(name, device):
    mask = torch.ones(2, KEYS, dtype=torch.bool, device=device)
    places = torch.arange(KEYS, device=device)
    lengths = torch.tensor([[150], [77]], device=device)
    if name == "left":
        mask = places >= KEYS - lengths
    elif name == "right":
        mask = places < lengths
    elif name == "blocks":  # whole blocks, and all but one key of others
        mask[0] = (places // 64) % 2 == 0
        mask[1] = (places // 64 != 1) | (places == 100)
    elif name == "holes":
        mask = torch.rand(2, KEYS, device=device) > 0.3
    elif name == "nothing":
        mask[1] = False
    return mask


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("left", torch.float16),
        ("right", torch.float32),
        ("blocks", torch.float16),
        ("blocks", torch.float32),
        ("holes", torch.float16),
        ("nothing", torch.float32),
    ],
)
def test_masks_hide_keys_and_nothing_else(name, dtype, device):
    q, k, v, grad = _inputs(device, dtype)
    mask = _mask(name, device)
    budget = 1e-5 if dtype is torch.float32 else 4e-3
    found = _run(q, k, v, grad, mask)
    want = oracle_attention(q, k, v, True, mask, SCALE, grad)
    for x, y in zip(found, want, strict=True):
        assert relative_error(x, y) < budget
        assert x.isfinite().all()


def test_a_mask_that_hides_nothing_changes_no_bit(device):
    q, k, v, grad = (x[:1] for x in _inputs(device))
    found = _run(q, k, v, grad, _mask("all", device)[:1])
    for x, y in zip(found, _run(q, k, v, grad, None), strict=True):
        assert torch.equal(x, y)


def test_hidden_blocks_change_no_bit_of_what_is_left(device):
    """As if their keys were not there."""
    q, k, v, grad = _inputs(device)
    block = pose(q, k, v, None, None, SCALE, True, None).tiles.block_n
    mask = _mask("all", device)
    mask[:, : 2 * block] = False
    output, dq, dk, dv = _run(q, k, v, grad, mask)
    rest = _run(q, k[:, :, 2 * block :], v[:, :, 2 * block :], grad, None)
    for x, y in zip((output, dq, dk[:, :, 2 * block :], dv[:, :, 2 * block :]), rest, strict=True):
        assert torch.equal(x, y)
    assert not dk[:, :, : 2 * block].any()


@pytest.mark.parametrize("name", ["left", "blocks"])
def test_hidden_blocks_are_not_listed(name, device):
    q, k, v, _ = _inputs(device)
    mask = _mask(name, device)
    problem = pose(q, k, v, mask, None, SCALE, False, None)
    found = screen.screen(problem, skip=False)
    n_blocks, block = problem.grid[1], problem.tiles.block_n
    for batch in range(2):
        seen = {int(x) // block for x in mask[batch].nonzero()}
        for listed, count in zip(found.listed[batch, 0], found.length[batch, 0], strict=True):
            its = set(listed[:count].tolist())
            if name == "left":
                assert its == seen
            assert seen <= its <= set(range(min(seen), n_blocks))


@pytest.mark.parametrize(
    ("window", "causal"),
    [((0, 0), True), ((40, 0), False), ((100, 30), False), ((-1, 20), False), ((100, 30), True)],
)
def test_windows_of_any_size(window, causal, device):
    q, k, v, _ = (x[:1] for x in _inputs(device))
    left, right = (10_000 if side < 0 else side for side in window)
    bias = torch.zeros(ROWS, KEYS, dtype=torch.float64, device=device)
    places = torch.arange(ROWS, device=device)[:, None] + KEYS - ROWS
    keys = torch.arange(KEYS, device=device)
    bias[(keys < places - left) | (keys > places + (0 if causal else right))] = -torch.inf
    window = left, right
    output = forward.launch_forward(q, k, v, None, None, SCALE, causal, window)[0]
    z = q.double() @ k.double().mT * (SCALE / 2) + bias
    high = z.amax(-1, keepdim=True)
    low = high - 1
    for _ in range(60):
        middle = (low + high) / 2
        inside = (z - middle).clamp_min(0).square().sum(-1, keepdim=True) >= 1
        low, high = torch.where(inside, middle, low), torch.where(inside, high, middle)
    assert relative_error(output, (z - low).clamp_min(0).square() @ v.double()) < 1e-5


@pytest.mark.parametrize("block", [16, 64])
def test_the_summary_of_a_mask(block, device):
    mask = _mask("blocks", device)
    mask[:, :3] = mask[:, -5:] = False
    found = summarize(mask, block)
    n_blocks = -(-KEYS // block)
    whole = torch.nn.functional.pad(mask, (0, n_blocks * block - KEYS)).view(2, n_blocks, block)
    inside = torch.arange(n_blocks * block, device=device).view(n_blocks, block) < KEYS
    states = whole.any(-1).int() + (whole | ~inside).all(-1).int()
    assert torch.equal(found[:, : n_blocks * block].view_as(whole), whole.int())
    assert torch.equal(found[:, n_blocks * block : -2], states)
    for line, ends in zip(mask, found[:, -2:].tolist(), strict=True):
        seen = line.nonzero()
        assert ends == [int(seen.min()), int(seen.max()) + 1]
