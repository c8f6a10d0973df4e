"""Pictures that exist already, for every family of pictures: encoding and the one noised pass."""

from types import SimpleNamespace

import diffusers
import pytest
import torch
import torch.nn.functional as F

from conceptattention import ConceptAttention, segment
from conceptattention.adapters import adapter_for
from conceptattention.tiny import FAMILIES, TEXT, normal

diffusers.utils.logging.set_verbosity_error()
WORDS = ["a", "b", "c"]
EMBEDS = normal(3, TEXT, seed=5)
NAMES = [
    "flux2", "qwen", "chroma", "longcat", "ovis", "bria", "cogview4", "hunyuan-image", "z-image"
]  # fmt: skip


class Mirror(torch.nn.Module):
    """An autoencoder without loss: latents repeat the colours, normalised as its settings say."""

    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self, channels, side, film):
        super().__init__()
        self.channels, self.side, self.film = channels, side, film
        self.config = SimpleNamespace(
            scaling_factor=0.7, shift_factor=0.1, z_dim=channels, batch_norm_eps=1e-4,
            latents_mean=[0.2] * channels, latents_std=[1.5] * channels,
        )  # fmt: skip
        self.bn = SimpleNamespace(
            running_mean=normal(4 * channels, seed=1), running_var=normal(4 * channels).square() + 1
        )

    def encode(self, pictures):
        flat = pictures[:, :, 0] if self.film else pictures
        small = F.avg_pool2d(flat, self.side).repeat(1, -(-self.channels // 3), 1, 1)
        small = small[:, : self.channels]
        made = small[:, :, None] if self.film else small
        return SimpleNamespace(latent_dist=SimpleNamespace(mode=lambda: made, mean=made))

    def decode(self, latents, **_):
        flat = (latents[:, :, 0] if self.film else latents)[:, :3]
        wide = flat.repeat_interleave(self.side, -1).repeat_interleave(self.side, -2)
        return (wide[:, :, None] if self.film else wide,)


@pytest.fixture(params=NAMES)
def case(request):
    """Return family, pipeline with a lossless autoencoder, and a picture of whole patches."""
    family = FAMILIES[request.param]
    pipe = family.build()
    adapter = adapter_for(pipe.transformer)
    channels = {"longcat": 16}.get(request.param, 4)
    side = 1 if request.param == "bria" else pipe.vae_scale_factor
    object.__setattr__(pipe, "vae", Mirror(channels, side, request.param == "qwen"))
    height, width = (family.call.get(key, size) for key, size in (("height", 32), ("width", 48)))
    small = torch.rand(
        2, 3, height // side, width // side, generator=torch.Generator().manual_seed(0)
    )
    picture = small.repeat_interleave(side, -1).repeat_interleave(side, -2)
    return family, pipe, adapter, picture


def test_the_pipeline_decodes_what_the_adapter_encoded(case):
    family, pipe, adapter, picture = case
    latents = adapter.encode_image(pipe, 2 * picture - 1)
    if adapter.family == "Z-Image":
        latents = latents[:, :, 0]
    pipe.scheduler.step = lambda *_, **__: (latents,)
    made = family.run(pipe, output_type="pt")
    torch.testing.assert_close(made, picture, rtol=0, atol=1e-5)


def test_the_noised_pass_is_the_pipelines_own(case, monkeypatch):
    """The pipeline's call in its second step, with our latents."""
    family, pipe, adapter, picture = case
    latents = adapter.encode_image(pipe, 2 * picture - 1)
    stock = type(pipe).__call__

    def call(self, prompt, **given):
        assert prompt == ["x", "y"]
        assert given["num_inference_steps"] == 1
        return stock(self, **family.arguments(self, **given))

    side = adapter.patch(pipe)
    grid = (picture.shape[2] // side, picture.shape[3] // side)
    theirs = []
    monkeypatch.setattr(
        pipe.transformer, "forward",
        lambda *args, forward=pipe.transformer.forward, **kwargs: (
            theirs.append((args, kwargs)), forward(*args, **kwargs)
        )[1],
    )  # fmt: skip
    stock(pipe, **family.arguments(pipe))
    args, kwargs = theirs[2 if family.guider else 1]
    monkeypatch.undo()
    monkeypatch.setattr(pipe, "__class__", type("Pipeline", (type(pipe),), {"__call__": call}))
    before = torch.get_rng_state()
    ours = adapter.arguments(pipe, latents, grid, ["x", "y"], float(pipe.scheduler.sigmas[1]))
    assert torch.equal(before, torch.get_rng_state())
    names = ("x", "t", "cap_feats")  # those of Z-Image are given by place
    seen = {**dict(zip(names, args, strict=False)), **kwargs}
    seen.pop("return_dict")
    assert ours[adapter.latents_argument] is latents
    for name, value in seen.items():
        if name != adapter.latents_argument:
            torch.testing.assert_close(ours[name], value)
    with ConceptAttention(pipe, WORDS, concept_embeds=EMBEDS, layers="all") as observer:
        pipe.transformer(**ours, return_dict=False)
    assert observer.heatmaps().values.shape == (2, 3, *grid)


def test_segment_takes_the_pipelines_text(case, monkeypatch):
    family, pipe, adapter, picture = case
    stock = type(pipe).__call__

    def call(self, prompt, **given):
        return stock(self, **family.arguments(self, batch=len(prompt), **given))

    monkeypatch.setattr(pipe, "__class__", type("Pipeline", (type(pipe),), {"__call__": call}))
    settings = {"concept_embeds": EMBEDS, "layers": [0]}
    maps = segment(pipe, picture, WORDS, "x", t=0.4, **settings)
    side = adapter.patch(pipe)
    latents = adapter.encode_image(pipe, 2 * picture - 1)
    grid = (picture.shape[2] // side, picture.shape[3] // side)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    given = adapter.arguments(pipe, 0.6 * latents + 0.4 * noise, grid, ["x"] * 2, 0.4)
    with torch.no_grad(), ConceptAttention(pipe, WORDS, **settings) as observer:
        pipe.transformer(**given, return_dict=False)
    torch.testing.assert_close(maps.values, observer.heatmaps().values)


@pytest.mark.parametrize("name", ["cogvideox", "hunyuan-video"])
def test_families_of_videos_are_refused(name):
    pipe = FAMILIES[name].build()
    with pytest.raises(ValueError, match="makes videos"):
        segment(pipe, torch.rand(1, 3, 32, 32), WORDS, concept_embeds=EMBEDS)
    assert not pipe.transformer._forward_hooks
