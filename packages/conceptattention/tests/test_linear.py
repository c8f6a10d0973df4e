import itertools

import pytest
import torch

from conceptattention import ConceptAttention
from conceptattention.adapters import adapter_for, linear
from conceptattention.kernels.linear import Norm, few_row_linear, reference
from conceptattention.kernels.linear.op import tile
from conceptattention.tiny import FAMILIES, TEXT
from conceptattention.tiny import normal as on_cpu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def normal(*shape, seed=0, dtype=torch.float32):
    made = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return made.to(DEVICE, dtype)


def case(images, tokens, features, columns, weights, dtype, *, norm, swiglu=False):
    x = normal(images, tokens, features * (1 + swiglu), seed=1, dtype=dtype) * 3 + 1
    w = [normal(columns, features, seed=2 + i, dtype=dtype) / features**0.5 for i in range(weights)]
    b = [normal(columns, seed=9 + i, dtype=dtype) for i in range(weights)]
    table = normal(images, 1, 6 * max(features, columns), seed=20, dtype=dtype)  # rows are apart
    scale, shift, gate = table[..., :features], table[..., -features:], table[..., 1 : columns + 1]
    made = {
        "none": None,
        "plain": Norm(scale, shift, 1e-6),
        "affine": Norm(scale, shift, 1e-5, normal(features, seed=21, dtype=dtype) + 1,
                       normal(features, seed=22, dtype=dtype)),
        "scale": Norm(scale, shift),
    }[norm]  # fmt: skip
    return x, w, b, made, gate, normal(images, tokens, columns, seed=30, dtype=dtype)


def widened(value):
    if isinstance(value, torch.Tensor):
        return value.double()
    if isinstance(value, list):
        return [part.double() for part in value]
    if isinstance(value, Norm):
        return Norm(**{k: widened(v) for k, v in vars(value).items()})
    return value


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("images", "tokens", "features", "columns", "weights", "norm", "act_in", "act_out", "gated"),
    [
        (1, 5, 96, 80, 3, "plain", "none", "none", False),
        (2, 3, 160, 48, 1, "affine", "none", "gelu_tanh", False),
        (2, 8, 64, 64, 1, "none", "none", "none", True),
        (1, 1, 300, 90, 1, "none", "silu", "none", False),
        (1, 20, 128, 33, 2, "scale", "none", "silu", False),
        (3, 1, 72, 40, 1, "none", "swiglu", "gelu", True),
    ],
)
def test_few_row_linear_equals_its_twin(
    images, tokens, features, columns, weights, norm, act_in, act_out, gated, dtype
):
    x, w, b, made, gate, residual = case(
        images, tokens, features, columns, weights, dtype, norm=norm, swiglu=act_in == "swiglu"
    )
    rest = {"gate": gate, "residual": residual} if gated else {}
    rest |= {"norm": made, "act_in": act_in, "act_out": act_out}
    ours = few_row_linear(x, w, b, **rest)
    exact = reference.few_row_linear(
        widened(x), widened(w), widened(b), **{k: widened(v) for k, v in rest.items()}
    )
    assert ours.dtype == dtype
    assert ours.shape == (weights, images, tokens, columns)
    error = (ours.double() - exact).norm() / exact.norm()
    assert error < (1e-6 if dtype == torch.float32 else 1e-3)


def test_tiles_fit_into_shared_memory():
    for features, rows, size in itertools.product((160, 3072, 15360), (1, 5, 16, 33, 64), (2, 4)):
        made = tile(features, rows, size)
        held = made["BLOCK_N"] + max(8, 1 << (rows - 1).bit_length())
        assert (made["num_stages"] - 1) * held * made["BLOCK_K"] * size <= 99 * 1024
        assert made["BLOCK_K"] >= 32


def test_few_row_linear_without_bias():
    x, w, _, made, _, _ = case(1, 2, 64, 32, 1, torch.float32, norm="plain")
    torch.testing.assert_close(
        few_row_linear(x, w, norm=made), reference.few_row_linear(x, w, norm=made)
    )


