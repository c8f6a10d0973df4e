"""CogView4: weights shared by text and picture, a causal text encoder padded on the left."""

# ruff: noqa: D102 (`Adapter` documents the methods)

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .base import Block, Call, Encoded, execution_device
from .cogvideox import CogVideoXAdapter
from .joint import Token, positions_from_latents, word_vectors


class CogView4Adapter(CogVideoXAdapter):
    """Reads diffusers' `CogView4Transformer2DModel`."""

    family = "CogView4"
    model_class = "CogView4Transformer2DModel"
    films = shifted = shares_modulation = False
    prompt_start = None  # padded on the left, so it depends on the prompt's length

    def guided(self, pipe: Any) -> bool:
        return False  # the unconditional pass is a call of its own

    def encode(self, pipe: Any, words: Sequence[str], token: Token) -> Encoded:
        states = pipe.encode_prompt(
            list(words), do_classifier_free_guidance=False, device=execution_device(pipe)
        )[0]
        return word_vectors(pipe.tokenizer, words, states, token, causal=True, end=0)

    def temb(self, model: nn.Module, call: Call) -> Tensor:
        embed: Any = model.time_condition_embed
        given = call.arguments
        names = ("timestep", "original_size", "target_size", "crop_coords")
        dtype = given["hidden_states"].dtype
        return torch.nn.functional.silu(embed(*(given[name] for name in names), dtype))

    def pre(self, block: Block, concepts: Tensor, temb: Tensor) -> tuple[Tensor, Any]:
        module: Any = block.module
        normed, *state = module.norm1(concepts, concepts, temb)[5:]
        return normed, [part[:, None] for part in state]

    def post(self, block: Block, concepts: Tensor, outputs: Tensor, state: Any) -> Tensor:
        module: Any = block.module
        parts = module.attn1.to_out[0], module.norm2_context, module.ff
        return self.carry_on(concepts, outputs, state, *parts)

    def positions(self, call: Call) -> tuple[Tensor, tuple[int, ...]]:
        return positions_from_latents(call.arguments["hidden_states"], call.config)
