"""CUDA graphs replay attention and decoding bit for bit; checkpointing repeats what it must."""

import pytest
import torch

from adasplash import adasplash, adasplash_decode, page_stats

on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")


def _capture(call):
    """Return a graph of a call, and the tensors that a replay writes."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = call()
    return graph, found


@pytest.mark.gpu
@on_a_gpu
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("alpha", [1.5, 1.3, "tensor"])
def test_forward_and_backward_are_replayed_bit_for_bit(alpha, dtype, causal):
    torch.manual_seed(0)
    shape = (2, 4, 333, 64)
    leaves = [torch.randn(shape, device="cuda", dtype=dtype).requires_grad_() for _ in range(3)]
    if alpha == "tensor":
        alpha = torch.tensor([1.2, 1.4, 1.5, 1.7], device="cuda", requires_grad=True)
        leaves.append(alpha)
    grad = torch.randn(shape, device="cuda", dtype=dtype)

    def call():
        output = adasplash(*leaves[:3], alpha, is_causal=causal, backend="triton")
        return output.detach(), *torch.autograd.grad(output, leaves, grad)

    graph, found = _capture(call)
    for gain in (1.0, 4.0):  # more of it makes other blocks empty
        with torch.no_grad():
            for leaf in leaves[:3]:
                leaf.copy_(gain * torch.randn(shape, device="cuda"))
            grad.normal_()
        graph.replay()
        replayed = [x.clone() for x in found]
        want = call()
        assert all(torch.equal(x, y) for x, y in zip(replayed, want, strict=True))
        assert all(bool(x.isfinite().all()) and bool(x.any()) for x in want)


@pytest.mark.gpu
@on_a_gpu
def test_replays_drop_other_weights_and_repeat_under_a_seed():
    leaves = [torch.randn(2, 4, 300, 64, device="cuda").requires_grad_() for _ in range(3)]

    def call():
        output = adasplash(*leaves, dropout_p=0.2)
        return output.detach(), *torch.autograd.grad(output, leaves, torch.ones_like(output))

    graph, found = _capture(call)
    runs = []
    for seed in (3, None, 3):
        if seed is not None:
            torch.manual_seed(seed)
        graph.replay()
        runs.append([x.clone() for x in found])
    torch.manual_seed(3)
    runs.append(call())
    assert not torch.equal(runs[0][0], runs[1][0])
    for other in runs[2:]:
        assert all(torch.equal(x, y) for x, y in zip(runs[0], other, strict=True))


@pytest.mark.gpu
@on_a_gpu
@pytest.mark.parametrize("paged", [True, False])
@pytest.mark.parametrize("bounds", [True, False])
def test_decoding_is_replayed_bit_for_bit_as_the_cache_grows(paged, bounds):
    torch.manual_seed(0)
    q = torch.randn(2, 8, 1, 64, device="cuda", dtype=torch.bfloat16)
    slabs, places = (16, 64) if paged else (2, 512)
    k, v = torch.randn(2, slabs, 2, places, 64, device="cuda", dtype=torch.bfloat16).unbind(0)
    table = torch.randperm(16, device="cuda").int().view(2, 8) if paged else None
    lengths = torch.tensor([500, 77], dtype=torch.int32, device="cuda")
    stats = page_stats(k) if bounds else None

    def call():
        return adasplash_decode(q, k, v, lengths, table, stats, backend="triton")

    graph, found = _capture(call)
    seen = []
    for added in (0, 1, 11):
        lengths.add_(added)
        q.normal_()
        graph.replay()
        seen.append(found.clone())
        assert torch.equal(seen[-1], call())
        assert bool(seen[-1].isfinite().all())
        assert bool(seen[-1].any())
    assert not torch.equal(seen[0], seen[1])


@pytest.mark.parametrize("saved", [True, False])
def test_selective_checkpointing_runs_attention_as_often_as_it_was_told(saved, device, monkeypatch):
    from torch.utils.checkpoint import (
        CheckpointPolicy,
        checkpoint,
        create_selective_checkpoint_contexts,
    )

    from adasplash.kernels.attention import forward

    runs = []
    real = forward.launch_forward
    monkeypatch.setattr(forward, "launch_forward", lambda *x: (runs.append(1), real(*x))[1])

    def policy(context, op, *args, **kwargs):
        keep = saved and op == torch.ops.adasplash.attention_forward.default
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    torch.manual_seed(0)
    length = 1000 if device.type == "cuda" else 20
    leaves = [torch.randn(1, 2, length, 16, device=device, requires_grad=True) for _ in range(3)]

    def block(q, k, v):
        return adasplash(2 * q, k, v, backend="triton").square()

    want = torch.autograd.grad(block(*leaves).sum(), leaves)
    runs.clear()
    output = checkpoint(
        block, *leaves, use_reentrant=False,
        context_fn=lambda: create_selective_checkpoint_contexts(policy),
    )  # fmt: skip
    found = torch.autograd.grad(output.sum(), leaves)
    assert len(runs) == (1 if saved else 2)
    assert all(torch.equal(x, y) for x, y in zip(found, want, strict=True))
