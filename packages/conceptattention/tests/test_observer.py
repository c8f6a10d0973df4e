import copy
import subprocess
import sys

import pytest
import torch

from conceptattention import (
    Adapter,
    ConceptAttention,
    JointAdapter,
    preset,
    register_adapter,
)
from conceptattention.selection import resolve
from conceptattention.testing import (
    ORACLE_ERROR,
    dense_concept_outputs,
    flux_arguments,
    hooks,
    tiny_flux,
)

CONCEPTS = ["cat", "grass", "sky"]


def generate(pipe, prompt=("a cat on grass", "a dog on snow"), **kwargs):
    kwargs = {"height": 16, "width": 32, "num_inference_steps": 3, **kwargs}
    generator = torch.Generator().manual_seed(0)
    return pipe(
        list(prompt),
        generator=generator, output_type="pt", max_sequence_length=16, **kwargs,
    ).images  # fmt: skip


CFG = {"negative_prompt": ["", ""], "true_cfg_scale": 3.0}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kwargs", [{}, CFG], ids=["plain", "true-cfg"])
@pytest.mark.parametrize("guidance", [False, True], ids=["schnell", "dev"])
def test_images_are_bit_identical(dtype, kwargs, guidance):
    pipe = tiny_flux(guidance=guidance).to(dtype)
    plain = generate(pipe, **kwargs)
    state = torch.get_rng_state()
    with ConceptAttention(pipe, CONCEPTS, space=["output", "cross_attention", "value"]) as observer:
        seen = generate(pipe, **kwargs)
    assert torch.equal(plain, seen)
    assert plain.shape == (2, 3, 16, 32)
    assert torch.equal(state, torch.get_rng_state())
    assert hooks(pipe) == 0
    maps = observer.heatmaps()
    assert maps.values.shape == (2, 3, 4, 8)
    assert set(maps.coverage.values()) == {1.0}
    torch.testing.assert_close(maps.values.sum(1), torch.ones(2, 4, 8))


@pytest.mark.parametrize("guided", [False, True])
def test_concept_outputs_equal_the_masked_stock_model(flux, flux_dev, guided):
    pipe = flux_dev if guided else flux
    embeds = torch.randn(4, 24, generator=torch.Generator().manual_seed(1))
    arguments = flux_arguments(pipe)
    expected = dense_concept_outputs(pipe, arguments, embeds)
    with ConceptAttention(
        pipe, ["a", "b", "c", "d"], layers="all", store="all", concept_embeds=embeds,
        vectors=["concept_output", "image_output", "image_key", "concept_query"],
        space=["output", "cross_attention"],
    ) as observer, torch.no_grad():  # fmt: skip
        pipe.transformer(**arguments)
    for layer, dense in enumerate(expected):
        ours = observer.vectors("concept_output", layer=layer)
        assert (ours - dense).abs().max() < ORACLE_ERROR
        image = observer.vectors("image_output", layer=layer)
        raw = torch.einsum("brd,bnd->brn", dense.double(), image.double()).view(2, 4, 3, 5)
        maps = observer.heatmaps().select(layers=[layer])
        torch.testing.assert_close(maps.with_reduce("raw").values, raw.float())
        torch.testing.assert_close(maps.values, raw.softmax(1).float())
        q = observer.vectors("concept_query", layer=layer).double()
        k = observer.vectors("image_key", layer=layer).double()
        logits = (q @ k.mT / q.shape[-1] ** 0.5).mean(1).view(2, 4, 3, 5).float()
        crossed = observer.heatmaps(space="cross_attention").select(layers=[layer])
        torch.testing.assert_close(crossed.with_reduce("raw").values, logits)


def test_hooks_leave_after_an_exception(flux):
    with pytest.raises(ZeroDivisionError), ConceptAttention(flux, CONCEPTS):
        _ = 1 // 0
    assert hooks(flux) == 0
    before = generate(flux)

    def stop(pipe, step, timestep, kwargs):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), ConceptAttention(flux, CONCEPTS):
        generate(flux, callback_on_step_end=stop)
    assert hooks(flux) == 0
    assert torch.equal(before, generate(flux))


