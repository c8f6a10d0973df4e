"""CUDA graphs: what is replayed is what is computed eagerly, bit for bit."""

import pytest
import torch

from adasplash import adasplash, adasplash_decode, page_stats
from adasplash.testing import clustered_inputs, random_inputs

pytestmark = pytest.mark.gpu


def _captured(call):
    """Return a graph of the call, and the tensors that it writes."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = call()
    return graph, found


@pytest.mark.parametrize("gain", [0.0, 4.0])
@pytest.mark.parametrize("causal", [True, False])
def test_attention_and_gradients_in_a_graph(causal, gain):
    leaves = clustered_inputs(1, 2, 700, 64, gain, dtype=torch.bfloat16, device="cuda")
    leaves = [x.requires_grad_() for x in leaves]
    grad = torch.randn_like(leaves[2])

    def call():
        output = adasplash(*leaves, is_causal=causal)
        return output, *torch.autograd.grad(output, leaves, grad)

    graph, found = _captured(call)
    other = random_inputs(1, 2, 2, 700, 700, 64, dtype=torch.bfloat16, device="cuda", seed=1)
    with torch.no_grad():  # other numbers at the same places, of another sparsity
        for leaf, x in zip(leaves, other, strict=True):
            leaf.copy_(x)
    graph.replay()
    for x, y in zip(found, call(), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("bounds", [True, False])
def test_decoding_in_a_graph_follows_the_lengths(bounds):
    q, k, v = random_inputs(2, 8, 2, 1, 1024, 64, dtype=torch.bfloat16, device="cuda")
    lengths = torch.tensor([300, 1024], dtype=torch.int32, device="cuda")
    stats = page_stats(k) if bounds else None

    def call():
        return adasplash_decode(q, k, v, lengths, None, stats)

    graph, found = _captured(call)
    lengths.copy_(torch.tensor([1000, 17]))
    graph.replay()
    assert torch.equal(found, call())
