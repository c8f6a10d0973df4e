"""The embedded demo model: a small Flux.1 pipeline of diffusers' and transformers' classes."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import (
    ConfigMixin,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    ModelMixin,
)
from diffusers.configuration_utils import register_to_config
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

from .scenes import MAX_TOKENS, VOCABULARY

ASSETS = Path(__file__).parent / "assets"
PIXELS = 64
# How maps of this model are read: scores averaged over layers before the softmax, which weights a
# layer by the size of its scores (the order of the reference for Flux.2).
READING: dict[str, Any] = {"reduce": "mean_softmax"}

TRANSFORMER = {
    "in_channels": 12,
    "num_layers": 5,
    "num_single_layers": 2,
    "attention_head_dim": 32,
    "num_attention_heads": 5,
    "joint_attention_dim": 128,
    "pooled_projection_dim": 128,
    "axes_dims_rope": (4, 14, 14),
}
TEXT_ENCODER = {
    "d_model": 128,
    "d_kv": 32,
    "d_ff": 256,
    "num_layers": 1,
    "num_heads": 4,
    "feed_forward_proj": "gated-gelu",
    "dropout_rate": 0.0,
}


class IdentityVAE(ModelMixin, ConfigMixin):
    """An autoencoder whose latents are the pixels, so that patches come from Flux's packing."""

    @register_to_config
    def __init__(
        self,
        latent_channels: int = 3,
        block_out_channels: Sequence[int] = (3,),
        scaling_factor: float = 1.0,
        shift_factor: float = 0.0,
    ) -> None:
        super().__init__()
        # Pipelines read device and dtype from a component's tensors.
        self.register_buffer("unit", torch.ones(1))

    def encode(self, image: Tensor) -> SimpleNamespace:
        """Return the pixels, wrapped as diffusers' autoencoders wrap a distribution."""
        return SimpleNamespace(latent_dist=SimpleNamespace(mode=lambda: image))

    def decode(self, latents: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        """Return the latents as pixels."""
        return (latents,)


class DemoPipeline(FluxPipeline):  # type: ignore[misc]
    """A Flux.1 pipeline whose one text encoder also gives the pooled vector."""

    def encode_prompt(
        self,
        prompt: str | list[str] | None = None,
        prompt_2: str | list[str] | None = None,
        device: torch.device | None = None,
        num_images_per_prompt: int = 1,
        prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        max_sequence_length: int = MAX_TOKENS,
        lora_scale: float | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return token vectors, their pooled mean and text positions, as `FluxPipeline` does."""
        device = device or self._execution_device
        if prompt_embeds is None or pooled_prompt_embeds is None:
            text = prompt_2 or prompt or ""
            tokens = self.tokenizer_2(
                [text] if isinstance(text, str) else list(text),
                padding="max_length",
                max_length=MAX_TOKENS,
                truncation=True,
                return_tensors="pt",
            ).input_ids
            prompt_embeds, pooled_prompt_embeds = encode_tokens(
                self.text_encoder_2, tokens.to(device)
            )
            prompt_embeds = prompt_embeds.repeat_interleave(num_images_per_prompt, 0)
            pooled_prompt_embeds = pooled_prompt_embeds.repeat_interleave(num_images_per_prompt, 0)
        ids = torch.zeros(prompt_embeds.shape[1], 3, device=device, dtype=prompt_embeds.dtype)
        return prompt_embeds, pooled_prompt_embeds, ids


def encode_tokens(text_encoder: Any, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Return token vectors (batch, tokens, dim) and their mean over the words (batch, dim).

    Padding is zero: a padded place that had seen the words could tell the picture what they say,
    and concepts have no such place.
    """
    words = tokens > 0
    states = text_encoder(input_ids=tokens, attention_mask=words).last_hidden_state
    states = states * words[..., None].to(states.dtype)
    return states, states.sum(1) / words.sum(1, keepdim=True).clamp(min=1)


def build_tokenizer(vocabulary: Sequence[str] = VOCABULARY) -> PreTrainedTokenizerFast:
    """Return the word-level tokenizer; it drops articles, "and", and punctuation but hyphens."""
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>")
    )
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.Lowercase(),
            normalizers.Replace(Regex(r"[^a-z-]+"), " "),
            normalizers.Replace(Regex(r"(?<![a-z-])(a|an|the|and|of)(?![a-z-])"), " "),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        model_max_length=MAX_TOKENS,
    )