def test_running_mean_equals_the_mean_of_all(flux):
    maps = {}
    for store in ("mean", "layers", "steps", "all"):
        with ConceptAttention(flux, CONCEPTS, layers="all", store=store) as observer:
            generate(flux)
        maps[store] = observer.heatmaps()
    assert len(maps["all"].keys) == 9
    for reduce in ("softmax_mean", "mean_softmax", "raw"):
        expected = maps["all"].with_reduce(reduce).values
        for store in ("mean", "layers", "steps"):
            torch.testing.assert_close(maps[store].with_reduce(reduce).values, expected)
    by_hand = maps["all"].soft.mean(0)
    torch.testing.assert_close(maps["mean"].values, by_hand)
    one = maps["all"].select(layers=[2], steps=[0, 1])
    torch.testing.assert_close(maps["layers"].select(layers=[2]).keys, [(2, -1)])
    assert one.keys == [(2, 0), (2, 1)]


def test_selected_steps_and_layers(flux):
    with ConceptAttention(flux, CONCEPTS, layers="last:2", steps=[-1, 0], store="all") as observer:
        generate(flux)
    maps = observer.heatmaps()
    assert sorted(maps.keys) == [(1, 0), (1, 2), (2, 0), (2, 2)]
    assert maps.coverage == {1: 1.0, 2: 1.0}


def test_only_the_conditional_pass_counts(flux):
    with ConceptAttention(flux, CONCEPTS, store="steps") as observer:
        generate(flux)
        generate(flux, **{**CFG, "true_cfg_scale": 1.5})
    assert len(observer.runs) == 2
    first, second = observer.heatmaps(run=0), observer.heatmaps(run=1)
    assert [key[1] for key in first.keys] == [key[1] for key in second.keys] == [0, 1, 2]
    # Step 0 sees the same noise and prompt, so guidance cannot have changed it yet.
    torch.testing.assert_close(first.select(steps=[0]).values, second.select(steps=[0]).values)
    assert not torch.equal(first.values, second.values)


def test_one_step_runs_are_told_apart(flux):
    with ConceptAttention(flux, CONCEPTS) as observer:
        for _ in range(3):
            generate(flux, num_inference_steps=1, **CFG)
    assert [run.steps for run in observer.runs] == [{0}, {0}, {0}]


def test_concept_order_does_not_matter(flux):
    maps = []
    for words in (["cat", "grass", "sky"], ["sky", "cat", "grass"]):
        with ConceptAttention(flux, words) as observer:
            generate(flux)
        maps.append(observer.heatmaps())
    for word in CONCEPTS:
        torch.testing.assert_close(maps[0][word].values, maps[1][word].values)


def test_without_self_attention_concepts_are_independent(flux):
    raw = []
    for words in (["cat"], CONCEPTS):
        with ConceptAttention(flux, words, self_attention=False) as observer:
            generate(flux)
        raw.append(observer.heatmaps().raw[:, :, 0])
    torch.testing.assert_close(raw[0], raw[1])


def test_words_per_image_equal_shared_words(flux):
    with ConceptAttention(flux, [["cat", "sky"], ["dog", "snow"]]) as observer:
        generate(flux)
    both = observer.heatmaps()
    assert both.names(1) == ("dog", "snow")
    with ConceptAttention(flux, ["dog", "snow"]) as observer:
        generate(flux)
    torch.testing.assert_close(both.values[1], observer.heatmaps().values[1])


def test_projections_fused_while_attached_are_found(flux):
    pipe = copy.deepcopy(flux)
    with ConceptAttention(pipe, CONCEPTS) as observer:
        generate(pipe)
        pipe.transformer.fuse_qkv_projections()
        generate(pipe)
    pipe.transformer.unfuse_qkv_projections()
    torch.testing.assert_close(observer.heatmaps(run=0).values, observer.heatmaps(run=1).values)
    assert hooks(pipe) == 0


def test_a_skipped_layer_lowers_the_coverage(flux):
    pipe = copy.deepcopy(flux)
    block = pipe.transformer.transformer_blocks[1]
    forward = block.forward
    block.forward = lambda hidden_states, encoder_hidden_states, **_: (
        encoder_hidden_states,
        hidden_states,
    )
    with ConceptAttention(pipe, CONCEPTS, layers="all") as observer:
        generate(pipe)
    assert observer.heatmaps().coverage == {0: 1.0, 1: 0.0, 2: 0.0}
    with ConceptAttention(pipe, CONCEPTS, layers=[2]) as observer:
        generate(pipe)
    with pytest.raises(RuntimeError, match="none of the layers"):
        observer.heatmaps()
    block.forward = forward


