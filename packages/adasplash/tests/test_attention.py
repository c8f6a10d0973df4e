"""Attention against the float64 oracle, for the reference and for the kernels."""

from contextlib import nullcontext

import pytest
import torch

from adasplash import adasplash
from adasplash.testing import (
    clustered_inputs,
    oracle_attention,
    oracle_weights,
    random_inputs,
    relative_error,
)

BACKENDS = ["reference", "triton"]
# batch, heads, heads_kv, seq_q, seq_k, dim_head, dim_value
SHAPES = {
    "one tile": (1, 1, 1, 33, 33, 16, 16),
    "odd, two tiles": (1, 2, 2, 67, 67, 24, 24),
    "grouped heads, more keys": (2, 4, 2, 9, 70, 16, 40),
    "more queries than keys": (1, 2, 1, 70, 33, 16, 16),
    "one query": (2, 2, 1, 1, 65, 16, 16),
    "one key": (1, 1, 1, 1, 1, 8, 8),
}


def _run(q, k, v, backend, grad=None, **options):
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    output = adasplash(*leaves, backend=backend, **options)
    output.backward(torch.ones_like(output) if grad is None else grad)
    return output.detach(), *(leaf.grad for leaf in leaves)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_output_and_gradients_equal_the_oracle(shape, causal, backend, device):
    q, k, v = random_inputs(*shape, device=device)
    grad = torch.randn(*q.shape[:-1], v.shape[-1], device=device)
    found = _run(q, k, v, backend, grad, is_causal=causal)
    want = oracle_attention(q, k, v, causal, grad=grad)
    for name, x, y in zip(["output", "dq", "dk", "dv"], found, want, strict=True):
        assert relative_error(x, y) < 1e-5 or y.abs().max() < 1e-12, name


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_mask_with_holes_hides_its_keys(backend, device):
    q, k, v = random_inputs(2, 2, 1, 40, 40, 16, device=device)
    mask = torch.rand(2, 40, device=device) > 0.3
    grad = torch.randn_like(q)
    found = _run(q, k, v, backend, grad, key_padding_mask=mask)
    want = oracle_attention(q, k, v, True, mask, grad=grad)
    for x, y in zip(found, want, strict=True):
        assert relative_error(x, y) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_without_a_visible_key_are_zero_with_zero_gradients(backend, device):
    q, k, v = random_inputs(1, 1, 1, 5, 5, 16, device=device)
    mask = torch.tensor([[False, False, True, True, True]], device=device)
    output, dq, dk, dv = _run(q, k, v, backend, key_padding_mask=mask)
    assert output[0, 0, :2].eq(0).all()
    assert dq[0, 0, :2].eq(0).all()
    assert dk[0, 0, :2].eq(0).all()
    assert dv[0, 0, :2].eq(0).all()
    assert all(x.isfinite().all() for x in (output, dq, dk, dv))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_nan_stays_in_its_row(backend, device):
    q, k, v = random_inputs(1, 1, 1, 70, 70, 16, device=device)
    want = adasplash(q, k, v, backend=backend)
    q[0, 0, 66, 3] = torch.nan
    found = adasplash(q, k, v, backend=backend)
    assert found[0, 0, 66].isnan().all()
    others = torch.arange(70, device=device) != 66
    assert torch.equal(found[0, 0, others], want[0, 0, others])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", ["ties", "one huge score", "all far below zero", "shifted"])
def test_hard_scores(case, backend, device):
    q, k, v = random_inputs(1, 1, 1, 34, 34, 16, device=device)
    if case == "ties":
        k[:] = k[:, :, :1]
    elif case == "one huge score":
        k[0, 0, 7] *= 1e3
    elif case == "all far below zero":
        q, k = q.abs() * 100, -k.abs() * 100
    else:
        q[..., 0], k[..., 0] = 40.0, 40.0
    # Huge scores have fewer digits behind the point: the scores themselves are off by more.
    scores = (q.double() @ k.double().mT).abs().max().item() * 16**-0.5 / 2
    output = adasplash(q, k, v, backend=backend)
    error = (output.double() - oracle_attention(q, k, v, True)[0]).abs().max().item()
    assert error < 2e-5 + 2e-6 * scores


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_strides_give_the_same(backend, device):
    q, k, v = random_inputs(2, 2, 2, 35, 35, 16, device=device)
    want = _run(q, k, v, backend)
    views = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    for x, y in zip(_run(*views, backend), want, strict=True):
        assert torch.equal(x, y)
    columns = [x.mT.contiguous().mT for x in (q, k, v)]
    assert torch.equal(adasplash(*columns, backend=backend), want[0])


