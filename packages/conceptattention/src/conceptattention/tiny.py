"""Tiny random pipelines of every family, and the dense oracle that works for all of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

TEXT = 24
ROPE = {"axes_dims_rope": (4, 6, 6)}
HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Return normal numbers from their own generator."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tiny_vae() -> Any:
    """Return a random autoencoder without downsampling."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        latent_channels=4, block_out_channels=(4,), norm_num_groups=1, shift_factor=0.1
    )


@dataclass
class Family:
    """One family: how to build its pipeline and how to call it with text vectors."""

    pipeline: str
    transformer: str
    config: dict[str, Any]
    call: dict[str, Any] = field(default_factory=dict)
    guidance: dict[str, Any] = field(default_factory=dict)  # turns guidance on
    off: dict[str, Any] = field(default_factory=dict)  # turns guidance off
    prompt: tuple[str, ...] = ("prompt_embeds",)
    scheduler: str = "FlowMatchEulerDiscreteScheduler"
    scheduler_config: dict[str, Any] = field(default_factory=dict)
    extra: tuple[str, ...] = ()  # further components that stay None
    grid: tuple[int, ...] = (2, 3)
    vae: Any = None
    guider: bool = False
    encoder: bool = False  # the pipeline takes texts only, so it gets a stand-in encoder
    lists: bool = False  # text vectors are lists, one tensor per picture, of unequal lengths

    def build(self, dtype: torch.dtype = torch.float32, **config: Any) -> Any:
        """Return the stock pipeline with random weights and no text encoders."""
        import diffusers

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = getattr(diffusers, self.transformer)(**{**self.config, **config}).eval()
        scheduler = getattr(diffusers, self.scheduler)(**self.scheduler_config)
        parts: dict[str, Any] = dict.fromkeys(("vae", "text_encoder", "tokenizer", *self.extra))
        if self.vae is not None:
            parts["vae"] = self.vae()
        if self.guider:
            parts["guider"] = diffusers.ClassifierFreeGuidance(guidance_scale=3.0)
        pipe = getattr(diffusers, self.pipeline)(
            **parts, transformer=model.to(dtype), scheduler=scheduler
        )
        pipe.set_progress_bar_config(disable=True)
        if self.encoder:
            pipe._encode_prompt = lambda texts: torch.cat(
                [normal(1, 5, TEXT, seed=len(text)) for text in texts]
            ).to(dtype)
        return pipe

    def texts(
        self, batch: int = 2, dtype: torch.dtype = torch.float32, negative: bool = False
    ) -> dict[str, Any]:
        """Return random text vectors under the names of the pipeline's arguments."""
        prefix = "negative_" if negative else ""
        made: dict[str, Any] = {}
        for index, name in enumerate(self.prompt):
            key = prefix + name
            if "mask" in name:
                mask = torch.ones(batch, 5, dtype=torch.long)
                mask[-1, 3:] = 0
                made[key] = mask.to(dtype) if self.pipeline == "ChromaPipeline" else mask
            else:
                width: tuple[int, ...] = (batch, TEXT) if "pooled" in name else (batch, 5, TEXT)
                made[key] = normal(*width, seed=index + 10 * negative).to(dtype)
                if self.lists:  # the second text is long enough to be filled up further
                    long = normal(40, TEXT, seed=20 + negative).to(dtype)
                    made[key] = [made[key][0], long, *made[key][2:]][:batch]
        return made

    def run(self, pipe: Any, guided: bool = False, batch: int = 2, **kwargs: Any) -> Tensor:
        """Return the latents of a short run."""
        out = pipe(**self.arguments(pipe, guided, batch, **kwargs))
        return out.frames if hasattr(out, "frames") else out.images  # type: ignore[no-any-return]

    def arguments(
        self, pipe: Any, guided: bool = False, batch: int = 2, **kwargs: Any
    ) -> dict[str, Any]:
        """Return the arguments of a short run."""
        dtype = pipe.transformer.dtype
        texts: dict[str, Any] = dict(self.texts(batch, dtype))
        if guided or self.guider:
            texts |= self.texts(batch, dtype, negative=True) | self.guidance
        else:
            texts |= self.off
        if self.encoder:
            guidance = {k: v for k, v in texts.items() if "embeds" not in k}
            texts = {"prompt": ["a cat", "a tree"][:batch], **guidance}
        return {
            "height": 32, "width": 48, "num_inference_steps": 2, "output_type": "latent",
            "generator": torch.Generator().manual_seed(0), **texts, **self.call, **kwargs,
        }  # fmt: skip