def test_multi_token_words(flux, caplog):
    with ConceptAttention(flux, ["cat tree", "sky"], token="first") as first:
        pass
    with ConceptAttention(flux, ["cat tree", "sky"], token="last") as last:
        pass
    with caplog.at_level("WARNING"), ConceptAttention(flux, ["cat tree", "zebra"]) as mean:
        pass
    assert "cat tree: several tokens" in caplog.text
    assert "does not know zebra" in caplog.text
    expected = (first._embeds[0, 0] + last._embeds[0, 0]) / 2
    torch.testing.assert_close(mean._embeds[0, 0], expected)


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"concepts": []}, ValueError, "`concepts` must hold at least one word"),
        ({"concepts": "cat"}, TypeError, "`concepts` must be a list of words; got 'cat'"),
        ({"concepts": ["cat", 3]}, TypeError, "`concepts` must hold strings; got 3"),
        ({"concepts": ["cat", " "]}, ValueError, "`concepts` must hold words; got ' '"),
        ({"concepts": ["cat", "sky", "cat"]}, ValueError, "got 'cat' twice"),
        ({"concepts": [["cat"], ["a", "b"]]}, ValueError, r"one length; got lengths \[1, 2\]"),
        ({"concepts": [str(i) for i in range(513)]}, ValueError, "at most 512 words; got 513"),
        ({"layers": [3]}, ValueError, "`layers` must be between -3 and 2; got 3"),
        ({"layers": "some"}, ValueError, "must be 'default', 'all', 'last:N', indices or a slice"),
        ({"layers": slice(9, None)}, ValueError, "`layers` must select at least one of 3 layers"),
        ({"steps": "some"}, ValueError, "`steps` must be 'all', 'noise:LOW-HIGH', an index"),
        ({"steps": []}, ValueError, "`steps` must select at least one step"),
        ({"space": "prompt"}, ValueError, "`space` must be one of .*; got 'prompt'"),
        ({"store": "some"}, ValueError, "`store` must be one of .*; got 'some'"),
        ({"token": "middle"}, ValueError, "`token` must be one of .*; got 'middle'"),
        ({"normalize": "l1"}, ValueError, "`normalize` must be one of .*; got 'l1'"),
        ({"vectors": ["q"]}, ValueError, "`vectors` must be one of .*; got 'q'"),
        ({"temperature": 0.0}, ValueError, "`temperature` must be above 0 or 'auto'; got 0.0"),
        ({"concept_embeds": torch.zeros(2, 24)}, ValueError,
         r"3 concepts in one list; got \(2, 24\)"),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("unchecked")
def test_bad_arguments(flux, kwargs, error, message):
    with pytest.raises(error, match=message):
        ConceptAttention(flux, **{"concepts": CONCEPTS, **kwargs})


def test_step_out_of_range(flux):
    message = "`steps` must be between -3 and 2; got 7"
    with pytest.raises(ValueError, match=message), ConceptAttention(flux, CONCEPTS, steps=[7]):
        generate(flux)
    assert hooks(flux) == 0


def test_wrong_batch_of_word_lists(flux):
    message = "`concepts` has 3 lists of words, one per image"
    with (
        pytest.raises(ValueError, match=message),
        ConceptAttention(flux, [["cat"], ["dog"], ["sky"]]),
    ):
        generate(flux)
    assert hooks(flux) == 0


def test_unknown_model(flux):
    class Pipe:
        transformer = torch.nn.Linear(1, 1)

    with pytest.raises(ValueError, match=r"class Linear, .*known families: Flux\.1"):
        ConceptAttention(Pipe(), CONCEPTS)


@pytest.mark.usefixtures("unchecked")
def test_register_adapter_refuses_other_objects():
    with pytest.raises(
        TypeError, match="`adapter` must be a subclass or an instance of Adapter; got 'flux'"
    ):
        register_adapter("flux")
    with pytest.raises(TypeError, match="must be a subclass or an instance of Adapter"):
        register_adapter(dict)
    unfinished = type("Unfinished", (JointAdapter,), {"encode": lambda *_: None})
    with pytest.raises(TypeError, match="Unfinished must define family, model_class, temb"):
        register_adapter(unfinished)


@pytest.mark.usefixtures("unchecked")
def test_an_adapter_that_encodes_something_else_is_named(flux, monkeypatch):
    from conceptattention.adapters.flux import FluxAdapter

    monkeypatch.setattr(FluxAdapter, "encode", lambda *_: torch.zeros(3, 24))
    with pytest.raises(TypeError, match=r"`encode` of FluxAdapter must return .* got Tensor"):
        ConceptAttention(flux, CONCEPTS).__enter__()
    assert hooks(flux) == 0


