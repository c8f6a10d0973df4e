"""Chroma: Flux.1 blocks whose modulation is a slice of one table, text slices last."""

# ruff: noqa: D102 (`Adapter` documents the methods)

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from .base import Block, Call, Encoded, execution_device
from .joint import JointAdapter, Token, word_vectors
from .linear import Modulated


class ChromaAdapter(JointAdapter):
    """Reads diffusers' `ChromaTransformer2DModel`."""

    family = "Chroma"
    model_class = "ChromaTransformer2DModel"
    masked_text = True

    def default_layers(self, model: nn.Module) -> Sequence[int]:
        return range(15, 19) if len(self.blocks(model)) == 19 else super().default_layers(model)

    def encode(self, pipe: Any, words: Sequence[str], token: Token) -> Encoded:
        states = pipe.encode_prompt(
            prompt=list(words), device=execution_device(pipe), do_classifier_free_guidance=False
        )[0]
        return word_vectors(pipe.tokenizer, words, states, token)

    def temb(self, model: nn.Module, call: Call) -> Tensor:
        parts: Any = model
        time = call.arguments["timestep"].to(call.arguments["hidden_states"].dtype) * 1000
        table = parts.distilled_guidance_layer(parts.time_text_embed(time))
        dual = 6 * len(parts.transformer_blocks)
        text = 3 * len(parts.single_transformer_blocks) + dual
        return table[:, text : text + dual]  # type: ignore[no-any-return]

    def pre(self, block: Block, concepts: Tensor, temb: Tensor) -> tuple[Modulated, Any]:
        norm: Any = block.module.norm1_context
        first = 6 * block.index
        shift, scale, *state = temb[:, first : first + 6, None].unbind(1)
        return Modulated(concepts, norm.norm, scale, shift), state
