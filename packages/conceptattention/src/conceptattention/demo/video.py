"""A small CogVideoX pipeline of diffusers' classes, and the moving scenes that it is trained on."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    ConfigMixin,
    ModelMixin,
)
from diffusers.configuration_utils import register_to_config
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import T5Config, T5EncoderModel

from .model import build_tokenizer
from .scenes import BACKGROUNDS, ITEMS, LABELS, MAX_OBJECTS, VOCABULARY, _constants, _draw, _Layout

VIDEO_ASSETS = Path(__file__).parent / "assets" / "video"
PIXELS, FRAMES, MAX_TOKENS = 24, 6, 8
# Nouns and places that differ in colour: outlines of a few pixels do not tell much.
CLIP_ITEMS = ("apple", "leaf", "fish", "moon", "flower", "tile", "wheel", "bee")
CLIP_PLACES = ("grass", "water", "sand", "snow")
MOST_OBJECTS = 3
TRANSFORMER = {
    "num_attention_heads": 5, "attention_head_dim": 32, "num_layers": 6, "time_embed_dim": 32,
    "text_embed_dim": 96,
}  # fmt: skip
TEXT_ENCODER = {"d_model": 96, "d_kv": 32, "d_ff": 192, "num_layers": 1, "num_heads": 3}


@dataclass(frozen=True)
class Clips:
    """A batch of captioned videos.

    Args:
        videos: Colour in [0, 1], (batch, frames, 3, size, size).
        labels: Index into `LABELS` of every pixel, (batch, frames, size, size).
        tokens: Caption as indices into `VOCABULARY`, zero-padded, (batch, MAX_TOKENS).
        items: Index into `ITEMS` of each object, -1 where there is none, (batch, MAX_OBJECTS).
        places: Index into `BACKGROUNDS`, (batch,).
    """

    videos: Tensor
    labels: Tensor
    tokens: Tensor
    items: Tensor
    places: Tensor

    def words(self, index: int) -> list[str]:
        """Return the objects of one clip, then its background."""
        items = [ITEMS[i] for i in self.items[index].tolist() if i >= 0]
        return [*items, BACKGROUNDS[int(self.places[index])]]


def sample_clips(
    count: int,
    generator: torch.Generator,
    *,
    size: int = PIXELS,
    frames: int = FRAMES,
    objects: int | None = None,
    plain_captions: bool = False,
    renderer: Callable[..., tuple[Tensor, Tensor]] = _draw,
) -> Clips:
    """Return random videos of objects that move in straight lines and bounce off the border.

    Args:
        count: Number of videos, above 0.
        generator: Source of all randomness, on the device that draws.
        size: Height and width in pixels, a multiple of 2.
        frames: Number of frames.
        objects: Number of objects; 1 to `MOST_OBJECTS` at random when None.
        plain_captions: Captions name everything; otherwise some words or all are left out.
        renderer: Draws the frames; a compiled one is faster.

    Source: own.
    """
    device = generator.device

    def uniform(*shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        return torch.rand(shape, generator=generator, device=device) * (high - low) + low

    names = torch.tensor([ITEMS.index(word) for word in CLIP_ITEMS], device=device)
    grounds = torch.tensor([BACKGROUNDS.index(word) for word in CLIP_PLACES], device=device)
    items = names[uniform(count, len(names)).argsort(1)[:, :MAX_OBJECTS]]
    number = (uniform(count, 1) * MOST_OBJECTS).long() + 1 if objects is None else objects
    items = items.masked_fill(torch.arange(MAX_OBJECTS, device=device) >= number, -1)
    places = grounds[(uniform(count) * len(grounds)).long()]

    radii = uniform(count, MAX_OBJECTS, low=0.15, high=0.24)
    heading = uniform(count, MAX_OBJECTS, high=2 * math.pi)
    way = torch.stack([heading.cos(), heading.sin()], -1) * uniform(
        count, MAX_OBJECTS, 1, low=0.4, high=1.1
    )  # over the whole video, in widths of the picture
    time = torch.linspace(0, 1, frames, device=device)[:, None, None]
    low = 0.8 * radii[:, None, :, None]
    room = 1 - 2 * low
    along = uniform(count, 1, MAX_OBJECTS, 2) + way[:, None] * time / room
    centres = low + room * (1 - (along.remainder(2) - 1).abs())  # reflected at the border

    def repeat(values: Tensor) -> Tensor:
        return values.repeat_interleave(frames, 0)

    layout = _Layout(
        backgrounds=repeat(places[:, None].expand(-1, 2)),
        items=repeat(items),
        colours=torch.full((count * frames, MAX_OBJECTS), -1, device=device),
        centres=centres.flatten(0, 1),
        radii=repeat(radii),
        angles=repeat(uniform(count, MAX_OBJECTS, low=-0.5, high=0.5)),
        shade=repeat(uniform(count, MAX_OBJECTS, 3, low=-0.06, high=0.06)),
        phase=repeat(uniform(count, 2, 4)),
        horizon=repeat(uniform(count, 3)),
        light=repeat(uniform(count, 2, low=-0.14, high=0.14)),
        coarse=repeat(uniform(count, 2, 8, 8)),
        fine=repeat(uniform(count, 2, size // 2, size // 2)),
        grain=torch.randn((count * frames, 3, size, size), generator=generator, device=device),
    )
    videos, labels = renderer(layout, size, _constants(device))
    first = VOCABULARY.index(LABELS[0])
    things = torch.where(items >= 0, items + len(BACKGROUNDS) + first, 0)
    ground = torch.stack([torch.full_like(places, VOCABULARY.index("on")), places + first], 1)
    tokens = torch.cat([things, ground], 1)
    if not plain_captions:
        tokens = tokens.masked_fill(uniform(*tokens.shape) < 0.1, 0)
        tokens = tokens.masked_fill(uniform(count, 1) < 0.1, 0)
    tokens = tokens.gather(1, (tokens == 0).to(torch.int8).argsort(dim=1, stable=True))
    tokens = nn.functional.pad(tokens, (0, MAX_TOKENS - tokens.shape[1]))
    shape = (count, frames)
    return Clips(videos.unflatten(0, shape), labels.unflatten(0, shape), tokens, items, places)


class VideoIdentityVAE(ModelMixin, ConfigMixin):
    """An autoencoder whose latents are the pixels, in time too."""

    @register_to_config
    def __init__(
        self,
        block_out_channels: tuple[int, ...] = (3,),
        temporal_compression_ratio: int = 1,
        scaling_factor: float = 1.0,
    ) -> None:
        super().__init__()
        self.register_buffer("unit", torch.ones(1))

    def decode(self, latents: Tensor) -> SimpleNamespace:
        """Return the latents as pixels."""
        return SimpleNamespace(sample=latents)


class VideoDemoPipeline(CogVideoXPipeline):  # type: ignore[misc]
    """A CogVideoX pipeline whose texts have `MAX_TOKENS` tokens."""

    def _get_t5_prompt_embeds(
        self,
        prompt: str | list[str],
        num_videos_per_prompt: int = 1,
        max_sequence_length: int = MAX_TOKENS,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        states: Tensor = super()._get_t5_prompt_embeds(
            prompt, num_videos_per_prompt, MAX_TOKENS, device, dtype
        )
        return states


def build_video_pipeline(
    transformer: dict[str, Any] | None = None, text_encoder: dict[str, Any] | None = None
) -> VideoDemoPipeline:
    """Return the video pipeline with random weights; arguments replace settings."""
    text = {**TEXT_ENCODER, **(text_encoder or {})}
    config = T5Config(
        **text, vocab_size=len(VOCABULARY), pad_token_id=0, decoder_start_token_id=0,
        dropout_rate=0.0, feed_forward_proj="gated-gelu", use_cache=False,
    )  # fmt: skip
    model = CogVideoXTransformer3DModel(
        in_channels=3, out_channels=3, patch_size=2, sample_width=PIXELS, sample_height=PIXELS,
        sample_frames=FRAMES, temporal_compression_ratio=1, max_text_seq_length=MAX_TOKENS,
        use_rotary_positional_embeddings=True, **{**TRANSFORMER, **(transformer or {})},
    )  # fmt: skip
    pipe = VideoDemoPipeline(
        tokenizer=build_tokenizer(),
        text_encoder=T5EncoderModel(config).eval(),
        vae=VideoIdentityVAE(),
        transformer=model.eval(),
        scheduler=CogVideoXDDIMScheduler(
            prediction_type="v_prediction", rescale_betas_zero_snr=True, clip_sample=False,
            timestep_spacing="trailing",
        ),
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def turns(pipe: VideoDemoPipeline, size: int, frames: int) -> tuple[Tensor, Tensor]:
    """Return rotary positions, as the pipeline makes them."""
    device = pipe.transformer.device
    made: tuple[Tensor, Tensor] = pipe._prepare_rotary_positional_embeddings(
        size, size, frames, device
    )
    return made


def save_video_weights(pipe: VideoDemoPipeline, folder: str | os.PathLike[str]) -> Path:
    """Write the configuration, and weights with matrices in 8 bits, a scale for each row."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    stored: dict[str, Tensor] = {}
    for name, tensor in _tensors(pipe).items():
        tensor = tensor.detach().float().cpu()
        if tensor.ndim < 2:
            stored[name] = tensor.half()
            continue
        rows = tensor.flatten(1)
        scale = (rows.abs().amax(1, keepdim=True) / 127).clamp(min=1e-6)
        scale = scale.half().float().clamp(min=6e-8)
        stored[name] = (rows / scale).round().clamp(-127, 127).to(torch.int8).view_as(tensor)
        stored[f"{name}.scale"] = scale[:, 0].half()
    config = {
        "transformer": {name: pipe.transformer.config[name] for name in TRANSFORMER},
        "text_encoder": {name: getattr(pipe.text_encoder.config, name) for name in TEXT_ENCODER},
        "vocabulary": list(VOCABULARY),
    }
    path = folder / "weights.safetensors"
    temporary = path.with_suffix(".tmp")
    save_file(stored, temporary)
    os.replace(temporary, path)
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    return path


