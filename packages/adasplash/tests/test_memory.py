"""What attention keeps for its backward."""

import torch

from adasplash import adasplash


def test_a_threshold_for_every_row_and_a_bit_for_every_block_are_kept(device):
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        q, k, v = (
            torch.randn(1, 2, 128, 16, dtype=torch.float16, device=device).requires_grad_()
            for _ in range(3)
        )
        adasplash(q, k, v, backend="triton")
    rest = [x for x in kept if not any(x is leaf for leaf in (q, k, v))]
    bits, rows = 2 * 2 * 1, 4 * 2 * 128  # 2 heads of 2 tiles of 2 blocks, in a byte a tile
    assert sorted(x.numel() * x.element_size() for x in rest) == [bits, rows]