FAMILIES = {
    "flux": Family(
        "FluxPipeline", "FluxTransformer2DModel",
        {"in_channels": 16, "num_layers": 3, "num_single_layers": 1, "joint_attention_dim": TEXT,
         "pooled_projection_dim": TEXT, "guidance_embeds": True, **HEADS, **ROPE},
        prompt=("prompt_embeds", "pooled_prompt_embeds"), guidance={"true_cfg_scale": 3.0},
        extra=("text_encoder_2", "tokenizer_2"),
    ),
    "flux2": Family(
        "Flux2Pipeline", "Flux2Transformer2DModel",
        {"in_channels": 16, "num_layers": 3, "num_single_layers": 1, "joint_attention_dim": TEXT,
         "axes_dims_rope": (4, 4, 4, 4), **HEADS},
    ),
    "sd3": Family(
        "StableDiffusion3Pipeline", "SD3Transformer2DModel",
        {"sample_size": 16, "in_channels": 4, "out_channels": 4, "num_layers": 3,
         "joint_attention_dim": TEXT, "caption_projection_dim": 32,
         "pooled_projection_dim": TEXT, "pos_embed_max_size": 16, **HEADS},
        prompt=("prompt_embeds", "pooled_prompt_embeds"), off={"guidance_scale": 1.0},
        guidance={"guidance_scale": 5.0},
        extra=("text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3"),
    ),
    "cogvideox": Family(
        "CogVideoXPipeline", "CogVideoXTransformer3DModel",
        {"in_channels": 4, "out_channels": 4, "time_embed_dim": 8, "text_embed_dim": TEXT,
         "num_layers": 3, "sample_width": 6, "sample_height": 4, "sample_frames": 9,
         "patch_size": 2, "temporal_compression_ratio": 4, "max_text_seq_length": 5,
         "use_rotary_positional_embeddings": True, **HEADS},
        call={"num_frames": 9}, off={"guidance_scale": 1.0}, guidance={"guidance_scale": 5.0},
        scheduler="CogVideoXDDIMScheduler", grid=(3, 2, 3),
    ),
    "qwen": Family(
        "QwenImagePipeline", "QwenImageTransformer2DModel",
        {"patch_size": 2, "in_channels": 16, "out_channels": 4, "num_layers": 3,
         "joint_attention_dim": TEXT, **HEADS, **ROPE},
        prompt=("prompt_embeds", "prompt_embeds_mask"), guidance={"true_cfg_scale": 3.0},
    ),
    "chroma": Family(
        "ChromaPipeline", "ChromaTransformer2DModel",
        {"in_channels": 16, "num_layers": 3, "num_single_layers": 1, "joint_attention_dim": TEXT,
         "approximator_num_channels": 8, "approximator_hidden_dim": 16, "approximator_layers": 1,
         **HEADS, **ROPE},
        prompt=("prompt_embeds", "prompt_attention_mask"), off={"guidance_scale": 1.0},
        guidance={"guidance_scale": 4.0},
    ),
    "hunyuan-video": Family(
        "HunyuanVideoPipeline", "HunyuanVideoTransformer3DModel",
        {"in_channels": 4, "out_channels": 4, "num_layers": 3, "num_single_layers": 1,
         "num_refiner_layers": 1, "patch_size": 2, "patch_size_t": 1, "text_embed_dim": TEXT,
         "pooled_projection_dim": TEXT, "guidance_embeds": True, "rope_axes_dim": (4, 6, 6),
         **HEADS},
        prompt=("prompt_embeds", "pooled_prompt_embeds", "prompt_attention_mask"),
        call={"num_frames": 9}, guidance={"true_cfg_scale": 3.0},
        extra=("text_encoder_2", "tokenizer_2"), grid=(3, 2, 3),
    ),
    "longcat": Family(
        "LongCatImagePipeline", "LongCatImageTransformer2DModel",
        {"in_channels": 64, "num_layers": 3, "num_single_layers": 1, "joint_attention_dim": TEXT,
         "pooled_projection_dim": TEXT, **HEADS, **ROPE},
        off={"guidance_scale": 1.0}, guidance={"guidance_scale": 4.0}, extra=("text_processor",),
        call={"enable_prompt_rewrite": False}, encoder=True,
    ),
    "ovis": Family(
        "OvisImagePipeline", "OvisImageTransformer2DModel",
        {"in_channels": 16, "out_channels": 16, "num_layers": 3, "num_single_layers": 1,
         "joint_attention_dim": TEXT, **HEADS, **ROPE},
        off={"guidance_scale": 1.0}, guidance={"guidance_scale": 4.0, "negative_prompt": None},
    ),
    "bria": Family(
        "BriaPipeline", "BriaTransformer2DModel",
        {"in_channels": 16, "num_layers": 3, "num_single_layers": 1, "joint_attention_dim": TEXT,
         **HEADS, **ROPE},
        off={"guidance_scale": 1.0}, guidance={"guidance_scale": 4.0}, vae=tiny_vae, grid=(16, 24),
    ),
    "cogview4": Family(
        "CogView4Pipeline", "CogView4Transformer2DModel",
        {"in_channels": 4, "out_channels": 4, "num_layers": 3, "text_embed_dim": TEXT,
         "time_embed_dim": 8, "condition_dim": 4, "pos_embed_max_size": 16,
         "rope_axes_dim": (16, 16), **HEADS},
        off={"guidance_scale": 1.0}, guidance={"guidance_scale": 5.0},
    ),
    "hunyuan-image": Family(
        "HunyuanImagePipeline", "HunyuanImageTransformer2DModel",
        {"in_channels": 4, "out_channels": 4, "num_layers": 3, "num_single_layers": 1,
         "num_refiner_layers": 1, "patch_size": (1, 1), "text_embed_dim": TEXT,
         "text_embed_2_dim": TEXT, "rope_axes_dim": (8, 8), **HEADS},
        prompt=("prompt_embeds", "prompt_embeds_mask", "prompt_embeds_2", "prompt_embeds_mask_2"),
        extra=("text_encoder_2", "tokenizer_2"), guider=True,
        call={"height": 64, "width": 96},
    ),
    "z-image": Family(
        "ZImagePipeline", "ZImageTransformer2DModel",
        {"in_channels": 4, "dim": 32, "n_layers": 3, "n_refiner_layers": 1, "n_heads": 2,
         "n_kv_heads": 2, "cap_feat_dim": TEXT, "axes_dims": (4, 6, 6), "axes_lens": (128, 16, 16)},
        off={"guidance_scale": 0.0}, guidance={"guidance_scale": 4.0}, lists=True,
    ),
}  # fmt: skip


