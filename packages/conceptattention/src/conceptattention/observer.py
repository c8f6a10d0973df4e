"""The observer: a concept stream computed beside an unmodified pipeline.

Hooks read what each layer computed for the image tokens, carry the concept vectors through the
text weights, and never touch what the model computes, so images stay bit-identical.
"""

from __future__ import annotations

import inspect
import logging
import weakref
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from .adapters import Block, Call, ImageSide, adapter_for
from .kernels.concept import concept_attention, reference, usable
from .maps import ConceptMaps, Reduce
from .scores import Normalize, RunningMean, Temperature, check_temperature
from .selection import Selection, check_concepts, check_steps, resolve_steps, select_layers

_logger = logging.getLogger(__name__)
_logger.addHandler(logging.NullHandler())

Space = Literal["output", "cross_attention", "prompt_attention", "value"]
Store = Literal["mean", "layers", "steps", "all"]
Token = Literal["auto", "first", "mean", "last"]
Vector = Literal["concept_output", "image_output", "concept_query", "image_key", "concept_value"]
Kernels = Literal["auto", "torch", "triton"]

_attached: weakref.WeakSet[nn.Module] = weakref.WeakSet()


class StopForward(Exception):
    """Raised inside the model once every needed layer has been seen; `segment` catches it."""


