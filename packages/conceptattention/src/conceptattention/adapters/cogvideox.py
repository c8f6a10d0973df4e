"""CogVideoX: text and video share all weights but their modulation; batched guidance."""

# ruff: noqa: D102 (`Adapter` documents the methods)

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import Tensor, nn

from .base import Block, Call, Encoded, ImageSide, execution_device
from .joint import (
    SHARED_WEIGHTS,
    JointAdapter,
    Token,
    positions_from_latents,
    word_vectors,
)
from .linear import Modulated, Normed


class CogVideoXAdapter(JointAdapter):
    """Reads diffusers' `CogVideoXTransformer3DModel`."""

    family = "CogVideoX"
    model_class = "CogVideoXTransformer3DModel"
    films = shares_modulation = True
    heads_first = True

    def blocks(self, model: nn.Module) -> list[Block]:
        found: Any = model.transformer_blocks
        return [Block(i, f"transformer_blocks.{i}", b, b.attn1) for i, b in enumerate(found)]

    def default_layers(self, model: nn.Module) -> Sequence[int]:
        return range(len(self.blocks(model)))

    def guided(self, pipe: Any) -> bool:
        return bool(getattr(pipe, "guidance_scale", 1) > 1)

    def encode(self, pipe: Any, words: Sequence[str], token: Token) -> Encoded:
        states = pipe.encode_prompt(
            list(words), do_classifier_free_guidance=False, device=execution_device(pipe)
        )[0]
        return word_vectors(pipe.tokenizer, words, states, token)

    def seed(self, model: nn.Module) -> nn.Module:
        return model.patch_embed.text_proj  # type: ignore[return-value, union-attr]

    def temb(self, model: nn.Module, call: Call) -> Tensor:
        parts: Any = model
        given = call.arguments
        dtype = given["hidden_states"].dtype
        times = parts.time_proj(given["timestep"]).to(dtype)
        times = parts.time_embedding(times, given.get("timestep_cond"))
        if parts.ofs_embedding is not None:
            times = times + parts.ofs_embedding(parts.ofs_proj(given["ofs"]).to(dtype))
        return times  # type: ignore[no-any-return]

    def image_side(
        self, block: Block, taps: Mapping[str, Tensor], arguments: Mapping[str, Any]
    ) -> ImageSide:
        text = arguments["encoder_hidden_states"].shape[1]
        whole = super().image_side(block, taps, arguments)
        return ImageSide(
            whole.keys[:, :, text:], whole.values[:, :, text:], whole.outputs[:, text:]
        )

    def rotate(self, keys: Tensor, arguments: Mapping[str, Any]) -> tuple[Tensor, None]:
        return keys, None  # the attention rotates keys in place, after our tap saw them

    def prompt_taps(self, block: Block) -> dict[str, tuple[nn.Module, Literal["input", "output"]]]:
        attn: Any = block.attention
        if attn.norm_q is not None:
            return {"prompt": (attn.norm_q, "output")}
        return {"prompt": (attn.to_qkv if attn.fused_projections else attn.to_q, "output")}

    def prompt_queries(
        self, block: Block, tap: Tensor, arguments: Mapping[str, Any], patches: int
    ) -> Tensor:
        heads = block.attention.heads
        if tap.ndim == 3:
            fused = block.attention.fused_projections and block.attention.norm_q is None
            tap = (tap.chunk(3, -1)[0] if fused else tap).unflatten(-1, (heads, -1)).transpose(1, 2)
        return tap[:, :, : tap.shape[2] - patches]  # text has no rotary position

    def modulator(self, block: Block) -> Any:
        return block.module.norm1.linear  # type: ignore[union-attr]

    def pre(self, block: Block, concepts: Tensor, temb: Tensor) -> tuple[Tensor | Modulated, Any]:
        norm: Any = block.module.norm1
        parts = self.modulation(self.modulator(block), temb, 6, first=3, shared=True)
        shift, scale, gate = parts  # behind the video's
        return Modulated(concepts, norm.norm, scale, shift), (gate, temb)

    def qkv(
        self, block: Block, concepts: Any, arguments: Mapping[str, Any]
    ) -> tuple[Tensor | Normed, Tensor | Normed, Tensor]:
        return self.project_heads(block.attention, concepts, SHARED_WEIGHTS)

    def post(self, block: Block, concepts: Tensor, outputs: Tensor, state: Any) -> Tensor:
        module: Any = block.module
        gate, temb = state
        concepts = self.project(module.attn1.to_out[0], outputs, gate=gate, residual=concepts)
        shift, scale, gate = self.modulation(module.norm2.linear, temb, 6, first=3)
        normed = Modulated(concepts, module.norm2.norm, scale, shift)
        return self.feed_forward(module.ff, normed, gate)

    def positions(self, call: Call) -> tuple[Tensor, tuple[int, ...]]:
        latents = call.arguments["hidden_states"].transpose(1, 2)  # frames before channels
        return positions_from_latents(latents, call.config)
