"""Stable Diffusion 3 and 3.5: no rotary positions, batched guidance, CLIP concept vectors."""

# ruff: noqa: D102 (`Adapter` documents the methods)

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .base import Block, Call, Encoded, execution_device
from .joint import JointAdapter, Token, positions_from_latents, word_vectors
from .linear import Modulated


class SD3Adapter(JointAdapter):
    """Reads diffusers' `SD3Transformer2DModel`, with or without dual attention."""

    family = "Stable Diffusion 3"
    model_class = "SD3Transformer2DModel"
    pipeline = "StableDiffusion3Pipeline"
    heads_first = True
    shares_modulation = True
    prompt_start = 1  # CLIP's marker comes first

    def default_layers(self, model: nn.Module) -> Sequence[int]:
        # The last block has no text MLP, and poor maps.
        return range(max(len(self.blocks(model)) - 1, 1))

    def guided(self, pipe: Any) -> bool:
        return bool(getattr(pipe, "guidance_scale", 1) > 1)

    def encode(self, pipe: Any, words: Sequence[str], token: Token) -> Encoded:
        texts = list(words)
        states = pipe.encode_prompt(
            texts, texts, texts, device=execution_device(pipe), do_classifier_free_guidance=False
        )[0]
        # CLIP states come first, T5 states after; CLIP starts with one marker.
        return word_vectors(pipe.tokenizer, words, states, token, start=1)

    def temb(self, model: nn.Module, call: Call) -> Tensor:
        embed: Any = model.time_text_embed
        given = call.arguments
        return embed(given["timestep"], given["pooled_projections"])  # type: ignore[no-any-return]

    def pre(self, block: Block, concepts: Tensor, temb: Tensor) -> tuple[Tensor | Modulated, Any]:
        module: Any = block.module
        if module.context_pre_only:  # the last block modulates text but does not carry it on
            return module.norm1_context(concepts, temb), None
        return super().pre(block, concepts, temb)

    def positions(self, call: Call) -> tuple[Tensor, tuple[int, ...]]:
        return positions_from_latents(call.arguments["hidden_states"], call.config)

    def arguments(
        self, pipe: Any, latents: Tensor, grid: tuple[int, int], prompt: list[str], t: float
    ) -> dict[str, Any]:
        embeds, _, pooled, _ = pipe.encode_prompt(
            prompt, prompt, prompt, device=latents.device, do_classifier_free_guidance=False
        )
        return {
            "hidden_states": latents,
            "timestep": torch.full((len(latents),), 1000 * t, device=latents.device),
            "pooled_projections": pooled.to(latents.dtype),
            "encoder_hidden_states": embeds.to(latents.dtype),
        }