def test_many_vectors_are_warned_of_once(flux, caplog, monkeypatch):
    monkeypatch.setattr("conceptattention.stream.MANY_BYTES", 5000)
    with ConceptAttention(
        flux, CONCEPTS, vectors=["image_output"], vector_dtype=torch.bfloat16, layers="all"
    ) as observer:
        generate(flux)
    kept = observer.vectors("image_output", layer=0)
    assert kept.dtype == torch.bfloat16
    assert kept.nbytes <= 5000 < len(observer.runs[0].vectors) * kept.nbytes
    assert sum("kept vectors take more than" in text for text in caplog.messages) == 1


def test_registered_classes_are_asked_first(flux, monkeypatch):
    from conceptattention.adapters import adapter_for, registry
    from conceptattention.adapters.flux import FluxAdapter

    class Mine(FluxAdapter):
        pass

    monkeypatch.setattr(registry, "_ADAPTERS", [])
    register_adapter(Mine)
    first, second = adapter_for(flux.transformer), adapter_for(flux.transformer)
    assert type(first) is Mine
    assert first is not second  # what it remembers of a pass is an observer's own
    with pytest.raises(TypeError, match="abstract"):
        Adapter()


def test_nested_contexts_are_refused(flux):
    with ConceptAttention(flux, CONCEPTS):
        with pytest.raises(RuntimeError, match="observed by another ConceptAttention"):
            ConceptAttention(flux, CONCEPTS).__enter__()
        generate(flux)
    assert hooks(flux) == 0


def test_compiled_before_is_refused(flux):
    pipe = copy.deepcopy(flux)
    pipe.transformer.transformer_blocks[0].compile(backend="eager")
    with pytest.raises(RuntimeError, match="compiled before it was observed"):
        ConceptAttention(pipe, CONCEPTS)


@pytest.mark.usefixtures("unchecked")  # the type checker cannot be compiled
def test_compiled_inside_the_context_is_heard(flux):
    pipe = copy.deepcopy(flux)
    with ConceptAttention(pipe, CONCEPTS) as observer:
        generate(pipe)
        for block in pipe.transformer.transformer_blocks:
            block.compile(backend="eager")
        generate(pipe)
    eager, compiled = observer.heatmaps(run=0), observer.heatmaps(run=1)
    assert compiled.coverage == eager.coverage
    torch.testing.assert_close(compiled.values, eager.values)


_COMPILED = """
import torch
from torch._dynamo.testing import CompileCounter
from conceptattention import ConceptAttention
from conceptattention.testing import tiny_flux

pipe, counter = tiny_flux(), CompileCounter()
# At the usual limit Dynamo would give up and compile no more, which looks the same.
torch._dynamo.config.recompile_limit = 1000

def graphs(steps):
    pipe("a cat", height=16, width=32, num_inference_steps=steps, output_type="pt",
         max_sequence_length=16)
    return counter.frame_count

with ConceptAttention(pipe, ["cat", "grass"]):
    for block in pipe.transformer.transformer_blocks:
        block.compile(backend=counter)
    print(graphs(2), graphs(5))
"""