def load_video_pipeline(folder: str | os.PathLike[str] | None = None) -> VideoDemoPipeline:
    """Return the trained video pipeline.

    Args:
        folder: Where `save_video_weights` wrote; the package's own weights when None.

    Raises:
        ValueError: A file is missing, truncated or of another version.
    """
    folder = VIDEO_ASSETS if folder is None else Path(folder)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        stored = load_file(folder / "weights.safetensors")
    except Exception as error:
        raise ValueError(
            f"`folder` must hold config.json and weights.safetensors of the video model; "
            f"{str(folder)!r} does not: {error}."
        ) from error
    if tuple(config.get("vocabulary", ())) != VOCABULARY:
        raise ValueError(f"`folder` {str(folder)!r} holds a video model with another vocabulary.")
    pipe = build_video_pipeline(config["transformer"], config["text_encoder"])
    wanted = _tensors(pipe)
    missing = sorted(set(wanted) - set(stored))
    if missing:
        raise ValueError(f"`folder` {str(folder)!r} misses weights: {missing[:3]}.")
    with torch.no_grad():
        for name, tensor in wanted.items():
            value = stored[name].float()
            if f"{name}.scale" in stored:
                scale = stored[f"{name}.scale"].float()
                value = value * scale.view(-1, *[1] * (value.ndim - 1))
            tensor.copy_(value)
    return pipe


def _tensors(pipe: VideoDemoPipeline) -> dict[str, Tensor]:
    """Return the trained parameters by name; tied ones once."""
    parts = {"transformer": pipe.transformer, "text_encoder": pipe.text_encoder}
    return {
        f"{part}.{name}": tensor
        for part, module in parts.items()
        for name, tensor in module.named_parameters()
    }
