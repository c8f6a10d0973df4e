"""CUDA graphs: forward passes and whole drafts of a model without launch costs."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .ahead import Foresight
from .devices import on
from .kernels.judge import pick_rules
from .llama import LlamaBody
from .processors import Processors

_logger = logging.getLogger(__name__)
WIDTHS = (1, 2, 4, 6, 8, 12, 16)  # Tokens of a row in one graph, where a graph is for any number.
MOST = WIDTHS[-1] - 1  # Ids that a draft may have.
MARGIN = 2 * WIDTHS[-1]  # Cache entries beyond a text that drafts and padding may touch.
# What the host says of a row's draft: the place of the last id fed, ids, their positions, and those
# of the ids to be written. Nothing of it is left for the device to compute.
LAST, IDS = 0, 1
PLACES = IDS + WIDTHS[-1]
LATER = PLACES + WIDTHS[-1]
DRAFT_LINE = LATER + MOST
_CHUNK = 512  # Longest stretch of a prompt in one pass.


class _Call:
    """What stands for a graph on other devices: the function itself, called at each replay."""

    def __init__(self, run: Callable[[], Any]) -> None:
        self._run = run
        self.out = run()

    def replay(self) -> None:
        """Run, and put the results where they were."""
        out = self._run()
        if isinstance(out, Tensor):
            self.out.copy_(out)


def pinned(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor of the host's whose copy to a device need not be waited for."""
    return tensor.pin_memory() if device.type == "cuda" else tensor


def seconds_of(graph: Any, device: torch.device) -> float:
    """Return the seconds that a graph takes on a CUDA device; 0 on others."""
    if device.type != "cuda":
        return 0.0
    torch.cuda.synchronize(device)
    begun = time.perf_counter()
    graph.replay()
    torch.cuda.synchronize(device)
    return time.perf_counter() - begun


class Answer:
    """Where the result of a round is read, once it is there.

    Args:
        rows: Rows of the result.
        numbers: Numbers of each.
        device: Where it comes from.
    """

    def __init__(self, rows: int, numbers: int, device: torch.device) -> None:
        self._numbers = pinned(torch.zeros(rows, numbers, dtype=torch.long), device)
        self._device = device
        self._done = torch.cuda.Event() if device.type == "cuda" else None

    def put(self, result: Tensor) -> None:
        """Have the result copied when it is there; a graph may hold the copy."""
        self._numbers.copy_(result, non_blocking=True)

    def mark(self) -> None:
        """Take what has been put so far for the result."""
        if self._done is not None:
            self._done.record(torch.cuda.current_stream(self._device))

    def read(self) -> list[list[int]]:
        """Wait for the result and return it."""
        if self._done is not None:
            self._done.synchronize()
        numbers: list[list[int]] = self._numbers.tolist()
        return numbers

    def floats(self) -> list[list[float]]:
        """Return what was read last, where it is numbers in float64."""
        numbers: list[list[float]] = self._numbers.view(torch.double).tolist()
        return numbers


