"""The concept stream: concept vectors carried beside one forward pass, and their scores."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .adapters import Adapter, Block, Call, ImageSide, Normed
from .concepts import PromptWords
from .kernels.concept import concept_attention, halved, reference, usable
from .scores import Normalize, RunningMean, Temperature, heat_map

_logger = logging.getLogger(__name__)
_logger.addHandler(logging.NullHandler())
Space = Literal["output", "cross_attention", "prompt_attention", "value", "daam"]
PROMPT_SPACES = ("prompt_attention", "daam")  # read from the words inside the prompt
Store = Literal["mean", "layers", "steps", "all"]
Vector = Literal["concept_output", "image_output", "concept_query", "image_key", "concept_value"]
Kernels = Literal["auto", "torch", "triton"]
MANY_BYTES = 10**9  # of kept vectors, from which on a run warns


@dataclass(frozen=True)
class Recording:
    """What is recorded of each layer; the arguments are those of `ConceptAttention`."""

    layers: tuple[int, ...]
    spaces: tuple[str, ...]
    store: Store
    normalize: Normalize | None
    temperature: Temperature
    self_attention: bool
    vectors: tuple[Vector, ...]
    vector_dtype: torch.dtype | None
    kernels: Kernels


@dataclass
class Record:
    """What one run of the pipeline has shown: means, vectors, and the steps each layer was seen in.

    Keys of `means` are (space, layer, step), with -1 where all are averaged; keys of `vectors` are
    (name, layer, step).
    """

    steps: set[int] = field(default_factory=set)
    seen: dict[int, set[int]] = field(default_factory=lambda: defaultdict(set))
    means: dict[tuple[str, int, int], RunningMean] = field(default_factory=dict)
    vectors: dict[tuple[str, int, int], Tensor] = field(default_factory=dict)
    vector_bytes: int = 0


class ConceptStream:
    """The concepts on their way through the layers of one forward pass.

    Args:
        model: The transformer.
        adapter: Of its family.
        call: The forward pass.
        images: Number of conditional rows; a larger batch holds as many unconditional ones.
        embeds: Text vectors of the concepts, (lists, concepts, dim_text).
        prompt: Where the concepts stand in the prompt, for `PROMPT_SPACES`.
        recording: What is recorded.
        record: Where to.
        step: Number of the step.
    """

    def __init__(
        self,
        model: nn.Module,
        adapter: Adapter,
        call: Call,
        images: int,
        embeds: Tensor,
        prompt: PromptWords | None,
        recording: Recording,
        record: Record,
        step: int,
    ) -> None:
        self.model, self.adapter, self.call, self.images = model, adapter, call, images
        self.embeds, self.prompt = embeds, prompt
        self.recording, self.record, self.step = recording, record, step
        self.busy = False  # modules run for the concepts: taps on them must not listen
        self._next = 0
        self._rows, self._part = slice(0, None), False  # of the batch, and whether not all
        self._text = 0
        self._concepts: Tensor | None = None
        self._temb: Tensor | None = None
        self._shares: Tensor | None = None
        self._fits: tuple[Any, ...] | None = None
        self._tables: tuple[Tensor, tuple[Tensor, Tensor]] | None = None

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """Compute without gradients and without hearing our own taps."""
        self.busy = True
        try:
            with torch.no_grad():
                yield
        finally:
            self.busy = False

    def start(self, inputs: Tensor, text: Tensor) -> None:
        """Start the stream where the prompt enters the model.

        It waits for this moment since offloading moves the weights inside the forward pass.

        Args:
            inputs: What went into the text projection.
            text: What came out, (batch, tokens, dim).

        Raises:
            ValueError: Lists of concepts, vectors or prompts do not fit the batch.
        """
        with self._aside():
            batch, rows = self.images, self.adapter.rows(self.call)
            embeds = self.embeds.to(text.device, inputs.dtype)
            if batch % len(embeds):
                raise ValueError(
                    f"`concepts` has {len(embeds)} lists of words, one per image; "
                    f"got a batch of {batch} images."
                )
            if embeds.shape[-1] != inputs.shape[-1]:
                raise ValueError(
                    f"`concept_embeds` must have vectors of length {inputs.shape[-1]}, as the "
                    f"prompt has; got {embeds.shape[-1]}."
                )
            embeds = embeds.repeat_interleave(batch // len(embeds), dim=0)
            first = 0 if self.adapter.conditional_first else rows - batch
            self._rows, self._part = slice(first, first + batch), batch < rows
            self._text = self.adapter.text_tokens(self.call, text)
            call = self._conditional(rows)
            self._concepts = self.adapter.start(self.model, call, embeds)
            self._temb = self.adapter.temb(self.model, call)
            if self.prompt is not None:
                self._shares = self.prompt.shares(batch, self._text, text.device)

    def _conditional(self, batch: int) -> Call:
        """Return the call with the rows of its conditional half alone."""
        if batch == self.images:
            return self.call
        rows = {
            name: value[self._rows] if _per_row(value, batch) else value
            for name, value in self.call.arguments.items()
        }
        return Call(rows, self.call.config)

    def layer(
        self, block: Block, taps: Mapping[str, Tensor] | None, arguments: Mapping[str, Any]
    ) -> None:
        """Carry the concepts through one layer and record its scores.

        Args:
            block: The layer.
            taps: What its taps heard; None where one stayed silent.
            arguments: Keyword arguments of its attention.
        """
        if block.index != self._next or taps is None:
            # A cache skipped a layer: the concept stream of this pass ends here.
            self._concepts = None
        self._next = block.index + 1
        concepts, temb = self._concepts, self._temb
        if concepts is None or temb is None or taps is None:
            return
        with self._aside():
            if self._part:
                taps = {name: tap[self._rows] for name, tap in taps.items()}
            given = {
                **arguments, "text_tokens": self._text, "call": self.call, "rows": self._rows,
            }  # fmt: skip
            image = self.adapter.image_side(block, taps, given)
            self.adapter.kernels = triton = self._use_triton(image, concepts.shape[1])
            self.adapter.heard = taps.get("modulation")
            normed, state = self.adapter.pre(block, concepts, temb)
            q, k, v = self.adapter.qkv(block, normed, given)
            q, out = self._attend(q, k, v, image, triton)
            outputs = out.transpose(1, 2).flatten(2)  # [batch, concepts, dim]
            if block.index in self.recording.layers:
                patches = image.keys.shape[2]
                asked = heat = None
                if "prompt_attention" in self.recording.spaces:
                    asked = self.adapter.prompt_queries(block, taps["prompt"], given, patches)
                if "daam" in self.recording.spaces:
                    heat = heat_map(*self.adapter.heat_sides(block, taps, given, patches))
                self._score(block.index, image, q, v, outputs, asked, heat, triton)
                self._keep_vectors(block.index, image, q, v, outputs)
            if block.index < self.recording.layers[-1]:
                self._concepts = self.adapter.post(block, concepts, outputs, state)

    def _attend(
        self, q: Tensor | Normed, k: Tensor | Normed, v: Tensor, image: ImageSide, triton: bool
    ) -> tuple[Tensor, Tensor]:
        """Return the queries, normalised where something needs them, and the concepts' outputs."""
        asking, asked = (
            part if isinstance(part, Normed) else Normed(part, None) for part in (q, k)
        )
        turns = self._turns(image, triton)
        if not triton:
            q, k = asking.value, asked.value
            own, values = (k, v) if self.recording.self_attention else (None, None)
            out = reference.concept_attention(q, own, values, image.keys, image.values, turns)
            return q, out
        (q, q_norm), (k, k_norm) = (
            (part.value, None) if part is asking and self._reads_queries else part.split()
            for part in (asking, asked)
        )
        own, values = (k, v) if self.recording.self_attention else (None, None)
        norms = (q_norm, k_norm)
        return q, concept_attention(q, own, values, image.keys, image.values, turns, norms)

    @property
    def _reads_queries(self) -> bool:
        recording = self.recording
        return "concept_query" in recording.vectors or "cross_attention" in recording.spaces

    def _turns(self, image: ImageSide, triton: bool) -> tuple[Tensor, Tensor] | None:
        """Return the rotary tables as the attention wants them, made once for all layers."""
        rotary = image.rotary
        if rotary is None:
            return None
        if self._tables is None or not _same(self._tables[0], rotary[0]):
            dim, dtype = image.keys.shape[-1], image.keys.dtype
            cos, sin = halved(rotary, dim) if triton else (part.to(dtype) for part in rotary)
            self._tables = rotary[0], (cos, sin)
        return self._tables[1]

    def _score(
        self,
        layer: int,
        image: ImageSide,
        q: Tensor,
        v: Tensor,
        outputs: Tensor,
        asked: Tensor | None,
        heat: Tensor | None,
        triton: bool,
    ) -> None:
        """Add the layer's scores in every space to the running means."""
        recording, record = self.recording, self.record
        record.seen[layer].add(self.step)
        for space in recording.spaces:
            key = (
                space,
                layer if recording.store in ("layers", "all") else -1,
                self.step if recording.store in ("steps", "all") else -1,
            )
            mean = record.means.setdefault(key, RunningMean())
            if heat is not None and self._shares is not None and space == "daam":
                mean.add(self._shares @ heat, recording.temperature)
                continue
            scale, ours, theirs = 1.0, outputs, image.outputs
            if space == "value":
                ours, theirs = _flat(v), _flat(image.values)
            elif space != "output":
                ours, theirs = _flat(q), _flat(image.rotated)
                if space == "prompt_attention" and asked is not None and self._shares is not None:
                    ours = self._shares.to(asked.dtype) @ _flat(asked)
                scale = 1 / (q.shape[1] * q.shape[-1] ** 0.5)  # mean over heads
            mean.add_vectors(
                ours, theirs, recording.normalize, recording.temperature, scale, triton=triton
            )

    def _keep_vectors(
        self, layer: int, image: ImageSide, q: Tensor, v: Tensor, outputs: Tensor
    ) -> None:
        known = {
            "concept_output": outputs, "image_output": image.outputs, "concept_query": q,
            "concept_value": v,
        }  # fmt: skip
        for name in self.recording.vectors:
            vector = image.rotated if name == "image_key" else known[name]
            dtype = self.recording.vector_dtype or vector.dtype
            self._keep((name, layer, self.step), vector.detach().to(dtype, copy=True))

    def _keep(self, key: tuple[str, int, int], vector: Tensor) -> None:
        record, before = self.record, self.record.vector_bytes
        record.vectors[key] = vector
        record.vector_bytes += vector.nbytes
        if before <= MANY_BYTES < record.vector_bytes:
            _logger.warning(
                "kept vectors take more than %.0f GB of %s after step %d, layer %d; choose fewer "
                "`layers` or `steps`, or a narrower `vector_dtype`",
                MANY_BYTES / 1e9, vector.device, self.step, key[1],
            )  # fmt: skip

    def _use_triton(self, image: ImageSide, concepts: int) -> bool:
        """Return whether the kernels run; "auto" means on CUDA wherever they can.

        Raises:
            ValueError: They were asked for and cannot run.
        """
        kernels = self.recording.kernels
        if kernels == "torch" or (kernels == "auto" and not image.keys.is_cuda):
            return False
        layout = image.keys.device, image.keys.shape, image.keys.stride(-1)
        if self._fits == layout:  # as in the layer before
            return True
        reason = usable(image.keys, concepts)
        if reason is not None and kernels == "triton":
            raise ValueError(f"`kernels='triton'` cannot run here: {reason}.")
        self._fits = layout if reason is None else None
        return reason is None


def _flat(heads: Tensor) -> Tensor:
    """Return (batch, tokens, heads * dim_head) from (batch, heads, tokens, dim_head)."""
    return heads.transpose(1, 2).flatten(2)


def _same(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors, both alive, look at the same numbers."""
    return one.data_ptr() == other.data_ptr() and one.shape == other.shape


def _per_row(value: Any, batch: int) -> bool:
    if isinstance(value, Tensor):
        return value.ndim > 0 and len(value) == batch
    return isinstance(value, list) and len(value) == batch
