"""The mix operation: kernels in Triton's interpreter, or on a GPU, and gradients."""

import pytest
import torch

from mole.kernels.mix import mix, segments

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"


def inputs(tokens=23, distinct=7, experts=3, dim=40, dtype=torch.float32):
    generator = torch.Generator().manual_seed(tokens)
    inverse = torch.randint(max(1, distinct - 2), (tokens,), generator=generator)  # two unused
    gates = torch.randn(tokens, experts, generator=generator).softmax(-1)
    values = torch.randn(distinct, experts, dim, generator=generator)
    grad = torch.randn(tokens, dim, generator=generator)
    gates, values, grad = (t.to(DEVICE, dtype) for t in (gates, values, grad))
    return gates, values, inverse.to(DEVICE), grad


def gradients(backend, gates, values, inverse, grad):
    gates, values = gates.clone().requires_grad_(), values.clone().requires_grad_()
    out = mix(gates, values, inverse, *segments(inverse, len(values)), backend=backend)
    out.backward(grad)
    return out.detach(), gates.grad, values.grad


@pytest.mark.parametrize("shape", [(23, 7, 3, 40), (1, 1, 1, 16), (70, 3, 5, 130), (9, 12, 17, 8)])
def test_kernels_agree_with_float64(shape):
    arguments = inputs(*shape)
    exact = gradients("reference", *(t.double() if t.is_floating_point() else t for t in arguments))
    found = gradients("triton", *arguments)
    for ours, theirs in zip(found, exact, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_gradients_accumulate_in_a_bank(backend):
    gates, values, inverse, grad = inputs()
    _, gates_grad, values_grad = gradients("reference", gates, values, inverse, grad)
    bank = torch.ones(7, 3, 40, device=DEVICE)
    gates = gates.clone().requires_grad_()
    plan = segments(inverse, 7)
    mix(gates, values, inverse, *plan, bank, backend=backend).backward(grad)
    torch.testing.assert_close(bank, 1 + values_grad)
    torch.testing.assert_close(gates.grad, gates_grad)


def test_reference_passes_gradcheck():
    gates, values, inverse, _ = inputs(5, 4, 2, 3, torch.float64)
    gates.requires_grad_()
    values.requires_grad_()
    plan = segments(inverse, 4)
    assert torch.autograd.gradcheck(
        lambda g, v: mix(g, v, inverse, *plan, backend="reference"), (gates, values)
    )


@pytest.mark.skipif(CUDA, reason="opcheck with tensors on the CPU")
def test_operation_is_registered_for_compilation():
    gates, values, inverse, _ = inputs()
    gates.requires_grad_()
    torch.library.opcheck(
        torch.ops.mole.mix.default,
        (gates, values.requires_grad_(), inverse, *segments(inverse, 7), None, False),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )
