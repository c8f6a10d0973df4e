"""What `torch.func` makes of the functions, forward mode, and export for any length."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jvp, vmap

from adasplash import EntmaxAttention, adasplash, entmax, entmax_loss
from adasplash.testing import random_inputs

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")
STEP = 1e-6


def _numbers(*shape):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def _slope(function, inputs, tangents):
    ahead, behind = (
        function(*(x + sign * STEP * t for x, t in zip(inputs, tangents, strict=True)))
        for sign in (1, -1)
    )
    return (ahead - behind) / (2 * STEP)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_gradients_of_functions_are_those_of_autograd(backend, device):
    q, k, v = (x.requires_grad_() for x in random_inputs(1, 2, 1, 12, 12, 16, device=device))
    alpha = torch.tensor([1.2, 1.6], device=device)

    def loss(q, alpha, mask):
        output = adasplash(q, k, v, alpha, key_padding_mask=mask, backend=backend)
        return output.square().sum()

    masks = torch.ones(2, 1, 12, dtype=torch.bool, device=device)
    masks[1, :, 7] = False
    leaf = alpha.clone().requires_grad_()
    wanted = [torch.autograd.grad(loss(q, leaf, mask), (q, leaf)) for mask in masks]
    found = grad(loss, (0, 1))(q, alpha, masks[0])
    each = vmap(grad(loss, (0, 1)), (None, None, 0))(q, alpha, masks)
    for place in range(2):
        want = torch.stack([one[place] for one in wanted])
        assert torch.allclose(found[place], want[0], rtol=1e-4, atol=1e-5)
        assert torch.allclose(each[place], want, rtol=1e-4, atol=1e-5)


def test_gradients_of_a_layer_of_every_sample():
    layer, x = EntmaxAttention(8, 2, alpha="learned"), torch.randn(3, 6, 8)
    parameters = dict(layer.named_parameters())

    def loss(parameters, x):
        return functional_call(layer, parameters, (x[None],)).square().sum()

    each = vmap(grad(loss), (None, 0))(parameters, x)
    layer(x).square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert torch.allclose(each[name].sum(0), parameter.grad, atol=1e-5)


@pytest.mark.parametrize("alpha", [1.0, 1.3, 1.5, 2.0])
def test_forward_mode_of_the_map_and_the_loss(alpha):
    x, tangent = _numbers(2, 4, 7).unbind(0)
    target = torch.tensor([1, 6, 0, 2])
    for function in (lambda x: entmax(x, alpha), lambda x: entmax_loss(x, target, alpha)):
        want = _slope(function, (x,), (tangent,))
        assert torch.allclose(jvp(function, (x,), (tangent,))[1], want, atol=1e-8)
    with forward_ad.dual_level():
        dual = entmax(forward_ad.make_dual(x, tangent), alpha)
        found = forward_ad.unpack_dual(dual).tangent
    assert torch.allclose(found, _slope(lambda x: entmax(x, alpha), (x,), (tangent,)), atol=1e-8)


def test_forward_mode_in_alpha():
    x, tangent = _numbers(2, 4, 7).unbind(0)
    alpha, moved = torch.tensor([[1.1], [1.4], [1.5], [1.9]]).double(), _numbers(4, 1)
    want = _slope(entmax, (x, alpha), (tangent, moved))
    assert torch.allclose(jvp(entmax, (x, alpha), (tangent, moved))[1], want, atol=1e-7)


def test_hessians_of_the_map_and_of_attention():
    x = _numbers(6)
    k, v = _numbers(2, 1, 1, 5, 4).unbind(0)
    q = _numbers(1, 1, 2, 4)
    for function, inputs in (
        (lambda x: entmax(x, 1.4).square().sum(), x),
        (lambda q: adasplash(q, k, v, is_causal=False).square().sum(), q),
    ):
        found = hessian(function)(inputs)
        want = torch.autograd.functional.hessian(function, inputs)
        assert torch.allclose(found, want)
        assert want.abs().max() > 0.01


def test_the_kernels_refuse_forward_mode(device):
    q, k, v = random_inputs(1, 1, 1, 8, 8, 16, device=device)

    def attend(q):
        return adasplash(q, k, v, backend="triton")

    with pytest.raises(NotImplementedError, match="no forward-mode derivatives; use `backend="):
        jvp(attend, (q,), (q,))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="no forward-mode"):
        attend(forward_ad.make_dual(q, q).requires_grad_())


@pytest.mark.parametrize("options", [{}, {"alpha": 1.3, "window": (5, 0)}, {"is_causal": False}])
def test_export_for_any_length(options):
    class Model(torch.nn.Module):
        def forward(self, q, k, v):
            return adasplash(q, k, v, **options)

    shapes = ({2: torch.export.Dim.DYNAMIC},) * 3
    inputs = tuple(random_inputs(1, 2, 2, 20, 20, 16))
    program = torch.export.export(Model(), inputs, dynamic_shapes=shapes).module()
    longer = random_inputs(1, 2, 2, 150, 150, 16)  # more than one tile
    assert torch.allclose(program(*longer), adasplash(*longer, **options), atol=1e-6)
