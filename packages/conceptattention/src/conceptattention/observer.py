"""The observer: a concept stream computed beside an unmodified pipeline.

Hooks read what each layer computed for the image tokens, carry the concept vectors through the
text weights, and never touch what the model computes, so images stay bit-identical.

The parts: `taps` hears the layers, `runs` decides which forward passes count, `stream` carries the
concepts through one of them, `concepts` and `selection` read the arguments.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any, get_args

import torch
from torch import Tensor, nn

from .adapters import adapter_for
from .concepts import (
    PromptWords,
    Token,
    check_concepts,
    check_embeds,
    encode_concepts,
    find_in_prompt,
)
from .maps import ConceptMaps, Reduce
from .modular import standard
from .runs import Router, Run
from .scores import Normalize, Temperature, check_temperature
from .selection import Selection, check_steps, resolve_layers
from .stream import Kernels, Recording, Space, Store, Vector
from .taps import Taps, assert_ready


class ConceptAttention:
    """Records saliency maps of concepts while a diffusion pipeline runs.

    Use it as a context manager around any number of pipeline calls. The pipeline's images are the
    same bits with and without it.

    Args:
        pipe: A diffusers pipeline whose transformer belongs to a registered family.
        concepts: Words, in or outside the prompt; or one list of words per image of the batch, all
            of one length.
        layers: "default" (the family's choice), "all", "last:N", an index, a slice, or indices.
        steps: "all", an index, a slice, or indices; negative ones count from the last step, and
            fractions are shares of the run: `slice(0.7, -1)`. "noise:0.3-0.7" takes the steps whose
            noise level lies there, the scheduler's time as a share of its training steps.
        space: "output" (the paper's maps), "cross_attention", "prompt_attention" (queries of the
            words inside the prompt), "value", "daam" (attention of the picture to those words), or
            several of them.
        store: "mean" keeps one map; "layers", "steps" and "all" keep one per layer, per step, or
            both, for `ConceptMaps.select`.
        normalize: None for raw scores; "l2", "cosine" or "linear" as in `concept_scores`.
        temperature: Divides scores before the softmax over concepts; above 0, or "auto" for the
            standard deviation of each image's scores.
        reduce: Order of reduction of the maps, as in `ConceptMaps.with_reduce`.
        self_attention: Let concepts attend to each other too, as the paper does.
        single_stream: Carry concepts on through the single-stream layers, numbered after the
            dual-stream ones, beyond the paper: Flux.1, Flux.2, LongCat-Image,
            Bria.
        token: Which token of a word stands for it: "first" (the paper), "mean", "last", or "auto":
            "first" for words of one token, else "mean".
        vectors: Names of vectors to keep for `vectors` of the selected layers and steps, on the
            model's device; more than 1 GB of them is warned of.
        vector_dtype: What they are kept in; the model's own dtype when None.
        prompt: For "prompt_attention" and "daam": the text, or one per image, that the pipeline is
            called with; it must hold every concept.
        prompt_tokens: Instead of `prompt`: each concept's positions among the text tokens.
        concept_embeds: Text vectors (concepts, dim_text) to use instead of encoding the words.
        kernels: What computes the side attention and its scores: "torch", "triton", or "auto":
            Triton on CUDA for at most 16 concepts and known head sizes, else torch.

    Raises:
        ValueError: An argument is out of range or the model family is unknown.
        TypeError: A concept is no string.

    Source: Helbling et al. 2025 (arXiv 2502.04320), section 4.
    """

    def __init__(
        self,
        pipe: Any,
        concepts: Sequence[str] | Sequence[Sequence[str]],
        *,
        layers: Selection = "default",
        steps: Selection = "all",
        space: Space | Sequence[Space] = "output",
        store: Store = "mean",
        normalize: Normalize | None = None,
        temperature: Temperature = 1.0,
        reduce: Reduce = "softmax_mean",
        self_attention: bool = True,
        single_stream: bool = False,
        token: Token = "auto",
        vectors: Sequence[Vector] = (),
        vector_dtype: torch.dtype | None = None,
        prompt: str | Sequence[str] | None = None,
        prompt_tokens: Sequence[Sequence[int]] | None = None,
        concept_embeds: Tensor | None = None,
        kernels: Kernels = "auto",
    ) -> None:
        self.concepts = check_concepts(concepts)
        self.spaces: tuple[str, ...] = (space,) if isinstance(space, str) else tuple(space)
        for name, values, known in (
            ("space", self.spaces or ("",), get_args(Space)),
            ("store", (store,), get_args(Store)),
            ("token", (token,), get_args(Token)),
            ("normalize", (normalize,), (None, *get_args(Normalize))),
            ("reduce", (reduce,), get_args(Reduce)),
            ("vectors", tuple(vectors), get_args(Vector)),
            ("kernels", (kernels,), get_args(Kernels)),
        ):
            for value in values:
                if value not in known:
                    raise ValueError(f"`{name}` must be one of {known}; got {value!r}.")
        check_temperature(temperature)
        check_steps(steps)
        transformer: Any = getattr(pipe, "transformer", None) or getattr(pipe, "unet", None)
        self.adapter = adapter_for(transformer)
        assert_ready(transformer)
        self.model: nn.Module = transformer
        self.pipe, self.token, self.reduce = pipe, token, reduce
        self.temperature, self.steps = temperature, steps
        blocks = self.adapter.blocks(transformer)
        if single_stream:
            blocks = [*blocks, *self.adapter.single_blocks(transformer)]
        default = self.adapter.default_layers(transformer)
        self.layers = resolve_layers(layers, len(blocks), default)
        self._embeds = check_embeds(concept_embeds, self.concepts)
        asked = {
            "prompt_attention": self.adapter.prompt_taps, "daam": self.adapter.heat_taps
        }  # fmt: skip
        further = [find for space, find in asked.items() if space in self.spaces]
        prompt_words = None
        if further:
            for find in further:
                find(blocks[0])  # families that cannot say so
            prompt_words = PromptWords(
                find_in_prompt(
                    self.adapter, standard(pipe, self.adapter), self.concepts, prompt, prompt_tokens
                )
            )
        recording = Recording(
            self.layers, self.spaces, store, normalize, temperature, self_attention,
            tuple(vectors), vector_dtype, kernels,
        )  # fmt: skip
        self.router = Router(pipe, transformer, self.adapter, steps, recording, prompt_words)
        needed = blocks[: self.layers[-1] + 1]
        taps = {layer: further for layer in self.layers}
        self._taps = Taps(transformer, self.adapter, needed, taps, self.router)

    @property
    def runs(self) -> list[Run]:
        """What each call of the pipeline has shown, in order."""
        return self.router.runs

    def __enter__(self) -> ConceptAttention:
        """Encode the concepts and attach the hooks.

        Raises:
            RuntimeError: The transformer is compiled, parallelised or observed already.
            ValueError: The pipeline cannot encode the concepts.
        """
        self._taps.check()
        if self._embeds is None:
            pipe = standard(self.pipe, self.adapter)
            self._embeds = encode_concepts(self.adapter, pipe, self.concepts, self.token)
        self.router.embeds = self._embeds
        self._taps.attach()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Remove every hook."""
        self._taps.detach()
        self.router.end()

    def heatmaps(self, *, space: Space | None = None, run: int = -1) -> ConceptMaps:
        """Return the maps of one pipeline run.

        Args:
            space: Which of the recorded spaces; the first when None.
            run: Which run inside this context, counted like a list index.

        Raises:
            RuntimeError: No forward pass was seen, or no layer could be observed.
            ValueError: `space` or `run` was not recorded, or scores are not finite.
        """
        name = self.spaces[0] if space is None else space
        if name not in self.spaces:
            raise ValueError(f"`space` must be one of the recorded {self.spaces}; got {name!r}.")
        chosen = self._run(run)
        means = {key[1:]: mean for key, mean in chosen.means.items() if key[0] == name}
        if not means:
            raise RuntimeError(
                f"none of the layers {self.layers} was observed in steps {self.steps!r}: they were "
                "skipped by a cache or the model was compiled before it was observed."
            )
        target, grid = chosen.places(self.adapter)
        stacked = []
        for part in ("raw", "soft"):
            values = torch.stack([getattr(mean, part) for mean in means.values()])
            values = values[..., target.to(values.device)].unflatten(-1, grid)
            stacked.append(values.float().cpu())
        if not stacked[0].isfinite().all():
            raise ValueError(
                f"the scores of space {name!r} are not finite; the model overflows in "
                f"{self.pipe.transformer.dtype}, try torch.bfloat16 or torch.float32."
            )
        return ConceptMaps(
            raw=stacked[0],
            soft=stacked[1],
            concepts=self.concepts,
            keys=list(means),
            counts=[mean.count for mean in means.values()],
            coverage={layer: len(chosen.seen[layer]) / len(chosen.steps) for layer in self.layers},
            space=name,
            temperature=self.temperature,
            reduce=self.reduce,
        )

    def vectors(self, name: Vector, *, layer: int, step: int = 0, run: int = -1) -> Tensor:
        """Return one kept vector of one layer and step.

        Raises:
            RuntimeError: No forward pass was seen.
            ValueError: It was not kept, or `run` was not recorded.
        """
        kept = self._run(run).vectors
        if (name, layer, step) not in kept:
            raise ValueError(
                f"`name` {name!r} of layer {layer}, step {step} was not kept; "
                f"kept: {sorted(kept) or 'nothing'}. Ask for it with `vectors=[...]`."
            )
        return kept[name, layer, step]

    def _run(self, run: int) -> Run:
        if not self.runs:
            raise RuntimeError(
                "no forward pass of `pipe.transformer` was seen; "
                "call the pipeline inside the `with` block."
            )
        if not -len(self.runs) <= run < len(self.runs):
            raise ValueError(
                f"`run` must be between {-len(self.runs)} and {len(self.runs) - 1}; got {run}."
            )
        return self.runs[run]
