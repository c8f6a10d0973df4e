"""Flux.1, also Kontext, Fill and Control: concepts get a zero pooled vector.

Source: Helbling et al. 2025, sections 3 and 4; layer choice of the reference implementation.
"""

# ruff: noqa: D102 (`Adapter` documents the methods)

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .base import Call, Encoded, execution_device
from .joint import Token, word_vectors
from .single import SingleStreamAdapter


class FluxAdapter(SingleStreamAdapter):
    """Reads diffusers' `FluxTransformer2DModel`."""

    family = "Flux.1"
    model_class = "FluxTransformer2DModel"
    pipeline = "FluxPipeline"
    prompt_tokenizer = "tokenizer_2"

    def default_layers(self, model: nn.Module) -> Sequence[int]:
        count = len(self.blocks(model))
        if count == 19:
            return range(15, 19)
        # Of other depths the later half without the last layer, as the reference's scripts take
        # 14 to 17 of 19; two layers at least.
        first = count // 2
        return range(first, min(count, max(first + 2, count - 1)))

    def encode(self, pipe: Any, words: Sequence[str], token: Token) -> Encoded:
        states = pipe.encode_prompt(
            prompt=list(words), prompt_2=None, device=execution_device(pipe)
        )[0]
        return word_vectors(pipe.tokenizer_2, words, states, token)

    def temb(self, model: nn.Module, call: Call) -> Tensor:
        embed: Any = model.time_text_embed
        dtype = call.arguments["hidden_states"].dtype
        pooled = torch.zeros_like(call.arguments["pooled_projections"])
        times = [call.arguments["timestep"].to(dtype) * 1000]
        if call.arguments.get("guidance") is not None:
            times.append(call.arguments["guidance"].to(dtype) * 1000)
        return embed(*times, pooled)  # type: ignore[no-any-return]

    def arguments(
        self, pipe: Any, latents: Tensor, grid: tuple[int, int], prompt: list[str], t: float
    ) -> dict[str, Any]:
        device, dtype, batch = latents.device, latents.dtype, len(latents)
        embeds, pooled, text_ids = pipe.encode_prompt(prompt=prompt, prompt_2=None, device=device)
        guided = pipe.transformer.config.guidance_embeds
        return {
            "hidden_states": latents,
            "timestep": torch.full((batch,), t, device=device, dtype=dtype),
            "guidance": torch.full((batch,), 3.5, device=device) if guided else None,
            "pooled_projections": pooled.to(dtype),
            "encoder_hidden_states": embeds.to(dtype),
            "txt_ids": text_ids,
            "img_ids": pipe._prepare_latent_image_ids(batch, *grid, device, dtype),
        }