class Dense:
    """Runs a stock model with concepts put into its text, under a mask; keeps their outputs.

    Concepts see each other and the image; nothing sees them. Whatever mask the model brings is
    kept for its own tokens. Only the public attention function of torch is wrapped.
    """

    def __init__(
        self,
        monkeypatch: Any,
        adapter: Any,
        model: Any,
        starts: Tensor,
        text_first: bool,
        extend: bool = True,
        single_stream: bool = False,
    ) -> None:
        self.outputs: list[Tensor] = []
        self.count, self.model = starts.shape[1], model
        self.text = 0
        real = F.scaled_dot_product_attention

        def attend(
            query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, **kwargs: Any
        ) -> Tensor:
            total, count = query.shape[2], self.count
            if len(self.outputs) == self.layers:  # single-stream layers come after, unread
                return real(query, key, value)
            if not self.text or total <= self.text:  # a refiner of the text alone
                return real(query, key, value, attn_mask=attn_mask, **kwargs)
            start = 0 if text_first else total - self.text
            mask = torch.ones(total, total, dtype=torch.bool)
            text = slice(start + count, start + self.text)
            mask[:, start : start + count] = False
            mask[start : start + count] = True
            mask[start : start + count, text] = False
            out = real(query, key, value, attn_mask=mask)
            part = out[:, :, start : start + count]
            self.outputs.append(part.transpose(1, 2).flatten(2))
            return out

        def insert(module: Any, args: Any, output: Tensor) -> Tensor | None:
            if not extend:
                self.text = output.shape[1]
                return None
            self.text = output.shape[1] + self.count
            return torch.cat([starts, output], dim=1)

        self.layers = len(adapter.blocks(model))
        if single_stream:
            self.layers += len(adapter.single_blocks(model))
        monkeypatch.setattr(F, "scaled_dot_product_attention", attend)
        self.handle = adapter.seed(model).register_forward_hook(insert)
