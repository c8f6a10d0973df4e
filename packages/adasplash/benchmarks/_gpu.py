"""What the benchmarks on a GPU share."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention


def graphed(call: Callable[[], object]) -> Callable[[], None]:
    """Return the replay of a call's CUDA graph, so that no host work is timed."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def soft(q, k, v, backend: SDPBackend, **options):
    """Softmax attention by one of torch's backends."""
    with sdpa_kernel(backend):
        return scaled_dot_product_attention(q, k, v, **options)
