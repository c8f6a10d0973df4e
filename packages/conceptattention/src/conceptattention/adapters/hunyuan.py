"""HunyuanVideo and HunyuanImage: text passes a small refiner first."""

# ruff: noqa: D102 (`Adapter` documents the methods)

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor, nn

from .base import Adapter, Block, Call, Encoded, execution_device
from .joint import JointAdapter, Token, positions_from_latents, word_vectors


class _HunyuanAdapter(JointAdapter):
    masked_text = shares_modulation = True

    def encode(self, pipe: Any, words: Sequence[str], token: Token) -> Encoded:
        states = pipe.encode_prompt(list(words), device=execution_device(pipe))[0]
        return word_vectors(pipe.tokenizer, words, states, token, causal=True)

    def start(self, model: nn.Module, call: Call, embeds: Tensor) -> Tensor:
        refiner: Any = model.context_embedder
        batch, count = embeds.shape[:2]
        # Every concept is a text of its own, so concepts do not meet in the refiner.
        times = call.arguments["timestep"].repeat_interleave(count)
        return refiner(embeds.flatten(0, 1)[:, None], times).view(batch, count, -1)  # type: ignore[no-any-return]

    def positions(self, call: Call) -> tuple[Tensor, tuple[int, ...]]:
        return positions_from_latents(call.arguments["hidden_states"], call.config)


class HunyuanVideoAdapter(_HunyuanAdapter):
    """Reads `HunyuanVideoTransformer3DModel`; concepts share the prompt's pooled vector."""

    family = "HunyuanVideo"
    model_class = "HunyuanVideoTransformer3DModel"
    films = True

    def temb(self, model: nn.Module, call: Call) -> Tensor:
        embed: Any = model.time_text_embed
        given = call.arguments
        times = embed(given["timestep"], given["pooled_projections"], given.get("guidance"))
        return times[0]  # type: ignore[no-any-return]


class HunyuanImageAdapter(_HunyuanAdapter):
    """Reads diffusers' `HunyuanImageTransformer2DModel`."""

    family = "HunyuanImage"
    model_class = "HunyuanImageTransformer2DModel"
    shifted = False

    def patch(self, pipe: Any) -> int:
        return int(pipe.vae_scale_factor * pipe.transformer.config.patch_size[-1])

    def prompt_taps(self, block: Block) -> dict[str, tuple[nn.Module, Literal["input", "output"]]]:
        # Text and glyph tokens are sorted by their masks, so positions are not fixed.
        return Adapter.prompt_taps(self, block)

    def temb(self, model: nn.Module, call: Call) -> Tensor:
        embed: Any = model.time_guidance_embed
        given = call.arguments
        return embed(  # type: ignore[no-any-return]
            given["timestep"], guidance=given.get("guidance"), timestep_r=given.get("timestep_r")
        )
