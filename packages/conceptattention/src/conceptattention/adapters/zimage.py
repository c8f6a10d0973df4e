"""Z-Image: one stream of shared weights, the picture first, in lists instead of batches."""

# ruff: noqa: D102 (`Adapter` documents the methods)

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .base import Block, Call, Encoded, ImageSide, execution_device
from .joint import JointAdapter, Token, word_vectors
from .qwen import turn


class ZImageAdapter(JointAdapter):
    """Reads diffusers' `ZImageTransformer2DModel`; not its Omni form with several pictures."""

    family = "Z-Image"
    model_class = "ZImageTransformer2DModel"
    pipeline = "ZImagePipeline"
    conditional_first = masked_text = True
    prompt_start = 3  # behind "<|im_start|>user\n"
    latents_argument, time_argument, clean_time = "x", "t", 1.0
    plain_call: ClassVar[Mapping[str, Any]] = {"guidance_scale": 0.0}

    def matches(self, model: nn.Module) -> bool:
        return super().matches(model) and model.siglip_embedder is None  # type: ignore[union-attr]

    def blocks(self, model: nn.Module) -> list[Block]:
        found: Any = model.layers
        return [Block(i, f"layers.{i}", block, block.attention) for i, block in enumerate(found)]

    def single_blocks(self, model: nn.Module) -> list[Block]:
        return []

    def guided(self, pipe: Any) -> bool:
        until, plan = pipe._cfg_truncation, pipe.scheduler
        now = 1 - plan.timesteps[plan.begin_index or 0] / 1000
        return bool(pipe.guidance_scale > 0 and (until is None or until >= 1 or now <= until))

    def encode(self, pipe: Any, words: Sequence[str], token: Token) -> Encoded:
        states, _ = pipe.encode_prompt(list(words), execution_device(pipe), False)
        return word_vectors(pipe.tokenizer, words, states, token, causal=True, start=3)

    def text_tokens(self, call: Call, text: Tensor) -> int:
        return max(_filled(len(part)) for part in call.arguments["cap_feats"])

    def seed(self, model: nn.Module) -> nn.Module:
        return model.cap_embedder  # type: ignore[return-value]

    def start(self, model: Any, call: Call, embeds: Tensor) -> Tensor:
        states = model.cap_embedder(embeds).flatten(0, 1)[:, None]
        for layer in model.context_refiner:  # every concept is a text of its own
            states = layer(states, None, None)
        return states.view(*embeds.shape[:2], -1)  # type: ignore[no-any-return]

    def temb(self, model: nn.Module, call: Call) -> Tensor:
        parts: Any = model
        return parts.t_embedder(call.arguments["t"] * parts.t_scale).type_as(call.arguments["x"][0])  # type: ignore[no-any-return]

    def image_side(
        self, block: Block, taps: Mapping[str, Tensor], arguments: Mapping[str, Any]
    ) -> ImageSide:
        count = prod(_grid(arguments["call"]))
        keys = turn(taps["keys"][:, :count], arguments["freqs_cis"][arguments["rows"], :count])
        values = taps["values"][:, :count].unflatten(-1, (block.attention.heads, -1))
        return ImageSide(keys.transpose(1, 2), values.transpose(1, 2), taps["outputs"][:, :count])

    def prompt_taps(self, block: Block) -> dict[str, Any]:
        return {"prompt": (block.attention.norm_q, "output")}

    def prompt_queries(
        self, block: Block, tap: Tensor, arguments: Mapping[str, Any], patches: int
    ) -> Tensor:
        text = slice(_filled(patches), _filled(patches) + arguments["text_tokens"])
        turns = arguments["freqs_cis"][arguments["rows"], text]
        return turn(tap[:, text], turns).transpose(1, 2)

    def pre(self, block: Block, concepts: Tensor, temb: Tensor) -> tuple[Tensor, Any]:
        module: Any = block.module
        scale, *state = module.adaLN_modulation(temb)[:, None].chunk(4, dim=-1)
        return module.attention_norm1(concepts) * (1 + scale), state

    def qkv(
        self, block: Block, concepts: Tensor, arguments: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor, Tensor]:
        attn: Any = block.attention
        q, k, v = (f(concepts) for f in (attn.to_q, attn.to_k, attn.to_v))
        q, k, v = (part.unflatten(-1, (attn.heads, -1)) for part in (q, k, v))
        first = _filled(prod(_grid(arguments["call"])))  # concepts sit where the text begins
        turns = arguments["freqs_cis"][arguments["rows"], first : first + 1]
        q, k = turn(attn.norm_q(q), turns), turn(attn.norm_k(k), turns)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def post(self, block: Block, concepts: Tensor, outputs: Tensor, state: Any) -> Tensor:
        module: Any = block.module
        gate, scale_mlp, gate_mlp = state
        outputs = module.attention.to_out[0](outputs)
        concepts = concepts + gate.tanh() * module.attention_norm2(outputs)
        inner = module.feed_forward(module.ffn_norm1(concepts) * (1 + scale_mlp))
        return concepts + gate_mlp.tanh() * module.ffn_norm2(inner)  # type: ignore[no-any-return]

    def encode_image(self, pipe: Any, image: Tensor) -> Tensor:
        return super().encode_image(pipe, image)[:, :, None]

    def positions(self, call: Call) -> tuple[Tensor, tuple[int, ...]]:
        return torch.ones(prod(_grid(call)), dtype=torch.bool), _grid(call)


def _grid(call: Call) -> tuple[int, int]:
    height, width = call.arguments["x"][0].shape[-2:]
    return height // (side := call.arguments.get("patch_size", 2)), width // side


def _filled(count: int) -> int:
    return count + -count % 32  # the model fills picture and text up with padding tokens
