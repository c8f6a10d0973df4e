"""Fast decoding: one token at a time for a whole batch, as one CUDA graph.

Dense models, mixtures of experts and lookup models in table form run the same code. A lookup
model's router rides in the up-projection, and one kernel ends a layer: softmax, dequantisation,
weighted sum, residual, and the next layer's norm. It therefore launches as many kernels as its
dense twin; the rows of all layers are fetched on a second stream while earlier layers compute.
Where the host finds the rows, the step is launched before it knows them: only the second stream
waits for its answer.
"""

from contextlib import nullcontext
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from ..kernels.admit import admit, hold
from ..kernels.gather import gather
from ..lut import CachedStore, DeviceStore, DiskStore, LutRows, MmapStore, PinnedStore
from ..modeling import DenseForCausalLM, MoeForCausalLM, MoleForCausalLM
from ..modeling.feedforward import SparseMlp
from .layer import Layer, compute, end, fused
from .sampling import Sampling, choose

_ROUTER_ROWS = 8  # the up-projection grows by a multiple of this, for aligned matrix products
_NO_WAIT = 2**31 - 1  # an answer to all questions
_GROUPS = (1, 5)  # layers whose rows are waited for together: first group, second; then the rest
# All that is on its way over the bus slows the layers that run beside. 96 KiB come nearly as fast
# as 256 and slow them less; measured on an H200.
_PROGRAMS = 24