def observed(pipe, family, kernels, **kwargs):
    """Return the concepts' outputs of every layer, and the final latents."""
    with ConceptAttention(
        pipe, ["a", "b", "c"], concept_embeds=on_cpu(3, TEXT, seed=5), layers="all",
        vectors=["concept_output"], kernels=kernels, **kwargs,
    ) as observer:  # fmt: skip
        latents = family.run(pipe, num_inference_steps=1)
    layers = observer.layers
    return torch.stack(
        [observer.vectors("concept_output", layer=i, step=0) for i in layers]
    ), latents


@pytest.fixture
def launches(monkeypatch):
    """Count what the kernel computes, by the number of weights."""
    seen = []

    def spy(x, weights, *rest, **options):
        seen.append(len(weights))
        return few_row_linear(x, weights, *rest, **options)

    monkeypatch.setattr(linear, "few_row_linear", spy)
    return seen


@pytest.mark.parametrize("name", ["flux", "flux2", "sd3", "cogvideox", "qwen", "chroma"])
def test_families_compute_the_same_by_the_kernel(name, launches):
    family = FAMILIES[name]
    pipe = family.build()
    by_torch, plain = observed(pipe, family, "torch")
    assert not launches
    by_kernel, seen = observed(pipe, family, "triton")
    assert launches
    torch.testing.assert_close(by_kernel, by_torch, rtol=1e-5, atol=2e-6)
    assert torch.equal(plain, seen)


def test_touched_modules_are_called_themselves(launches):
    family = FAMILIES["flux"]
    pipe = family.build()
    by_torch, _ = observed(pipe, family, "torch")
    observed(pipe, family, "triton")
    untouched = len(launches)
    attn = pipe.transformer.transformer_blocks[0].attn
    heard = []
    handle = attn.to_add_out.register_forward_hook(lambda *given: heard.append(given[2].shape[1]))
    attn.add_q_proj.forward = type(attn.add_q_proj).forward.__get__(
        attn.add_q_proj
    )  # as offload does
    launches.clear()
    by_kernel, _ = observed(pipe, family, "triton")
    handle.remove()
    assert untouched - len(launches) == 2  # the projections and the output
    assert 3 in heard  # the hook of somebody else heard the three concepts
    torch.testing.assert_close(by_kernel, by_torch, rtol=1e-5, atol=2e-6)


def test_one_modulation_serves_several_images():
    x, w, b, norm, gate, residual = case(3, 2, 64, 64, 1, torch.float32, norm="plain")
    one = Norm(norm.scale[:1], norm.shift[:1], norm.eps)
    ours = few_row_linear(x, w, b, norm=one, gate=gate[:1], residual=residual)
    twin = reference.few_row_linear(x, w, b, norm=one, gate=gate[:1], residual=residual)
    torch.testing.assert_close(ours, twin, rtol=1e-4, atol=1e-4)


OWN = ("flux", "flux2", "chroma", "cogview4", "z-image")  # modulated in another way


@pytest.mark.parametrize("name", ["flux", *(name for name in FAMILIES if name not in OWN)])
def test_the_prompts_modulation_is_heard_not_computed_again(name):
    family = FAMILIES[name]
    pipe = family.build()
    adapter = adapter_for(pipe.transformer)
    block = adapter.blocks(pipe.transformer)[1]
    called = []
    adapter.modulator(block).register_forward_pre_hook(lambda *_: called.append(1))
    family.run(pipe)
    plain = len(called)
    with ConceptAttention(
        pipe, ["a", "b"], concept_embeds=on_cpu(2, TEXT), layers="all", kernels="torch"
    ):
        family.run(pipe)
    own = 2 if name == "flux" else 0  # a pooled vector of zero: modulated once more a step
    assert len(called) == 2 * plain + own
