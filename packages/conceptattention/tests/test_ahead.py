"""The second stream: which layers take part, and that nothing but time depends on it."""

import pytest
import torch

from conceptattention import ConceptAttention
from conceptattention.adapters import adapter_for
from conceptattention.ahead import Ahead
from conceptattention.testing import flux_arguments, tiny_flux

WORDS = ["cat", "grass", "sky"]


class Packed(torch.nn.Parameter):
    """Stands for the weights of a quantisation library."""


def cast(module):
    module.register_forward_pre_hook(lambda *_: None)


def wrap(module):
    module.forward = module.forward


def pack(module):
    module.weight = Packed(module.weight.data)


@pytest.fixture
def model():
    return tiny_flux().transformer.eval()


def test_plain_layers_run_ahead_to_the_next_one(model):
    blocks = adapter_for(model).blocks(model)
    ahead = Ahead(blocks)
    assert [ahead.following(block) for block in blocks] == [blocks[1], blocks[2], None]


@pytest.mark.parametrize("change", [cast, wrap, pack])
@pytest.mark.parametrize("layer", [0, 1])
def test_layers_that_others_changed_stay_in_the_models_stream(model, change, layer):
    blocks = adapter_for(model).blocks(model)
    change(blocks[layer].module.ff_context.net[2])
    ahead = Ahead(blocks)
    assert ahead.following(blocks[0]) is None
    assert ahead.following(blocks[1]) is (blocks[2] if layer == 0 else None)


def test_every_run_looks_at_the_layers_again(model):
    blocks = adapter_for(model).blocks(model)
    ahead = Ahead(blocks)
    assert ahead.following(blocks[0]) is blocks[1]
    cast(blocks[0].module)
    ahead.forget()
    assert ahead.following(blocks[0]) is None


def test_the_observers_own_hooks_do_not_count(model, monkeypatch):
    pytest.importorskip("triton")
    seen = []
    following = Ahead.following
    monkeypatch.setattr(Ahead, "following", lambda *a: seen.append(following(*a)) or seen[-1])
    pipe = tiny_flux()
    embeds = torch.randn(3, 24, generator=torch.Generator().manual_seed(0))
    maps = []
    for kernels in ("torch", "triton"):
        with ConceptAttention(
            pipe, WORDS, concept_embeds=embeds, kernels=kernels, layers="all"
        ) as observer:
            pipe.transformer(**flux_arguments(pipe))
        maps.append(observer.heatmaps().raw)
    assert [block.index for block in seen] == [1, 2]
    torch.testing.assert_close(*maps, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
def test_the_second_stream_changes_no_bit(monkeypatch):
    from conceptattention.demo.model import load_pipeline

    pipe = load_pipeline().to("cuda", torch.bfloat16)
    raw, images = [], []
    for alone in (True, False, False):
        with monkeypatch.context() as patch:
            if alone:
                patch.setattr(Ahead, "following", lambda *_: None)
            with ConceptAttention(
                pipe, ["bee", "grass", "clouds"], kernels="triton", layers="all",
                single_stream=True, store="all",
            ) as observer:  # fmt: skip
                images.append(
                    pipe(["a bee on grass"] * 2, num_inference_steps=8, output_type="pt",
                         generator=torch.Generator().manual_seed(0)).images
                )  # fmt: skip
            raw.append(observer.heatmaps().raw)
    for other in (1, 2):
        assert torch.equal(images[0], images[other])
        assert torch.equal(raw[0], raw[other])