def test_skipping_blocks_changes_no_bit(device):
    from adasplash.kernels.attention.forward import launch_forward

    q, k, v = random_inputs(1, 2, 2, 200, 200, 16, scale=20.0, device=device)
    skipped = launch_forward(q, k, v, None, None, 0.25, True, None, skip=True)
    visited = launch_forward(q, k, v, None, None, 0.25, True, None, skip=False)
    for x, y in zip(skipped, visited, strict=True):
        assert torch.equal(x, y)


def test_blocks_without_weight_are_not_active(device):
    from adasplash.kernels.attention.forward import launch_forward
    from adasplash.kernels.attention.tiles import tiles_for

    q, k, v = random_inputs(1, 1, 1, 200, 200, 16, scale=60.0, device=device)
    tiles = tiles_for(q, v)
    packed = launch_forward(q, k, v, None, None, 0.25, True, None)[2][0, 0].cpu()
    active = (packed[..., None] >> torch.arange(8) & 1).flatten(1).bool()
    weights = oracle_weights(q, k, True)[0, 0].cpu()
    rows, keys = (-(-200 // size) * size - 200 for size in (tiles.block_m, tiles.block_n))
    blocks = torch.nn.functional.pad(weights, (0, keys, 0, rows))
    blocks = blocks.unflatten(1, (-1, tiles.block_n)).unflatten(0, (-1, tiles.block_m))
    largest = blocks.amax((1, 3))
    assert not active[:, largest.shape[1] :].any()
    active = active[:, : largest.shape[1]]
    assert active[largest > 1e-8].all()
    # Float32 may leave 1e-9 where float64 has nothing, but not in many blocks.
    assert (active & (largest == 0)).sum() < 0.25 * (largest == 0).sum()


@pytest.mark.parametrize("backend", BACKENDS)
def test_results_repeat_bit_for_bit(backend, device):
    q, k, v = random_inputs(1, 4, 2, 66, 66, 16, device=device)
    for x, y in zip(_run(q, k, v, backend), _run(q, k, v, backend), strict=True):
        assert torch.equal(x, y)


def test_a_row_does_not_depend_on_its_neighbours_in_the_batch(device):
    q, k, v = random_inputs(3, 2, 2, 35, 35, 16, device=device)
    whole = adasplash(q, k, v, backend="triton")
    assert torch.equal(whole[1:2], adasplash(q[1:2], k[1:2], v[1:2], backend="triton"))


def test_gradcheck_of_the_reference():
    q, k, v = random_inputs(1, 2, 1, 5, 7, 3, 4, dtype=torch.float64)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    assert torch.autograd.gradcheck(lambda *x: adasplash(*x, backend="reference"), leaves)


def test_only_the_values_may_require_gradients(device):
    q, k, v = random_inputs(1, 1, 1, 20, 20, 16, device=device)
    v.requires_grad_()
    adasplash(q, k, v, backend="triton").sum().backward()
    assert v.grad.isfinite().all()


def test_only_alpha_may_require_gradients(device):
    q, k, v = random_inputs(1, 2, 1, 20, 20, 16, device=device)
    alpha = torch.full((2,), 1.4, device=device, requires_grad=True)
    adasplash(q, k, v, alpha, backend="triton").square().sum().backward()
    assert alpha.grad.isfinite().all()
    assert (alpha.grad != 0).all()


def test_gradients_that_nobody_asked_for_change_no_bit_and_keep_nothing(device):
    q, k, v = random_inputs(1, 2, 1, 20, 20, 16, device=device)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    want = adasplash(*leaves, backend="triton")
    with torch.no_grad():
        found = adasplash(*leaves, backend="triton")
    for output in (found, adasplash(q, k, v, backend="triton")):
        assert torch.equal(output, want)
        assert output.grad_fn is None
    assert want.grad_fn is not None


def test_half_precision_is_as_good_as_a_dense_half_precision_computation(device):
    q, k, v = random_inputs(1, 2, 2, 50, 50, 16, dtype=torch.float16, device=device)
    want = oracle_attention(q, k, v, True)[0]
    for backend in BACKENDS:
        output = adasplash(q, k, v, backend=backend)
        assert output.dtype is torch.float16
        assert relative_error(output, want) < 2e-3


@pytest.mark.parametrize("gain", [0.0, 1.0, 6.0])
def test_short_lists_of_blocks_and_full_ones_agree_with_the_oracle(gain, device):
    q, k, v = clustered_inputs(1, 1, 512, 16, gain, dtype=torch.float16, device=device)
    grad = torch.randn_like(v)
    found = _run(q, k, v, "triton", grad)
    for x, y in zip(found, oracle_attention(q, k, v, True, grad=grad), strict=True):
        assert relative_error(x, y) < 4e-3


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_scale_may_be_zero_or_negative(backend, device):
    q, k, v = random_inputs(1, 2, 1, 40, 40, 16, device=device)
    grad = torch.randn_like(q)
    for scale in (0.0, -0.3):
        found = _run(q, k, v, backend, grad, scale=scale)
        for x, y in zip(found, oracle_attention(q, k, v, True, None, scale, grad), strict=True):
            assert relative_error(x, y) < 1e-5 or y.abs().max() < 1e-12


def test_an_empty_batch_gives_an_empty_output():
    q, k, v = (x[:0] for x in random_inputs(1, 1, 1, 4, 4, 8, 6))
    assert adasplash(q, k, v).shape == (0, 1, 4, 6)


def test_torch_knows_the_operators(device):
    from adasplash.kernels.attention import operators

    q, k, v = random_inputs(1, 2, 1, 20, 20, 16, device=device)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(
        operators._forward, (*leaves, None, None, 0.25, True, -1, -1), test_utils=checks
    )


def test_autocast_computes_in_its_dtype():
    q, k, v = random_inputs(1, 1, 1, 8, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert adasplash(q, k, v.bfloat16()).dtype is torch.bfloat16


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dim", [32, 64, 80, 128, 256])
def test_every_dtype_and_head_size_on_the_gpu(dtype, dim):
    budget = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    q, k, v = random_inputs(2, 4, 2, 257, 300, dim, dtype=dtype, device="cuda")
    grad = torch.randn_like(q)
    found = _run(q, k, v, "triton", grad)
    for x, y in zip(found, oracle_attention(q, k, v, True, grad=grad), strict=True):
        assert relative_error(x, y) < budget


@pytest.mark.parametrize("listened", [False, True])
def test_second_derivatives_of_the_kernels_are_refused(listened, device):
    from torch.utils.flop_counter import FlopCounterMode

    q, k, v = random_inputs(1, 2, 1, 20, 20, 16, device=device)
    q.requires_grad_()

    def twice(backend):
        loss = adasplash(q, k, v, backend=backend).square().sum()
        (once,) = torch.autograd.grad(loss, q, create_graph=True)
        return once.detach(), torch.autograd.grad(once.sum(), q)

    mode = FlopCounterMode(display=False) if listened else nullcontext()
    with mode, pytest.raises(NotImplementedError, match="no second derivatives; use `backend='ref"):
        twice("triton")
    assert twice("reference")[1][0].isfinite().all()


@pytest.mark.parametrize("alpha", [1.5, 2.0, "by head"])
def test_second_derivatives_of_the_reference(alpha):
    alphas = torch.tensor([1.4, 1.7], dtype=torch.float64, requires_grad=True)
    q, k, v = (x.requires_grad_() for x in random_inputs(1, 2, 1, 4, 5, 3, dtype=torch.float64))
    inputs = (q, k, v, alphas) if alpha == "by head" else (q, k, v)

    def attend(q, k, v, alphas=alpha):
        return adasplash(q, k, v, alphas, backend="reference")

    assert torch.autograd.gradgradcheck(attend, inputs)


def test_tensors_without_memory_have_shapes():
    """As accelerate and transformers make models before they load them."""
    q, k, v = (x.to("meta") for x in random_inputs(1, 2, 1, 20, 20, 16, 24))
    assert adasplash(q, k, v).shape == (1, 2, 20, 24)
