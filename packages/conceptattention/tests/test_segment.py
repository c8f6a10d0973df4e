import numpy as np
import pytest
import torch

from conceptattention import ConceptAttention, segment
from conceptattention.testing import hooks, tiny_flux

CONCEPTS = ["cat", "grass", "sky"]


def test_segment_stops_early_and_averages_samples(flux):
    image = torch.rand(2, 3, 19, 34, generator=torch.Generator().manual_seed(0))
    # Leaves diffusers' own records on the model, which mean no offloading.
    flux(["a cat"], height=16, width=32, num_inference_steps=1, max_sequence_length=16)
    ran = []
    handle = flux.transformer.single_transformer_blocks[0].register_forward_hook(
        lambda *_: ran.append(1)
    )
    maps = segment(flux, image, CONCEPTS, ["a cat", "a dog"], t=0.4, samples=3)
    handle.remove()
    assert not ran
    assert maps.values.shape == (2, 3, 4, 8)  # 19 x 34 pixels are scaled to 16 x 32
    assert maps.counts == [3 * len(maps.coverage)]
    again = segment(flux, image, CONCEPTS, ["a cat", "a dog"], t=0.4, samples=3)
    assert torch.equal(maps.values, again.values)
    other = segment(flux, image, CONCEPTS, ["a cat", "a dog"], t=0.4, samples=3, seed=1)
    assert not torch.equal(maps.values, other.values)
    assert hooks(flux) == 0


@pytest.mark.parametrize("kind", ["tensor", "picture", "array"])
def test_segment_maps_cover_the_whole_picture(flux, kind, monkeypatch):
    """Sizes that are no whole number of patches are scaled, not cut: maps keep their place."""
    from PIL import Image

    picture = Image.new("RGB", (38, 19))
    picture.paste("white", (34, 0, 38, 19))  # cut to 36 x 16, half of the stripe would be gone
    given = picture
    if kind == "tensor":
        given = torch.zeros(1, 3, 19, 38)
        given[..., 34:] = 1
    if kind == "array":
        given = np.asarray(picture)
    seen = []
    adapter = type(ConceptAttention(flux, ["cat"]).adapter)
    encode = adapter.encode_image
    monkeypatch.setattr(
        adapter, "encode_image", lambda self, pipe, x: seen.append(x) or encode(self, pipe, x)
    )
    segment(flux, given, ["cat", "sky"])
    (pixels,) = seen
    assert pixels.shape == (1, 3, 16, 36)
    share = float((pixels[0] / 2 + 0.5).mean())
    assert share == pytest.approx(4 / 38, rel=0.02)


@pytest.mark.parametrize("wide", ["vae", "transformer"])
def test_segment_with_parts_of_two_types(wide):
    pipe = tiny_flux()
    image = torch.rand(1, 3, 16, 32, generator=torch.Generator().manual_seed(0))
    expected = segment(pipe, image, CONCEPTS)
    narrow = ("vae",) if wide == "transformer" else ("transformer", "text_encoder_2")
    for name in narrow:
        getattr(pipe, name).to(torch.bfloat16)
    maps = segment(pipe, image, CONCEPTS)
    assert (maps.values - expected.values).abs().max() < 0.05


@pytest.mark.usefixtures("unchecked")
def test_segment_errors(flux):
    from PIL import Image

    image = torch.rand(1, 3, 16, 16)
    for kwargs, message in (
        ({"t": 0.0}, "`t` must be above 0 and at most 1; got 0.0"),
        ({"t": 1.5}, "`t` must be above 0 and at most 1; got 1.5"),
        ({"samples": 0}, "`samples` must be at least 1; got 0"),
        ({"prompt": ["a", "b"]}, "`prompt` must be one text or 1 of them"),
        ({"steps": [0]}, "`steps` has no meaning"),
        (
            {"image": image[:0]},
            r"\(batch, 3, height, width\); got \(0, 3, 16, 16\)",
        ),
        ({"image": image[0]}, r"must have shape \(batch, 3, height, width\); got \(3, 16, 16\)"),
        ({"image": 2 * image + 1}, "colours between 0 and 1"),
        ({"image": image[..., :2]}, "at least 4 pixels high and wide"),
        ({"image": [Image.new("RGB", (8, 8)), Image.new("RGB", (8, 9))]}, "pictures of one size"),
    ):
        with pytest.raises(ValueError, match=message):
            segment(flux, **{"image": image, "concepts": CONCEPTS, **kwargs})
    with pytest.raises(TypeError, match="`image` must be a PIL picture"):
        segment(flux, 3, CONCEPTS)
    for call in (lambda: segment(None, image, CONCEPTS), lambda: ConceptAttention(None, CONCEPTS)):
        with pytest.raises(ValueError, match="`pipe` must be a diffusers pipeline with a transf"):
            call()
    assert hooks(flux) == 0


def test_segment_uses_its_caption_for_prompt_attention(flux):
    picture = torch.rand(1, 3, 16, 24, generator=torch.Generator().manual_seed(0))
    maps = segment(flux, picture, ["cat", "sky"], "a cat on sky", space="prompt_attention")
    given = segment(
        flux, picture, ["cat", "sky"], "a cat on sky",
        space="prompt_attention", prompt_tokens=[[1], [3]],
    )  # fmt: skip
    assert torch.equal(maps.values, given.values)
