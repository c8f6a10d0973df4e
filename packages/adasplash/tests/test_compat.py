"""The published package's names, with its signatures, against the functions they stand for."""

import inspect
from pathlib import Path

import numpy as np
import pytest
import torch

import adasplash
from adasplash.testing import oracle_attention, random_inputs, relative_error

# As `inspect.signature` prints those of adasplash 0.2.2, annotations aside.
PUBLISHED = {
    "adasplash_v1": "q, k, v, alpha=1.5, is_causal=False, varlen=None, niter=10",
    "adasplash_v2": "q, k, v, niter=1, varlen=None",
    "adasplash2": "q, k, v, niter=1, varlen=None",
    "adasplash_no_block_mask": "q, k, v, alpha=1.5, is_causal=False, varlen=None, niter=10",
    "triton_entmax": "x, alpha=1.5, n_iter=2, use_histogram=True, fast_math=False",
    "triton_entmax_v1": "x, alpha=1.5, n_iter=10, fast_math=True",
    "triton_entmax_v2": "x, alpha=1.5, n_iter=2, use_histogram=True, fast_math=False",
    "triton_sparsemax": "x, **kwargs",
    "triton_entmax15": "x, **kwargs",
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_signatures_are_the_published_ones(name):
    parameters = inspect.signature(getattr(adasplash, name)).parameters.values()
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in parameters]
    assert ", ".join(map(str, bare)) == PUBLISHED[name]
    assert name in adasplash.__all__


def test_the_first_seven_arguments_are_the_published_ones():
    parameters = list(inspect.signature(adasplash.adasplash).parameters.values())
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in parameters[:7]]
    published = "q, k, v, alpha=1.5, is_causal=True, varlen=None, niter=None"
    assert ", ".join(map(str, bare)) == published


def test_each_calls_what_it_stands_for():
    q, k, v = random_inputs(2, 4, 2, 40, 40, 16)
    lengths = torch.tensor([40, 23])
    mask = torch.arange(40) < lengths[:, None]
    rows = mask[:, None, :, None]
    causal = oracle_attention(q, k, v, True)[0]
    padded = oracle_attention(q, k, v, False, mask)[0] * rows
    sparse = adasplash.adasplash(q, k, v, 2.0, False)
    assert relative_error(adasplash.adasplash2(q, k, v, 3), causal) < 1e-5
    assert relative_error(adasplash.adasplash_v2(q, k, v, varlen=lengths)[0], causal[0]) < 1e-5
    assert relative_error(adasplash.adasplash_v1(q, k, v, 1.5, False, lengths), padded) < 1e-5
    assert torch.equal(adasplash.adasplash_no_block_mask(q, k, v, 2.0), sparse)
    x = torch.randn(3, 50)
    assert torch.equal(adasplash.triton_entmax(x, 1.3), adasplash.entmax(x, 1.3))
    assert torch.equal(adasplash.triton_entmax_v1(x, 2.0, 4), adasplash.sparsemax(x))
    assert torch.equal(adasplash.triton_sparsemax(x, n_iter=5), adasplash.sparsemax(x))
    assert torch.equal(adasplash.triton_entmax15(x, fast_math=True), adasplash.entmax15(x))


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_rows_behind_a_length_are_zero_with_zero_gradients(backend, device):
    q, k, v = random_inputs(2, 2, 1, 20, 20, 16, device=device)
    # What stands behind the end of a sequence must not matter, whatever it is.
    q[1, :, 13:], k[1, :, 13:], v[1, :, 13:] = -3.0, 1e4, 7.0
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    lengths = torch.tensor([20, 13], device=device)
    output = adasplash.adasplash(*leaves, varlen=lengths, backend=backend)
    grad = torch.randn_like(output)
    output.backward(grad)
    alone = [x[1:, :, :13].clone().requires_grad_() for x in (q, k, v)]
    wanted = adasplash.adasplash(*alone, backend=backend)
    wanted.backward(grad[1:, :, :13])
    assert relative_error(output.detach()[1:, :, :13], wanted.detach()) < 1e-6
    assert (output[1, :, 13:] == 0).all()
    for leaf, other in zip(leaves, alone, strict=True):
        assert relative_error(leaf.grad[1:, :, :13], other.grad) < 1e-5
        assert (leaf.grad[1, :, 13:] == 0).all()


@pytest.mark.usefixtures("own_checks")
def test_lengths_that_do_not_fit_are_refused():
    q, k, v = random_inputs(2, 2, 1, 8, 8, 16)
    lengths = torch.tensor([8, 3])
    attend = adasplash.adasplash
    with pytest.raises(ValueError, match=r"`varlen` must have shape \(2,\), a length for each"):
        attend(q, k, v, varlen=lengths[:1])
    for wrong in (k.shape[2] + 1, -1):
        with pytest.raises(ValueError, match=rf"`varlen` must hold lengths from 0 to .*{wrong}\]"):
            attend(q, k, v, varlen=torch.tensor([3, wrong]))
    with pytest.raises(ValueError, match="`varlen` needs as many queries as keys"):
        attend(q[:, :, :4], k, v, varlen=lengths)
    with pytest.raises(ValueError, match="`key_padding_mask` cannot go with `varlen`"):
        attend(q, k, v, varlen=lengths, key_padding_mask=torch.ones(2, 8, dtype=torch.bool))
    packed = [x[0].transpose(0, 1) for x in (q, k, v)]
    with pytest.raises(ValueError, match="`varlen` cannot go with `cu_seqlens_q`"):
        attend(*packed, varlen=lengths, cu_seqlens_q=torch.tensor([0, 8]))


RECORDED = {
    "v2": ("adasplash_v2", {"niter": 10}),
    "v2 varlen": ("adasplash_v2", {"varlen": torch.tensor([128, 70])}),
    "v1": ("adasplash_v1", {}),
    "v1 alpha 1.25": ("adasplash_v1", {"alpha": 1.25}),
    "entmax15": ("triton_entmax15", {}),
    "sparsemax": ("triton_sparsemax", {}),
    "entmax 1.25": ("triton_entmax_v1", {"alpha": 1.25}),
}


@pytest.mark.parametrize("name", RECORDED)
def test_outputs_and_gradients_are_those_that_the_published_package_gave(name):
    function, options = RECORDED[name]
    with np.load(Path(__file__).parent / "data" / "upstream.npz") as stored:
        case = {key.split("/")[1]: torch.from_numpy(stored[key])
                for key in stored.files if key.startswith(f"{name}/")}  # fmt: skip
    names = ("q", "k", "v") if "q" in case else ("x",)
    leaves = [case[x].requires_grad_() for x in names]
    output = getattr(adasplash, function)(*leaves, **options)
    found = [output, *torch.autograd.grad(output, leaves, case["grad"])]
    for x, y in zip(found, ["output", *(f"d{x}" for x in names)], strict=True):
        want = case[y]
        if "varlen" in options:  # behind a length theirs may be anything
            rows = torch.arange(x.shape[2]) < options["varlen"][:, None]
            x, want = (z.detach() * rows[:, None, :, None] for z in (x, want))
        assert relative_error(x.detach(), want) < 1e-4, y
