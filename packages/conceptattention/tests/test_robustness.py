"""What users do to a transformer before or while it is observed: the images stay the same bits."""

import diffusers
import pytest
import torch

from conceptattention import ConceptAttention, segment
from conceptattention.testing import tiny_flux
from conceptattention.tiny import FAMILIES, TEXT, normal

WORDS = ["a", "b", "c"]
SETTINGS = {"concept_embeds": normal(3, TEXT, seed=5), "layers": "all"}


def add_lora(model):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=2, target_modules=["to_k", "to_v", "add_q_proj", "add_k_proj", "to_add_out"],
        init_lora_weights=False,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model.add_adapter(config)


def observe(family, pipe, kernels="auto", **kwargs):
    with ConceptAttention(pipe, WORDS, **SETTINGS, kernels=kernels) as observer:
        seen = family.run(pipe, **kwargs)
    return seen, observer.heatmaps()


@pytest.mark.parametrize("name", ["flux", "sd3"])
def test_lora_before_and_inside_the_context(name):
    family = FAMILIES[name]
    pipe = family.build()
    _, without = observe(family, pipe)
    with ConceptAttention(pipe, WORDS, **SETTINGS) as observer:
        add_lora(pipe.transformer)
        inside = family.run(pipe)
    plain = family.run(pipe)
    seen, maps = observe(family, pipe)
    assert torch.equal(plain, seen)
    assert torch.equal(plain, inside)
    assert torch.equal(maps.values, observer.heatmaps().values)
    assert maps.counts == [6]
    assert not torch.allclose(maps.values, without.values)  # text weights changed too


def float8(model):
    model.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)


def group_offload(model):
    diffusers.hooks.apply_group_offloading(
        model, onload_device=torch.device("cpu"), offload_type="block_level",
        num_blocks_per_group=1,
    )  # fmt: skip


@pytest.mark.parametrize("change", [float8, group_offload])
@pytest.mark.parametrize("name", ["flux", "sd3", "cogvideox"])
def test_changed_storage_of_weights(name, change):
    family = FAMILIES[name]
    pipe = family.build()
    change(pipe.transformer)
    plain = family.run(pipe)
    seen, maps = observe(family, pipe)
    assert torch.equal(plain, seen)
    assert maps.counts == [6]
    assert set(maps.coverage.values()) == {1.0}


def test_segment_with_float8_weights():
    pipe = tiny_flux()
    float8(pipe.transformer)
    picture = torch.rand(1, 3, 16, 24, generator=torch.Generator().manual_seed(0))
    maps = segment(pipe, picture, ["cat", "sky"], "a cat")
    assert maps.values.shape == (1, 2, 4, 6)


def pyramid(pipe):
    return diffusers.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 2000),
        spatial_attention_block_identifiers=("transformer_blocks",),
        current_timestep_callback=lambda: pipe._current_timestep,
    )


CACHES = {
    "pyramid": pyramid,
    "taylor": lambda pipe: diffusers.TaylorSeerCacheConfig(cache_interval=2),
    "first block": lambda pipe: diffusers.FirstBlockCacheConfig(threshold=10.0),
    "mag": lambda pipe: diffusers.MagCacheConfig(
        threshold=10.0, num_inference_steps=6, max_skip_steps=2, mag_ratios=torch.ones(6)
    ),
}


@pytest.mark.parametrize("cache", CACHES)
def test_caches_change_coverage_and_nothing_else(cache):
    family = FAMILIES["flux"]

    def run(observed):
        pipe = family.build()
        pipe.transformer.enable_cache(CACHES[cache](pipe))
        if not observed:
            return family.run(pipe, num_inference_steps=6), None
        return observe(family, pipe, num_inference_steps=6)

    (plain, _), (seen, maps) = run(False), run(True)
    assert torch.equal(plain, seen)
    assert maps.coverage[0] > 0
    assert min(maps.coverage.values()) < 1.0


@pytest.mark.parametrize("cache", CACHES)
def test_segment_neither_uses_nor_leaves_a_cache(cache):
    pipe = tiny_flux()
    picture = torch.rand(1, 3, 16, 24, generator=torch.Generator().manual_seed(0))
    settings = {"layers": "all", "samples": 2}
    expected = segment(pipe, picture, ["cat", "sky"], **settings)

    def generate():
        return pipe(
            "a cat", height=16, width=24, num_inference_steps=6, max_sequence_length=16,
            output_type="pt", generator=torch.Generator().manual_seed(0),
        ).images  # fmt: skip

    pipe.transformer.enable_cache(CACHES[cache](pipe))
    before = generate()
    maps = segment(pipe, picture, ["cat", "sky"], **settings)
    assert torch.equal(maps.values, expected.values)
    assert set(maps.coverage.values()) == {1.0}
    assert pipe.transformer.is_cache_enabled
    assert torch.equal(before, generate())


