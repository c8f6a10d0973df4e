"""Tensors of more numbers than 32 bits count, and another device than the current one."""

import pytest
import torch

from adasplash import adasplash, adasplash_decode, entmax15
from adasplash.testing import random_inputs, relative_error

BEYOND = 2**31


def _room(gib):
    if torch.cuda.mem_get_info()[0] < gib * 2**30:
        pytest.skip(f"needs {gib} GiB of GPU memory")


def _gradients(q, k, v):
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    output = adasplash(*leaves)
    return [output.detach(), *torch.autograd.grad(output, leaves, v)]


@pytest.mark.gpu
def test_heads_beyond_32_bits_are_read_and_written_at_their_places():
    _room(48)
    planes = BEYOND // (64 * 64) + 2
    q, k, v = (torch.randn(1, planes, 64, 64, dtype=torch.float16, device="cuda") for _ in range(3))
    assert q.numel() > BEYOND
    last = [x[:, -2:].clone() for x in (q, k, v)]
    first = [x[:, :2].clone() for x in (q, k, v)]
    found = _gradients(q, k, v)
    for place, some in ((slice(-2, None), last), (slice(0, 2), first)):
        assert all(
            torch.equal(x[:, place], y) for x, y in zip(found, _gradients(*some), strict=True)
        )


@pytest.mark.gpu
def test_a_cache_beyond_32_bits_is_read_at_its_places():
    _room(16)
    shape = (9, 8, 2**18, 128)
    k, v = (torch.randn(shape, dtype=torch.float16, device="cuda") for _ in range(2))
    assert k.numel() > BEYOND
    q = torch.randn(9, 16, 1, 128, dtype=torch.float16, device="cuda")
    lengths = torch.full((9,), shape[2], dtype=torch.int32, device="cuda")
    found = adasplash_decode(q, k, v, lengths)
    alone = adasplash_decode(q[-1:], k[-1:].clone(), v[-1:].clone(), lengths[-1:])
    assert relative_error(found[-1:], alone) < 1e-3  # fewer sequences are split further


@pytest.mark.gpu
def test_another_device_than_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    inputs = random_inputs(1, 4, 4, 100, 100, 32, dtype=torch.float32, device="cuda:0")
    lengths = torch.tensor([90])
    runs = []
    for device in ("cuda:0", "cuda:1"):
        q, k, v = (x.to(device) for x in inputs)
        runs.append([*_gradients(q, k, v), entmax15(q),
                     adasplash_decode(q[:, :, :1], k, v, lengths.to(device))])  # fmt: skip
        assert all(str(x.device) == device for x in runs[-1])
    assert torch.cuda.current_device() == 0
    assert all(torch.equal(x, y.to("cuda:0")) for x, y in zip(*runs, strict=True))
