"""CUDA graphs: a forward pass without launch costs, and a round with one wait for the device."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .acceptance import settle
from .chance import Chance
from .devices import on
from .drafting import SharedTokens
from .llama import LlamaBody
from .processors import Processors
from .runners import best_of

_logger = logging.getLogger(__name__)
WIDTHS = (1, 2, 4, 6, 8, 12, 16)  # Tokens of a row in one graph, where a graph is for any number.
_DRAFT_WIDTHS = (2, 8, 16)  # The same of a draft's first pass: a small model's time is not width's.
MARGIN = 2 * WIDTHS[-1]  # Cache entries beyond a text that drafts and padding may touch.
_IDLE = [*[0] * (WIDTHS[-1] + 1), 1, 0, 0, 0]  # What a round says of a row that has ended.
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


def _pinned(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.pin_memory() if device.type == "cuda" else tensor


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
        shape = len(body.layers), rows, body.kv_heads, capacity, body.dim_head
        self.keys = torch.zeros(shape, dtype=body.weight.dtype, device=self.device)
        self.values = torch.zeros_like(self.keys)
        self.table = tuple(t.to(body.weight.dtype) for t in body.rotary_table(capacity))
        self.pool = torch.cuda.graph_pool_handle() if self.device.type == "cuda" else None
        self.setup_seconds = 0.0
        self._given = torch.zeros(2, rows, WIDTHS[-1], dtype=torch.long, device=self.device)
        self._last = torch.zeros(rows, dtype=torch.long, device=self.device)
        self._graphs: dict[tuple[Any, ...], tuple[Any, Tensor]] = {}
        self._drawing: dict[tuple[Any, ...], Tensor] = {}  # Laws of drawn ids, and noise for them.
        self.reset()

    def reset(self) -> None:
        """Begin anew with all rows."""
        self.slots = list(range(self.rows))
        self.lengths = [0] * self.rows

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
            with torch.cuda.graph(graph, pool=self.pool):
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

    def choose(self, feeds: Sequence[Sequence[int]], keep: Sequence[int]) -> list[list[int]]:
        """See `Chooser`."""
        width = max(map(len, feeds))
        if not 0 < width <= WIDTHS[-1]:
            return best_of(self.extend(feeds, keep))
        given = self._padded(feeds, next(w for w in WIDTHS if w >= width))
        best = self._replay(given, best=True).tolist()
        self.lengths = [n + len(feed) for n, feed in zip(self.lengths, feeds, strict=True)]
        return [
            best[slot][len(feed) - k : len(feed)]
            for slot, feed, k in zip(self.slots, feeds, keep, strict=True)
        ]

    def write(
        self, feeds: Sequence[Sequence[int]], counts: Sequence[int], among: Tensor | None = None
    ) -> list[list[int]]:
        """See `Chooser`."""
        return self._write(feeds, counts, among, None)

    def draw(
        self,
        feeds: Sequence[Sequence[int]],
        counts: Sequence[int],
        among: Tensor,
        process: Processors,
        chance: Chance,
    ) -> tuple[list[list[int]], Tensor]:
        """See `Chooser`."""
        key, steps = ("laws", among.data_ptr()), max(counts)
        if key not in self._drawing:
            wide = torch.promote_types(self.body.weight.dtype, torch.float32)
            shape = 2, self.rows, WIDTHS[-1], len(among)
            self._drawing[key] = torch.ones(shape, dtype=wide, device=self.device)
        laws, noise = self._drawing[key]
        chance.fill(noise[:, :steps], "exponential")
        places = self._write(feeds, counts, among, process)
        lines = torch.tensor(self.slots).to(self.device)
        return places, laws[lines, :steps]

    def _write(
        self,
        feeds: Sequence[Sequence[int]],
        counts: Sequence[int],
        among: Tensor | None,
        process: Processors | None,
    ) -> list[list[int]]:
        if max(map(len, feeds)) > WIDTHS[-1]:  # A prompt: all but its end in one pass.
            self.extend([feed[:-1] for feed in feeds], [0] * len(feeds))
            feeds = [feed[-1:] for feed in feeds]
        counts = [count if feed else 0 for count, feed in zip(counts, feeds, strict=True)]
        given = self._padded(feeds, next(w for w in _DRAFT_WIDTHS if w >= max(map(len, feeds))))
        last = torch.zeros(self.rows, dtype=torch.long)
        for slot, feed in zip(self.slots, feeds, strict=True):
            last[slot] = max(len(feed), 1) - 1
        self._last.copy_(_pinned(last, self.device), non_blocking=True)
        written = self._replay_draft(given, max(counts), among, process).tolist()
        for row, (feed, count) in enumerate(zip(feeds, counts, strict=True)):
            self.lengths[row] += len(feed) + max(count - 1, 0)
        return [written[slot][:count] for slot, count in zip(self.slots, counts, strict=True)]

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

    def _replay(self, given: Tensor, head: Tensor | None = None, best: bool = False) -> Tensor:
        """Return the logits of ids and places, or the likeliest ids, by a graph."""
        ids, places = self._take(given)
        key = "best" if best else "logits", ids.shape[1], 0 if head is None else head.data_ptr()

        def run() -> Tensor:
            states = self.forward(ids, places)
            logits = self.body.logits(states.reshape(-1, states.shape[-1]), head)
            if best:
                chosen = torch.where(logits.isnan().any(dim=1), -1, logits.argmax(dim=1))
                return chosen.view(self.rows, -1)
            return logits.reshape(self.rows, ids.shape[1], -1)

        return self._result(key, run)

    def _replay_draft(
        self, given: Tensor, steps: int, among: Tensor | None, process: Processors | None
    ) -> Tensor:
        """Return the ids after each row's last, or where drawn their places, by a graph.

        The shape is `(rows, steps)`.
        """
        ids, places = self._take(given)
        chosen_from = 0 if among is None else among.data_ptr()
        key = "draft", ids.shape[1], steps, chosen_from, process and process.key
        laws, noise = self._drawing.get(("laws", chosen_from), (None, None))

        def run() -> Tensor:
            line = torch.arange(self.rows, device=self.device)
            states = self.forward(ids, places)
            state, place = states[line, self._last], places[line, self._last]
            written: list[Tensor] = []
            for step in range(steps):
                if step:
                    place = (place + 1).clamp(max=self.capacity - 1)
                    last = written[-1] if among is None else among[written[-1]]
                    state = self.forward(last[:, None], place[:, None])[:, 0]
                logits = self.body.logits(state)
                logits = logits if among is None else logits[:, among]
                if process is not None and laws is not None and noise is not None:
                    laws[:, step] = process.scores_only(logits).softmax(dim=1)
                    logits = laws[:, step] / noise[:, step]
                written.append(logits.argmax(dim=1))
            out = torch.stack(written, dim=1)
            return out if among is None or process is not None else among[out]

        return self._result(key, run)

    def _take(self, given: Tensor) -> tuple[Tensor, Tensor]:
        """Put ids and places where the graphs read them."""
        width = given.shape[2]
        self._given[:, :, :width].copy_(_pinned(given, self.device), non_blocking=True)
        return self._given[0, :, :width], self._given[1, :, :width]

    def _result(self, key: tuple[Any, ...], run: Callable[[], Tensor]) -> Tensor:
        if key not in self._graphs:
            self._graphs[key] = self.capture(run)
        graph, out = self._graphs[key]
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


class _Answer:
    """Where the result of a round is read, once it is there.

    Args:
        rows: Rows of the result.
        numbers: Numbers of each.
        device: Where it comes from.
    """

    def __init__(self, rows: int, numbers: int, device: torch.device) -> None:
        self._numbers = _pinned(torch.zeros(rows, numbers, dtype=torch.long), device)
        self._device = device
        self._done = torch.cuda.Event() if device.type == "cuda" else None

    def ask(self, result: Tensor) -> None:
        """Have the result copied when it is there."""
        self._numbers.copy_(result, non_blocking=True)
        if self._done is not None:
            self._done.record(torch.cuda.current_stream(self._device))

    def read(self) -> list[list[int]]:
        """Wait for the result and return it."""
        if self._done is not None:
            self._done.synchronize()
        numbers: list[list[int]] = self._numbers.tolist()
        return numbers


@dataclass(frozen=True)
class Settled:
    """What a round brought to each row.

    Attributes:
        proposed: Target ids proposed.
        accepted: How many of them are accepted.
        following: The token after these.
        fed: Ids that the drafter was fed, and holds.
    """

    proposed: list[list[int]]
    accepted: list[int]
    following: list[int]
    fed: list[list[int]]


class GraphRound:
    """A round of TLI, or of plain decoding, as two graphs and one wait.

    One graph drafts, one runs the target and judges; draws are made from noise that is put in
    before, so that any generator serves. Of plain rounds that follow each other, each begins before
    the result of the last one is read.

    Args:
        target: Runner of the target.
        drafter: Runner of the drafter, on the same device.
        method: The shared tokens.
        processors: What is done to the target's logits; all by scores alone.
        block: Whether drafts are judged as blocks.
    """

    def __init__(
        self,
        target: GraphRunner,
        drafter: GraphRunner,
        method: SharedTokens,
        processors: Processors,
        block: bool,
    ) -> None:
        self._target, self._drafter = target, drafter
        self._method, self._process, self._block = method, processors, block
        rows, device = target.rows, target.device
        most = WIDTHS[-1]
        kept = len(method.kept_target)
        vocab = len(target.body.head.weight)
        # All that the host says in a round, in one copy: fed ids, and numbers of each row.
        self._said = torch.zeros(rows, most + 5, dtype=torch.long, device=device)
        self._host = _pinned(torch.zeros(rows, most + 5, dtype=torch.long), device)
        self._result = torch.zeros(rows, most + 2, dtype=torch.long, device=device)
        self._answers = [_Answer(rows, most + 2, device) for _ in range(2)]
        self._flying: _Answer | None = None  # Of a plain round that was begun ahead.
        self._columns = torch.zeros(rows, most, dtype=torch.long, device=device)
        wide = torch.promote_types(target.body.weight.dtype, torch.float32)

        def number(*shape: int) -> Tensor:
            return torch.ones(shape, dtype=wide, device=device)

        drawn = 0 if processors.greedy else rows
        self._laws, self._draft_noise = number(drawn, most, kept), number(drawn, most, kept)
        self._coins, self._noise = number(drawn, most), number(drawn, vocab)
        self._forth = method.forth_of_columns().to(device)
        self._draft_graphs: dict[tuple[int, int], Any] = {}
        self._verify_graphs: dict[int, Any] = {}

    def play(
        self,
        pending: Sequence[int],
        feeds: Sequence[Sequence[int]],
        limits: Sequence[int],
        lookahead: int,
        chance: Chance,
        ahead: bool = False,
    ) -> Settled:
        """Draft, verify and wait for the result.

        Args:
            pending: The one id of each row that the target has not seen.
            feeds: Ids that the drafter has not seen; none where nothing is drafted.
            limits: How many proposals of each row count; 0 where nothing is drafted.
            lookahead: Proposals to draft, 0 to 15.
            chance: Source of noise.
            ahead: Whether the next round will be plain too, as this one is: it begins before the
                result of this one is read, which the device goes on from by itself.
        """
        with on(self._target.device):
            if lookahead or self._flying is None:
                self._say(pending, feeds, limits, lookahead, chance)
                flying = self._fly(lookahead, chance)
            else:
                flying = self._flying
            self._flying = self._fly(0, chance) if ahead and not lookahead else None
        return self._settled(flying.read(), feeds, limits, lookahead)

    def land(self) -> None:
        """Forget a round that was begun ahead."""
        self._flying = None

    def _say(
        self,
        pending: Sequence[int],
        feeds: Sequence[Sequence[int]],
        limits: Sequence[int],
        lookahead: int,
        chance: Chance,
    ) -> None:
        """Tell the device what it needs to know of a round, and draft."""
        target, drafter, most = self._target, self._drafter, WIDTHS[-1]
        if lookahead and max(map(len, feeds)) > most:  # A prompt: all but its end in one pass.
            drafter.extend([feed[:-1] for feed in feeds], [0] * len(feeds))
            feeds = [feed[-1:] for feed in feeds]
        lines = [_IDLE] * target.rows
        for row, slot in enumerate(target.slots):
            feed, held = feeds[row], (drafter.lengths[row], target.lengths[row])
            numbers = held[0], max(len(feed), 1), held[1], pending[row], limits[row]
            lines[slot] = [*feed, *[0] * (most - len(feed)), *numbers]
        self._host.copy_(torch.tensor(lines))
        self._said.copy_(self._host, non_blocking=True)
        if lookahead:
            if not self._process.greedy:
                chance.fill(self._coins, "uniform")
                chance.fill(self._draft_noise[:, :lookahead], "exponential")
            self._draft(next(w for w in _DRAFT_WIDTHS if w >= max(map(len, feeds))), lookahead)

    def _fly(self, lookahead: int, chance: Chance) -> _Answer:
        """Begin a verification, and return what its result will be read from."""
        if not self._process.greedy:
            chance.fill(self._noise, "exponential")
        self._verify(lookahead)
        self._answers.reverse()
        self._answers[0].ask(self._result)
        return self._answers[0]

    def _settled(
        self,
        answer: list[list[int]],
        feeds: Sequence[Sequence[int]],
        limits: Sequence[int],
        lookahead: int,
    ) -> Settled:
        target, drafter = self._target, self._drafter
        result = Settled([], [], [], [])
        wide = lookahead and max(map(len, feeds)) > WIDTHS[-1]
        for row, slot in enumerate(target.slots):
            accepted, following, *drafted = answer[slot]
            if accepted < 0:
                raise ValueError("`target` gave logits that are no numbers.")
            target.lengths[row] += 1 + accepted
            result.accepted.append(accepted)
            result.following.append(following)
            result.proposed.append(drafted[: limits[row]])
            held: list[int] = []
            if lookahead and feeds[row]:
                later = [self._method.forth(token) for token in drafted[: lookahead - 1]]
                held = [*feeds[row], *later]
                drafter.lengths[row] += (1 if wide else len(feeds[row])) + len(later)
            result.fed.append(held)
        return result

    def _draft(self, width: int, lookahead: int) -> None:
        key = width, lookahead
        if key not in self._draft_graphs:
            self._draft_graphs[key], _ = self._drafter.capture(
                lambda: self._run_draft(width, lookahead)
            )
        self._draft_graphs[key].replay()

    def _run_draft(self, width: int, lookahead: int) -> None:
        said, most, drafter = self._said, WIDTHS[-1], self._drafter
        start, length = said[:, most, None], said[:, most + 1, None]
        end = drafter.capacity - 1
        steps = torch.arange(width, device=said.device)
        states = drafter.forward(said[:, :width], (start + steps).clamp(max=end))
        line = torch.arange(len(said), device=said.device)
        state = states[line, length[:, 0] - 1]
        column = length[:, 0]
        for step in range(lookahead):
            if step:
                place = (start + length + step - 1).clamp(max=end)
                state = drafter.forward(self._forth[column][:, None], place)[:, 0]
            logits = drafter.body.logits(state, self._method.head)
            logits = self._process.scores_only(self._method.shared_logits(logits))
            if self._process.greedy:
                column = logits.argmax(dim=1)
            else:
                law = logits.softmax(dim=1)
                self._laws[:, step] = law
                column = (law / self._draft_noise[:, step]).argmax(dim=1)
            self._columns[:, step] = column

    def _verify(self, lookahead: int) -> None:
        if lookahead not in self._verify_graphs:
            self._verify_graphs[lookahead], _ = self._target.capture(
                lambda: self._run_verify(lookahead)
            )
            self._said.copy_(self._host)  # As it was before the passes of the capture.
        self._verify_graphs[lookahead].replay()

    def _run_verify(self, lookahead: int) -> None:
        said, most, target = self._said, WIDTHS[-1], self._target
        columns = self._columns[:, :lookahead]
        drafted = self._method.kept_target[columns]
        ids = torch.cat([said[:, most + 3, None], drafted], dim=1)
        steps = torch.arange(lookahead + 1, device=said.device)
        places = (said[:, most + 2, None] + steps).clamp(max=target.capacity - 1)
        states = target.forward(ids, places)
        logits = target.body.logits(states.reshape(-1, states.shape[-1]))
        logits = self._process.scores_only(logits)
        broken = logits.isnan().any(dim=1).view(len(said), -1).any(dim=1)
        limits = said[:, most + 4]
        if self._process.greedy:
            best = logits.argmax(dim=1).view(len(said), -1)
            fits = (best[:, :lookahead] == drafted) & (steps[:lookahead] < limits[:, None])
            accepted = fits.long().cumprod(dim=1).sum(dim=1)
            following = best.gather(1, accepted[:, None])[:, 0]
        else:
            p = logits.softmax(dim=1).view(len(said), lookahead + 1, -1)
            accepted, following = settle(
                p,
                drafted,
                limits,
                self._coins[:, :lookahead],
                self._noise,
                self._laws[:, :lookahead],
                columns,
                self._method.kept_target,
                self._block,
            )
        self._result[:, 0] = torch.where(broken, -1, accepted)
        self._result[:, 1] = following
        self._result[:, 2 : 2 + lookahead] = drafted
        if not lookahead:  # What the next round needs to know, if it is plain too.
            said[:, most + 2] += 1
            said[:, most + 3] = following


class Runners:
    """Graph runners kept from call to call, so that what was captured once stays of use."""

    def __init__(self) -> None:
        self._free: dict[tuple[int, int], list[GraphRunner]] = {}
        self._rounds: dict[tuple[Any, ...], GraphRound] = {}

    def take(self, model: Any, rows: int, capacity: int) -> GraphRunner:
        """Return a runner with room for so many ids a row; it is to be given back."""
        waiting = self._free.setdefault((id(model), rows), [])
        while waiting:
            runner = waiting.pop()
            if runner.capacity >= capacity:
                runner.reset()
                return runner
            self._forget(runner)
        return GraphRunner(model, rows, -(-capacity // 512) * 512)

    def give_back(self, model: Any, runner: GraphRunner) -> None:
        """Keep a runner for the next call."""
        self._free.setdefault((id(model), runner.rows), []).append(runner)

    def _forget(self, runner: GraphRunner) -> None:
        self._rounds = {k: r for k, r in self._rounds.items() if id(runner) not in k}

    def round(
        self,
        target: GraphRunner,
        drafter: GraphRunner,
        method: SharedTokens,
        processors: Processors,
        block: bool,
    ) -> GraphRound:
        """Return the graphs of these runners and processors."""
        key = id(target), id(drafter), processors.key, block
        if key not in self._rounds:
            while len(self._rounds) >= 8:
                self._rounds.pop(next(iter(self._rounds)))
            self._rounds[key] = GraphRound(target, drafter, method, processors, block)
        return self._rounds[key]
