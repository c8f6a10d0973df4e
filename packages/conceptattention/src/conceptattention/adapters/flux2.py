"""Flux.2: one modulation shared by all blocks, four-axis ids, a causal text encoder."""

# ruff: noqa: D102 (`Adapter` documents the methods)

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .base import Block, Call, Encoded, ImageSide, execution_device
from .joint import Token, split_heads, word_vectors
from .linear import Modulated, Normed
from .single import SingleStreamAdapter


class Flux2Adapter(SingleStreamAdapter):
    """Reads diffusers' `Flux2Transformer2DModel`."""

    family = "Flux.2"
    model_class = "Flux2Transformer2DModel"
    pipeline = "Flux2Pipeline"
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
        shared = (parts.double_stream_modulation_txt, parts.single_stream_modulation)
        return torch.cat([modulation(embedded) for modulation in shared], dim=-1)

    def encode_image(self, pipe: Any, image: Tensor) -> Tensor:
        latents = pipe._encode_vae_image(image, None)  # in patches, normalised
        return pipe._pack_latents(latents)  # type: ignore[no-any-return]

    def taps(self, block: Block) -> dict[str, tuple[nn.Module, Literal["input", "output"]]]:
        if not self.is_single(block):
            return super().taps(block)
        attn: Any = block.attention  # its projections are fused with the feed-forward's
        return {
            "keys": (attn.norm_k, "output"),
            "values": (attn.to_qkv_mlp_proj, "output"),
            "outputs": (attn.to_out, "input"),
        }

    def image_side(
        self, block: Block, taps: Mapping[str, Tensor], arguments: Mapping[str, Any]
    ) -> ImageSide:
        if not self.is_single(block):
            return super().image_side(block, taps, arguments)
        text: int = arguments["text_tokens"]
        attn: Any = block.attention
        width = attn.inner_dim
        keys, rotary = self.rotate(taps["keys"][:, text:], arguments)
        values = taps["values"][:, text:, 2 * width : 3 * width].unflatten(-1, (attn.heads, -1))
        outputs = taps["outputs"][:, text:, :width]
        return ImageSide(keys.transpose(1, 2), values.transpose(1, 2), outputs, rotary)

    def pre(self, block: Block, concepts: Tensor, temb: Tensor) -> tuple[Tensor | Modulated, Any]:
        module: Any = block.module
        parts = temb[:, None].chunk(9, dim=-1)  # six of the dual-stream blocks, then three
        if self.is_single(block):
            shift, scale, gate = parts[6:]
            attn, normed = module.attn, Modulated(concepts, module.norm, scale, shift)
            widths = [3 * attn.inner_dim, attn.mlp_hidden_dim * attn.mlp_mult_factor]
            qkv, inner = self.project(attn.to_qkv_mlp_proj, normed).split(widths, dim=-1)
            return qkv, (gate, inner)  # one projection for attention and feed-forward
        shift, scale, *state = parts[:6]
        return Modulated(concepts, module.norm1_context, scale, shift), state

    def qkv(
        self, block: Block, concepts: Any, arguments: Mapping[str, Any]
    ) -> tuple[Tensor | Normed, Tensor | Normed, Tensor]:
        if not self.is_single(block):
            return super().qkv(block, concepts, arguments)
        return split_heads(block.attention, concepts.chunk(3, dim=-1))  # `pre` projected them

    def post(self, block: Block, concepts: Tensor, outputs: Tensor, state: Any) -> Tensor:
        if not self.is_single(block):
            return super().post(block, concepts, outputs, state)
        attn: Any = block.attention
        gate, inner = state
        inner = torch.cat([outputs, attn.mlp_act_fn(inner)], dim=-1)
        concepts = self.project(attn.to_out, inner, gate=gate, residual=concepts)
        return concepts.clip(-65504, 65504) if concepts.dtype == torch.float16 else concepts
