"""The losses: their definition, margins, gradients, and cross entropy as the limit."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.functional import cross_entropy

from adasplash import Entmax15Loss, EntmaxLoss, SparsemaxLoss, entmax, entmax_loss


def defined(x, target, alpha):
    """Return max over p of (p . x + H(p)) - x_target, by a search on the simplex in float64."""
    x = x.double()
    p = torch.full_like(x, 1 / x.shape[-1]).log().requires_grad_()
    search = torch.optim.LBFGS(
        [p], max_iter=500, line_search_fn="strong_wolfe", tolerance_grad=1e-12
    )

    def value():
        q = p.softmax(-1)
        return (q * x).sum() + (1 - q.pow(alpha).sum()) / (alpha * (alpha - 1))

    def closure():
        search.zero_grad()
        loss = -value()
        loss.backward()
        return loss

    search.step(closure)
    return float(value().detach() - x[target])


@pytest.mark.parametrize("alpha", [1.2, 1.5, 2.0])
def test_the_loss_is_its_definition(alpha):
    x = torch.randn(5, dtype=torch.float64)
    for target in range(5):
        found = float(entmax_loss(x[None], torch.tensor([target]), alpha))
        assert found == pytest.approx(defined(x, target, alpha), abs=1e-6)


@pytest.mark.parametrize("alpha", [1.3, 1.5, 2.0])
def test_the_loss_is_zero_from_the_margin_on(alpha):
    x = torch.tensor([[1 / (alpha - 1), 0.0, -1.0]], dtype=torch.float64)
    zero = torch.tensor([0])
    assert float(entmax_loss(x, zero, alpha)) == pytest.approx(0, abs=1e-12)
    assert float(entmax_loss(x * 0.9, zero, alpha)) > 1e-5


def test_cross_entropy_is_the_limit():
    x, target = torch.randn(6, 9, dtype=torch.float64), torch.randint(9, (6,))
    want = cross_entropy(x, target)
    assert torch.allclose(entmax_loss(x, target, 1.0), want)
    assert torch.allclose(entmax_loss(x, target, 1.0001), want, rtol=1e-3)


def test_gradients():
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([0, 5, -100, 2])
    for alpha in (1.0, 1.5, 2.0):
        assert gradcheck(lambda x, a=alpha: entmax_loss(x, target, a, reduction="none"), x)
    assert gradgradcheck(lambda x: entmax_loss(x, target, 1.5), x)
    (grad,) = torch.autograd.grad(entmax_loss(x, target, 1.5, reduction="sum"), x)
    one = torch.zeros_like(x).scatter(1, target.clamp(min=0)[:, None], 1.0)
    want = (entmax(x, 1.5) - one).masked_fill(target[:, None] < 0, 0.0)
    assert torch.allclose(grad, want)


def test_reductions_and_ignored_rows():
    x, target = torch.randn(2, 3, 5), torch.randint(5, (2, 3))
    target[0, 1] = -1
    each = entmax_loss(x, target, ignore_index=-1, reduction="none")
    assert each.shape == (2, 3)
    assert each[0, 1] == 0
    assert torch.allclose(EntmaxLoss(1.5, -1, "sum")(x, target), each.sum())
    assert torch.allclose(Entmax15Loss(-1)(x, target), each.sum() / 5)
    assert torch.allclose(SparsemaxLoss(-1)(x, target), entmax_loss(x, target, 2.0, -1))
    masked = torch.full((1, 3), -torch.inf)
    masked[0, 1] = 2.0
    assert float(entmax_loss(masked, torch.tensor([1]))) == 0


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"alpha": 0.5}, "`alpha` must be at least 1; got 0.5"),
        ({"reduction": "best"}, "`reduction` must be 'mean', 'sum' or 'none'; got 'best'"),
        ({"target": torch.tensor([0])}, r"`target` must have shape \(2,\)"),
        ({"target": torch.tensor([0, 3])}, "`target` must be below 3"),
    ],
)
def test_errors(kwargs, message, own_checks):
    with pytest.raises(ValueError, match=message):
        entmax_loss(**{"x": torch.randn(2, 3), "target": torch.tensor([0, 1]), **kwargs})


def test_targets_that_are_no_classes(own_checks):
    for target in (torch.tensor([0.0, 1.0]), torch.tensor([True, False])):
        with pytest.raises(TypeError, match="`target` must hold numbers of classes, integers; got"):
            entmax_loss(torch.randn(2, 3), target)
