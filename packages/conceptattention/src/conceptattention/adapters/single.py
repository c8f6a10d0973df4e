"""Single-stream blocks of the Flux kind: text and picture share all weights in one sequence."""

# ruff: noqa: D102 (`Adapter` documents the methods)

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..kernels.concept import reference
from .base import Block, ImageSide
from .joint import SHARED_WEIGHTS, JointAdapter
from .linear import Modulated, Normed


class SingleStreamAdapter(JointAdapter):
    """Carries concepts on through the single-stream blocks after the dual ones, text first."""

    def single_blocks(self, model: nn.Module) -> list[Block]:
        found: Any = model.single_transformer_blocks
        first = len(self.blocks(model))
        return [
            Block(first + i, f"single_transformer_blocks.{i}", block, block.attn)
            for i, block in enumerate(found)
        ]

    def is_single(self, block: Block) -> bool:
        """Return whether the layer is one of `single_blocks`."""
        return block.name.startswith("single")

    def modulator(self, block: Block) -> Any:
        return block.module.norm.linear if self.is_single(block) else super().modulator(block)  # type: ignore[union-attr]

    def taps(self, block: Block) -> dict[str, tuple[nn.Module, Literal["input", "output"]]]:
        if not self.is_single(block):
            return super().taps(block)
        attn: Any = block.attention
        values = attn.to_qkv if attn.fused_projections else attn.to_v
        found = {
            "keys": (attn.norm_k, "output"),
            "values": (values, "output"),
            "outputs": (attn, "output"),
        }
        if self.shares_modulation:
            found["modulation"] = (self.modulator(block), "output")
        return found  # type: ignore[return-value]

    def image_side(
        self, block: Block, taps: Mapping[str, Tensor], arguments: Mapping[str, Any]
    ) -> ImageSide:
        if not self.is_single(block):
            return super().image_side(block, taps, arguments)
        text: int = arguments["text_tokens"]
        keys, rotary = self.rotate(taps["keys"][:, text:], arguments)
        values = taps["values"][:, text:]
        if block.attention.fused_projections:
            values = values.chunk(3, -1)[2]
        values = values.unflatten(-1, (block.attention.heads, -1))
        outputs = taps["outputs"][:, text:]
        return ImageSide(keys.transpose(1, 2), values.transpose(1, 2), outputs, rotary)

    def prompt_taps(self, block: Block) -> dict[str, tuple[nn.Module, Literal["input", "output"]]]:
        if not self.is_single(block):
            return super().prompt_taps(block)
        norm: Any = block.attention.norm_q
        return {"prompt": (norm, "output")}

    def prompt_queries(
        self, block: Block, tap: Tensor, arguments: Mapping[str, Any], patches: int
    ) -> Tensor:
        if not self.is_single(block):
            return super().prompt_queries(block, tap, arguments, patches)
        text: int = arguments["text_tokens"]
        rotary = (part[:text] for part in arguments["image_rotary_emb"])
        return reference.rotate(tap[:, :text].transpose(1, 2), *rotary)

    def pre(self, block: Block, concepts: Tensor, temb: Tensor) -> tuple[Tensor | Modulated, Any]:
        if not self.is_single(block):
            return super().pre(block, concepts, temb)
        norm: Any = block.module.norm
        shift, scale, gate = self.modulation(self.modulator(block), temb, 3, shared=True)
        normed = Modulated(concepts, norm.norm, scale, shift)
        return normed, (normed, gate)

    def qkv(
        self, block: Block, concepts: Any, arguments: Mapping[str, Any]
    ) -> tuple[Tensor | Normed, Tensor | Normed, Tensor]:
        if not self.is_single(block):
            return super().qkv(block, concepts, arguments)
        return self.project_heads(block.attention, concepts, SHARED_WEIGHTS)

    def post(self, block: Block, concepts: Tensor, outputs: Tensor, state: Any) -> Tensor:
        if not self.is_single(block):
            return super().post(block, concepts, outputs, state)
        module: Any = block.module
        normed, gate = state
        inner = module.act_mlp(self.project(module.proj_mlp, normed))
        inner = torch.cat([outputs, inner], dim=2)
        concepts = self.project(module.proj_out, inner, gate=gate, residual=concepts)
        return concepts.clip(-65504, 65504) if concepts.dtype == torch.float16 else concepts