def test_segment_runs_group_offloaded_models_to_their_end():
    pipe = tiny_flux()
    group_offload(pipe.transformer)
    ran = []
    pipe.transformer.norm_out.register_forward_hook(lambda *_: ran.append(1))
    segment(pipe, torch.rand(1, 3, 16, 24), ["cat", "sky"])
    assert ran


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")
def test_compiled_blocks_are_refused_before_and_heard_inside():
    family = FAMILIES["flux"]
    pipe = family.build()
    with ConceptAttention(pipe, WORDS, **SETTINGS) as observer:
        pipe.transformer.compile_repeated_blocks(backend="eager")
        seen = family.run(pipe)
    maps = observer.heatmaps()
    plain = family.run(pipe)
    assert torch.equal(plain, seen)
    assert torch.equal(maps.values, observe(family, family.build())[1].values)
    with pytest.raises(RuntimeError, match="compiled before it was observed"):
        ConceptAttention(pipe, WORDS, **SETTINGS)


def bitsandbytes(model, kind):
    bnb = pytest.importorskip("bitsandbytes")

    def replace(linear):
        size = linear.in_features, linear.out_features, linear.bias is not None
        if kind == "8bit":
            made = bnb.nn.Linear8bitLt(*size, has_fp16_weights=False)
        else:
            made = bnb.nn.Linear4bit(*size, compute_dtype=torch.float32, quant_type="nf4")
        made.load_state_dict(linear.state_dict())
        return made.to("cpu")

    replace_linears(model, replace)


def gguf(model):
    library = pytest.importorskip("gguf")
    from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter

    kind = library.GGMLQuantizationType.Q8_0

    def replace(linear):
        if linear.in_features % 32:
            return linear
        size = linear.in_features, linear.out_features, linear.bias is not None
        made = GGUFLinear(*size, compute_dtype=torch.float32)
        packed = library.quantize(linear.weight.detach().numpy(), kind)
        made.weight = GGUFParameter(torch.from_numpy(packed), quant_type=kind)
        made.bias = linear.bias
        return made

    replace_linears(model, replace)


def torchao(model):
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())


def replace_linears(model, replace):
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is torch.nn.Linear:
                setattr(module, name, replace(child))


QUANTISED = {
    "bitsandbytes 8 bits": lambda model: bitsandbytes(model, "8bit"),
    "bitsandbytes 4 bits": lambda model: bitsandbytes(model, "4bit"),
    "gguf": gguf,
    "torchao": torchao,
}


@pytest.mark.parametrize("quantise", QUANTISED)
def test_quantised_weights(quantise):
    family = FAMILIES["flux"]
    pipe = family.build()
    QUANTISED[quantise](pipe.transformer)
    plain = family.run(pipe, num_inference_steps=1)
    seen, maps = observe(family, pipe, num_inference_steps=1)
    assert torch.equal(plain, seen)
    assert maps.counts == [3]
    assert set(maps.coverage.values()) == {1.0}
    # The kernel for few rows stands for plain weights alone.
    fast, by_kernels = observe(family, pipe, kernels="triton", num_inference_steps=1)
    assert torch.equal(plain, fast)
    torch.testing.assert_close(by_kernels.values, maps.values, rtol=1e-4, atol=1e-5)


def model_offload(pipe):
    pipe.enable_model_cpu_offload(device="cpu")


def sequential_offload(pipe):
    from accelerate import cpu_offload

    cpu_offload(pipe.transformer, execution_device=torch.device("cpu"))


@pytest.mark.parametrize("kernels", ["torch", "triton"])
@pytest.mark.parametrize("offload", [model_offload, sequential_offload])
def test_offloaded_pipelines(offload, kernels):
    pytest.importorskip("accelerate")
    pipe = tiny_flux()

    def generate():
        return pipe(
            "a cat", height=16, width=24, num_inference_steps=1, max_sequence_length=16,
            output_type="pt", generator=torch.Generator().manual_seed(0),
        ).images  # fmt: skip

    plain = generate()
    with ConceptAttention(pipe, ["cat", "sky"], kernels="torch") as expected:
        generate()
    offload(pipe)
    with ConceptAttention(pipe, ["cat", "sky"], kernels=kernels) as observer:
        seen = generate()
    assert torch.equal(plain, seen)
    torch.testing.assert_close(
        observer.heatmaps().values, expected.heatmaps().values, rtol=1e-4, atol=1e-5
    )