@dataclass
class Run:
    """What one pipeline run has shown so far."""

    call: Call
    timesteps: Any = None
    step: int = 0
    steps: set[int] = field(default_factory=set)
    last_text: Tensor | None = None
    last_index: int | None = None
    seen: dict[int, set[int]] = field(default_factory=lambda: defaultdict(set))
    means: dict[tuple[str, int, int], RunningMean] = field(default_factory=dict)
    vectors: dict[tuple[str, int, int], Tensor] = field(default_factory=dict)
    guided: bool = False  # batches hold unconditional rows first


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
            fractions are shares of the run: `slice(0.7, -1)`.
        space: "output" (the paper's maps), "cross_attention", "prompt_attention" (queries of the
            words inside the prompt), "value", or several of them.
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
        vectors: Names of vectors to keep for `vectors`, on the model's device.
        prompt: For "prompt_attention": the text, or one per image, that the pipeline is called
            with; it must hold every concept.
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
        transformer: Any = getattr(pipe, "transformer", None) or getattr(pipe, "unet", None)
        self.adapter = adapter_for(transformer)
        assert_ready(transformer)
        self.pipe = pipe
        self.model: nn.Module = transformer
        self.blocks = self.adapter.blocks(transformer)
        if single_stream:
            self.blocks = [*self.blocks, *self.adapter.single_blocks(transformer)]
        self.layers = select_layers(
            layers, len(self.blocks), self.adapter.default_layers(transformer)
        )
        self.steps = steps
        check_steps(steps)
        self.store, self.normalize, self.reduce = store, normalize, reduce
        self.temperature: Temperature = temperature
        self.self_attention, self.token = self_attention, token
        self.kept, self.kernels = tuple(vectors), kernels
        self._embeds = self._check_embeds(concept_embeds)
        self._spots = self._find_in_prompt(prompt, prompt_tokens)
        self._shares: Tensor | None = None  # of the prompt's tokens in each concept's query
        self.runs: list[Run] = []
        self.stop_early = False
        self.direct = False  # the transformer is called by us, not by the pipeline
        self._signature = inspect.signature(type(transformer).forward)
        self._handles: list[Any] = []
        self._tapped: list[tuple[nn.Module, ...]] = []
        self._reset()

    # Attaching and detaching

    def __enter__(self) -> ConceptAttention:
        """Encode the concepts and attach the hooks.

        Raises:
            RuntimeError: The transformer is compiled, parallelised or observed already.
            ValueError: The pipeline cannot encode the concepts.
        """
        assert_ready(self.model)
        if self.model in _attached:
            raise RuntimeError(
                "`pipe` is observed by another ConceptAttention; leave that context first."
            )
        if self._embeds is None:
            self._embeds = self._encode()
        _attached.add(self.model)
        try:
            self._attach()
        except BaseException:
            self._detach()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Remove every hook."""
        self._detach()

    def _attach(self) -> None:
        model, seed = self.model, self.adapter.seed(self.model)
        self._handles = [
            model.register_forward_pre_hook(self._before_model, with_kwargs=True),
            model.register_forward_hook(self._after_model, always_call=True),
            seed.register_forward_hook(self._on_seed),
        ]
        self._tapped = [(seed,)]
        for block in self.blocks[: self.layers[-1] + 1]:
            taps = self._wanted(block)
            self._tapped.append(tuple(module for module, _ in taps.values()))
            for name, (module, side) in taps.items():
                self._handles.append(self._tap(block.index, name, module, side))
            self._handles.append(
                block.attention.register_forward_hook(self._on_attention(block), with_kwargs=True)
            )

    def _detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._tapped = [], []
        _attached.discard(self.model)
        self._reset()

    def _retap(self) -> None:
        """Attach again if LoRA, fusing or a new text projection replaced a tapped module."""
        wanted: list[tuple[nn.Module, ...]] = [(self.adapter.seed(self.model),)]
        for block in self.blocks[: self.layers[-1] + 1]:
            wanted.append(tuple(module for module, _ in self._wanted(block).values()))
        if wanted != self._tapped:
            _logger.debug("the model's projections changed; attaching again")
            # The hooks on the model itself are running now and stay.
            for handle in self._handles[2:]:
                handle.remove()
            keep = self._handles[:2]
            self._attach()
            for handle in self._handles[:2]:
                handle.remove()
            self._handles[:2] = keep

    def _wanted(self, block: Block) -> dict[str, Any]:
        """Return the taps of a layer."""
        taps: dict[str, Any] = self.adapter.taps(block)
        if "prompt_attention" in self.spaces and block.index in self.layers:
            taps = taps | self.adapter.prompt_taps(block)
        return taps

    def _tap(self, index: int, name: str, module: nn.Module, side: str) -> Any:
        def record_output(module: nn.Module, args: Any, output: Tensor) -> None:
            if self._active and not self._busy:
                self._taps[index][name] = output

        def record_input(module: nn.Module, args: Any) -> None:
            if self._active and not self._busy:
                self._taps[index][name] = args[0]

        if side == "input":
            return module.register_forward_pre_hook(record_input)
        return module.register_forward_hook(record_output)

    # One forward pass

    def _reset(self) -> None:
        self._active = False
        self._busy = False
        self._next = 0
        self._rows = slice(0, None)
        self._text = 0
        self._stream: Tensor | None = None
        self._temb: Tensor | None = None
        self._taps: dict[int, dict[str, Tensor]] = defaultdict(dict)

    def _before_model(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        self._reset()
        assert_ready(model)
        self._retap()
        bound = self._signature.bind_partial(model, *args, **kwargs)
        self._active = self._route(Call(bound.arguments, self.pipe.transformer.config))

    def _route(self, call: Call) -> bool:
        """Return whether this forward pass is the conditional one of a selected step.

        A scheduler makes a new list of timesteps for every run and counts its steps in Python, so
        none of this reads the device. Within a step the first call is the conditional one.
        """
        scheduler = getattr(self.pipe, "scheduler", None)
        timesteps = getattr(scheduler, "timesteps", None)
        index = getattr(scheduler, "step_index", None)
        text = call.arguments.get("encoder_hidden_states")
        run = self.runs[-1] if self.runs else None
        if run is None or run.timesteps is not timesteps:
            run = Run(call, timesteps, guided=not self.direct and self.adapter.guided(self.pipe))
            self.runs.append(run)
        elif index == run.last_index and text is not run.last_text:
            return False
        else:
            run.step += 1
        run.call, run.last_index, run.last_text = call, index, text
        total = max(run.step + 1, 0 if timesteps is None else len(timesteps))
        if run.step not in resolve_steps(self.steps, total):
            return False
        run.steps.add(run.step)
        return True

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """Compute without gradients and without hearing our own taps."""
        self._busy = True
        try:
            with torch.no_grad():
                yield
        finally:
            self._busy = False

    def _on_seed(self, module: nn.Module, args: Any, output: Tensor) -> None:
        if not self._active or self._busy or self._embeds is None:
            return
        with self._aside():
            run = self.runs[-1]
            batch = len(output) // 2 if run.guided else len(output)
            embeds = self._embeds.to(output.device, args[0].dtype)
            if batch % len(embeds):
                raise ValueError(
                    f"`concepts` has {len(embeds)} lists of words, one per image; "
                    f"got a batch of {batch} images."
                )
            embeds = embeds.repeat_interleave(batch // len(embeds), dim=0)
            self._rows = slice(len(output) - batch, None)
            self._text = output.shape[1]
            call = self._conditional(run.call, len(output))
            self._stream = self.adapter.start(self.model, call, embeds)
            self._temb = self.adapter.temb(self.model, call)
            self._share_tokens(output, batch)

    def _share_tokens(self, output: Tensor, batch: int) -> None:
        """Make the matrix (batch, concepts, tokens) that averages the queries of each word."""
        if not self._spots:
            return
        shape = (batch, len(self._spots[0]), output.shape[1])
        shares = self._shares
        if shares is not None and shares.shape == shape and shares.device == output.device:
            return
        shares = torch.zeros(shape)
        for row in range(batch):
            spots = self._spots[row * len(self._spots) // batch]
            for place, positions in enumerate(spots):
                if max(positions) >= shape[2]:
                    raise ValueError(
                        f"`prompt_tokens` must be below {shape[2]}, the number of text tokens; "
                        f"got {max(positions)}."
                    )
                shares[row, place, positions] = 1 / len(positions)
        self._shares = shares.to(output.device)

    def _conditional(self, call: Call, batch: int) -> Call:
        """Return the call with the rows of its conditional half alone."""
        if self._rows.start == 0:
            return call
        rows = {
            name: value[self._rows] if _per_row(value, batch) else value
            for name, value in call.arguments.items()
        }
        return Call(rows, call.config)

    def _on_attention(self, block: Block) -> Any:
        def step(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if not self._active or self._busy:
                return
            taps = self._taps.pop(block.index, {})
            if block.index != self._next or len(taps) < len(self._wanted(block)):
                # A cache skipped a layer: the concept stream of this pass ends here.
                self._stream = None
            stream, temb = self._stream, self._temb
            if stream is not None and temb is not None:
                with self._aside():
                    taps = {name: tap[self._rows] for name, tap in taps.items()}
                    given = {**kwargs, "text_tokens": self._text}
                    image = self.adapter.image_side(block, taps, given)
                    self._observe(block, image, stream, temb, given, taps.get("prompt"))
            self._next = block.index + 1
            if self.stop_early and block.index == self.layers[-1]:
                raise StopForward

        return step

    def _observe(
        self,
        block: Block,
        image: ImageSide,
        stream: Tensor,
        temb: Tensor,
        arguments: Any,
        prompt: Tensor | None,
    ) -> None:
        """Carry the concept stream through one layer and record its scores."""
        normed, state = self.adapter.pre(block, stream, temb)
        q, k, v = self.adapter.qkv(block, normed, arguments)
        triton = self._use_triton(image, q.shape[2])
        attend = concept_attention if triton else reference.concept_attention
        own = (k, v) if self.self_attention else (None, None)
        out = attend(q, own[0], own[1], image.keys, image.values, image.rotary)
        outputs = out.transpose(1, 2).flatten(2)  # [batch, concepts, dim]
        if block.index in self.layers:
            run = self.runs[-1]
            run.seen[block.index].add(run.step)
            for space in self.spaces:
                scale, ours, theirs = 1.0, outputs, image.outputs
                if space == "value":
                    ours, theirs = _flat(v), _flat(image.values)
                elif space != "output":
                    ours, theirs = _flat(q), _flat(image.rotated)
                    if space == "prompt_attention":
                        ours = self._prompt_queries(block, prompt, arguments, theirs.shape[1])
                    scale = 1 / (q.shape[1] * q.shape[-1] ** 0.5)  # mean over heads
                layer = block.index if self.store in ("layers", "all") else -1
                step = run.step if self.store in ("steps", "all") else -1
                mean = run.means.setdefault((space, layer, step), RunningMean())
                mean.add_vectors(
                    ours, theirs, self.normalize, self.temperature, scale, triton=triton
                )
            available = {
                "concept_output": outputs, "image_output": image.outputs, "concept_query": q,
                "concept_value": v,
            }  # fmt: skip
            if "image_key" in self.kept:
                available["image_key"] = image.rotated
            for name in self.kept:
                run.vectors[name, block.index, run.step] = available[name].detach().clone()
        if block.index < self.layers[-1]:
            self._stream = self.adapter.post(block, stream, outputs, state)

    def _prompt_queries(self, block: Block, tap: Any, arguments: Any, patches: int) -> Tensor:
        """Return the mean query of each concept's tokens in the prompt."""
        queries = _flat(self.adapter.prompt_queries(block, tap, arguments, patches))
        shares: Any = self._shares
        return shares.to(queries.dtype) @ queries  # type: ignore[no-any-return]

    def _use_triton(self, image: ImageSide, concepts: int) -> bool:
        """Return whether the kernels run; "auto" means on CUDA wherever they can.

        Raises:
            ValueError: They were asked for and cannot run.
        """
        if self.kernels == "torch" or (self.kernels == "auto" and not image.keys.is_cuda):
            return False
        reason = usable(image.keys, concepts)
        if reason is not None and self.kernels == "triton":
            raise ValueError(f"`kernels='triton'` cannot run here: {reason}.")
        return reason is None

    def _after_model(self, model: nn.Module, args: Any, output: Any) -> None:
        self._reset()

    # Reading

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
        if not self.runs:
            raise RuntimeError(
                "no forward pass of `pipe.transformer` was seen; "
                "call the pipeline inside the `with` block."
            )
        try:
            chosen = self.runs[run]
        except IndexError:
            raise ValueError(f"`run` must be below {len(self.runs)}; got {run}.") from None
        means = {key[1:]: mean for key, mean in chosen.means.items() if key[0] == name}
        if not means:
            raise RuntimeError(
                f"none of the layers {self.layers} was observed in steps {self.steps!r}: they were "
                "skipped by a cache or the model was compiled before it was observed."
            )
        target, grid = self.adapter.positions(chosen.call)
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
            ValueError: It was not kept.
        """
        kept = self.runs[run].vectors if self.runs else {}
        if (name, layer, step) not in kept:
            raise ValueError(
                f"`name` {name!r} of layer {layer}, step {step} was not kept; "
                f"kept: {sorted(kept) or 'nothing'}. Ask for it with `vectors=[...]`."
            )
        return kept[name, layer, step]

    # Checks

    def _encode(self) -> Tensor:
        lists = self.concepts if isinstance(self.concepts[0], tuple) else (self.concepts,)
        words = list(dict.fromkeys(word for row in lists for word in row))
        try:
            with torch.no_grad():
                encoded = self.adapter.encode(self.pipe, words, self.token)
        except (AttributeError, TypeError) as error:
            raise ValueError(
                "`pipe` cannot encode concepts, as its text encoders or tokenizers are missing; "
                "pass `concept_embeds`."
            ) from error
        if encoded.unknown:
            _logger.warning("the tokenizer does not know %s", ", ".join(encoded.unknown))
        several = [w for w, n in zip(words, encoded.tokens, strict=True) if n > 1]
        if several and self.token == "auto":
            _logger.warning("%s: several tokens, their mean is used", ", ".join(several))
        place = {word: index for index, word in enumerate(words)}
        return torch.stack([encoded.embeds[[place[word] for word in row]] for row in lists])

    def _find_in_prompt(
        self,
        prompt: str | Sequence[str] | None,
        tokens: Sequence[Sequence[int]] | None,
    ) -> list[list[list[int]]]:
        """Return the positions of every concept's tokens, for each prompt."""
        if "prompt_attention" not in self.spaces:
            return []
        if (prompt is None) == (tokens is None):
            raise ValueError("`space='prompt_attention'` needs either `prompt` or `prompt_tokens`.")
        self.adapter.prompt_taps(self.blocks[0])
        several = isinstance(self.concepts[0], tuple)
        if tokens is not None:
            if several or len(tokens) != len(self.concepts) or not all(tokens):
                raise ValueError(
                    f"`prompt_tokens` must hold positions for each of {len(self.concepts)} "
                    f"concepts in one list; got {tokens!r}."
                )
            return [[list(row) for row in tokens]]
        texts: list[str] = [prompt] if isinstance(prompt, str) else list(prompt or ())
        lists: Any = self.concepts if several else [self.concepts]
        if several and len(texts) == 1:
            texts = texts * len(lists)
        if not several:
            lists = lists * len(texts)
        if not texts or len(texts) != len(lists):
            raise ValueError(
                f"`prompt` must be one text or {len(lists) or 'several'} of them; got {len(texts)}."
            )
        find = self.adapter.prompt_positions
        return [
            [find(self.pipe, text, word) for word in words]
            for text, words in zip(texts, lists, strict=True)
        ]

    def _check_embeds(self, embeds: Tensor | None) -> Tensor | None:
        if embeds is None:
            return None
        count = len(self.concepts)
        if isinstance(self.concepts[0], tuple) or embeds.ndim != 2 or len(embeds) != count:
            raise ValueError(
                f"`concept_embeds` must have shape (concepts, dim_text) with {count} concepts in "
                f"one list; got {tuple(embeds.shape)}."
            )
        return embeds[None]


def _flat(heads: Tensor) -> Tensor:
    """Return (batch, tokens, heads * dim_head) from (batch, heads, tokens, dim_head)."""
    return heads.transpose(1, 2).flatten(2)


def _per_row(value: Any, batch: int) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0 and len(value) == batch


def assert_ready(model: nn.Module) -> None:
    """Check that hooks on the transformer will be heard.

    Raises:
        RuntimeError: It was compiled before it was observed, or is spread over devices.
    """
    compiled = type(model).__name__ == "OptimizedModule" or any(
        module._compiled_call_impl is not None for module in model.modules()
    )
    if compiled and model not in _attached:
        raise RuntimeError(
            "`pipe.transformer` was compiled before it was observed, so its hooks stay silent; "
            "enter the ConceptAttention context first and compile inside it."
        )
    if getattr(model, "_parallel_config", None) is not None:
        raise RuntimeError(
            "`pipe.transformer` runs with context or tensor parallelism, which is not supported; "
            "observe a transformer on one device."
        )
