"""Flux.1: dual-stream layers; concepts pass through the text weights with zero pooled vector.

Source: Helbling et al. 2025, sections 3 and 4; layer choice of the reference implementation.
"""

# ruff: noqa: D102 (`Adapter` documents the methods)

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .base import Adapter, Block, Call, Encoded, ImageSide, execution_device


class FluxAdapter(Adapter):
    """Reads diffusers' `FluxTransformer2DModel`."""

    family = "Flux.1"

    def matches(self, model: nn.Module) -> bool:
        return type(model).__name__ == "FluxTransformer2DModel"

    def blocks(self, model: nn.Module) -> list[Block]:
        found: Any = model.transformer_blocks
        return [Block(i, f"transformer_blocks.{i}", b, b.attn) for i, b in enumerate(found)]

    def default_layers(self, model: nn.Module) -> Sequence[int]:
        count = len(self.blocks(model))
        return range(15, 19) if count == 19 else range(count // 2, count)

    def encode(
        self, pipe: Any, words: Sequence[str], token: Literal["auto", "first", "mean", "last"]
    ) -> Encoded:
        tokenizer = pipe.tokenizer_2
        rows = [tokenizer(word, add_special_tokens=False).input_ids for word in words]
        unknown = tokenizer.unk_token_id
        embeds = pipe.encode_prompt(prompt=list(words), device=execution_device(pipe))[0]
        vectors = []
        for row, states in zip(rows, embeds, strict=True):
            rule = ("first" if len(row) < 2 else "mean") if token == "auto" else token
            content = states[: max(len(row), 1)]
            pick = {"first": content[0], "mean": content.mean(0), "last": content[-1]}
            vectors.append(pick[rule])
        unread = (w for w, row in zip(words, rows, strict=True) if not row or unknown in row)
        return Encoded(torch.stack(vectors), tuple(len(row) for row in rows), tuple(unread))

    def seed(self, model: nn.Module) -> nn.Module:
        return model.context_embedder  # type: ignore[return-value]

    def temb(self, model: nn.Module, call: Call) -> Tensor:
        embed: Any = model.time_text_embed
        dtype = call.arguments["hidden_states"].dtype
        pooled = torch.zeros_like(call.arguments["pooled_projections"])
        times = [call.arguments["timestep"].to(dtype) * 1000]
        if call.arguments.get("guidance") is not None:
            times.append(call.arguments["guidance"].to(dtype) * 1000)
        return embed(*times, pooled)  # type: ignore[no-any-return]

    def taps(self, block: Block) -> dict[str, tuple[nn.Module, Literal["input", "output"]]]:
        attn: Any = block.attention
        values = ("qkv", attn.to_qkv) if attn.fused_projections else ("values", attn.to_v)
        return {
            "keys": (attn.norm_k, "output"),
            values[0]: (values[1], "output"),
            "outputs": (attn.to_out[0], "input"),
        }

    def image_side(
        self, block: Block, taps: Mapping[str, Tensor], arguments: Mapping[str, Any]
    ) -> ImageSide:
        from diffusers.models.embeddings import apply_rotary_emb

        keys = taps["keys"]  # [batch, patches, heads, dim_head], before rotation
        values = taps["values"] if "values" in taps else taps["qkv"].chunk(3, dim=-1)[2]
        rotary = arguments.get("image_rotary_emb")
        if rotary is not None:
            rotary = tuple(part[-keys.shape[1] :] for part in rotary)  # text comes first
            keys = apply_rotary_emb(keys, rotary, sequence_dim=1)
        values = values.unflatten(-1, (-1, keys.shape[-1]))
        return ImageSide(keys.transpose(1, 2), values.transpose(1, 2), taps["outputs"])

    def pre(self, block: Block, concepts: Tensor, temb: Tensor) -> tuple[Tensor, Any]:
        norm: Any = block.module.norm1_context
        normed, *state = norm(concepts, emb=temb)
        return normed, state

    def qkv(self, block: Block, concepts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        attn: Any = block.attention
        if attn.fused_projections:
            q, k, v = attn.to_added_qkv(concepts).chunk(3, dim=-1)
        else:
            q, k, v = (f(concepts) for f in (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj))
        q, k, v = (part.unflatten(-1, (-1, attn.head_dim)) for part in (q, k, v))
        # Concepts sit at position (0, 0, 0), where the rotation is the identity.
        q, k = attn.norm_added_q(q), attn.norm_added_k(k)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def post(self, block: Block, concepts: Tensor, outputs: Tensor, state: Any) -> Tensor:
        module: Any = block.module
        gate, shift_mlp, scale_mlp, gate_mlp = (part[:, None] for part in state)
        concepts = concepts + gate * module.attn.to_add_out(outputs)
        normed = module.norm2_context(concepts) * (1 + scale_mlp) + shift_mlp
        return concepts + gate_mlp * module.ff_context(normed)  # type: ignore[no-any-return]

    def positions(self, call: Call) -> tuple[Tensor, tuple[int, ...]]:
        ids = call.arguments["img_ids"]
        ids = ids[0] if ids.ndim == 3 else ids
        target = ids[:, 0] == 0  # reference pictures (Kontext) carry 1 here
        rows, columns = (ids[target][:, 1:].long().amax(0) + 1).tolist()
        return target, (rows, columns)

    def encode_image(self, pipe: Any, image: Tensor) -> Tensor:
        latents = pipe.vae.encode(image).latent_dist.mode()
        config = pipe.vae.config
        latents = (latents - config.shift_factor) * config.scaling_factor
        return pipe._pack_latents(latents, *latents.shape)  # type: ignore[no-any-return]

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
