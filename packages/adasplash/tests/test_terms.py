"""Dropout, ALiBi, bias, cap and packed sequences in the kernels, against the float64 reference."""

import itertools

import pytest
import torch
import triton
import triton.language as tl
from torch.utils.checkpoint import checkpoint

from adasplash import adasplash
from adasplash.kernels.attention import dropout, forward, op, operators
from adasplash.kernels.attention.philox import words
from adasplash.kernels.attention.scores import tanh
from adasplash.kernels.attention.terms import Terms, brought_close, is_close
from adasplash.testing import clustered_inputs, random_inputs, relative_error

ROWS, KEYS = 20, 45


def _gradients(leaves, extra, grad, **options):
    """Return the output and the gradients of all tensors, from the same seed in every call."""
    leaves = [x.clone().requires_grad_() for x in leaves]
    more = {name: x.detach().requires_grad_() for name, x in extra.items()}  # strides as they are
    torch.manual_seed(5)
    output = adasplash(*leaves, **more, **options)
    output.backward(grad)
    return [output.detach(), *(x.grad for x in (*leaves, *more.values()))]


def _compare(q, k, v, extra=None, budget=5e-6, **options):
    """Compare kernels in the dtype of q with the reference in float64."""
    extra = extra or {}
    grad = torch.randn((*q.shape[:-1], v.shape[-1]), device=q.device).to(q.dtype)
    found = _gradients((q, k, v), extra, grad, backend="triton", **options)
    wide = [x.double() for x in (q, k, v)]
    more = {name: x.double() for name, x in extra.items()}
    want = _gradients(wide, more, grad.double(), backend="reference", **options)
    for name, x, y in zip(["output", "dq", "dk", "dv", *extra], found, want, strict=True):
        assert relative_error(x, y) < budget or y.abs().max() < 1e-12, name
    return found


def _inputs(device, heads_kv=1):
    return random_inputs(2, 2, heads_kv, ROWS, KEYS, 16, 8, device=device)


@triton.jit
def _draw(seed_ptr, out_ptr, plane, first, start, M: tl.constexpr, N: tl.constexpr):
    drawn = words(tl.load(seed_ptr), plane, first, start, M, N)
    places = tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(out_ptr + places, drawn)


@triton.jit
def _bend(x_ptr, size: tl.constexpr):
    places = tl.arange(0, size)
    tl.store(x_ptr + places, tanh(tl.load(x_ptr + places)))


@pytest.mark.parametrize("seed", [0, 2**62 - 12345])
def test_the_kernel_and_its_twin_keep_the_same_weights(seed, device):
    seed = torch.tensor([seed], device=device)
    drawn = torch.empty(16, 32, dtype=torch.int32, device=device)
    _draw[(1,)](seed, drawn, 3, 100, 64, 16, 32)
    rows = torch.arange(100, 116, device=device)
    for p in (0.1, 0.5, 0.999):
        keep = dropout.kept(seed, torch.tensor(3, device=device), rows, 96, p)
        assert torch.equal(drawn >= dropout.cut(p), keep[:, 64:])
        assert keep.float().mean().item() == pytest.approx(1 - p, abs=0.05)


def test_words_are_those_of_the_published_generator():
    """Known answers for Philox 4x32 with 7 rounds, from the tests of its authors' Random123."""
    zeros = torch.zeros(1, dtype=torch.int64)
    state = [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]
    for place, word in enumerate(state):
        signed = word - 2**32 if word >= 2**31 else word
        for p in ((signed + 2**31) / 2**32, (signed + 1 + 2**31) / 2**32):
            keep = dropout.kept(zeros, zeros[0], zeros, 4, p)[0, place]
            assert keep.item() == (signed >= dropout.cut(p))


@pytest.mark.parametrize("alpha", [1.5, "tensor"])
def test_dropout_equals_the_reference_with_the_same_seed(alpha, device):
    extra = {"alpha": torch.tensor([1.3, 1.7], device=device)} if alpha == "tensor" else {}
    _compare(*_inputs(device), extra, budget=5e-5, dropout_p=0.3)