def build_pipeline(
    transformer: dict[str, Any] | None = None,
    text_encoder: dict[str, Any] | None = None,
    *,
    vocabulary: Sequence[str] = VOCABULARY,
    vae: ModelMixin | None = None,
) -> DemoPipeline:
    """Return the demo pipeline with random weights.

    Args:
        transformer: Settings that replace those of `TRANSFORMER`.
        text_encoder: Settings that replace those of `TEXT_ENCODER`.
        vocabulary: The words it knows.
        vae: The autoencoder; None for pixels.
    """
    tokenizer = build_tokenizer(vocabulary)
    config = T5Config(
        **{**TEXT_ENCODER, **(text_encoder or {})},
        vocab_size=len(vocabulary),
        pad_token_id=0,
        decoder_start_token_id=0,
        use_cache=False,
    )
    pipe = DemoPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=IdentityVAE() if vae is None else vae,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=T5EncoderModel(config).eval(),
        tokenizer_2=tokenizer,
        transformer=FluxTransformer2DModel(**{**TRANSFORMER, **(transformer or {})}).eval(),
    )
    pipe.default_sample_size = PIXELS
    pipe.set_progress_bar_config(disable=True)
    return pipe


def save_weights(pipe: DemoPipeline, folder: str | os.PathLike[str]) -> Path:
    """Write weights in bfloat16 and the configuration, each file whole or not at all."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"{part}.{name}": tensor.detach().to("cpu", torch.bfloat16).contiguous()
        for part, module in _parts(pipe).items()
        for name, tensor in module.state_dict().items()
        if name != "encoder.embed_tokens.weight"  # tied to `shared.weight`
    }
    config = {
        "transformer": {name: pipe.transformer.config[name] for name in TRANSFORMER},
        "text_encoder": {name: getattr(pipe.text_encoder_2.config, name) for name in TEXT_ENCODER},
        "vocabulary": sorted(words := pipe.tokenizer_2.get_vocab(), key=words.get),
    }
    path = folder / "weights.safetensors"
    temporary = path.with_suffix(".tmp")
    save_file(tensors, temporary)
    os.replace(temporary, path)
    temporary = folder / "config.tmp"
    temporary.write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, folder / "config.json")
    return path


def load_pipeline(
    folder: str | os.PathLike[str] | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    vae: ModelMixin | None = None,
) -> DemoPipeline:
    """Return the trained demo pipeline.

    Args:
        folder: Where `save_weights` wrote; the package's own weights when None.
        dtype: Type to compute in; the file holds bfloat16.
        device: Where to put it.
        vae: The autoencoder of a model that was trained with one; None for pixels.

    Raises:
        ValueError: A file is missing, truncated or of another version.
    """
    folder = ASSETS if folder is None else Path(folder)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        tensors = load_file(folder / "weights.safetensors")
    except Exception as error:
        raise ValueError(
            f"`folder` must hold config.json and weights.safetensors of the demo model; "
            f"{str(folder)!r} does not: {error}."
        ) from error
    vocabulary = tuple(config.get("vocabulary", ()))
    if vae is None and vocabulary != VOCABULARY:
        raise ValueError(
            f"`folder` {str(folder)!r} holds a demo model with another vocabulary; train it again."
        )
    pipe = build_pipeline(
        config["transformer"], config["text_encoder"], vocabulary=vocabulary, vae=vae
    )
    for part, module in _parts(pipe).items():
        state = {k[len(part) + 1 :]: v for k, v in tensors.items() if k.startswith(part + ".")}
        missing, unexpected = module.load_state_dict(state, strict=False)
        missing = [name for name in missing if name != "encoder.embed_tokens.weight"]
        if missing or unexpected:
            raise ValueError(
                f"`folder` {str(folder)!r} holds other weights than its config.json describes: "
                f"missing {missing[:3]}, unexpected {unexpected[:3]}."
            )
    pipe.to(device)
    return pipe if dtype == torch.float32 else pipe.to(dtype)


def _parts(pipe: DemoPipeline) -> dict[str, torch.nn.Module]:
    """Return the trained components by the prefix of their weights."""
    return {"transformer": pipe.transformer, "text_encoder": pipe.text_encoder_2}
