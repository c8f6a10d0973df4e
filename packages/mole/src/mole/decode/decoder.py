"""Fast decoding: one token at a time for a whole batch, as one CUDA graph.

A dense model and a lookup model in table form run the same code. The router's weights ride in the
up-projection, and one kernel ends a layer: softmax, dequantisation, weighted sum, residual, and the
next layer's norm. A lookup model therefore launches as many kernels as its dense twin; the rows of
all layers are fetched on a second stream while earlier layers compute. Where the host finds the
rows, a step is two graphs: what needs no rows runs while the host looks.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from ..kernels.gather import gather
from ..lut import CachedStore, DeviceStore, LutRows, PinnedStore
from ..modeling import DenseForCausalLM, MoleForCausalLM
from .layer import Layer, block, compute, end, fused
from .sampling import Sampling, choose

_ROUTER_ROWS = 8  # the up-projection grows by a multiple of this, for aligned matrix products
_GROUPS = (1, 5)  # layers whose rows are waited for together: first group, second; then the rest


class Decoder:
    """Decoding of one batch of prompts of equal length, greedy or sampled.

    Args:
        model: A `DenseForCausalLM`, or a `MoleForCausalLM` in table form whose table is open. Its
            weights are used where they are; those of one input are laid beside each other first.
        batch: Number of sequences.
        length: Longest sequence, prompt included.
        compiled: Compile the layers with Inductor.
        captured: Replay a step as a CUDA graph; needs a GPU. It fetches the rows itself from a
            table in pinned or device memory, and from a cache there with a slot for every sequence,
            which the host fills before the replay. With other stores the host fetches the rows.

    Raises:
        TypeError: `model` is of another type.
        ValueError: It is in expert form, has no table or gated feed-forward blocks, or `captured`
            is asked for without a GPU.
    """

    def __init__(
        self,
        model: DenseForCausalLM | MoleForCausalLM,
        batch: int,
        length: int,
        compiled: bool | None = None,
        captured: bool | None = None,
    ) -> None:
        if not isinstance(model, (DenseForCausalLM, MoleForCausalLM)):
            raise TypeError(
                "`model` must be a DenseForCausalLM or a MoleForCausalLM; "
                f"got {type(model).__name__}."
            )
        lookup = isinstance(model, MoleForCausalLM)
        if lookup and (model.config.lookup_form != "table" or model.lut is None):
            raise ValueError("`model` must be in table form with an open table; convert it first.")
        if model.config.mlp_type != "plain":
            raise ValueError("`model` must have plain feed-forward blocks; use its `generate`.")
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
        parts: list[Any] = [block, compute, end, choose]
        if cuda if compiled is None else compiled:
            parts = [torch.compile(part, fullgraph=True, dynamic=False) for part in parts]
        self._run_block, self._run_compute, self._run_end, self._run_choose = parts
        # How ids are chosen ("greedy", "any" or "some" of them drawn), and graphs of the parts of a
        # step, for each way where it matters.
        self._way = "greedy"
        self._graphs: dict[tuple[str, str], Any] = {}
        self._generator: torch.Generator | None = None
        self._sampling: Sampling | None = None
        self._prepare()

    @torch.no_grad()
    def _prepare(self) -> None:
        """Fuse weights and allocate everything a step touches."""
        config = self.config
        model: Any = self.model.model
        size = (self.batch, config.num_key_value_heads, self.length, config.head_dim)
        norms = [layer.input_layernorm.weight for layer in model.layers[1:]] + [model.norm.weight]
        self.layers = []
        for layer, following in zip(model.layers, norms, strict=True):
            attention, up = layer.self_attn, layer.mlp.up_proj.weight
            if layer.lookup is not None:
                router = layer.lookup.router.weight
                extra = -(-len(router) // _ROUTER_ROWS) * _ROUTER_ROWS
                up = fused([up, router], len(up) + extra)
            heads = [attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]
            qkv = fused(heads, sum(map(len, heads)))
            self.layers.append(
                Layer(
                    qkv=qkv,
                    out=attention.o_proj.weight.detach(),
                    post=layer.post_attention_layernorm.weight.detach(),
                    up=up.detach(),
                    down=layer.mlp.down_proj.weight.detach(),
                    next=following.detach(),
                    keys=torch.zeros(size, dtype=self.dtype, device=self.device),
                    values=torch.zeros(size, dtype=self.dtype, device=self.device),
                )
            )
        positions = torch.arange(self.length, device=self.device)
        cos, sin = model.rotary(positions[None], self.dtype)
        self.cos, self.sin = cos[0, 0], sin[0, 0]
        self.positions = positions
        self.ids = torch.zeros(self.batch, dtype=torch.long, device=self.device)
        self.position = torch.zeros(1, dtype=torch.long, device=self.device)
        self.history = torch.zeros(self.batch, self.length, dtype=torch.long, device=self.device)
        self.rows: list[Any] = [None] * len(self.layers)
        self.sizes = (
            config.num_attention_heads,
            config.intermediate_size,
            config.rms_norm_eps,
            model.layers[0].mlp.act,
        )
        self.hosted = False
        if self.store is None:
            return
        meta = self.store.meta
        self.staging = torch.zeros(
            self.batch, meta.row_stride, dtype=torch.uint8, device=self.device
        )
        staged = LutRows.from_bytes(self.staging, meta)
        scales = [None] * meta.layers if staged.scales is None else staged.scales.unbind(1)
        found = iter(zip(staged.codes.unbind(1), scales, strict=True))
        self.rows = [None if layer.lookup is None else next(found) for layer in model.layers]
        # A model may have been moved after its table was opened.
        here = (
            isinstance(self.store, (CachedStore, DeviceStore))
            and self.store.table.device == self.device
        )
        cached = isinstance(self.store, CachedStore)
        self.leased = here and cached and self.store.capacity >= self.batch
        cuda = self.device.type == "cuda"
        pinned = cuda and isinstance(self.store, PinnedStore)
        if pinned:
            self.store.lock(self.device)
        # Whether a step fetches the rows itself, or finds them fetched.
        self.fetched = pinned or self.leased or (here and not cached)
        if self.fetched:
            self.side = torch.cuda.Stream(self.device) if cuda else None
            self.flag = torch.zeros(1, dtype=torch.int32, device=self.device)
            self.spans = self._spans() if cuda else {0: [(0, meta.row_stride)]}
        self.places = self.ids  # which rows of the store's table to fetch
        if self.leased:
            self.places = torch.zeros_like(self.ids)
            self.slots = torch.zeros(self.batch, dtype=torch.long, pin_memory=cuda)
        # Whether the host finds the rows: it sees the ids in memory of its own.
        self.hosted = self.leased or not self.fetched
        if self.hosted:
            self.first = next(n for n, rows in enumerate(self.rows) if rows is not None)
            self.seen = torch.zeros(self.batch, dtype=torch.long, pin_memory=cuda)
            self.copied = torch.cuda.Event() if cuda else None

    def _spans(self) -> dict[int, list[tuple[int, int]]]:
        """Return, for the layers that begin a group, the parts of a row the group needs."""
        meta, spans = self.store.meta, {}
        numbers = [n for n, layer in enumerate(self.model.model.layers) if layer.lookup is not None]
        size = meta.code_bytes // meta.layers
        begin = 0
        for count in (*_GROUPS, meta.layers):
            end = min(begin + count, meta.layers)
            if begin == end:
                break
            parts = [(begin * size // 8 * 8, min(-(-end * size // 8) * 8, meta.row_stride))]
            if begin == 0 and meta.scale_bytes:
                parts.append((meta.code_bytes // 8 * 8, meta.row_stride))
            spans[numbers[begin]] = parts
            begin = end
        return spans

    def _fetch(self) -> dict[int, Any]:
        """Start to fetch the rows of the current ids; return the events of the groups."""
        events: dict[int, Any] = {}
        if self.store is None or not self.fetched:
            return events
        if self.side is not None:
            self.side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.side):  # does nothing without a stream
            for number, parts in self.spans.items():
                for first, last in parts:
                    gather(self.store.table, self.places, self.staging, self.flag, first, last)
                if self.side is not None:
                    events[number] = self.side.record_event()
        return events

    def _step(self) -> None:
        """Run one token of every sequence through the model."""
        events = self._fetch()
        hidden, normed, where = self._enter()
        self._leave(*self._layers(hidden, normed, where, range(len(self.layers)), events))

    def _open(self) -> None:
        """Run the part of a step that needs no rows: up to the end of the first lookup layer."""
        hidden, normed, where = self._enter()
        hidden, normed = self._layers(hidden, normed, where, range(self.first), {})
        layer = self.layers[self.first]
        computed = self._run_compute(hidden, normed, layer, *where, *self.sizes)
        self._opened = computed, where

    def _close(self) -> None:
        """Run the rest of a step that was opened."""
        events = self._fetch()
        self._await(events, self.first)
        computed, where = self._opened
        layer, rows = self.layers[self.first], self.rows[self.first]
        hidden, normed = self._run_end(*computed, layer, rows, self.config.rms_norm_eps)
        rest = range(self.first + 1, len(self.layers))
        self._leave(*self._layers(hidden, normed, where, rest, events))

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
        mask = (self.positions <= self.position)[None, None, None]
        where = self.cos[self.position], self.sin[self.position], self.position, mask
        return hidden, normed, where

    def _layers(
        self,
        hidden: Tensor,
        normed: Tensor,
        where: tuple[Tensor, ...],
        numbers: range,
        events: dict[int, Any],
    ) -> tuple[Tensor, Tensor]:
        """Run some layers; return the residual stream and its norm for the next."""
        for number in numbers:
            self._await(events, number)
            layer, rows = self.layers[number], self.rows[number]
            hidden, normed = self._run_block(hidden, normed, layer, *where, rows, *self.sizes)
        return hidden, normed

    def _await(self, events: dict[int, Any], number: int) -> None:
        """Let the layer of this number wait for its rows."""
        if number in events:
            torch.cuda.current_stream(self.device).wait_event(events[number])

    def _leave(self, hidden: Tensor, normed: Tensor) -> None:
        """Choose the next ids."""
        if self._way == "greedy":
            self._run_choose(normed, self.model.lm_head.weight, self.ids)
        else:
            self._draw(nn.functional.linear(normed, self.model.lm_head.weight))
        self.position += 1

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
    def prefill(self, prompts: Int[Tensor, "batch seq_q"]) -> None:
        """Run the prompts through the model and choose the first new ids."""
        batch, count = prompts.shape
        if batch != self.batch or not 0 < count < self.length:
            raise ValueError(
                f"`prompts` must have {self.batch} rows of 1 to {self.length - 1} ids; "
                f"got {batch} of {count}."
            )
        prompts = prompts.to(self.device)
        found = self.model(prompts, use_cache=True, logits_to_keep=1)
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

    @torch.no_grad()
    def step(self) -> None:
        """Decode one token of every sequence; waits for the ids only if the host finds the rows."""
        self._renew()
        if not self.hosted:
            self._run("_step")
            return
        self.seen.copy_(self.ids, non_blocking=True)
        if self.copied is not None:
            self.copied.record(torch.cuda.current_stream(self.device))
        self._run("_open")  # meanwhile the host finds the rows
        if self.copied is not None:
            self.copied.synchronize()
        if not self.leased:
            self.staging.copy_(self.store.read(self.seen), non_blocking=True)
            self._run("_close")
            return
        with self.store.lease(self.seen) as slots:
            self.slots.copy_(torch.tensor(slots))
            self.places.copy_(self.slots, non_blocking=True)
            self._run("_close")

    def _run(self, part: str) -> None:
        """Run a part of a step, or replay it; it is captured when it comes for the first time."""
        way = "" if part == "_open" else self._way
        if (part, way) not in self._graphs:
            # One compiled block serves all decoders of a process, in a version for each shape.
            with torch._dynamo.config.patch(recompile_limit=64):
                if not self.captured:
                    getattr(self, part)()
                    return
                self._graphs[part, way] = self._capture(getattr(self, part))
        self._graphs[part, way].replay()

    def _capture(self, part: Callable[[], None]) -> Any:
        """Return a part of a step as a graph; what the rehearsals changed is put back."""
        kept = [t.clone() for t in (self.ids, self.position, self.history)]
        rehearsal = torch.cuda.Stream(self.device)
        rehearsal.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(rehearsal):
            for _ in range(2):
                self.position.copy_(kept[1])
                part()
        torch.cuda.current_stream(self.device).wait_stream(rehearsal)
        graph = torch.cuda.CUDAGraph()
        self.position.copy_(kept[1])
        with torch.cuda.graph(graph):
            part()
        for tensor, value in zip((self.ids, self.position, self.history), kept, strict=True):
            tensor.copy_(value)
        return graph

    def generate(
        self,
        prompts: Int[Tensor, "batch seq_q"],
        new_tokens: int,
        *,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | None = None,
    ) -> Int[Tensor, "batch total"]:
        """Return the prompts with `new_tokens` chosen ids after each.

        Args:
            prompts: Ids, one prompt a row.
            new_tokens: How many ids to add.
            temperature: What logits are divided by before one is drawn; 0 takes the likeliest.
            top_k: Draw one of the likeliest so many only.
            top_p: Draw one of the likeliest only that together have this chance.
            generator: Source of chance, on the model's device; torch's own if None.

        Raises:
            ValueError: The prompts are not `batch` rows, or do not fit into `length`; temperature
                or limits are out of range.
        """
        self._choose_by(temperature, top_k, top_p, generator)
        total = prompts.shape[1] + new_tokens
        if new_tokens < 1 or total > self.length:
            raise ValueError(
                f"`new_tokens` must be 1 to {self.length - prompts.shape[1]}, what fits into "
                f"`length` {self.length}; got {new_tokens}."
            )
        self.prefill(prompts)
        for _ in range(new_tokens - 1):
            self.step()
        self.history.index_copy_(1, self.position, self.ids[:, None])
        return self.history[:, :total].clone()


__all__ = ["Decoder"]