def test_dropout_repeats_under_a_seed_and_differs_between_calls(device):
    q, k, v = (x[:1, :1] for x in _inputs(device))
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(adasplash(q, k, v, dropout_p=0.5, backend="triton"))
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    assert not torch.equal(runs[2], adasplash(q, k, v, dropout_p=0.5, backend="triton"))


def test_the_mean_over_dropout_is_the_output_without(device):
    q, k, v = (x[:1, :1] for x in _inputs(device))
    want = adasplash(q, k, v, backend="reference")
    torch.manual_seed(0)
    runs = [adasplash(q, k, v, dropout_p=0.2, backend="reference") for _ in range(300)]
    assert relative_error(torch.stack(runs).mean(0), want) < 0.06


def test_checkpointing_drops_the_same_weights(device):
    leaves = [x[:1].requires_grad_() for x in _inputs(device)]

    def block(q, k, v):
        return adasplash(2 * q, k, v, dropout_p=0.4, backend="triton").square()

    torch.manual_seed(3)
    want = torch.autograd.grad(block(*leaves).sum(), leaves)
    torch.manual_seed(3)
    output = checkpoint(block, *leaves, use_reentrant=False)
    found = torch.autograd.grad(output.sum(), leaves)
    assert all(torch.equal(x, y) for x, y in zip(found, want, strict=True))


@pytest.mark.parametrize("shape", [(2,), (2, 2)])
@pytest.mark.parametrize("options", [{}, {"is_causal": False, "window": (15, 4)}])
def test_slopes_equal_the_reference(shape, options, device):
    _compare(*_inputs(device), {"alibi_slopes": torch.rand(shape, device=device) * 0.3}, **options)


@pytest.mark.parametrize("options", [{}, {"scale": -0.7, "is_causal": False}])
def test_softcap_equals_the_reference(options, device):
    _compare(*_inputs(device), softcap=1.5, **options)


def test_tanh_is_exact_to_rounding(device):
    x = torch.cat([torch.linspace(-1, 1, 2000), torch.linspace(-30, 30, 48)]).to(device)
    bent = x.clone()
    _bend[(1,)](bent, 2048)
    want = x.double().tanh()
    assert ((bent - want).abs() <= 1e-6 * want.abs()).all()


@pytest.mark.parametrize(
    "shape", [(2, 2, ROWS, KEYS), (1, 2, ROWS, KEYS), (2, 1, 1, KEYS), (ROWS, KEYS), (KEYS,)]
)
def test_bias_equals_the_reference(shape, device):
    _compare(*_inputs(device), {"attn_bias": torch.randn(shape, device=device)}, is_causal=False)


@pytest.mark.parametrize("layout", ["turned", "shifted", "shared", "one row for all keys"])
def test_a_bias_in_any_layout_is_read_by_neighbouring_keys(layout, device):
    table = torch.randn(2, 60, 60, device=device)
    bias = {
        "turned": table[:, :KEYS, :ROWS].mT,
        "shifted": table[:, :ROWS, 1 : KEYS + 1],
        "shared": table[:1, :ROWS, :KEYS].expand(2, -1, -1),
        "one row for all keys": table[:, :ROWS, :1].expand(-1, -1, KEYS),
    }[layout][None]
    close = brought_close(bias)
    assert torch.equal(close, bias)
    assert not is_close(bias)
    assert is_close(close)
    heads = 1 if layout == "shared" else 2
    assert close.untyped_storage().nbytes() == 4 * heads * ROWS * 48  # what is shared, once
    assert brought_close(close) is close
    _compare(*_inputs(device), {"attn_bias": bias}, is_causal=False)


def test_a_bias_of_whole_rows_changes_nothing_and_has_no_gradient(device):
    q, k, v = _inputs(device)
    grad = torch.randn(2, 2, ROWS, 8, device=device)
    bias = {"attn_bias": torch.randn(2, ROWS, 1, device=device)}
    found = _gradients((q, k, v), bias, grad, backend="triton")
    want = _gradients((q, k, v), {}, grad, backend="triton")
    for x, y in zip(found, want, strict=False):
        assert relative_error(x, y) < 1e-5
    assert found[4].eq(0).all()


