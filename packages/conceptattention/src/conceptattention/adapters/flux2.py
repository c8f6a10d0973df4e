"""Flux.2: one modulation shared by all blocks, four-axis ids, a causal text encoder."""

# ruff: noqa: D102 (`Adapter` documents the methods)

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from .base import Block, Call, Encoded, execution_device
from .joint import JointAdapter, Token, word_vectors


class Flux2Adapter(JointAdapter):
    """Reads diffusers' `Flux2Transformer2DModel`."""

    family = "Flux.2"
    model_class = "Flux2Transformer2DModel"
    prompt_start = None  # padded on the left, so it depends on the prompt's length

    def default_layers(self, model: nn.Module) -> Sequence[int]:
        return range(5, 8) if len(self.blocks(model)) == 8 else super().default_layers(model)

    def encode(self, pipe: Any, words: Sequence[str], token: Token) -> Encoded:
        if not hasattr(pipe, "_get_mistral_3_small_prompt_embeds"):
            raise ValueError(
                "`pipe` is a Flux.2 pipeline with another text encoder than Mistral; "
                "pass `concept_embeds`."
            )
        states = pipe.encode_prompt(list(words), device=execution_device(pipe))[0]
        tokenizer = getattr(pipe.tokenizer, "tokenizer", pipe.tokenizer)
        # The template is padded on the left and ends with the word and one closing token.
        return word_vectors(tokenizer, words, states, token, causal=True, end=-1)

    def temb(self, model: nn.Module, call: Call) -> Tensor:
        parts: Any = model
        dtype = call.arguments["hidden_states"].dtype
        time, guidance = call.arguments["timestep"], call.arguments.get("guidance")
        guidance = None if guidance is None else guidance.to(dtype) * 1000
        embedded = parts.time_guidance_embed(time.to(dtype) * 1000, guidance)
        return parts.double_stream_modulation_txt(embedded)  # type: ignore[no-any-return]

    def pre(self, block: Block, concepts: Tensor, temb: Tensor) -> tuple[Tensor, Any]:
        module: Any = block.module
        shift, scale, *state = temb[:, None].chunk(6, dim=-1)
        return (1 + scale) * module.norm1_context(concepts) + shift, state