def test_no_step_compiles_anew():
    # In a process of its own: the type checker of the tests wraps what would be compiled.
    done = subprocess.run(
        [sys.executable, "-c", _COMPILED], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    first, later = map(int, done.stdout.split()[-2:])
    assert later == first > 0


def test_missing_encoders(flux):
    pipe = copy.deepcopy(flux)
    pipe.tokenizer_2 = None
    with pytest.raises(ValueError, match=r"cannot encode concepts.*pass `concept_embeds`"):
        ConceptAttention(pipe, CONCEPTS).__enter__()
    assert hooks(pipe) == 0


@pytest.mark.usefixtures("unchecked")
def test_reading_errors(flux):
    observer = ConceptAttention(flux, CONCEPTS)
    with pytest.raises(RuntimeError, match="no forward pass"):
        observer.heatmaps()
    with observer:
        generate(flux)
    with pytest.raises(ValueError, match="`space` must be one of the recorded"):
        observer.heatmaps(space="value")
    with pytest.raises(ValueError, match="`run` must be between -1 and 0; got 4"):
        observer.heatmaps(run=4)
    with pytest.raises(ValueError, match="was not kept; kept: nothing"):
        observer.vectors("concept_output", layer=0)


def test_scores_that_overflow_are_reported(flux):
    embeds = torch.full((1, 24), float("nan"))
    with ConceptAttention(flux, ["cat"], concept_embeds=embeds) as observer:
        generate(flux)
    with pytest.raises(ValueError, match="scores of space 'output' are not finite"):
        observer.heatmaps()


@pytest.mark.gpu
def test_bit_identity_on_gpu():
    pipe = tiny_flux(guidance=True).to("cuda", torch.bfloat16)
    plain = generate(pipe, **CFG)
    with ConceptAttention(pipe, CONCEPTS) as observer:
        seen = generate(pipe, **CFG)
    assert torch.equal(plain, seen)
    assert observer.heatmaps().values.shape == (2, 3, 4, 8)


def test_prompt_words_are_found_in_the_prompt(flux):
    settings = {"space": ["output", "prompt_attention"], "layers": "all"}
    with ConceptAttention(flux, ["cat", "snow"], prompt="a cat on snow", **settings) as observer:
        generate(flux, prompt=["a cat on snow", "a cat on snow"])
    with ConceptAttention(flux, ["cat", "snow"], prompt_tokens=[[1], [3]], **settings) as by_number:
        generate(flux, prompt=["a cat on snow", "a cat on snow"])
    ours, expected = (o.heatmaps(space="prompt_attention") for o in (observer, by_number))
    assert torch.equal(ours.raw, expected.raw)
    assert not torch.equal(ours.raw, observer.heatmaps().raw)


def test_prompts_of_a_batch_have_their_own_positions(flux):
    prompts = ["a cat on snow", "snow on a cat"]
    settings = {"space": "prompt_attention", "layers": "all"}
    with ConceptAttention(flux, ["cat", "snow"], prompt=prompts, **settings) as both:
        generate(flux, prompt=prompts)
    with ConceptAttention(flux, ["cat", "snow"], prompt=prompts[1], **settings) as second:
        generate(flux, prompt=prompts)
    both, second = both.heatmaps().raw, second.heatmaps().raw
    assert torch.equal(both[:, 1], second[:, 1])
    assert not torch.equal(both[:, 0], second[:, 0])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "need either `prompt` or `prompt_tokens`"),
        ({"prompt": "a dog"}, "`prompt` must hold every concept; 'cat' is not in 'a dog'"),
        ({"prompt": []}, "`prompt` must be one text or"),
        ({"prompt_tokens": [[0]]}, "`prompt_tokens` must hold positions for each of 2 concepts"),
        ({"prompt_tokens": [[0], []]}, "`prompt_tokens` must hold positions for each"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_errors_of_prompt_attention(flux, given, message):
    with pytest.raises(ValueError, match=message):
        ConceptAttention(flux, ["cat", "sky"], space="prompt_attention", **given)


def test_prompt_tokens_out_of_range(flux):
    with (
        pytest.raises(ValueError, match="`prompt_tokens` must be below 16"),
        ConceptAttention(flux, ["cat"], space="prompt_attention", prompt_tokens=[[16]]),
    ):
        generate(flux)


def test_fractions_select_steps():
    assert resolve("steps", slice(0.7, -1), 10) == {7, 8}
    assert resolve("steps", slice(0.25, 0.5), 10) == {3, 4}
    assert resolve("steps", [0.0, 0.5, 1.0], 4) == {0, 2, 3}
    with pytest.raises(ValueError, match="`steps` as shares must be between 0 and 1"):
        resolve("steps", 1.5, 10)


def test_automatic_temperature_is_the_spread_of_the_scores(flux):
    with ConceptAttention(flux, ["cat", "sky"], temperature="auto", store="all") as observer:
        generate(flux)
    maps = observer.heatmaps()
    spread = maps.raw.std(dim=(2, 3, 4), keepdim=True, correction=0)
    torch.testing.assert_close(maps.soft, (maps.raw / spread).softmax(2))
    one = maps.select(steps=[0], layers=[observer.layers[0]]).with_reduce("mean_softmax")
    torch.testing.assert_close(one.values, maps.soft[0])


def test_preset_of_the_paper(flux):
    settings = preset("paper", flux)
    assert settings["token"] == "first"
    with ConceptAttention(flux, ["cat", "sky"], **settings) as observer:
        generate(flux)
    assert observer.layers == (0, 1, 2)
    with pytest.raises(ValueError, match="`name` must be one of"):
        preset("best", flux)


def test_reduce_is_the_order_of_the_maps(flux):
    with ConceptAttention(flux, ["cat", "sky"], reduce="mean_softmax", temperature=5.0) as observer:
        generate(flux)
    maps = observer.heatmaps()
    torch.testing.assert_close(maps.values, (maps.raw[0] / 5).softmax(1))