class Decoder:
    """Decoding of one batch of prompts, greedy or sampled; shorter ones are padded on the left.

    Args:
        model: A `MoleForCausalLM` in table form whose table is open, or one of its twins, a
            `DenseForCausalLM` or a `MoeForCausalLM`. Its weights are used where they are; those of
            one input are laid beside each other first.
        batch: Number of sequences.
        length: Longest sequence, prompt included.
        compiled: Compile the layers with Inductor.
        captured: Replay a step as a CUDA graph; needs a GPU. It fetches the rows itself from a
            table in pinned or device memory. With other stores the host finds the rows, while the
            step's first layer runs.

    Raises:
        TypeError: `model` is of another type.
        ValueError: It is in expert form or has no table, or `captured` is asked for without a GPU.
    """

    def __init__(
        self,
        model: DenseForCausalLM | MoeForCausalLM | MoleForCausalLM,
        batch: int,
        length: int,
        compiled: bool | None = None,
        captured: bool | None = None,
    ) -> None:
        if not isinstance(model, (DenseForCausalLM, MoeForCausalLM, MoleForCausalLM)):
            raise TypeError(
                "`model` must be a MoleForCausalLM, DenseForCausalLM or MoeForCausalLM; "
                f"got {type(model).__name__}."
            )
        lookup = isinstance(model, MoleForCausalLM)
        if lookup and (model.config.lookup_form != "table" or model.lut is None):
            raise ValueError("`model` must be in table form with an open table; convert it first.")
        self.model: Any = model
        self.config: Any = model.config
        self.batch, self.length = batch, length
        self.store: Any = model.lut if lookup else None
        weight: Tensor = self.model.get_input_embeddings().weight
        self.device, self.dtype = weight.device, weight.dtype
        cuda = self.device.type == "cuda"
        self.captured = cuda if captured is None else captured
        if self.captured and not cuda:
            raise ValueError(f"`captured` needs a model on a GPU; this one is on {self.device}.")
        parts: list[Any] = [compute, end, choose]
        if cuda if compiled is None else compiled:
            parts = [torch.compile(part, fullgraph=True, dynamic=False) for part in parts]
        self._run_compute, self._run_end, self._run_choose = parts
        # How ids are chosen ("greedy", "any" or "some" of them drawn), and a step's graph for each.
        self._way = "greedy"
        self._graphs: dict[tuple[str, bool], Any] = {}
        self._padded = False  # whether a prompt of the batch begins with padding
        self.turns = 0  # steps that were launched as graphs
        self._generator: torch.Generator | None = None
        self._sampling: Sampling | None = None
        self._prepare()

    @torch.no_grad()
    def _prepare(self) -> None:
        """Fuse weights and allocate everything a step touches."""
        config = self.config
        model: Any = self.model.model
        norms = [layer.input_layernorm.weight for layer in model.layers[1:]] + [model.norm.weight]
        self.layers = [self._fused(*pair) for pair in zip(model.layers, norms, strict=True)]
        positions = torch.arange(self.length, device=self.device)
        cos, sin = model.rotary(positions[None], self.dtype)
        self.cos, self.sin = cos[0, 0], sin[0, 0]
        self.positions = positions
        self.ids = torch.zeros(self.batch, dtype=torch.long, device=self.device)
        self.position = torch.zeros(1, dtype=torch.long, device=self.device)
        self.first = torch.zeros(self.batch, 1, dtype=torch.long, device=self.device)
        self.history = torch.zeros(self.batch, self.length, dtype=torch.long, device=self.device)
        self.rows: list[Any] = [None] * len(self.layers)
        self.sizes = (
            config.num_attention_heads,
            config.intermediate_size,
            config.rms_norm_eps,
            model.layers[0].mlp.act,
        )
        self.hosted = self.leased = self.ahead = False
        if self.store is not None:
            self._prepare_rows()

    def _fused(self, layer: Any, following: Tensor) -> Layer:
        """Return a layer with matrices of one input beside each other, and an empty cache.

        Args:
            layer: A layer of the model.
            following: The norm that comes after it.
        """
        attention, mlp = layer.self_attn, layer.mlp
        up: Any
        mixed: dict[str, Any] = {}
        if isinstance(mlp, SparseMlp):
            mixed = {"router": mlp.router.weight.detach(), "top_k": mlp.top_k}
            up, down = mlp.up, mlp.down_t
        else:
            mixed = {"gated": mlp.gate_proj is not None}
            beside = [mlp.up_proj.weight] + ([mlp.gate_proj.weight] if mixed["gated"] else [])
            rows, down = sum(map(len, beside)), mlp.down_proj.weight
            if layer.lookup is not None:
                beside.append(layer.lookup.router.weight)
                rows += -(-len(beside[-1]) // _ROUTER_ROWS) * _ROUTER_ROWS
            up = fused(beside, rows)
        heads = [attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]
        qkv = fused(heads, sum(map(len, heads)))
        size = (self.batch, self.config.num_key_value_heads, self.length, self.config.head_dim)
        return Layer(
            qkv=qkv,
            out=attention.o_proj.weight.detach(),
            post=layer.post_attention_layernorm.weight.detach(),
            up=up.detach(),
            down=down.detach(),
            next=following.detach(),
            keys=torch.zeros(size, dtype=self.dtype, device=self.device),
            values=torch.zeros(size, dtype=self.dtype, device=self.device),
            **mixed,
        )

    def _prepare_rows(self) -> None:
        """Allocate where a step's rows arrive, and decide who fetches them."""
        meta, layers = self.store.meta, self.model.model.layers
        self.staging = torch.zeros(
            self.batch, meta.row_stride, dtype=torch.uint8, device=self.device
        )
        staged = LutRows.from_bytes(self.staging, meta)
        scales = [None] * meta.layers if staged.scales is None else staged.scales.unbind(1)
        found = iter(zip(staged.codes.unbind(1), scales, strict=True))
        self.rows = [None if layer.lookup is None else next(found) for layer in layers]
        # A model may have been moved after its table was opened.
        here = (
            isinstance(self.store, (CachedStore, DeviceStore))
            and self.store.table.device == self.device
        )
        cached = isinstance(self.store, CachedStore)
        cuda = self.device.type == "cuda"
        pinned = cuda and isinstance(self.store, PinnedStore)
        if pinned:
            self.store.lock(self.device)
        self.flag = torch.zeros(1, dtype=torch.int32, device=self.device)
        self.side = torch.cuda.Stream(self.device) if cuda else None
        self.spans = self._spans() if cuda else {0: [(0, meta.row_stride)]}
        # A step fetches the rows itself from a table that its device reads.
        if not (pinned or (here and not cached)):
            self._prepare_host(here and cached)

    def _prepare_host(self, cached: bool) -> None:
        """Allocate what passes between the host, which finds the rows, and a step."""
        cuda = self.device.type == "cuda"
        self.hosted = True
        # Whether rows stay on the device, a slot for every sequence; else all come from the host.
        self.leased = cached and self.store.capacity >= self.batch
        size = (self.batch, self.store.meta.row_stride)
        self.landing = torch.zeros(size, dtype=torch.uint8, pin_memory=cuda)
        # Every sequence's slot in the table, and its place in the landing.
        self.told = torch.zeros(2, self.batch, dtype=torch.long, pin_memory=cuda)
        self.known = torch.zeros(2, self.batch, dtype=torch.long, device=self.device)
        self.table = self.store.table if self.leased else self.staging
        self._told, self._landing = self.told.numpy(), list(self.landing)
        self._answer(None)
        self.seen = torch.zeros(self.batch, dtype=torch.long, pin_memory=cuda)
        self.copied = torch.cuda.Event() if cuda else None
        # A graph can be launched before its rows are known if looking for them needs no stream.
        behind = self.store.store if self.leased else self.store
        self.ahead = self.captured and isinstance(behind, (DiskStore, MmapStore, PinnedStore))
        self.ready = torch.zeros(1, dtype=torch.int32, pin_memory=cuda)
        self._ready = self.ready.numpy()
        self.turn = torch.zeros(1, dtype=torch.int32, device=self.device)

    def _spans(self) -> dict[int, list[tuple[int, int]]]:
        """Return, for the layers that begin a group, the parts of a row the group needs."""
        numbers = [n for n, layer in enumerate(self.model.model.layers) if layer.lookup is not None]
        return {numbers[first]: parts for first, parts in self.store.meta.spans(_GROUPS)}

    def _fetch(self) -> dict[int, Any]:
        """Start to fetch the rows of the current ids; return the events of the groups."""
        events: dict[int, Any] = {}
        if self.store is None:
            return events
        if self.side is not None:
            self.side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.side):  # does nothing without a stream
            if self.hosted and self.ahead:
                hold(self.ready, self.turn, self.told, self.known)
            for number, parts in self.spans.items():
                for begin, last in parts:
                    if self.hosted:
                        slots, landed = self.known
                        admit(self.table, slots, self.landing, landed, self.staging, begin, last)
                    else:
                        table = self.store.table
                        gather(
                            table, self.ids, self.staging, self.flag, begin, last,
                            programs=_PROGRAMS,
                        )  # fmt: skip
                if self.side is not None:
                    events[number] = self.side.record_event()
        return events

    def _step(self) -> None:
        """Run one token of every sequence through the model."""
        events = self._fetch()
        hidden, normed, where = self._enter()
        for number, (layer, rows) in enumerate(zip(self.layers, self.rows, strict=True)):
            computed = self._run_compute(hidden, normed, layer, *where, *self.sizes)
            if number in events:
                torch.cuda.current_stream(self.device).wait_event(events[number])
            hidden, normed = self._run_end(*computed, layer, rows, self.config.rms_norm_eps)
        if self._way == "greedy":
            self._run_choose(normed, self.model.lm_head.weight, self.ids)
        else:
            self._draw(nn.functional.linear(normed, self.model.lm_head.weight))
        self.position += 1

    def _enter(self) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """Return the first layer's input, its norm, and what tells all layers the position."""
        model: Any = self.model.model
        self.history.index_copy_(1, self.position, self.ids[:, None])
        hidden = model.embed_tokens(self.ids)
        normed = nn.functional.rms_norm(
            hidden,
            hidden.shape[1:],
            model.layers[0].input_layernorm.weight,
            self.config.rms_norm_eps,
        )
        # Positions count from the cache's beginning: only their differences matter.
        seen = (self.positions <= self.position)[None]
        if self._padded:
            seen = seen & (self.positions >= self.first)
        mask = seen[:, None, None]
        where = self.cos[self.position], self.sin[self.position], self.position, mask
        return hidden, normed, where

    def _draw(self, logits: Tensor) -> None:
        """Write sampled next ids."""
        assert self._sampling is not None
        self.ids.copy_(self._sampling.draw(logits, self._way == "some"))

    def _renew(self) -> None:
        """Draw the noise that decides the next ids."""
        if self._sampling is not None and self._way != "greedy":
            self._sampling.noise.exponential_(generator=self._generator)

    def _choose_by(
        self,
        temperature: float,
        top_k: int | None,
        top_p: float | None,
        generator: torch.Generator | None,
    ) -> None:
        """Say how ids are chosen from now on."""
        vocab = self.config.vocab_size
        if not 0 <= temperature < float("inf"):
            raise ValueError(f"`temperature` must be at least 0 and finite; got {temperature}.")
        if top_k is not None and top_k < 1:
            raise ValueError(f"`top_k` must be at least 1; got {top_k}.")
        if top_p is not None and not 0 < top_p <= 1:
            raise ValueError(f"`top_p` must be above 0 and at most 1; got {top_p}.")
        self._way, self._generator = "greedy", generator
        if not temperature:
            return
        self._way = "any" if top_k is None and top_p is None else "some"
        if self._sampling is None:
            scalars = (torch.zeros((), device=self.device) for _ in range(3))
            self._sampling = Sampling(torch.empty(self.batch, vocab, device=self.device), *scalars)
        self._sampling.temperature.fill_(temperature)
        self._sampling.top_k.fill_(vocab if top_k is None else top_k)
        self._sampling.top_p.fill_(2 if top_p is None else top_p)  # no sum gets there

    @torch.no_grad()
    def prefill(
        self,
        prompts: Int[Tensor, "batch seq_q"],
        attention_mask: Int[Tensor, "batch seq_q"] | None = None,
    ) -> None:
        """Run the prompts through the model and choose the first new ids.

        Args:
            prompts: Ids, one prompt a row.
            attention_mask: 0 for padding, which comes first, 1 for the prompts; None for no
                padding.

        Raises:
            ValueError: The prompts are not `batch` rows or too long, or the mask does not fit.
        """
        batch, count = prompts.shape
        if batch != self.batch or not 0 < count < self.length:
            raise ValueError(
                f"`prompts` must have {self.batch} rows of 1 to {self.length - 1} ids; "
                f"got {batch} of {count}."
            )
        prompts, mask = prompts.to(self.device), self._pad(prompts, attention_mask)
        with self._on_device():
            found = self.model(prompts, attention_mask=mask, use_cache=True, logits_to_keep=1)
        for number, layer in enumerate(self.layers):
            cached = found.past_key_values.layers[number]
            layer.keys[:, :, :count] = cached.keys
            layer.values[:, :, :count] = cached.values
        self.history[:, :count] = prompts
        if self._way == "greedy":
            self.ids.copy_(found.logits[:, -1].argmax(-1))
        else:
            self._renew()
            self._draw(found.logits[:, -1])
        self.position.fill_(count)

    def _pad(self, prompts: Tensor, mask: Tensor | None) -> Tensor | None:
        """Note where every prompt begins; return the mask on the device, None without padding."""
        self._padded = False
        if mask is None:
            return None
        mask = mask.to(self.device, torch.long)
        ascending = mask.shape == prompts.shape and bool(
            (mask.diff(dim=1) >= 0).all() and (mask[:, -1] == 1).all() and (mask >= 0).all()
        )
        if not ascending:
            raise ValueError(
                f"`attention_mask` must have the prompts' shape {tuple(prompts.shape)} and zeros "
                f"before ones in every row, as left padding gives; got {tuple(mask.shape)}."
            )
        self.first.copy_((mask == 0).sum(1, keepdim=True))
        self._padded = bool(self.first.any())
        return mask if self._padded else None

    @torch.no_grad()
    def step(self) -> None:
        """Decode one token of every sequence; waits for the ids only if the host finds the rows."""
        self._renew()
        if not self.hosted:
            self._run()
            return
        self.seen.copy_(self.ids, non_blocking=True)
        if self.copied is not None:
            self.copied.record(torch.cuda.current_stream(self.device))
        with self.store.lease() if self.leased else nullcontext(self._read) as find:
            try:
                if self.ahead:
                    self._run()
                if self.copied is not None:
                    self.copied.synchronize()
                self._answer(find(self.seen.tolist(), self._landing))
            except BaseException:
                self._answer(None)
                raise
            finally:
                if self.ahead:
                    self._ready[0] = self.turns  # whatever happened: the device waits for it
            if not self.ahead:
                self.known.copy_(self.told, non_blocking=True)
                self._run()

    def _read(self, wanted: list[int], landing: list[Tensor]) -> tuple[list[int], list[int]]:
        """Read all rows of a step, as `CachedStore.lease` has it; none of them is kept."""
        self.landing.copy_(self.store.read(torch.tensor(wanted)))
        return [-1] * len(wanted), list(range(len(wanted)))

    def _answer(self, found: tuple[list[int], list[int]] | None) -> None:
        """Tell the step where its rows are; without an answer it takes any and keeps none."""
        slots, landed = found or ([-1] * self.batch, list(range(self.batch)))
        self._told[:] = slots, landed

    def _run(self) -> None:
        """Run a step, or replay it; it is captured when it comes for the first time."""
        with self._on_device():
            way = self._way, self._padded
            if way not in self._graphs:
                # One compiled block serves all decoders of a process, in a version for each shape.
                with torch._dynamo.config.patch(recompile_limit=64):
                    if not self.captured:
                        self._step()
                        return
                    self._graphs[way] = self._capture()
            self._graphs[way].replay()
            self.turns += 1

    def _capture(self) -> Any:
        """Return a step as a graph; what the rehearsals changed is put back."""
        changed = [self.ids, self.position, self.history]
        if self.ahead:
            changed.append(self.turn)
            self._answer(None)
            self._ready[0] = _NO_WAIT
        kept = [tensor.clone() for tensor in changed]
        rehearsal = torch.cuda.Stream(self.device)
        rehearsal.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(rehearsal):
            for _ in range(2):
                self.position.copy_(kept[1])
                self._step()
        torch.cuda.current_stream(self.device).wait_stream(rehearsal)
        graph = torch.cuda.CUDAGraph()
        self.position.copy_(kept[1])
        with torch.cuda.graph(graph):
            self._step()
        for tensor, value in zip(changed, kept, strict=True):
            tensor.copy_(value)
        if self.ahead:
            rehearsal.synchronize()
            self._ready[0] = self.turns
        return graph

    def _on_device(self) -> Any:
        """Return a context in which kernels are launched on the model's device."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    def generate(
        self,
        prompts: Int[Tensor, "batch seq_q"],
        new_tokens: int,
        *,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | None = None,
        attention_mask: Int[Tensor, "batch seq_q"] | None = None,
    ) -> Int[Tensor, "batch total"]:
        """Return the prompts with `new_tokens` chosen ids after each.

        Args:
            prompts: Ids, one prompt a row; shorter ones padded on the left, with any id.
            new_tokens: How many ids to add.
            temperature: What logits are divided by before one is drawn; 0 takes the likeliest.
            top_k: Draw one of the likeliest so many only.
            top_p: Draw one of the likeliest only that together have this chance.
            generator: Source of chance, on the model's device; torch's own if None.
            attention_mask: 0 for padding, 1 for the prompts; None for no padding.

        Raises:
            ValueError: The prompts are not `batch` rows, or do not fit into `length`; temperature
                or limits are out of range; the mask is not one of left padding.
        """
        self._choose_by(temperature, top_k, top_p, generator)
        total = prompts.shape[1] + new_tokens
        if new_tokens < 1 or total > self.length:
            raise ValueError(
                f"`new_tokens` must be 1 to {self.length - prompts.shape[1]}, what fits into "
                f"`length` {self.length}; got {new_tokens}."
            )
        self.prefill(prompts, attention_mask)
        for _ in range(new_tokens - 1):
            self.step()
        self.history.index_copy_(1, self.position, self.ids[:, None])
        return self.history[:, :total].clone()


__all__ = ["Decoder"]
