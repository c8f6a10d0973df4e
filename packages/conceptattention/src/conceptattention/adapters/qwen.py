"""Qwen-Image and its edit variants: complex rotary positions for text too, a causal encoder."""

# ruff: noqa: D102 (`Adapter` documents the methods)

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from .base import Block, Call, Encoded, execution_device
from .joint import JointAdapter, Token, word_vectors
from .linear import Modulated, Normed


class QwenImageAdapter(JointAdapter):
    """Reads diffusers' `QwenImageTransformer2DModel`."""

    family = "Qwen-Image"
    model_class = "QwenImageTransformer2DModel"
    pipeline = "QwenImagePipeline"
    masked_text = shares_modulation = True

    def encode(self, pipe: Any, words: Sequence[str], token: Token) -> Encoded:
        states = pipe.encode_prompt(list(words), device=execution_device(pipe))[0]
        return word_vectors(pipe.tokenizer, words, states, token, causal=True)

    def seed(self, model: nn.Module) -> nn.Module:
        return model.txt_in  # type: ignore[return-value]

    def start(self, model: nn.Module, call: Call, embeds: Tensor) -> Tensor:
        parts: Any = model
        return parts.txt_in(parts.txt_norm(embeds))  # type: ignore[no-any-return]

    def temb(self, model: nn.Module, call: Call) -> Tensor:
        embed: Any = model.time_text_embed
        given = call.arguments
        hidden, guidance = given["hidden_states"], given.get("guidance")
        times = [given["timestep"].to(hidden.dtype)]
        if guidance is not None:
            times.append(guidance.to(hidden.dtype) * 1000)
        return embed(*times, hidden, given.get("additional_t_cond"))  # type: ignore[no-any-return]

    def encode_image(self, pipe: Any, image: Tensor) -> Tensor:
        config = pipe.vae.config
        latents = pipe.vae.encode(image[:, :, None]).latent_dist.mode()[:, :, 0]  # of a film
        mean, std = (
            torch.tensor(part).view(-1, 1, 1).to(latents)
            for part in (config.latents_mean, config.latents_std)
        )
        latents = (latents - mean) / std
        return pipe._pack_latents(latents, *latents.shape)  # type: ignore[no-any-return]

    def modulator(self, block: Block) -> Any:
        return block.module.txt_mod[1]  # type: ignore[index]

    def rotate(self, keys: Tensor, arguments: Mapping[str, Any]) -> tuple[Tensor, None]:
        return turn(keys, arguments["image_rotary_emb"][0]), None

    def prompt_queries(
        self, block: Block, tap: Tensor, arguments: Mapping[str, Any], patches: int
    ) -> Tensor:
        if tap.ndim == 3:
            tap = super().prompt_queries(block, tap, {}, patches).transpose(1, 2)
        return turn(tap, arguments["image_rotary_emb"][1][: tap.shape[1]]).transpose(1, 2)

    def pre(self, block: Block, concepts: Tensor, temb: Tensor) -> tuple[Modulated, Any]:
        module: Any = block.module
        shift, scale, *state = self.modulation(self.modulator(block), temb, 6, shared=True)
        return Modulated(concepts, module.txt_norm1, scale, shift), state

    def qkv(
        self, block: Block, concepts: Any, arguments: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().qkv(block, concepts, arguments)
        q, k = (part.value if isinstance(part, Normed) else part for part in (q, k))
        # Text starts behind the picture here: every concept takes the first text position.
        first = arguments["image_rotary_emb"][1][:1]
        q, k = (turn(part.transpose(1, 2), first).transpose(1, 2) for part in (q, k))
        return q, k, v

    def post(self, block: Block, concepts: Tensor, outputs: Tensor, state: Any) -> Tensor:
        module: Any = block.module
        parts = module.attn.to_add_out, module.txt_norm2, module.txt_mlp
        return self.carry_on(concepts, outputs, state, *parts)

    def positions(self, call: Call) -> tuple[Tensor, tuple[int, ...]]:
        shapes = call.arguments["img_shapes"][0]
        shapes = shapes if isinstance(shapes, list) else [shapes]
        sizes = [prod(shape) for shape in shapes]  # the picture first, then its references
        return torch.arange(sum(sizes)) < sizes[0], tuple(shapes[0][1:])


def turn(states: Tensor, turns: Tensor) -> Tensor:
    """Return states turned by complex numbers.

    Args:
        states: (batch, tokens, heads, dim_head).
        turns: ([batch,] tokens, dim_head / 2).
    """
    pairs = torch.view_as_complex(states.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turns[..., None, :]).flatten(-2).type_as(states)
