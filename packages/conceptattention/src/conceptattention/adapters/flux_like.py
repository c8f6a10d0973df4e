"""LongCat-Image, Ovis-Image and Bria: Flux.1 blocks conditioned on time alone."""

# ruff: noqa: D102 (`Adapter` documents the methods)

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from .base import Call, Encoded, execution_device
from .joint import JointAdapter, Token, word_vectors
from .single import SingleStreamAdapter


class LongCatAdapter(SingleStreamAdapter):
    """Reads diffusers' `LongCatImageTransformer2DModel`."""

    family = "LongCat-Image"
    model_class = "LongCatImageTransformer2DModel"
    shares_modulation = True
    plain_call: ClassVar[Mapping[str, Any]] = {"enable_prompt_rewrite": False}

    def encode(self, pipe: Any, words: Sequence[str], token: Token) -> Encoded:
        states = pipe.encode_prompt(prompt=list(words))[0]
        return word_vectors(pipe.tokenizer, words, states, token, causal=True)

    def temb(self, model: nn.Module, call: Call) -> Tensor:
        embed: Any = model.time_embed
        dtype = call.arguments["hidden_states"].dtype
        return embed(call.arguments["timestep"].to(dtype) * 1000, dtype)  # type: ignore[no-any-return]


class OvisAdapter(JointAdapter):
    """Reads diffusers' `OvisImageTransformer2DModel`."""

    family = "Ovis-Image"
    model_class = "OvisImageTransformer2DModel"
    shares_modulation = True

    def encode(self, pipe: Any, words: Sequence[str], token: Token) -> Encoded:
        states = pipe.encode_prompt(prompt=list(words), device=execution_device(pipe))[0]
        return word_vectors(pipe.tokenizer, words, states, token, causal=True)

    def start(self, model: nn.Module, call: Call, embeds: Tensor) -> Tensor:
        parts: Any = model
        return parts.context_embedder(parts.context_embedder_norm(embeds))  # type: ignore[no-any-return]

    def temb(self, model: nn.Module, call: Call) -> Tensor:
        parts: Any = model
        dtype = call.arguments["hidden_states"].dtype
        times = parts.time_proj(call.arguments["timestep"].to(dtype) * 1000)
        return parts.timestep_embedder(times.to(dtype))  # type: ignore[no-any-return]


class BriaAdapter(SingleStreamAdapter):
    """Reads diffusers' `BriaTransformer2DModel`; not its guidance-distilled form."""

    family = "Bria"
    model_class = "BriaTransformer2DModel"
    shares_modulation = True
    plain_call: ClassVar[Mapping[str, Any]] = {"guidance_scale": 1.0}

    def matches(self, model: nn.Module) -> bool:
        return super().matches(model) and not hasattr(model, "guidance_embed")

    def guided(self, pipe: Any) -> bool:
        return bool(getattr(pipe, "guidance_scale", 1) > 1)

    def patch(self, pipe: Any) -> int:
        return int(pipe.vae_scale_factor)  # of this pipeline, it counts the packing

    def encode(self, pipe: Any, words: Sequence[str], token: Token) -> Encoded:
        states = pipe.encode_prompt(
            prompt=list(words), device=execution_device(pipe), do_classifier_free_guidance=False
        )[0]
        return word_vectors(pipe.tokenizer, words, states, token)

    def temb(self, model: nn.Module, call: Call) -> Tensor:
        embed: Any = model.time_embed
        dtype = call.arguments["hidden_states"].dtype
        return embed(call.arguments["timestep"].to(dtype), dtype=dtype)  # type: ignore[no-any-return]
