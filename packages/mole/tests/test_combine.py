"""The combine operation: the kernel in Triton's interpreter, and on a GPU, against float64."""

import pytest
import torch

from mole import combine
from mole.kernels.combine import combine_norm
from mole.kernels.combine.reference import NF4_CODEBOOK, combine_reference, dequantise
from mole.testing import (
    check_combine,
    combine_budget,
    combine_float64,
    make_combine_inputs,
)

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="runs on the GPU instead")


@pytest.fixture(autouse=True)
def poisoned_allocations(monkeypatch):
    """Fill what `empty` returns with NaN: memory that a kernel forgets to write shows."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        made = empty(*args, **kwargs)
        return made.fill_(float("nan")) if made.is_floating_point() else made

    monkeypatch.setattr(torch, "empty", poisoned)


def naive(logits, vectors, residual):
    """The equation, scalar by scalar, in Python's float64."""
    out = residual.double().clone()
    for t in range(len(out)):
        weights = [2.718281828459045 ** float(v) for v in logits[t].double()]
        for j, weight in enumerate(weights):
            out[t] += weight / sum(weights) * vectors[t, j].double()
    return out


def test_reference_is_the_equation():
    inputs = make_combine_inputs(4, 3, 6)
    expected = naive(inputs["logits"], inputs["values"], inputs["residual"])
    torch.testing.assert_close(combine_float64(**inputs), expected)


@interpreted
@pytest.mark.parametrize("experts", [1, 2, 3, 8, 17, 32])
@pytest.mark.parametrize("fmt", ["fp32", "fp16", "int8", "fp8", "nf4", "nf3"])
def test_kernel_agrees_with_float64(experts, fmt):
    for tokens, dim in ((1, 8), (3, 72), (2, 136)):
        inputs = make_combine_inputs(tokens, experts, dim, fmt=fmt, seed=experts)
        exact = combine_float64(**inputs)
        found = combine(**inputs, backend="triton")
        assert found.dtype == torch.float32
        assert ((found - exact).abs() <= combine_budget(exact, torch.float32)).all()


@interpreted
def test_kernel_keeps_to_the_budget_in_all_shared_cases():
    cases = check_combine("cpu")
    assert len(cases) == 24
    assert max(case["error"] for case in cases) <= 1


@pytest.mark.gpu
def test_kernel_keeps_to_the_budget_on_the_gpu():
    cases = check_combine("cuda")
    assert {"bfloat16"} < {case["dtype"] for case in cases}
    assert max(case["error"] for case in cases) <= 1


@interpreted
def test_scales_may_cover_part_of_a_vector():
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-127, 128, (3, 2, 12), dtype=torch.int8, generator=generator)
    scales = torch.rand(3, 2, 4, generator=generator)
    logits, residual = torch.randn(3, 2), torch.randn(3, 12)
    expected = residual.double()
    gates = torch.softmax(logits.double(), -1)
    for block in range(4):
        part = slice(3 * block, 3 * block + 3)
        vectors = codes[..., part].double() * scales[..., block, None].double()
        expected[:, part] += (gates[..., None] * vectors).sum(1)
    for backend in ("triton", "reference"):
        found = combine(logits, codes, residual, scales, backend=backend)
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-4)


