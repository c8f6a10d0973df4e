"""The Triton kernels against their PyTorch twins; without a GPU, in Triton's interpreter."""

import pytest
import torch

from hetero_sd.kernels.decode import REFERENCE, pick_steps, reference
from hetero_sd.llama import LlamaBody, LlamaRunner
from hetero_sd.testing import make_model

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def noise(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(DEVICE)


@pytest.mark.parametrize(("tokens", "hidden"), [(1, 32), (5, 100)])
@pytest.mark.parametrize("adds", [True, False])
def test_add_rms_norm(tokens, hidden, adds):
    from hetero_sd.kernels.decode.kernel import launch_add_rms_norm

    x, weight = noise(tokens, hidden), noise(hidden, seed=2)
    y = noise(tokens, hidden, seed=1) if adds else None
    found = launch_add_rms_norm(x, y, weight, 1e-5)
    for mine, wanted in zip(found, reference.add_rms_norm(x, y, weight, 1e-5), strict=True):
        torch.testing.assert_close(mine, wanted)


@pytest.mark.parametrize(
    ("rows", "width", "heads", "kv_heads", "dim", "ends"),
    [(1, 1, 4, 2, 16, [0]), (2, 3, 4, 4, 8, [70, 2]), (3, 2, 6, 2, 24, [5, 129, 64])],
)
def test_rope_and_attention(rows, width, heads, kv_heads, dim, ends):
    from hetero_sd.kernels.decode.kernel import launch_attend, launch_rope_store

    capacity = 200
    q, k, v = (
        noise(rows, width, n, dim, seed=i) for i, n in enumerate([heads, kv_heads, kv_heads])
    )
    cos, sin = noise(capacity, dim, seed=4), noise(capacity, dim, seed=5)
    places = (torch.tensor(ends)[:, None] + torch.arange(width)).to(DEVICE)
    # A layer of a larger cache, filled with what must not be read beyond each position.
    caches = [noise(2, rows, kv_heads, capacity, dim, seed=6 + i)[1] for i in range(2)]
    twins = [cache.clone() for cache in caches]
    turned = launch_rope_store(q, k, v, cos, sin, places, *caches)
    wanted = reference.rope_store(q, k, v, cos, sin, places, *twins)
    torch.testing.assert_close(turned, wanted)
    for cache, twin in zip(caches, twins, strict=True):
        torch.testing.assert_close(cache, twin)
    found = launch_attend(turned, *caches, places)
    for cache in caches:
        for row, end in enumerate(ends):
            cache[row, :, end + width :] = float("nan")
    twins = [cache.nan_to_num() for cache in caches]
    extent = max(ends) + width
    torch.testing.assert_close(found, reference.attend(wanted, *twins, places, extent))
    torch.testing.assert_close(launch_attend(turned, *caches, places), found)


@torch.no_grad()
def test_ids_and_positions_may_be_parts_of_wider_tensors(tokenizers):
    """As those of a graph are, whose buffer is as wide as the widest graph."""
    model = make_model(tokenizers["characters"], 1, layers=2).to(DEVICE)
    given = torch.tensor([[[3, 1, 4, 9, 9], [1, 5, 2, 9, 9]], [[0, 1, 2, 7, 7], [4, 5, 6, 7, 7]]])
    given = given.to(DEVICE)
    found = []
    for backend in ("triton", "reference"):
        body = LlamaBody(model, backend)
        cache = noise(2, 2, 2, body.kv_heads, 8, body.dim_head)
        ids, places = given[0, :, :3], given[1, :, :3]
        found.append(body(ids, places, cache[0], cache[1], 8, body.rotary_table(8)))
    torch.testing.assert_close(*found, atol=2e-5, rtol=1e-4)


def test_swiglu():
    from hetero_sd.kernels.decode.kernel import launch_swiglu

    gate, up = noise(3, 700), noise(3, 700, seed=1)
    torch.testing.assert_close(launch_swiglu(gate, up), reference.swiglu(gate, up))


@pytest.mark.parametrize("rows", [1, 2, 7, 16])
def test_products_of_few_rows(rows):
    from hetero_sd.kernels.decode.products import (
        CONFIGS,
        launch_gated,
        launch_products,
        padded,
    )

    x = noise(rows, 300)
    weights = [noise(size, 300, seed=size) for size in (33, 5, 17)]
    for config in CONFIGS[padded(rows)]:
        (alone,) = launch_products(x, weights[:1], config)
        together = launch_products(x, weights, config)
        assert torch.equal(alone, together[0])
        for found, weight in zip(together, weights, strict=True):
            torch.testing.assert_close(found, x @ weight.T, atol=1e-4, rtol=1e-4)
    gate, up = weights[0] / 9, noise(33, 300, seed=7)
    found = launch_gated(x, (gate, up), config)
    torch.testing.assert_close(found, reference.swiglu(x @ gate.T, x @ up.T), atol=2e-4, rtol=1e-4)


@torch.no_grad()
def test_a_model_by_the_kernels(tokenizers):
    model = make_model(tokenizers["characters"], 1, layers=2).to(DEVICE)
    feeds = [[1, 2, 3, 4], [5]]
    runners = [LlamaRunner(model, 2, backend) for backend in ("triton", "reference")]
    for keep in ([2, 1], [1, 1]):
        found, wanted = (runner.extend(feeds, keep) for runner in runners)
        for mine, theirs in zip(found, wanted, strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)


def test_backends_that_cannot_run_are_refused(monkeypatch):
    cpu = torch.device("cpu")
    assert pick_steps(cpu, torch.float32) is REFERENCE
    with pytest.raises(ValueError, match="`backend` must be 'auto', 'triton' or 'reference'"):
        pick_steps(cpu, torch.float32, "cuda")
    with pytest.raises(ValueError, match="`backend` 'triton' cannot run: its kernels do not"):
        pick_steps(cpu, torch.float64, "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match="`backend` 'triton' cannot run: its kernels need a CUDA"):
        pick_steps(cpu, torch.float32, "triton")
