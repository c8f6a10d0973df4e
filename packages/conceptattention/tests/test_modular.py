"""Modular pipelines of diffusers: blocks around the same transformer, observed in the same way."""

import diffusers
import pytest
import torch

from conceptattention import ConceptAttention, segment
from conceptattention.testing import tiny_flux
from conceptattention.tiny import FAMILIES, TEXT, normal

modular = pytest.importorskip("diffusers.modular_pipelines")
diffusers.utils.logging.set_verbosity_error()


def modular_flux(pipe):
    made = modular.FluxAutoBlocks().init_pipeline()
    made.update_components(**{k: v for k, v in pipe.components.items() if v is not None})
    made.set_progress_bar_config(disable=True)
    return made


def test_flux_encodes_words_and_keeps_its_bits():
    pipe = tiny_flux()
    blocks = modular_flux(pipe)
    call = {
        "height": 16, "width": 24, "num_inference_steps": 2, "max_sequence_length": 16,
        "output_type": "pt",
    }  # fmt: skip

    def run(pipe, **kwargs):
        return pipe(
            prompt="a cat", generator=torch.Generator().manual_seed(0), **call, **kwargs
        )  # fmt: skip

    plain = run(blocks, output="images")
    with ConceptAttention(blocks, ["cat", "sky"]) as observer:
        seen = run(blocks, output="images")
    with ConceptAttention(pipe, ["cat", "sky"]) as expected:
        run(pipe)
    assert torch.equal(plain, seen)
    assert torch.equal(observer.heatmaps().values, expected.heatmaps().values)
    assert set(observer.heatmaps().coverage.values()) == {1.0}


def test_flux_segments_pictures():
    pipe = tiny_flux()
    picture = torch.rand(1, 3, 16, 24, generator=torch.Generator().manual_seed(0))
    maps = segment(modular_flux(pipe), picture, ["cat", "sky"], "a cat")
    assert torch.equal(maps.values, segment(pipe, picture, ["cat", "sky"], "a cat").values)


@pytest.mark.parametrize(
    ("name", "blocks"), [("sd3", "StableDiffusion3AutoBlocks"), ("qwen", "QwenImageAutoBlocks")]
)
def test_guiders_count_the_conditional_pass_alone(name, blocks):
    if not hasattr(modular, blocks):
        pytest.skip(f"this diffusers has no {blocks}")
    family = FAMILIES[name]
    pipe = family.build()
    made = getattr(modular, blocks)()
    for part in list(made.sub_blocks):  # neither texts nor pictures are encoded or decoded
        if part != "denoise":
            made.sub_blocks.pop(part)
    made = made.init_pipeline()
    made.set_progress_bar_config(disable=True)
    made.update_components(
        transformer=pipe.transformer, scheduler=pipe.scheduler,
        guider=diffusers.ClassifierFreeGuidance(guidance_scale=3.0),
    )  # fmt: skip
    words = ["a", "b", "c"]
    settings = {"concept_embeds": normal(3, TEXT, seed=5), "layers": "all"}

    def run():
        return made(
            **family.texts(2), **family.texts(2, negative=True), height=32, width=48,
            num_inference_steps=2, generator=torch.Generator().manual_seed(0), output="latents",
        )  # fmt: skip

    plain = run()
    with ConceptAttention(made, words, **settings) as observer:
        seen = run()
    assert torch.equal(plain, seen)
    maps = observer.heatmaps()
    assert maps.values.shape == (2, 3, 2, 3)
    assert maps.counts == [6]  # three layers in two steps
    with pytest.raises(ValueError, match="pass `concept_embeds`"), ConceptAttention(made, words):
        pass
