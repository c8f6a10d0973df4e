"""Alpha and the options that shape the scores, against float64 written out densely."""

import pytest
import torch

from adasplash import adasplash, entmax_attention
from adasplash.kernels.attention.reference import entmax_weights
from adasplash.testing import clustered_inputs, random_inputs, relative_error

ROWS, KEYS = 7, 9


def _inputs(dtype=torch.float32):
    return random_inputs(2, 4, 2, ROWS, KEYS, 8, 6, dtype=dtype)


def _weights(scores, alpha):
    """Return the alpha-entmax in float64 by 200 bisections, or the softmax."""
    scores = scores.double()
    empty = scores.amax(-1, keepdim=True) == -torch.inf
    if alpha == 1.0:
        return scores.softmax(-1).masked_fill(empty, 0.0)
    z = scores * (alpha - 1)
    high = z.amax(-1, keepdim=True).masked_fill(empty, 0.0)
    low = high - 1
    for _ in range(200):
        middle = (low + high) / 2
        total = (z - middle).clamp_min(0).pow(1 / (alpha - 1)).sum(-1, keepdim=True)
        low, high = torch.where(total >= 1, middle, low), torch.where(total >= 1, high, middle)
    return (z - low).clamp_min(0).pow(1 / (alpha - 1))


def _scores(q, k):
    k = k.double().repeat_interleave(q.shape[1] // k.shape[1], 1)
    return q.double() @ k.mT * q.shape[-1] ** -0.5


def _distance():
    return torch.arange(KEYS) - (torch.arange(ROWS)[:, None] + KEYS - ROWS)


def _values(v):
    return v.double().repeat_interleave(2, 1)


@pytest.mark.parametrize("alpha", [1.0, 1.01, 1.25, 1.5, 1.75, 2.0])
@pytest.mark.parametrize("causal", [True, False])
def test_any_alpha(alpha, causal):
    q, k, v = _inputs()
    scores = _scores(q, k)
    if causal:
        scores = scores.masked_fill(_distance() > 0, -torch.inf)
    output = adasplash(q, k, v, alpha, causal)
    assert relative_error(output, _weights(scores, alpha) @ _values(v)) < 1e-5


@pytest.mark.parametrize("window", [None, (1, 0)])
def test_softmax_attention_runs_in_torch_and_in_the_reference(window):
    q, k, v = random_inputs(1, 4, 2, 6, 6, 8)
    want = adasplash(q, k, v, 1.0, window=window, backend="reference")
    assert relative_error(adasplash(q, k, v, 1.0, window=window), want) < 1e-6


def test_entmax_attention_is_not_causal_unless_asked():
    q, k, v = random_inputs(1, 2, 1, 6, 6, 8)
    assert torch.equal(entmax_attention(q, k, v, 1.3), adasplash(q, k, v, 1.3, is_causal=False))
    options = {"is_causal": True, "window": (2, 0), "scale": 0.7}
    assert torch.equal(entmax_attention(q, k, v, **options), adasplash(q, k, v, **options))
    assert not torch.allclose(entmax_attention(q, k, v), adasplash(q, k, v))


def test_alpha_per_head_equals_the_heads_one_by_one():
    q, k, v = random_inputs(1, 3, 3, 6, 6, 8)
    alpha = torch.tensor([1.2, 1.5, 1.9])
    output = adasplash(q, k, v, alpha)
    for head in range(3):
        one = (x[:, head : head + 1] for x in (q, k, v))
        assert relative_error(output[:, head], adasplash(*one, alpha[head].item())[:, 0]) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("alpha", [1.01, 1.2, 2.0])
def test_kernels_equal_the_reference_for_any_alpha(alpha, dtype, device):
    q, k, v = clustered_inputs(1, 2, 150, 16, 0.5, dtype=dtype, device=device)
    grad = torch.randn(v.shape, generator=torch.Generator(device).manual_seed(1), device=device)
    grad = grad.to(dtype)
    alphas = torch.tensor([alpha, 1.6], device=device)
    found = []
    for backend in ("triton", "reference"):
        wide = torch.float32 if backend == "reference" else dtype
        leaves = [x.detach().to(wide).requires_grad_() for x in (q, k, v)]
        leaves.append(alphas.clone().requires_grad_())
        output = adasplash(*leaves, backend=backend)
        output.backward(grad.to(wide))
        found.append([output, *(leaf.grad for leaf in leaves)])
    budget = 5e-5 if dtype is torch.float32 else 5e-3
    for name, x, y in zip(["output", "dq", "dk", "dv", "dalpha"], *found, strict=True):
        # Near alpha 1 the gradient of alpha is a difference times 1e4.
        factor = 100 if name == "dalpha" and alpha == 1.01 else 1
        assert relative_error(x.detach(), y.detach()) < factor * budget, name


@pytest.mark.parametrize("alpha", [1.5, 1.3])
def test_one_query_of_grouped_heads_equals_the_reference(alpha, device):
    q, k, v = random_inputs(2, 6, 2, 1, 70, 16, 8, device=device)
    mask = torch.rand(2, 70, device=device) > 0.3
    found = []
    for backend in ("triton", "reference"):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        output = adasplash(*leaves, alpha, key_padding_mask=mask, backend=backend)
        output.square().sum().backward()
        found.append([output.detach(), *(leaf.grad for leaf in leaves)])
    for x, y in zip(*found, strict=True):
        assert relative_error(x, y) < 2e-5


def test_alpha_as_a_number_equals_alpha_as_a_tensor(device):
    q, k, v = random_inputs(1, 2, 1, 40, 40, 16, device=device)
    for alpha in (1.3, 1.5):
        one = adasplash(q, k, v, alpha, backend="triton")
        other = adasplash(q, k, v, torch.tensor(alpha), backend="triton")
        assert relative_error(one, other) < 1e-6


@pytest.mark.parametrize("shape", [(), (4,), (2, 4)])
def test_gradcheck_with_alpha(shape):
    q, k, v = (x.requires_grad_() for x in _inputs(torch.float64))
    alpha = torch.linspace(1.2, 1.9, max(1, torch.Size(shape).numel())).double().reshape(shape)
    inputs = [q, k, v, alpha.requires_grad_()]
    assert torch.autograd.gradcheck(adasplash, inputs, fast_mode=True)


def test_gradcheck_of_slopes_bias_and_softcap():
    q, k, v = (x.requires_grad_() for x in _inputs(torch.float64))
    slopes = torch.rand(4).double().requires_grad_()
    bias = torch.randn(1, 4, 1, KEYS).double().requires_grad_()

    def attend(q, k, v, slopes, bias):
        return adasplash(q, k, v, alibi_slopes=slopes, attn_bias=bias, softcap=3.0)

    assert torch.autograd.gradcheck(attend, [q, k, v, slopes, bias], fast_mode=True)


@pytest.mark.parametrize("window", [(2, 0), (0, 3), (-1, 1), (1, -1)])
def test_a_window_hides_what_is_far(window):
    q, k, v = _inputs()
    left, right = (10**6 if side == -1 else side for side in window)
    hidden = (_distance() < -left) | (_distance() > right)
    want = _weights(_scores(q, k).masked_fill(hidden, -torch.inf), 1.5) @ _values(v)
    assert relative_error(adasplash(q, k, v, is_causal=False, window=window), want) < 1e-5


@pytest.mark.parametrize("window", [(40, 0), (3, 70), (-1, 5), (60, -1)])
@pytest.mark.parametrize("shape", [(70, 130), (130, 70)])
def test_windows_in_the_kernels_equal_the_reference(window, shape, device):
    q, k, v = random_inputs(1, 1, 1, *shape, 16, device=device)
    grad = torch.randn_like(q)
    found = []
    for backend in ("triton", "reference"):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        output = adasplash(*leaves, is_causal=False, window=window, backend=backend)
        output.backward(grad)
        found.append([output.detach(), *(leaf.grad for leaf in leaves)])
    for x, y in zip(*found, strict=True):
        assert relative_error(x, y) < 2e-5


def test_softcap_slopes_and_bias_shape_the_scores_in_this_order():
    q, k, v = _inputs()
    slopes, bias = torch.rand(2, 4), torch.randn(ROWS, KEYS)
    scores = 2.0 * torch.tanh(_scores(q, k) / 2.0)
    scores = scores - slopes[..., None, None] * _distance().abs() + bias
    want = _weights(scores, 1.5) @ _values(v)
    options = {"alibi_slopes": slopes, "attn_bias": bias, "softcap": 2.0}
    assert relative_error(adasplash(q, k, v, is_causal=False, **options), want) < 1e-5


def test_dropout_drops_and_rescales_and_repeats_in_the_backward():
    q, k, _ = random_inputs(1, 1, 1, 300, 300, 8, scale=0.1)
    identity = torch.eye(300)[None, None].requires_grad_()
    torch.manual_seed(0)
    dropped = adasplash(q, k, identity[..., :256], is_causal=False, dropout_p=0.25)[0, 0]
    whole = adasplash(q, k, identity[..., :256], is_causal=False)[0, 0]
    kept = dropped != 0
    assert torch.allclose(dropped[kept], whole[kept] / 0.75, atol=1e-6)
    share = (kept & (whole > 0)).sum() / (whole > 0).sum()
    assert share.item() == pytest.approx(0.75, abs=0.02)
    dropped.sum().backward()
    # The gradient of a value is the weight that it got in the forward.
    columns = dropped.detach().sum(0)
    assert torch.allclose(identity.grad[0, 0].diagonal()[:256], columns, atol=1e-4)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_packed_sequences_equal_the_sequences_one_by_one(backend, device):
    bounds = [0, 5, 5, 12]
    q, k, v = (torch.randn(12, heads, 16, device=device) for heads in (4, 2, 2))
    packed = adasplash(q, k, v, cu_seqlens_q=torch.tensor(bounds), backend=backend)
    for start, stop in ((0, 5), (5, 12)):
        one = (x[None, start:stop].transpose(1, 2) for x in (q, k, v))
        want = adasplash(*one, backend=backend)[0].transpose(0, 1)
        assert relative_error(packed[start:stop], want) < 1e-6


def test_a_packed_sequence_without_keys_gives_zeros():
    q, k = torch.randn(4, 1, 8), torch.randn(3, 1, 8)
    bounds_q, bounds_k = torch.tensor([0, 2, 4]), torch.tensor([0, 0, 3])
    output = adasplash(q, k, k, cu_seqlens_q=bounds_q, cu_seqlens_k=bounds_k)
    assert output[:2].eq(0).all()
    assert output[2:].ne(0).any()


@pytest.mark.parametrize("alpha", [1.0, 1.3, 2.0])
def test_rows_without_keys_and_nan_rows(alpha):
    scores = torch.randn(4, 6, requires_grad=True)
    hidden = torch.zeros(4, 6, dtype=torch.bool)
    hidden[1] = True
    poison = torch.zeros(4, 6)
    poison[2, 3] = torch.nan
    weights = entmax_weights((scores + poison).masked_fill(hidden, -torch.inf), alpha)
    assert weights[1].eq(0).all()
    assert weights[2].isnan().all()
    assert weights[[0, 3]].sum(-1).sub(1).abs().max() < 1e-5
    weights[[0, 1, 3]].sum().backward()
    assert scores.grad[[0, 1, 3]].isfinite().all()
