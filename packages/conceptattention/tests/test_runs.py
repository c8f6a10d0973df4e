"""Runs: which forward passes count, after interruptions, re-use, threads and partial schedules."""

import threading

import diffusers
import pytest
import torch
from PIL import Image

from conceptattention import ConceptAttention
from conceptattention.testing import hooks, tiny_flux
from conceptattention.tiny import FAMILIES, TEXT, normal

WORDS = ["cat", "sky"]


def generate(pipe, steps=2, **kwargs):
    return pipe(
        ["a cat", "a dog"], height=16, width=32, num_inference_steps=steps,
        generator=torch.Generator().manual_seed(0), output_type="pt", max_sequence_length=16,
        **kwargs,
    ).images  # fmt: skip


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.guidance])
def test_the_conditional_pass_is_the_one_recorded(name):
    family = FAMILIES[name]
    pipe = family.build()
    embeds = normal(2, TEXT, seed=5)
    with ConceptAttention(pipe, WORDS, concept_embeds=embeds, layers="all", steps=[0]) as observer:
        family.run(pipe, guided=False)
        family.run(pipe, guided=True)
    plain, guided = observer.heatmaps(run=0), observer.heatmaps(run=1)
    # In step 0 guidance has changed nothing yet; the negative prompt would give other scores.
    torch.testing.assert_close(plain.raw, guided.raw)


def test_finished_runs_let_go_of_the_model_inputs(flux):
    with ConceptAttention(flux, WORDS) as observer:
        for _ in range(3):
            generate(flux)
    assert [run.call is None for run in observer.runs] == [True, True, False]
    maps = [observer.heatmaps(run=number) for number in range(3)]
    assert torch.equal(maps[0].values, maps[2].values)


@pytest.mark.parametrize(
    ("steps", "expected"),
    [([-1], {4}), (slice(0.6, -1), {3}), ([0.0], {0}), ("all", {0, 1, 2, 3, 4})],
)
def test_steps_of_a_run_that_starts_from_a_picture(flux, steps, expected):
    parts = {
        name: part for name, part in flux.components.items()
        if name not in ("image_encoder", "feature_extractor")
    }  # fmt: skip
    pipe = diffusers.FluxImg2ImgPipeline(**parts)
    pipe.set_progress_bar_config(disable=True)
    with ConceptAttention(pipe, WORDS, steps=steps, store="steps") as observer:
        # Half of ten steps are run: the scheduler lists all ten.
        generate(
            pipe, steps=10, strength=0.5, image=[Image.new("RGB", (32, 16), "red")] * 2
        )  # fmt: skip
    assert {step for _, step in observer.heatmaps().keys} == expected


def test_steps_by_their_noise_level(flux):
    with ConceptAttention(flux, WORDS, steps="noise:0.3-0.8", store="steps") as observer:
        generate(flux, steps=4)  # levels 1, 0.75, 0.5, 0.25
    assert [step for _, step in observer.heatmaps().keys] == [1, 2]
    none = ConceptAttention(flux, WORDS, steps="noise:0.3-0.4")
    with pytest.raises(ValueError, match=r"none of this run's levels: 1.00, 0.75, 0.50"), none:
        generate(flux, steps=4)


@pytest.mark.parametrize("steps", ["noise:0.8-0.2", "noise:a-b", "noise:0.5", "noise:0-2"])
def test_bad_noise_levels_are_named(flux, steps):
    with pytest.raises(ValueError, match=r"`steps` must be like 'noise:0.3-0.7'"):
        ConceptAttention(flux, WORDS, steps=steps)


def test_an_observer_goes_on_after_an_exception_inside_the_model(flux):
    """A run that broke in the middle of a layer leaves nothing behind, and keeps what it saw."""
    plain = generate(flux, steps=3)
    block, count = flux.transformer.transformer_blocks[1], []

    def fail(*_):
        count.append(1)
        if len(count) == 2:
            raise ZeroDivisionError

    with ConceptAttention(flux, WORDS, layers="all", store="all") as observer:
        handle = block.attn.register_forward_pre_hook(fail)
        with pytest.raises(ZeroDivisionError):
            generate(flux, steps=3)
        handle.remove()
        assert not observer.router.listening
        assert not observer._taps._heard
        seen = generate(flux, steps=3)
    assert torch.equal(plain, seen)
    broken, whole = observer.heatmaps(run=0), observer.heatmaps(run=1)
    assert broken.coverage == {0: 1.0, 1: 0.5, 2: 0.5}
    assert set(whole.coverage.values()) == {1.0}
    first = broken.select(steps=[0])
    assert torch.equal(first.values, whole.select(steps=[0]).values)


def test_an_observer_can_be_entered_again(flux):
    observer = ConceptAttention(flux, WORDS)
    for _ in range(2):
        with observer:
            generate(flux)
    generate(flux)  # not observed
    assert len(observer.runs) == 2
    assert torch.equal(observer.heatmaps(run=0).values, observer.heatmaps(run=1).values)


def test_pipelines_in_threads_do_not_meet():
    pipes = [tiny_flux(seed=seed) for seed in range(2)]
    expected, found = [], [None, None]
    for pipe in pipes:
        with ConceptAttention(pipe, WORDS) as observer:
            generate(pipe)
        expected.append(observer.heatmaps().values)

    def work(number):
        with ConceptAttention(pipes[number], WORDS) as observer:
            for _ in range(3):
                generate(pipes[number])
        found[number] = observer.heatmaps().values

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not torch.equal(*expected)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_prompts_and_vectors_that_do_not_fit_the_batch(flux):
    prompts = ["a cat", "cat on a", "a a cat"]
    observer = ConceptAttention(flux, ["cat"], space="prompt_attention", prompt=prompts)
    with pytest.raises(ValueError, match="`prompt` has 3 texts, one per image"), observer:
        generate(flux)
    observer = ConceptAttention(flux, ["cat"], concept_embeds=torch.zeros(1, 7))
    with (
        pytest.raises(ValueError, match="vectors of length 24, as the prompt has; got 7"),
        observer,
    ):
        generate(flux)


@pytest.mark.parametrize("inside", [False, True], ids=["on entering", "in a forward pass"])
def test_an_attachment_that_fails_half_way_leaves_no_hook(flux, monkeypatch, inside):
    observer = ConceptAttention(flux, WORDS, layers="all")
    taps = type(observer.adapter).taps

    def fails(self, block):
        if block.index == 2:
            raise AttributeError("to_k")
        return taps(self, block)

    def observe():
        if not inside:
            monkeypatch.setattr(type(observer.adapter), "taps", fails)
        with observer:
            monkeypatch.setattr(type(observer.adapter), "taps", fails)
            generate(flux)

    before = hooks(flux)
    with pytest.raises(AttributeError, match="to_k"):
        observe()
    monkeypatch.undo()
    assert hooks(flux) == before
    with ConceptAttention(flux, WORDS) as again:
        generate(flux)
    assert set(again.heatmaps().coverage.values()) == {1.0}
