"""The dense maps: what defines them, oracles, kernels, and gradients of first and second order."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

from adasplash import entmax, entmax15, sparsemax
from adasplash.kernels.entmax import reference
from adasplash.kernels.entmax.kernel import HELD

ROWS = st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=20)
ALPHAS = (1.01, 1.25, 1.5, 1.8, 2.0)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def kernels(monkeypatch):
    """Run the kernels on the CPU, too: in Triton's interpreter."""

    def fits(rows, each, alpha):
        return rows.dtype != torch.float64 and (each is not None or alpha <= 2)

    monkeypatch.setattr("adasplash.kernels.entmax.op._fits", fits)


def bisected(x, alpha):
    """Return the weights in float64 by bisection of tau: no code of the package."""
    z = (alpha - 1) * x.double()
    high = z.amax(-1, keepdim=True)
    low = high - 1
    for _ in range(200):
        middle = (low + high) / 2
        more = (z - middle).clamp_min(0).pow(1 / (alpha - 1)).sum(-1, keepdim=True) >= 1
        low, high = torch.where(more, middle, low), torch.where(more, high, middle)
    return (z - low).clamp_min(0).pow(1 / (alpha - 1))


def projected(x):
    """Return the projection onto the simplex in float64 by sorting."""
    ordered = x.double().sort(-1, descending=True)[0]
    count = torch.arange(1, x.shape[-1] + 1, device=x.device)
    tau = (ordered.cumsum(-1) - 1) / count
    support = (ordered > tau).sum(-1, keepdim=True)
    return (x.double() - tau.gather(-1, support - 1)).clamp_min(0)


@settings(max_examples=60, deadline=None)
@given(ROWS, st.sampled_from((1.2, 1.5, 2.0, 3.0)))
def test_it_is_a_distribution_that_satisfies_the_definition(row, alpha):
    x = torch.tensor(row, dtype=torch.float64)
    p = entmax(x, alpha)
    assert p.min() >= 0
    assert abs(p.sum().item() - 1) < 1e-9
    # On the support (alpha - 1) x - p^(alpha - 1) is tau; off it scores lie at or below it.
    tau = ((alpha - 1) * x - p ** (alpha - 1))[p > 0]
    assert (tau - tau[0]).abs().max() < 1e-6
    assert ((alpha - 1) * x[p == 0] <= tau[0] + 1e-6).all()


@settings(max_examples=30, deadline=None)
@given(ROWS, st.floats(-20, 20))
def test_a_shift_changes_nothing_and_a_permutation_permutes(row, shift):
    x = torch.tensor(row, dtype=torch.float64)
    assert torch.allclose(entmax15(x), entmax15(x + shift), atol=1e-9)
    order = torch.randperm(len(row))
    assert torch.allclose(entmax15(x)[order], entmax15(x[order]), atol=1e-12)


def test_known_values():
    assert entmax15(torch.zeros(4)).tolist() == [0.25] * 4
    # Two scores: p = (d + sqrt(2 - d^2))^2 / 4 with d = x1 / 2, and all of it from d = 1 on.
    d = 0.6
    want = (d + (2 - d * d) ** 0.5) ** 2 / 4
    assert entmax15(torch.tensor([2 * d, 0.0], dtype=torch.float64))[0].item() == pytest.approx(
        want
    )
    assert entmax15(torch.tensor([2.0, 0.0, -1.0])).tolist() == [1.0, 0.0, 0.0]
    assert sparsemax(torch.tensor([0.5, 0.0, -1.0])).tolist() == [0.75, 0.25, 0.0]
    x = torch.randn(5, 7, dtype=torch.float64)
    assert torch.allclose(entmax(x, 1.0), x.softmax(-1), atol=1e-12)


@pytest.mark.parametrize("n", [1, 3, 16, 100, 1000])
@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernel_and_reference_agree_with_bisection(alpha, n, dtype, kernels):
    x = (3 * torch.randn(4, n, device=DEVICE)).to(dtype)
    want = bisected(x, alpha)
    tolerance = 1e-6 if dtype == torch.float32 else 4e-3
    for p in (entmax(x, alpha), reference.forward(x, alpha)[0]):
        assert p.dtype == dtype
        assert (p.double() - want).abs().max() < tolerance


