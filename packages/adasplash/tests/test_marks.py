"""The bits of blocks that hold weight, and how much of them is kept."""

import pytest
import torch

from adasplash import adasplash
from adasplash.kernels.attention.marks import packed, unpacked


@pytest.mark.parametrize("blocks", [1, 8, 13, 70])
def test_bits_give_back_the_marks(blocks, device):
    marks = (torch.rand(2, 3, 5, blocks, device=device) < 0.4).to(torch.int8)
    bits = packed(marks)
    assert bits.shape == (2, 3, 5, -(-blocks // 8))
    assert torch.equal(unpacked(bits, blocks), marks)
    weights = 2 ** torch.arange(8, device=device)
    first = torch.nn.functional.pad(marks, (0, -blocks % 8)).unflatten(-1, (-1, 8))
    assert torch.equal((first * weights).sum(-1).to(torch.uint8), bits)


def test_a_bit_is_kept_for_every_block(device):
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        q, k, v = (torch.randn(1, 2, 128, 16, dtype=torch.float16, device=device).requires_grad_()
                   for _ in range(3))  # fmt: skip
        adasplash(q, k, v, backend="triton")
    rest = [x for x in kept if not any(x is leaf for leaf in (q, k, v))]
    assert sorted(x.numel() * x.element_size() for x in rest) == [2 * 2 * 1, 4 * 2 * 128]