@interpreted
@pytest.mark.parametrize("blocks", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("fmt", ["nf4", "int8"])
def test_blocks_and_halves_of_the_kernel_with_norm(blocks, fmt):
    generator = torch.Generator().manual_seed(blocks)
    dim, wide = 12, {"generator": generator}
    codes = torch.randint(-127, 128, (3, 2, dim), dtype=torch.int8, **wide)
    if fmt == "nf4":
        codes = torch.randint(256, (3, 2, dim // 2), dtype=torch.uint8, **wide)
    scales = torch.rand(3, 2, blocks, **wide)
    logits, residual, update = (torch.randn(3, n, **wide) for n in (2, dim, dim))
    weight = torch.rand(dim, **wide)
    arguments = (logits, codes, residual, update, weight, 1e-5, scales)
    found = combine_norm(*arguments, backend="triton")
    for kernel, exact in zip(found, combine_norm(*arguments, backend="reference"), strict=True):
        torch.testing.assert_close(kernel, exact, rtol=1e-5, atol=1e-4)


@interpreted
@pytest.mark.parametrize("experts", [1, 15, 17, 33])
def test_kernel_with_norm_takes_any_number_of_vectors(experts):
    inputs = make_combine_inputs(2, experts, 24, fmt="fp16", seed=experts)
    inputs |= {"update": torch.randn(2, 24), "weight": torch.rand(24), "eps": 1e-5}
    inputs["logits"][1, 0] = float("nan")
    found = combine_norm(**inputs, backend="triton")
    for kernel, exact in zip(found, combine_norm(**inputs, backend="reference"), strict=True):
        torch.testing.assert_close(kernel, exact, rtol=1e-5, atol=1e-5, equal_nan=True)
        assert kernel[1].isnan().all()
        assert not kernel[0].isnan().any()


@interpreted
def test_slices_of_wider_tensors_are_read_where_they_lie():
    inputs = make_combine_inputs(5, 4, 64)
    wide = torch.full((5, 3, 4, 64), float("nan"))
    wide[:, 1] = inputs["values"]
    expected = combine(**inputs, backend="triton")
    assert torch.equal(combine(**(inputs | {"values": wide[:, 1]}), backend="triton"), expected)
    turned = inputs["residual"].t().contiguous().t()
    assert torch.equal(combine(**(inputs | {"residual": turned}), backend="triton"), expected)


@interpreted
@pytest.mark.parametrize("fmt", ["fp16", "int8", "nf4", "nf3"])
def test_tokens_may_share_rows(fmt):
    inputs = make_combine_inputs(7, 4, 64, fmt=fmt)
    index = torch.tensor([2, 0, 2, 2, 1, 0, 1], dtype=torch.long)
    rows = {k: v for k, v in inputs.items() if k in ("values", "scales")}
    few = {k: None if v is None else v[:3] for k, v in rows.items()}
    many = {k: None if v is None else v[index] for k, v in rows.items()}
    for backend in ("triton", "reference", "auto"):
        found = combine(**(inputs | few), index=index, backend=backend)
        assert torch.equal(found, combine(**(inputs | many), backend=backend)), backend


@interpreted
def test_no_tokens_give_no_tokens():
    inputs = make_combine_inputs(1, 4, 8)
    none = {k: None if v is None else v[:0] for k, v in inputs.items()}
    for backend in ("triton", "reference", "auto"):
        assert combine(**none, backend=backend).shape == (0, 8)


def test_reference_has_the_right_gradients():
    inputs = [
        torch.randn(*shape, dtype=torch.float64, requires_grad=True)
        for shape in ((3, 4), (3, 4, 6), (3, 6))
    ]
    assert torch.autograd.gradcheck(combine_reference, inputs)
    assert torch.autograd.gradcheck(combine, inputs)  # "auto" takes the differentiable path


def test_nf4_pairs_hold_first_and_second_half():
    codes = torch.tensor([[0x0F, 0x70]], dtype=torch.uint8)  # low nibbles 15, 0; high 0, 7
    found = dequantise(codes, torch.tensor([[2.0]]))
    assert found.tolist() == [[2.0, -2.0, -2.0, 0.0]]
    assert sorted(NF4_CODEBOOK) == list(NF4_CODEBOOK)


@interpreted
def test_operation_is_registered_for_compilation():
    inputs = make_combine_inputs(3, 4, 16)
    arguments = (inputs["logits"], inputs["values"], inputs["residual"], None)
    # Autograd is left out on purpose: the kernel has no gradient, `combine` says so.
    torch.library.opcheck(
        torch.ops.mole.combine.default,
        arguments,
        test_utils=("test_schema", "test_faketensor"),
    )


def _inputs(**changes):
    return make_combine_inputs(3, 4, 16) | changes


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"index": torch.zeros(2, dtype=torch.long)},
            ValueError,
            r"`index` must have shape \(3,\); got \(2,\)",
        ),
        ({"logits": torch.zeros(2, 4)}, ValueError, "`logits` must have 3 tokens .* got 2"),
        (
            {"values": torch.zeros(3, 5, 16)},
            ValueError,
            r"`values` must have \(tokens, experts\) \(3, 4\) .* got \(3, 5\)",
        ),
        (
            {"values": torch.zeros(3, 4, 15)},
            ValueError,
            "must store 16 torch.float32 elements a vector for `dim` 16; got 15",
        ),
        ({"values": torch.zeros(3, 4, 16, dtype=torch.int32)}, TypeError, "got torch.int32"),
        (
            {"values": torch.zeros(3, 4, 16, dtype=torch.int8)},
            ValueError,
            "`scales` must be given for codes",
        ),
        ({"scales": torch.zeros(3, 4, 1)}, ValueError, "`scales` must be None for plain values"),
        (
            {"values": torch.zeros(3, 4, 16, dtype=torch.int8), "scales": torch.ones(3, 4, 3)},
            ValueError,
            r"a divisor of `dim` 16.*got \(3, 4, 3\)",
        ),
        ({"backend": "cuda"}, ValueError, "`backend` must be 'auto', 'triton' or .*got 'cuda'"),
    ],
)
@pytest.mark.usefixtures("our_checks_only")
def test_bad_arguments_are_named(changes, error, message):
    with pytest.raises(error, match=message):
        combine(**_inputs(**changes))


@interpreted
def test_kernel_refuses_gradients():
    inputs = make_combine_inputs(2, 4, 8)
    inputs["residual"].requires_grad_()
    with pytest.raises(ValueError, match="`backend` 'triton' has no gradient"):
        combine(**inputs, backend="triton")


def test_kernel_refuses_cpu_tensors_outside_the_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="needs CUDA tensors; got cpu tensors"):
        combine(**make_combine_inputs(2, 4, 8), backend="triton")