def test_an_infinite_bias_hides_and_rows_without_keys_give_zeros(device):
    q, k, v = _inputs(device)
    bias = torch.randn(ROWS, KEYS, device=device)
    bias[torch.rand(ROWS, KEYS, device=device) < 0.4] = -torch.inf
    bias[7] = -torch.inf
    found = _compare(q, k, v, {"attn_bias": bias}, is_causal=False)
    assert found[0][:, :, 7].eq(0).all()
    assert found[1][:, :, 7].eq(0).all()
    assert found[4][bias == -torch.inf].eq(0).all()
    assert all(x.isfinite().all() for x in found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_all_at_once_equal_the_reference(dtype, device):
    q, k, v = (x.to(dtype) for x in _inputs(device, heads_kv=2))
    extra = {
        "alibi_slopes": torch.rand(2, device=device) * 0.1,
        "attn_bias": torch.randn(2, ROWS, KEYS, device=device),
        "alpha": torch.tensor([1.3, 1.7], device=device),
    }
    mask = torch.rand(2, KEYS, device=device) > 0.3
    budget = 5e-5 if dtype is torch.float32 else 1e-2
    _compare(q, k, v, extra, budget, softcap=3.0, dropout_p=0.2, key_padding_mask=mask)


def test_skipping_blocks_changes_no_bit_whatever_shapes_the_scores(device):
    q, k, v = clustered_inputs(1, 2, 150, 16, 8.0, dtype=torch.float32, device=device)
    terms = Terms(
        slopes=torch.full((1, 2), 0.2, device=device),
        bias=torch.randn(1, 1, 150, 150, device=device),
        softcap=5.0,
    )
    skipped, visited = (
        forward.launch_forward(q, k, v, None, None, 0.25, True, None, terms, skip=skip)
        for skip in (True, False)
    )
    assert (skipped[2][:, :, -1] != 0b11111).any()  # the last tile sees five blocks
    for x, y in zip(skipped, visited, strict=True):
        assert torch.equal(x, y)


BOUNDS_Q, BOUNDS_K = [0, 3, 3, 40, 74], [0, 20, 27, 27, 70]


def _packed(device):
    q = 2 * torch.randn(74, 2, 16, device=device)
    k, v = torch.randn(70, 1, 16, device=device), torch.randn(70, 1, 8, device=device)
    bounds = (torch.tensor(x, device=device) for x in (BOUNDS_Q, BOUNDS_K))
    return (q, k, v), dict(zip(("cu_seqlens_q", "cu_seqlens_k"), bounds, strict=True))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"is_causal": False, "window": (20, 3)},
        {"dropout_p": 0.2, "softcap": 3.0},
        {"max_seqlen_q": 40, "max_seqlen_k": 50},
    ],
)
def test_packed_sequences_in_one_launch_equal_the_reference(options, device, monkeypatch):
    runs = []
    real = forward.launch_forward
    monkeypatch.setattr(forward, "launch_forward", lambda *x: (runs.append(1), real(*x))[1])
    tensors, bounds = _packed(device)
    extra = {"alibi_slopes": torch.rand(2, device=device) * 0.1} if "softcap" in options else {}
    _compare(*tensors, extra, **bounds, **options)
    assert len(runs) == 1


def test_packed_sequences_have_the_bits_of_each_alone(device):
    (q, k, v), bounds = _packed(device)
    grad = torch.randn(74, 2, 8, device=device)
    found = _gradients((q, k, v), {}, grad, backend="triton", **bounds)
    for i, (start, stop) in enumerate(itertools.pairwise(BOUNDS_Q)):
        first, end = BOUNDS_K[i : i + 2]
        rows, keys = slice(start, stop), slice(first, end)
        if start == stop or first == end:
            assert all(x[rows].eq(0).all() for x in found[:2])
            assert all(x[keys].eq(0).all() for x in found[2:])
            continue
        one = [x[None, part].transpose(1, 2) for x, part in ((q, rows), (k, keys), (v, keys))]
        its = _gradients(one, {}, grad[None, rows].transpose(1, 2), backend="triton")
        for x, part, y in zip(found, (rows, rows, keys, keys), its, strict=True):
            assert torch.equal(x[part], y[0].transpose(0, 1))