@pytest.mark.gpu
@pytest.mark.parametrize("n", [7, 1000, 8192, HELD + 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_kernels_on_a_gpu(n, dtype):
    x = (3 * torch.randn(64, n, device="cuda")).to(dtype).requires_grad_()
    tolerance = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 5e-3}[dtype]
    for alpha in ALPHAS:
        p = entmax(x, alpha)
        assert (p.double() - bisected(x.detach(), alpha)).abs().max() < tolerance
        grad = torch.randn_like(p)
        (found,) = torch.autograd.grad(p, x, grad)
        want = reference.backward(p.detach().double(), grad.double(), alpha)
        assert (found.double() - want).norm() <= 4 * tolerance * want.norm()


def test_sparsemax_is_the_projection_onto_the_simplex(kernels):
    for scale in (0.1, 1.0, 30.0):
        x = scale * torch.randn(6, 50, device=DEVICE)
        assert (sparsemax(x).double() - projected(x)).abs().max() < 1e-6


def test_alpha_above_two_is_bisected():
    x = torch.randn(4, 60)
    for alpha in (2.5, 4.0):
        assert (entmax(x, alpha).double() - bisected(x, alpha)).abs().max() < 1e-6


def test_rows_longer_than_the_registers_hold(kernels):
    x = 2 * torch.randn(1, HELD + 5000, device=DEVICE)
    x.requires_grad_()
    p = entmax15(x)
    assert (p.double() - bisected(x.detach(), 1.5)).abs().max() < 1e-6
    grad = torch.randn_like(p)
    p.backward(grad)
    assert torch.allclose(x.grad, reference.backward(p.detach(), grad, 1.5), atol=1e-7)


def test_an_alpha_for_every_slice(kernels):
    x = torch.randn(3, 4, 9, device=DEVICE)
    alpha = torch.tensor([1.0, 1.2, 1.5, 2.0], device=DEVICE)[None, :, None]
    p = entmax(x, alpha)
    for i, each in enumerate(alpha.flatten().tolist()):
        assert torch.allclose(p[:, i], entmax(x[:, i], each), atol=1e-6)
    assert torch.allclose(entmax(x, torch.tensor(1.3)), entmax(x, 1.3), atol=1e-6)
    moved = entmax(x.transpose(1, 2), alpha.transpose(1, 2), dim=1)
    assert torch.allclose(moved.transpose(1, 2), p, atol=1e-6)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_kernel_gradients_equal_those_of_the_reference(alpha, kernels):
    for n in (5, 300):
        x = torch.randn(3, n, device=DEVICE, requires_grad=True)
        p = entmax(x, alpha)
        grad = torch.randn_like(p)
        p.backward(grad)
        want = reference.backward(p.detach().double(), grad.double(), alpha)
        assert (x.grad.double() - want).abs().max() < 2e-6


def test_gradients_of_first_and_second_order_on_any_dimension():
    x = torch.randn(3, 5, 4, dtype=torch.float64, requires_grad=True)
    for dim in (0, 1, -1):
        for alpha in (1.0, 1.3, 1.5):
            assert gradcheck(lambda x, a=alpha, d=dim: entmax(x, a, d), x)
    x = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    for alpha in (1.2, 1.5, 2.0):
        assert gradgradcheck(lambda x, a=alpha: entmax(x, a), x)


def test_the_gradient_of_alpha():
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    for start in (1.02, 1.2, 1.5, 1.9):
        alpha = torch.full((3, 1), start, dtype=torch.float64, requires_grad=True)
        assert gradcheck(entmax, (x, alpha))
    alpha = torch.tensor(1.4, dtype=torch.float64, requires_grad=True)
    assert gradgradcheck(entmax, (x, alpha))


def test_masks_empty_slices_and_nan(kernels):
    x = torch.randn(4, 5, device=DEVICE, requires_grad=True)
    mask = torch.rand(4, 5, device=DEVICE) < 0.6
    mask[0], mask[1:, 0] = False, True
    p = entmax15(x, mask=mask)
    assert (p[~mask] == 0).all()
    assert p[0].eq(0).all()
    assert p[1:].sum(-1).tolist() == pytest.approx([1] * 3)
    p.square().sum().backward()
    assert x.grad.isfinite().all()
    assert (x.grad[~mask] == 0).all()
    x = torch.randn(3, 4, device=DEVICE)
    x[1, 2] = torch.nan
    p = sparsemax(x)
    assert p[1].isnan().all()
    assert p[[0, 2]].isfinite().all()


def test_aux_says_what_the_weights_follow_from(kernels):
    x = torch.randn(3, 7, 5, device=DEVICE)
    p, aux = entmax(x, 1.5, 1, return_aux=True)
    assert aux.tau.shape == aux.support_size.shape == (3, 5)
    again = (x / 2 - aux.tau[:, None]).clamp_min(0).square()
    assert torch.allclose(p, again, atol=1e-6)
    assert torch.equal(aux.support_size, (p > 0).sum(1))


def test_operators_follow_the_rules_of_torch():
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    rows = torch.randn(3, 8, device=DEVICE, requires_grad=True)
    op = torch.ops.adasplash
    torch.library.opcheck(op.entmax_forward.default, (rows, None, 1.5), test_utils=checks)
    p = entmax15(rows).detach()
    torch.library.opcheck(
        op.entmax_backward.default, (p, p, None, 1.5), test_utils=("test_schema", "test_faketensor")
    )


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: entmax(torch.arange(3)), TypeError, "`x` must be a floating point"),
        (lambda: entmax(torch.randn(3), dim=1), ValueError, "`dim` must be between -1 and 0"),
        (lambda: entmax(torch.randn(2, 0)), ValueError, "at least one element"),
        (lambda: entmax(torch.randn(3), 0.9), ValueError, "`alpha` must be at least 1; got 0.9"),
        (lambda: entmax(torch.randn(3), torch.tensor([2.5])), ValueError, "from 1 to 2"),
        (lambda: entmax(torch.randn(2, 3), torch.ones(2)), ValueError, "must broadcast to"),
        (lambda: entmax(torch.randn(3), mask=torch.ones(3)), TypeError, "`mask` must be a bool"),
    ],
)
def test_errors(call, error, message, own_checks):
    with pytest.raises(error, match=message):
        call()
