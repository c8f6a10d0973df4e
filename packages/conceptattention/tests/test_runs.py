"""Runs: which forward passes count, after interruptions, re-use, threads and partial schedules."""

import pytest
import torch

from conceptattention import ConceptAttention
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