class GraphRunner:
    """Runs a Llama-shaped model on a CUDA device, a few tokens at a time by graphs.

    The cache has a fixed capacity, and rows that have ended stay in it unused, so that the graphs
    stay valid from call to call. See `runners.Runner`.

    Args:
        model: A model that `why_not_llama` has nothing against. On other than CUDA devices the
            same steps are done without graphs, for tests.
        rows: Number of rows, 1 or more.
        capacity: Ids that fit into each row.
    """

    def __init__(self, model: Any, rows: int, capacity: int) -> None:
        self.body = body = LlamaBody(model)
        self.device = body.weight.device
        self.rows, self.capacity = rows, capacity
        # Of a draft's first pass: up to 16 ids in all, a small model's time is not theirs.
        self.draft_widths = (4 if rows <= 4 else 2), WIDTHS[-1]
        shape = len(body.layers), rows, body.kv_heads, capacity, body.dim_head
        self.keys = torch.zeros(shape, dtype=body.weight.dtype, device=self.device)
        self.values = torch.zeros_like(self.keys)
        self.table = tuple(t.to(body.weight.dtype) for t in body.rotary_table(capacity))
        self.pool = torch.cuda.graph_pool_handle() if self.device.type == "cuda" else None
        self.setup_seconds = 0.0
        self._given = torch.zeros(2, rows, WIDTHS[-1], dtype=torch.long, device=self.device)
        # Of a draft: what the host says of each row, as `go_on` takes it, and the ids written.
        self._said = torch.zeros(rows, DRAFT_LINE, dtype=torch.long, device=self.device)
        self._host = pinned(torch.zeros_like(self._said, device="cpu"), self.device)
        self._lines = self._host.numpy()
        self.places = np.minimum(np.arange(capacity + MARGIN), capacity - 1)
        self._written = torch.zeros(WIDTHS[-1], rows, dtype=torch.long, device=self.device)
        self._answer = Answer(WIDTHS[-1], rows, self.device)
        self._weights: dict[int, Answer] = {}
        self.foresight = Foresight()
        self._took: dict[tuple[Any, ...], float] = {}  # Seconds of a draft.
        self.fed = [0] * rows  # The last id that each row was fed before it wrote.
        self._last: tuple[tuple[Any, ...], Callable[[int, Tensor | None], None]] | None = None
        self._begun: tuple[Any, ...] | None = None  # What kind of draft was begun ahead,
        self._seen: tuple[tuple[Any, ...], list[list[int]]] | None = None  # and how one would be.
        self._rules = pick_rules(self.device)
        self._ids = torch.arange(len(body.head.weight), device=self.device)
        self._row = torch.arange(rows, device=self.device)
        self._graphs: dict[tuple[Any, ...], tuple[Any, Tensor]] = {}
        self.reset()

    def reset(self) -> None:
        """Begin anew with all rows."""
        self.slots = list(range(self.rows))
        self.lengths = [0] * self.rows
        self._last = self._begun = self._seen = None

    def forward(self, ids: Tensor, places: Tensor, extent: int | None = None) -> Tensor:
        """Return the last hidden states of all rows; ids and places are `(rows, width)`."""
        table = self.table[0], self.table[1]
        extent = extent or self.capacity
        states: Tensor = self.body(ids, places, self.keys, self.values, extent, table)
        return states

    def capture(self, run: Callable[[], Any]) -> tuple[Any, Any]:
        """Return a graph of a function, and its results, which each replay overwrites."""
        if self.device.type != "cuda":
            call = _Call(run)
            return call, call.out
        begun = time.perf_counter()
        with on(self.device):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                run()
                run()
            torch.cuda.current_stream().wait_stream(side)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            # On a stream of this device: the default one is of the device of the first capture.
            with torch.cuda.graph(graph, pool=self.pool, stream=side):
                out = run()
            graph.replay()  # The first replay loads the graph, which takes longer than later ones.
            torch.cuda.synchronize()
        self.setup_seconds += time.perf_counter() - begun
        return graph, out

    def extend(
        self, feeds: Sequence[Sequence[int]], keep: Sequence[int], head: Tensor | None = None
    ) -> list[Tensor]:
        """See `Runner`."""
        width, most = max(map(len, feeds)), max(keep)
        if not width:
            return [torch.empty(0) for _ in feeds]
        if width > _CHUNK + most:
            cut = [min(_CHUNK, max(len(feed) - most, 0)) for feed in feeds]
            self.extend([f[:c] for f, c in zip(feeds, cut, strict=True)], [0] * len(feeds))
            return self.extend([f[c:] for f, c in zip(feeds, cut, strict=True)], keep, head)
        bucket = next((w for w in WIDTHS if w >= width), width)
        given = self._padded(feeds, bucket)
        if bucket > WIDTHS[-1]:
            given = given.to(self.device)
            extent = min(max(self.lengths) + width, self.capacity)
            with on(self.device):
                states = self.forward(given[0], given[1], extent)
                logits = [
                    states[slot, len(feed) - k : len(feed)]
                    for slot, feed, k in zip(self.slots, feeds, keep, strict=True)
                ]
                if most:
                    logits = list(self.body.logits(torch.cat(logits), head).split(list(keep)))
        else:
            out = self._replay(given, head)
            logits = [
                out[slot, len(feed) - k : len(feed)].clone()
                for slot, feed, k in zip(self.slots, feeds, keep, strict=True)
            ]
        self.lengths = [n + len(feed) for n, feed in zip(self.lengths, feeds, strict=True)]
        return logits

    def tell(self, line: Any, length: int, feed: Sequence[int]) -> None:
        """Write the beginning of a row's line, for `go_on`.

        Args:
            line: Where to write, in NumPy: `DRAFT_LINE` numbers.
            length: Ids in the cache.
            feed: Ids to feed; where there are none, one that does not matter is.
        """
        count = len(feed) or 1
        line[LAST] = count - 1
        line[IDS : IDS + len(feed)] = feed
        line[PLACES:LATER] = self.places[length : length + WIDTHS[-1]]
        line[LATER:DRAFT_LINE] = self.places[length + count : length + count + MOST]

    def go_on(
        self, said: Tensor, width: int, steps: int, choose: Callable[[int, Tensor], Tensor]
    ) -> None:
        """Feed ids, and behind them ids that are chosen one by one; all but the last are fed too.

        Args:
            said: A line for each row that begins as `tell` writes it.
            width: Ids fed at most.
            steps: Ids to choose.
            choose: Given the step and the last hidden state of each row, returns an id for each.
        """
        ids, places = said[:, IDS : IDS + width], said[:, PLACES : PLACES + width]
        states = self.forward(ids, places)
        chosen = choose(0, states[self._row, said[:, LAST]])
        for step in range(1, steps):
            place = said[:, LATER + step - 1, None]
            chosen = choose(step, self.forward(chosen[:, None], place)[:, 0])

    def write(
        self,
        feeds: Sequence[Sequence[int]],
        counts: Sequence[int],
        among: Tensor | None = None,
        steps: int = 0,
    ) -> Callable[[], list[list[int]]]:
        """See `Chooser`."""
        counts = [count if feed else 0 for count, feed in zip(counts, feeds, strict=True)]
        steps = max(steps, *counts)
        kind = "draft", steps, 0 if among is None else among.data_ptr()
        fed = self._draft(kind, feeds, lambda w, said: self._run_draft(w, said, steps, among))
        for row, count in enumerate(counts):
            self.lengths[row] += fed[row] + max(count - 1, 0)
        slots = list(self.slots)

        def read() -> list[list[int]]:
            columns = list(zip(*self._answer.read()[:steps], strict=True))
            return [list(columns[slot][:n]) for slot, n in zip(slots, counts, strict=True)]

        return read

    def weighs(self, steps: int) -> bool:
        """See `Weigher`."""
        return steps <= MOST

    def weigh(
        self, feeds: Sequence[Sequence[int]], steps: int, processors: Processors, top: int
    ) -> Callable[[], tuple[list[list[int]], list[list[int]], list[list[float]]]]:
        """See `Weigher`."""
        top = min(top, len(self.body.head.weight))
        if top not in self._weights:
            self._weights[top] = Answer(self.rows, 2 * top, self.device)
        answer = self._weights[top]
        fed = self._draft(
            ("weighed", steps, top, processors.key),
            feeds,
            lambda w, said: self._run_draft(w, said, steps, None, (processors, top)),
        )
        answer.mark()
        for row, feed in enumerate(feeds):
            self.lengths[row] += fed[row] + (steps - 1 if feed else 0)
        slots = list(self.slots)

        def read() -> tuple[list[list[int]], list[list[int]], list[list[float]]]:
            best, columns = answer.read(), self._answer.read()[: steps - 1]
            shares = answer.floats()
            return (
                [[column[slot] for column in columns] for slot in slots],
                [best[slot][:top] for slot in slots],
                [shares[slot][top:] for slot in slots],
            )

        return read

    def _draft(
        self,
        kind: tuple[Any, ...],
        feeds: Sequence[Sequence[int]],
        run: Callable[[int, Tensor | None], None],
    ) -> list[int]:
        """Begin a draft by a graph of its kind; return how many ids each row is fed by it."""
        self._last = kind, run
        self.fed = [feed[-1] if feed else 0 for feed in feeds]
        if max(map(len, feeds)) > WIDTHS[-1]:  # A prompt: all but its end in one pass.
            self.extend([feed[:-1] for feed in feeds], [0] * len(feeds))
            feeds = [feed[-1:] for feed in feeds]
        self._check(max(map(len, feeds)))
        if self._foreseen(kind, feeds):
            with on(self.device):
                self._answer.mark()
            return list(map(len, feeds))
        if len(self.slots) < self.rows:  # The end of what ended rows were fed may lie beyond.
            self._lines[:] = 0
        for slot, feed, length in zip(self.slots, feeds, self.lengths, strict=True):
            self.tell(self._lines[slot], length, feed)
        width = next(w for w in self.draft_widths if w >= max(map(len, feeds)))
        with on(self.device):
            if (kind, width) not in self._graphs:  # All widths at once, none in a later text.
                last = self._lines[:, LAST].copy()
                self._lines[:, LAST] = 0  # A place that each width has.
                for other in self.draft_widths if self.device.type == "cuda" else (width,):
                    self._graphs[kind, other] = self.capture(partial(run, other, None))
                self._lines[:, LAST] = last
                self._took[kind] = seconds_of(self._graphs[kind, width][0], self.device)
            self._graphs[kind, width][0].replay()
            self._answer.mark()
        return [len(feed) for feed in feeds]

    def go_on_ahead(self, said: Tensor, begin: bool = True) -> None:
        """Begin a draft like the last one, before it is known how it has to begin.

        Args:
            said: A line for each row that begins as `tell` writes it, when the graphs before have
                run.
            begin: If not, a draft begins only where there is no graph: its capture is one.
        """
        assert self._last is not None
        kind, run = self._last
        key = kind, said.data_ptr()
        if key not in self._graphs:
            self._graphs[key] = self.capture(partial(run, self.draft_widths[0], said))
        elif begin:
            self._graphs[key][0].replay()
        else:
            return
        self._begun = kind

    @property
    def pays(self) -> bool:
        """Whether a draft like the last one should begin ahead."""
        return self._last is not None and self.foresight.pays(self._took.get(self._last[0], 0.0))

    def expect(self, lines: list[list[int]]) -> None:
        """Take note of how a draft like the last one would begin, or has begun.

        Args:
            lines: A line for each row of the cache, as `tell` writes it.
        """
        if self._last is not None:
            self._seen = self._last[0], lines
        if self._begun is not None:  # It has overwritten what lies behind.
            self.crop([lines[slot][PLACES] for slot in self.slots])
        self.foresight.read()

    def _foreseen(self, kind: tuple[Any, ...], feeds: Sequence[Sequence[int]]) -> bool:
        """Return whether a draft has been begun just so."""
        begun, self._begun, seen, self._seen = self._begun, None, self._seen, None
        if seen is None:
            return False
        hit = seen[0] == kind and all(
            self.begins(seen[1][slot], row, feed)
            for row, (slot, feed) in enumerate(zip(self.slots, feeds, strict=True))
            if feed
        )
        self.foresight.see(hit)
        return hit and begun == kind

    def begins(self, line: list[int], row: int, feed: Sequence[int]) -> bool:
        """Return whether a line says that a row is fed these ids, behind what it holds."""
        held, ids = line[PLACES], line[IDS : IDS + line[LAST] + 1]
        return held == self.lengths[row] and ids == list(feed)

    def _padded(self, feeds: Sequence[Sequence[int]], width: int) -> Tensor:
        """Return ids and places of all slots, shape `(2, rows, width)`."""
        self._check(max(map(len, feeds)))
        ids, starts = [[0] * width] * self.rows, [0] * self.rows
        for slot, feed, length in zip(self.slots, feeds, self.lengths, strict=True):
            ids[slot] = [*feed, *[0] * (width - len(feed))]
            starts[slot] = length
        places = torch.tensor(starts)[:, None] + torch.arange(width)
        return torch.stack([torch.tensor(ids), places.clamp(max=self.capacity - 1)])

    def _check(self, width: int) -> None:
        if max(self.lengths) + width > self.capacity:
            raise ValueError(
                f"the cache has room for {self.capacity} ids; {max(self.lengths) + width} are more."
            )

    def _replay(self, given: Tensor, head: Tensor | None = None) -> Tensor:
        """Return the logits of ids and places by a graph."""

        def run(ids: Tensor, places: Tensor) -> Tensor:
            states = self.forward(ids, places)
            logits = self.body.logits(states.reshape(-1, states.shape[-1]), head)
            return logits.reshape(self.rows, ids.shape[1], -1)

        kind = "logits", 0 if head is None else head.data_ptr()
        return self._result(kind, given, WIDTHS, run)

    def _run_draft(
        self,
        width: int,
        said: Tensor | None,
        steps: int,
        among: Tensor | None,
        weighed: tuple[Processors, int] | None = None,
    ) -> None:
        """Draft by the likeliest ids; the last one is only weighed, where that is asked for."""
        if said is None:
            said = self._said
            said.copy_(self._host, non_blocking=True)
        columns = torch.empty(self.rows, dtype=torch.long, device=self.device)
        parts = None if among is None else among[:, None]

        def choose(step: int, state: Tensor) -> Tensor:
            logits = self.body.raw_logits(state)
            if weighed is not None and step == steps - 1:
                processors, top = weighed
                wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
                best = processors.scores_only(wide).softmax(dim=1).topk(top, dim=1)
                shares = best.values.double().view(torch.long)
                self._weights[top].put(torch.cat([best.indices, shares], dim=1))
                return self._written[step]
            forth = self._ids[: logits.shape[1]] if among is None else among
            self._rules.pick(logits, parts, forth, columns, self._written[step])
            return self._written[step]

        self.go_on(said, width, steps, choose)
        self._answer.put(self._written)

    def _result(
        self,
        kind: tuple[Any, ...],
        given: Tensor,
        widths: Sequence[int],
        run: Callable[[Tensor, Tensor], Tensor],
    ) -> Tensor:
        """Return a function of ids and places by a graph.

        All widths are captured when the first is asked for, and none in the middle of a later text.
        """
        width = given.shape[2]
        if (kind, width) not in self._graphs:
            # What the passes of a capture write lies behind all that is known.
            for other in widths if self.device.type == "cuda" else [width]:
                ids, places = self._given[0, :, :other], self._given[1, :, :other]
                places.copy_(self.capacity - widths[-1] + torch.arange(other))
                graph = self.capture(partial(run, ids, places))
                self._graphs[kind, other] = graph
        self._given[:, :, :width].copy_(pinned(given, self.device), non_blocking=True)
        graph, out = self._graphs[kind, width]
        with on(self.device):
            graph.replay()
        result: Tensor = out
        return result

    def crop(self, lengths: Sequence[int]) -> None:
        """See `Runner`."""
        self.lengths = [min(a, b) for a, b in zip(self.lengths, lengths, strict=True)]

    def select(self, rows: Sequence[int]) -> None:
        """See `Runner`."""
        self.slots = [self.slots[row] for row in rows]
        self.lengths = [self.lengths[row] for row in rows]
