"""torch.compile traces attention to one graph; in a process without the type checker."""

import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from adasplash import adasplash

_CODE = """
import torch
from adasplash import adasplash, adasplash_decode, page_stats

device = "cuda" if torch.cuda.is_available() else "cpu"
graphs = []
def keep(graph, inputs):
    graphs.append(graph)
    return graph

for backend in ("triton", "reference"):
    for alpha in (1.5, torch.tensor([1.3, 1.6], device=device)):
        graphs.clear()
        def attend(q, k, v):
            return adasplash(q, k, v, alpha, backend=backend)
        compiled = torch.compile(attend, fullgraph=True, dynamic=True, backend=keep)
        for length in (20, 33):
            q, k, v = torch.randn(3, 1, 2, length, 16, device=device).unbind(0)
            assert torch.allclose(compiled(q, k, v), attend(q, k, v), atol=1e-6)
        # The reference goes through its tiles in Python: one graph for each length.
        assert len(graphs) == (1 if backend == "triton" else 2), len(graphs)

def attend(q, k, v):
    return adasplash(q, k, v, backend="triton")

q, k, v = (torch.randn(1, 2, 20, 16, device=device).requires_grad_() for _ in range(3))
compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
want = torch.autograd.grad(attend(q, k, v).square().sum(), (q, k, v))
found = torch.autograd.grad(compiled(q, k, v).square().sum(), (q, k, v))
assert all(torch.equal(x, y) for x, y in zip(want, found, strict=True))

slopes, bias = (torch.rand(2, device=device), torch.randn(20, device=device))
def attend(q, k, v, slopes, bias):
    options = {"alibi_slopes": slopes, "attn_bias": bias, "softcap": 3.0, "dropout_p": 0.3}
    return adasplash(q, k, v, **options, backend="triton")

inputs = (q, k, v, slopes.requires_grad_(), bias.requires_grad_())
compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
runs = []
for call in (attend, compiled):
    torch.manual_seed(3)
    output = call(*inputs)
    runs.append([output, *torch.autograd.grad(output.square().sum(), inputs)])
assert all(torch.equal(x, y) for x, y in zip(*runs, strict=True))

bounds = torch.tensor([0, 9, 20], dtype=torch.int32, device=device)
def attend(q, k, v, bounds):
    return adasplash(q, k, v, cu_seqlens_q=bounds, max_seqlen_q=11, backend="triton")

packed = [x[0].transpose(0, 1) for x in (q, k, v)]
compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
assert torch.equal(compiled(*packed, bounds), attend(*packed, bounds))

k, v = torch.randn(2, 2, 1, 128, 16, device=device).unbind(0)
stats, table = page_stats(k), torch.arange(2, device=device)[:, None]
lengths = torch.tensor([50, 64], device=device)
for rest in ((), (None, stats), (table.flip(0), None)):
    def decode(q, lengths):
        size = 64 if len(rest) and rest[0] is not None else 128
        return adasplash_decode(q, k[:, :, :size], v[:, :, :size], lengths, *rest, backend="triton")
    compiled = torch.compile(decode, fullgraph=True, backend="aot_eager")
    for added in (0, -10):
        q, now = torch.randn(2, 2, 1, 16, device=device), (lengths + added).clamp_max(64)
        assert torch.equal(compiled(q, now), decode(q, now))
print("compiled")
"""


def test_one_graph_for_all_lengths_and_the_same_gradients(monkeypatch):
    if not torch.cuda.is_available():
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    done = subprocess.run([sys.executable, "-c", _CODE], capture_output=True, text=True)
    assert done.stdout.strip() == "compiled", done.stderr[-2000:]


class _Watch(TorchDispatchMode):
    """Keep the names of the operators of this package."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "adasplash":
            self.seen.append(func.name())
        return func(*args, **(kwargs or {}))


def test_a_dispatch_mode_sees_the_operators_and_changes_no_bit(device):
    leaves = [torch.randn(1, 2, 20, 16, device=device, requires_grad=True) for _ in range(3)]
    want = adasplash(*leaves, backend="triton")
    wanted = torch.autograd.grad(want.square().sum(), leaves)
    with _Watch() as watch:
        found = adasplash(*leaves, backend="triton")
        grads = torch.autograd.grad(found.square().sum(), leaves)
    assert watch.seen == ["adasplash::attention_forward", "adasplash::attention_backward"]
    assert torch.equal(found, want)
    assert all(torch.equal(x, y) for x, y in zip(grads, wanted, strict=True))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_gives_what_a_loop_gives(device):
    q, k, v = torch.randn(3, 3, 1, 2, 20, 16, device=device).unbind(0)

    def attend(q, k, v):
        return adasplash(q, k, v, backend="triton")

    want = torch.stack([attend(*x) for x in zip(q, k, v, strict=True)])
    assert torch.equal(torch.vmap(attend)(q, k, v), want)


def test_flops_are_counted_as_those_of_dense_attention(device):
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention
    from torch.utils.flop_counter import FlopCounterMode

    leaves = [torch.randn(1, 2, 20, 16, device=device, requires_grad=True) for _ in range(3)]
    counts = []
    for attend in (
        lambda: adasplash(*leaves, backend="triton"),
        lambda: scaled_dot_product_attention(*leaves, is_causal=True),
    ):
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as forward:
            output = attend()
        with FlopCounterMode(display=False) as backward:
            output.sum().backward()
        counts.append((forward.get_total_flops(), backward.get_total_flops()))
    ours, dense = counts
    assert ours[0] == dense[0] == 2 * 2 * 20 * 20 * 32
    assert ours[1] == dense[1] + dense[0] // 2  # the scores are computed again


def test_selective_checkpointing_keeps_the_output(device):
    from torch.utils.checkpoint import (
        CheckpointPolicy,
        checkpoint,
        create_selective_checkpoint_contexts,
    )

    runs = []

    def policy(context, op, *args, **kwargs):
        if op == torch.ops.adasplash.attention_forward.default and not context.is_recompute:
            runs.append(op)
        keep = op == torch.ops.adasplash.attention_forward.default
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    leaves = [torch.randn(1, 2, 20, 16, device=device, requires_grad=True) for _ in range(3)]

    def block(q, k, v):
        return adasplash(2 * q, k, v, backend="triton").square()

    want = torch.autograd.grad(block(*leaves).sum(), leaves)
    output = checkpoint(
        block, *leaves, use_reentrant=False,
        context_fn=lambda: create_selective_checkpoint_contexts(policy),
    )  # fmt: skip
    found = torch.autograd.grad(output.sum(), leaves)
    assert len(runs) == 1
    assert all(torch.equal(x, y) for x, y in zip(found, want, strict=True))
