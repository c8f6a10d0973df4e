"""What most families share: separate text weights and one attention over text and image."""

# ruff: noqa: D102 (`Adapter` documents the methods)

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..kernels.concept import reference
from .base import Adapter, Block, Call, Encoded, ImageSide
from .calls import first_call
from .linear import Modulated, Normed

Token = Literal["auto", "first", "mean", "last"]
Weights = tuple[tuple[str, str, str], str, tuple[str, str]]  # each, fused, norms
TEXT_WEIGHTS: Weights = (
    ("add_q_proj", "add_k_proj", "add_v_proj"), "to_added_qkv", ("norm_added_q", "norm_added_k")
)  # fmt: skip
SHARED_WEIGHTS: Weights = ("to_q", "to_k", "to_v"), "to_qkv", ("norm_q", "norm_k")


class JointAdapter(Adapter):
    """Reads dual-stream blocks in diffusers' naming; a family overrides where it differs."""

    model_class: ClassVar[str]
    heads_first: ClassVar[bool] = False  # layout of the keys where `norm_k` sees them
    prompt_tokenizer: ClassVar[str] = "tokenizer"
    shares_modulation: ClassVar[bool] = False  # concepts are modulated as the prompt is
    masked_text: ClassVar[bool] = False  # attention does not see the padding of the prompt
    prompt_start: ClassVar[int | None] = 0  # place of the prompt's first token; None: not known
    plain_call: ClassVar[Mapping[str, Any]] = {}  # what makes a pipeline's first call conditional
    shifted: ClassVar[bool] = True  # latents, by the autoencoder's `shift_factor`
    time_argument: ClassVar[str] = "timestep"
    clean_time: ClassVar[float] = 0.0  # its value for a picture without noise

    def matches(self, model: nn.Module) -> bool:
        return type(model).__name__ == self.model_class

    def blocks(self, model: nn.Module) -> list[Block]:
        found: Any = model.transformer_blocks
        return [Block(i, f"transformer_blocks.{i}", b, b.attn) for i, b in enumerate(found)]

    def default_layers(self, model: nn.Module) -> Sequence[int]:
        count = len(self.blocks(model))
        return range(count // 2, count)

    def seed(self, model: nn.Module) -> nn.Module:
        return model.context_embedder  # type: ignore[return-value]

    def modulator(self, block: Block) -> Any:
        """Return the linear layer that gives the text's modulation before the attention."""
        return block.module.norm1_context.linear  # type: ignore[union-attr]

    def taps(self, block: Block) -> dict[str, tuple[nn.Module, Literal["input", "output"]]]:
        attn: Any = block.attention
        fused = attn.fused_projections
        found = {"outputs": (attn.to_out[0], "input")}
        if fused:
            found["qkv"] = (attn.to_qkv, "output")
        else:
            found["values"] = (attn.to_v, "output")
        if attn.norm_k is not None:
            found["keys"] = (attn.norm_k, "output")
        elif not fused:
            found["keys"] = (attn.to_k, "output")
        if self.shares_modulation:
            found["modulation"] = (self.modulator(block), "output")
        return found  # type: ignore[return-value]

    def image_side(
        self, block: Block, taps: Mapping[str, Tensor], arguments: Mapping[str, Any]
    ) -> ImageSide:
        heads = block.attention.heads
        _, keys, values = taps["qkv"].chunk(3, -1) if "qkv" in taps else (None, None, None)
        keys, values = taps.get("keys", keys), taps.get("values", values)
        if keys.ndim == 3:  # type: ignore[union-attr]
            keys = keys.unflatten(-1, (heads, -1))  # type: ignore[union-attr]
        elif self.heads_first:
            keys = keys.transpose(1, 2)  # type: ignore[union-attr]
        keys, rotary = self.rotate(keys, arguments)  # type: ignore[arg-type]
        values = values.unflatten(-1, (heads, -1))  # type: ignore[union-attr]
        return ImageSide(keys.transpose(1, 2), values.transpose(1, 2), taps["outputs"], rotary)

    def rotate(
        self, keys: Tensor, arguments: Mapping[str, Any]
    ) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """Return image keys (batch, patches, heads, dim_head) and how to rotate them yet."""
        rotary = arguments.get("image_rotary_emb")
        if rotary is None:
            return keys, None
        cos, sin = (part[-keys.shape[1] :] for part in rotary)  # text, if any, comes first
        return keys, (cos, sin)

    def prompt_taps(self, block: Block) -> dict[str, tuple[nn.Module, Literal["input", "output"]]]:
        attn: Any = block.attention
        if attn.norm_added_q is not None:
            return {"prompt": (attn.norm_added_q, "output")}
        return {
            "prompt": (attn.to_added_qkv if attn.fused_projections else attn.add_q_proj, "output")
        }

    def prompt_queries(
        self, block: Block, tap: Tensor, arguments: Mapping[str, Any], patches: int
    ) -> Tensor:
        attn: Any = block.attention
        if tap.ndim == 3:
            fused = attn.fused_projections and attn.norm_added_q is None
            tap = (tap.chunk(3, -1)[0] if fused else tap).unflatten(-1, (attn.heads, -1))
        elif self.heads_first:
            tap = tap.transpose(1, 2)
        queries, rotary = tap.transpose(1, 2), arguments.get("image_rotary_emb")
        if rotary is None or len(rotary[0]) == patches:
            return queries
        return reference.rotate(queries, *(part[: queries.shape[2]] for part in rotary))

    def heat_taps(self, block: Block) -> dict[str, tuple[nn.Module, Literal["input", "output"]]]:
        if self.masked_text:
            return super().heat_taps(block)
        attn: Any = block.attention
        shared = getattr(attn, "add_k_proj", None) is None  # text and picture have one key weight
        text = ("norm_k", "to_k", "to_qkv")
        text = text if shared else ("norm_added_k", "add_k_proj", "to_added_qkv")
        found = {}
        for tap, names in (("queries", ("norm_q", "to_q", "to_qkv")), ("prompt_keys", text)):
            module = getattr(attn, names[0], None)
            if module is None:
                module = getattr(attn, names[2 if attn.fused_projections else 1])
            found[tap] = (module, "output")
        return found  # type: ignore[return-value]

    def heat_sides(
        self, block: Block, taps: Mapping[str, Tensor], arguments: Mapping[str, Any], patches: int
    ) -> tuple[Tensor, Tensor]:
        queries, keys = taps["queries"], taps["prompt_keys"]
        if queries.ndim == 3 and block.attention.fused_projections:
            width = queries.shape[-1] // 3
            queries, keys = queries[..., :width], keys.roll(-width, -1)  # keys where queries were
        # Queries are laid out and rotated as keys are, and keys as queries.
        image = self.image_side(block, {**taps, "keys": queries}, arguments)
        return image.rotated, self.prompt_queries(block, keys, arguments, patches)

    def prompt_positions(self, pipe: Any, prompt: str, word: str) -> list[int]:
        if self.prompt_start is None:
            return super().prompt_positions(pipe, prompt, word)
        tokenizer = getattr(pipe, self.prompt_tokenizer)
        text = tokenizer(prompt, add_special_tokens=False).input_ids
        for form in (word, f" {word}"):  # in the middle of a text some tokenizers keep the space
            ids = tokenizer(form, add_special_tokens=False).input_ids
            for place in range(len(text) - len(ids) + 1):
                if ids and text[place : place + len(ids)] == ids:
                    return [self.prompt_start + place + offset for offset in range(len(ids))]
        raise ValueError(f"`prompt` must hold every concept; {word!r} is not in {prompt!r}.")

    def pre(self, block: Block, concepts: Tensor, temb: Tensor) -> tuple[Tensor | Modulated, Any]:
        norm: Any = block.module.norm1_context
        shift, scale, *state = self.modulation(self.modulator(block), temb, 6, shared=True)
        return Modulated(concepts, norm.norm, scale, shift), state

    def qkv(
        self, block: Block, concepts: Any, arguments: Mapping[str, Any]
    ) -> tuple[Tensor | Normed, Tensor | Normed, Tensor]:
        # Concepts sit at position 0, where the rotation is the identity.
        return self.project_heads(block.attention, concepts, TEXT_WEIGHTS)

    def project_heads(
        self, attn: Any, concepts: Any, weights: Weights
    ) -> tuple[Normed, Normed, Tensor]:
        """Return what `qkv` does, by the weights of these names in an attention module."""
        each, fused, norms = weights
        if attn.fused_projections:
            parts = self.project(getattr(attn, fused), concepts).chunk(3, dim=-1)
        else:
            parts = self.project_each([getattr(attn, name) for name in each], concepts)
        return split_heads(attn, parts, norms)

    def post(self, block: Block, concepts: Tensor, outputs: Tensor, state: Any) -> Tensor:
        module: Any = block.module
        parts = module.attn.to_add_out, module.norm2_context, module.ff_context
        return self.carry_on(concepts, outputs, state, *parts)

    def carry_on(
        self, concepts: Tensor, outputs: Tensor, state: Any,
        out: nn.Module, norm: nn.Module, mlp: nn.Module,
    ) -> Tensor:  # fmt: skip
        """Return what `post` does, by these modules of the block."""
        gate, shift_mlp, scale_mlp, gate_mlp = state
        concepts = self.project(out, outputs, gate=gate, residual=concepts)
        concepts = self.feed_forward(mlp, Modulated(concepts, norm, scale_mlp, shift_mlp), gate_mlp)
        return concepts.clip(-65504, 65504) if concepts.dtype == torch.float16 else concepts

    def positions(self, call: Call) -> tuple[Tensor, tuple[int, ...]]:
        return positions_from_ids(call.arguments["img_ids"])

    def encode_image(self, pipe: Any, image: Tensor) -> Tensor:
        config = pipe.vae.config
        latents = pipe.vae.encode(image).latent_dist.mode()
        shift = getattr(config, "shift_factor", None) if self.shifted else None
        latents = (latents - (shift or 0)) * config.scaling_factor
        pack = getattr(pipe, "_pack_latents", None)
        return latents if pack is None else pack(latents, *latents.shape)  # type: ignore[no-any-return]

    def arguments(
        self, pipe: Any, latents: Tensor, grid: tuple[int, int], prompt: list[str], t: float
    ) -> dict[str, Any]:
        side = self.patch(pipe)
        height, width = grid[0] * side, grid[1] * side
        given = first_call(pipe, prompt=prompt, height=height, width=width, **self.plain_call)
        noisy = given[self.time_argument]  # a pipeline's first call is at pure noise
        given[self.time_argument] = self.clean_time + (noisy - self.clean_time) * t
        return {**given, self.latents_argument: latents}


def split_heads(
    attn: Any, parts: Sequence[Tensor], norms: tuple[str, str] = SHARED_WEIGHTS[2]
) -> tuple[Normed, Normed, Tensor]:
    """Return queries, keys and values (batch, tokens, dim) by heads, with the norms yet to do."""
    q, k, v = (part.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for part in parts)
    return Normed(q, getattr(attn, norms[0])), Normed(k, getattr(attn, norms[1])), v


def positions_from_ids(ids: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """Return target tokens and grid from (image, row, column, ...) ids; references come after."""
    ids = ids[0] if ids.ndim == 3 else ids
    target = ids[:, 0] == ids[0, 0]
    place = ids[target][:, 1:3].long()
    rows, columns = (place.amax(0) - place.amin(0) + 1).tolist()
    return target, (rows, columns)


def positions_from_latents(
    latents: Tensor, config: Mapping[str, Any]
) -> tuple[Tensor, tuple[int, ...]]:
    """Return target tokens and grid of latents (batch, channels, [frames], height, width)."""
    patch = config["patch_size"]
    if isinstance(patch, int):
        patch = (config.get("patch_size_t") or 1, patch, patch)[5 - latents.ndim :]
    sizes = latents.shape[-len(patch) :]
    grid = tuple(size // step for size, step in zip(sizes, patch, strict=True))
    return torch.ones(prod(grid), dtype=torch.bool), grid


def word_vectors(
    tokenizer: Any,
    words: Sequence[str],
    states: Tensor | Sequence[Tensor],
    token: Token,
    *,
    causal: bool = False,
    start: int | None = None,
    end: int | None = None,
) -> Encoded:
    """Return one vector per word from encoder states that hold the word's tokens.

    Args:
        tokenizer: Splits a word into its tokens.
        words: The words.
        states: Encoder states, one row of tokens per word.
        token: As in `ConceptAttention`; "auto" is "last" for causal encoders.
        causal: Whether later tokens know earlier ones only.
        start: Position of a word's first token; 0 when None.
        end: Position after a word's last token, instead of `start`; 0 for the end of the row.
    """
    rows = [tokenizer(word, add_special_tokens=False).input_ids for word in words]
    vectors = []
    for row, line in zip(rows, states, strict=True):
        count = max(len(row), 1)
        first = start or 0 if end is None else (end % len(line) or len(line)) - count
        content = line[first : first + count]
        rule = token if token != "auto" else "last" if causal else "mean"
        vectors.append({"first": content[0], "mean": content.mean(0), "last": content[-1]}[rule])
    unknown = getattr(tokenizer, "unk_token_id", None)
    unread = (
        w
        for w, row in zip(words, rows, strict=True)
        if not row or (unknown is not None and unknown in row)
    )
    return Encoded(torch.stack(vectors), tuple(len(row) for row in rows), tuple(unread))
