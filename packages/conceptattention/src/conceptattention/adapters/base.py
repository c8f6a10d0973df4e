"""The adapter contract: what the observer must know about a model family."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from .linear import LinearLayers, Modulated, Normed


@dataclass(frozen=True)
class Block:
    """One layer in which image and text attend to each other.

    Args:
        index: Layer number, counted from 0.
        name: Name of the block inside the transformer.
        module: The block.
        attention: Its attention module; the observer's step runs after its forward pass.
    """

    index: int
    name: str
    module: nn.Module
    attention: nn.Module


@dataclass(frozen=True)
class Call:
    """One forward pass of the transformer.

    Args:
        arguments: Its arguments, by name.
        config: The transformer's configuration.
    """

    arguments: Mapping[str, Any]
    config: Mapping[str, Any]


@dataclass(frozen=True)
class Encoded:
    """Concept words, encoded one by one.

    Args:
        embeds: One text vector per word, (words, dim_text).
        tokens: Number of tokens of each word.
        unknown: Words that the tokenizer does not know.
    """

    embeds: Tensor
    tokens: tuple[int, ...]
    unknown: tuple[str, ...] = ()


@dataclass(frozen=True)
class ImageSide:
    """What one layer computed for the image tokens, as attention used it.

    Args:
        keys: (batch, heads, patches, dim_head); before rotation when `rotary` is given.
        values: (batch, heads, patches, dim_head).
        outputs: Attention output before the output projection, (batch, patches, dim).
        rotary: Cosines and sines (patches, dim_head) on neighbouring pairs of features.
    """

    keys: Tensor
    values: Tensor
    outputs: Tensor
    rotary: tuple[Tensor, Tensor] | None = None

    @property
    def rotated(self) -> Tensor:
        """The keys as attention used them."""
        from ..kernels.concept import reference

        return self.keys if self.rotary is None else reference.rotate(self.keys, *self.rotary)


class Adapter(LinearLayers, ABC):
    """How to read one family of multi-modal diffusion transformers.

    Linear layers go through `project`, `modulation` and `feed_forward`, which call the modules, so
    that offloading and LoRA keep working, or one kernel where every module is plain.
    """

    family: ClassVar[str]
    conditional_first: ClassVar[bool] = False  # of a guided batch's halves
    pipeline: ClassVar[str | None] = None  # diffusers' class that encodes, for modular pipelines
    latents_argument: ClassVar[str] = "hidden_states"  # of the transformer
    films: ClassVar[bool] = False  # not pictures

    @abstractmethod
    def matches(self, model: nn.Module) -> bool:
        """Return whether the transformer belongs to this family."""

    @abstractmethod
    def blocks(self, model: nn.Module) -> list[Block]:
        """Return the layers in the order they run."""

    def single_blocks(self, model: nn.Module) -> list[Block]:
        """Return the single-stream layers after `blocks`, numbered on from them."""
        raise ValueError(f"`single_stream`: {self.family} has no single-stream mode yet.")

    @abstractmethod
    def default_layers(self, model: nn.Module) -> Sequence[int]:
        """Return the layers that the maps average by default."""

    @abstractmethod
    def encode(
        self, pipe: Any, words: Sequence[str], token: Literal["auto", "first", "mean", "last"]
    ) -> Encoded:
        """Return one text vector per word, each encoded by itself."""

    @abstractmethod
    def seed(self, model: nn.Module) -> nn.Module:
        """Return the text-input projection; the concept stream starts when the prompt passes it."""

    def start(self, model: nn.Module, call: Call, embeds: Tensor) -> Tensor:
        """Return the start of the concept stream, (batch, concepts, dim)."""
        return self.seed(model)(embeds)  # type: ignore[no-any-return]

    def guided(self, pipe: Any) -> bool:
        """Return whether this run's first batch holds both the conditional and unconditional rows.

        Unconditional ones come first, or last with `conditional_first`.
        """
        return False

    def rows(self, call: Call) -> int:
        """Return the size of the batch."""
        return len(call.arguments[self.latents_argument])

    def text_tokens(self, call: Call, text: Tensor) -> int:
        """Return how many tokens of text a layer sees, given the output of `seed`."""
        return text.shape[1]

    @abstractmethod
    def temb(self, model: nn.Module, call: Call) -> Tensor:
        """Return the conditioning vector of the concept stream, (batch, dim)."""

    @abstractmethod
    def taps(self, block: Block) -> dict[str, tuple[nn.Module, Literal["input", "output"]]]:
        """Return the modules whose input or output `image_side` needs, by tap name."""

    @abstractmethod
    def image_side(
        self, block: Block, taps: Mapping[str, Tensor], arguments: Mapping[str, Any]
    ) -> ImageSide:
        """Return keys, values and outputs of the image tokens from one layer's taps.

        Args:
            block: The layer.
            taps: What the taps of the layer saw.
            arguments: Keyword arguments of the attention module's call, and "text_tokens", the
                length of the prompt; "call", the forward pass; "rows", which rows of the batch
                the taps hold.
        """

    def prompt_taps(self, block: Block) -> dict[str, tuple[nn.Module, Literal["input", "output"]]]:
        """Return the module whose output `prompt_queries` needs, under the name "prompt"."""
        raise ValueError(f"`space`: {self.family} has no 'prompt_attention' yet.")

    def prompt_queries(
        self, block: Block, tap: Tensor, arguments: Mapping[str, Any], patches: int
    ) -> Tensor:
        """Return the prompt's queries as attention used them, (batch, heads, tokens, dim_head).

        Args:
            block: The layer.
            tap: What the tap of `prompt_taps` saw.
            arguments: Keyword arguments of the attention module's call.
            patches: Number of image tokens.
        """
        raise ValueError(f"`space`: {self.family} has no 'prompt_attention' yet.")

    def heat_taps(self, block: Block) -> dict[str, tuple[nn.Module, Literal["input", "output"]]]:
        """Return the modules that `heat_sides` needs, beside those of `taps`."""
        raise ValueError(f"`space`: {self.family} has no 'daam' yet.")

    def heat_sides(
        self, block: Block, taps: Mapping[str, Tensor], arguments: Mapping[str, Any], patches: int
    ) -> tuple[Tensor, Tensor]:
        """Return the picture's queries and the prompt's keys as attention used them.

        Args:
            block: The layer.
            taps: What the taps of `taps` and `heat_taps` saw.
            arguments: As in `image_side`.
            patches: Number of image tokens.
        """
        raise ValueError(f"`space`: {self.family} has no 'daam' yet.")

    def prompt_positions(self, pipe: Any, prompt: str, word: str) -> list[int]:
        """Return where a word's tokens sit in the prompt, counted from the first text token."""
        raise ValueError(
            f"`prompt`: where {self.family} puts a prompt's tokens is not known; "
            "pass `prompt_tokens`."
        )

    @abstractmethod
    def pre(self, block: Block, concepts: Tensor, temb: Tensor) -> tuple[Tensor | Modulated, Any]:
        """Return the normalised, modulated concepts, computed or not yet, and what `post` needs."""

    @abstractmethod
    def qkv(
        self, block: Block, concepts: Any, arguments: Mapping[str, Any]
    ) -> tuple[Tensor | Normed, Tensor | Normed, Tensor]:
        """Return queries, keys and values of the concepts, (batch, heads, concepts, dim_head).

        Queries and keys may be `Normed`: then their norm is left to the attention.

        Args:
            block: The layer.
            concepts: As `pre` returned them.
            arguments: Keyword arguments of the attention module's call.
        """

    @abstractmethod
    def post(self, block: Block, concepts: Tensor, outputs: Tensor, state: Any) -> Tensor:
        """Return the concept stream after the layer."""

    @abstractmethod
    def positions(self, call: Call) -> tuple[Tensor, tuple[int, ...]]:
        """Return which tokens belong to the picture, and the grid they fill.

        May synchronise with the device: it is called once per run, after it.
        """

    def patch(self, pipe: Any) -> int:
        """Return how many pixels high and wide a token of the picture is."""
        return 2 * int(pipe.vae_scale_factor)

    def encode_image(self, pipe: Any, image: Tensor) -> Tensor:
        """Return clean latents as the transformer takes them.

        Args:
            pipe: The pipeline.
            image: Colour in [-1, 1], (batch, 3, height, width).
        """
        raise ValueError(f"`pipe`: `segment` does not know how {self.family} encodes pictures.")

    def arguments(
        self, pipe: Any, latents: Tensor, grid: tuple[int, int], prompt: list[str], t: float
    ) -> dict[str, Any]:
        """Return the transformer's keyword arguments for latents at noise level `t`.

        Args:
            pipe: The pipeline.
            latents: As `encode_image` returned them.
            grid: Tokens of the picture, rows and columns.
            prompt: One caption per picture.
            t: Noise level, above 0 and at most 1.
        """
        raise ValueError(f"`pipe`: `segment` does not know how {self.family} encodes pictures.")


def execution_device(pipe: Any) -> torch.device:
    """Return the device that the pipeline computes on, also when its weights are offloaded."""
    device = pipe._execution_device
    return device if isinstance(device, torch.device) else torch.device(device)