def test_a_nan_stays_in_its_sequence(device):
    tensors, bounds = _packed(device)
    grad = torch.randn(74, 2, 8, device=device)
    want = _gradients(tensors, {}, grad, backend="triton", **bounds)
    for x in tensors:
        x[2] = torch.nan  # of the first sequence
    found = _gradients(tensors, {}, grad, backend="triton", **bounds)
    assert found[0][2].isnan().all()
    for x, y, first in zip(found, want, (3, 3, 20, 20), strict=True):
        assert torch.equal(x[first:], y[first:])


def test_bounds_that_nobody_looked_at_touch_no_memory_of_others(device):
    x = torch.randn(1, 1, 30, 16, device=device, requires_grad=True)
    for places, rows in (([0, 10, 20], 20), ([0, 10, 99], 30), ([0, 10, 5], 10)):
        bounds = torch.tensor(places, dtype=torch.int32, device=device)
        terms = Terms(bounds_q=bounds, bounds_k=bounds)
        output = operators.attend(x, x, x, None, None, (0.25, True, -1, -1), terms, direct=True)
        assert output.isfinite().all()
        assert output[:, :, rows:].eq(0).all()
        (grad,) = torch.autograd.grad(output.sum(), x)
        assert grad.isfinite().all()
        assert grad[:, :, rows:].eq(0).all()


def test_torch_knows_the_operator_with_all_its_terms(device):
    q, k, v = (x[:1, :, :9].requires_grad_() for x in _inputs(device))
    slopes = torch.rand(1, 2, device=device, requires_grad=True)
    bias = torch.randn(1, 2, 9, 9, device=device, requires_grad=True)
    terms = Terms(slopes, bias, torch.tensor([7], device=device), softcap=3.0, dropout=0.1)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    settings = (None, None, 0.25, True, -1, -1)
    torch.library.opcheck(operators._forward, (q, k, v, *settings, *terms), test_utils=checks)
    bounds = torch.tensor([0, 2, 9], dtype=torch.int32, device=device)
    terms = Terms(bounds_q=bounds, bounds_k=bounds, max_k=8)
    torch.library.opcheck(
        operators._forward, (q, k, v, *settings, *terms), test_utils="test_faketensor"
    )


def test_packed_sequences_count_as_long_as_the_longest(device):
    from torch.utils.flop_counter import FlopCounterMode

    tensors, bounds = _packed(device)
    for longest, scores in ((None, 4 * 37 * 43), (10**4, 74 * 70)):  # never more than all tokens
        lengths = {"max_seqlen_q": longest, "max_seqlen_k": longest}
        with FlopCounterMode(display=False) as counter:
            adasplash(*tensors, backend="triton", **bounds, **lengths)
        assert counter.get_total_flops() == min(74 * 70, scores) * 2 * 2 * (16 + 8)


def test_the_longest_sequence_is_read_from_the_bounds_unless_it_is_told(device, monkeypatch):
    asked = []
    real = op._longest
    monkeypatch.setattr(op, "_longest", lambda x: (asked.append(1), real(x))[1])
    tensors, bounds = _packed(device)
    want = adasplash(*tensors, backend="reference", **bounds)
    assert len(asked) == 2
    told = adasplash(*tensors, backend="reference", max_seqlen_q=37, max_seqlen_k=43, **bounds)
    assert len(asked) == 2
    assert torch.equal(told, want)
    assert real(bounds["cu_seqlens_q"]) == 37


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_smallest_number_as_a_bias_hides_a_key(dtype, device):
    """As models of transformers write their masks; a row of nothing else gives zeros."""
    q, k, v = (x[:1] for x in _inputs(device))
    hidden = torch.rand(1, 1, ROWS, KEYS, device=device) < 0.3
    hidden[0, :, 3] = True
    zeros = torch.zeros(hidden.shape, dtype=dtype, device=device)
    found = [
        _compare(q, k, v, attn_bias=zeros.masked_fill(hidden, low))
        for low in (torch.finfo(dtype).min, -torch.inf)
    ]
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][0][0, :, 3].count_nonzero() == found[0][1][0, :, 3].count_nonzero() == 0
