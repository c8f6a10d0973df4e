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
from .drafting import SharedTokens
from .llama import LlamaBody
from .processors import Processors

_logger = logging.getLogger(__name__)
WIDTHS = (1, 2, 3, 4, 5, 6, 8, 12, 16)  # Tokens of a row in one graph.
MARGIN = 2 * WIDTHS[-1]  # Cache entries beyond a text that drafts and padding may touch.
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
        self._graphs: dict[tuple[int, int], tuple[Any, Tensor]] = {}
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
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            run()
            run()
        torch.cuda.current_stream(self.device).wait_stream(side)
        torch.cuda.synchronize(self.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            out = run()
        graph.replay()  # The first replay loads the graph, which takes longer than later ones.
        torch.cuda.synchronize(self.device)
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
        self._check(width)
        bucket = next((w for w in WIDTHS if w >= width), width)
        ids = torch.zeros(self.rows, bucket, dtype=torch.long)
        starts = torch.zeros(self.rows, 1, dtype=torch.long)
        for slot, feed, length in zip(self.slots, feeds, self.lengths, strict=True):
            ids[slot, : len(feed)] = torch.tensor(feed, dtype=torch.long)
            starts[slot] = length
        given = torch.stack([ids, (starts + torch.arange(bucket)).clamp(max=self.capacity - 1)])
        if bucket > WIDTHS[-1]:
            given = given.to(self.device)
            states = self.forward(given[0], given[1], min(max(self.lengths) + width, self.capacity))
            wanted = [
                states[slot, len(feed) - k : len(feed)]
                for slot, feed, k in zip(self.slots, feeds, keep, strict=True)
            ]
            logits = wanted
            if most:
                logits = list(self.body.logits(torch.cat(wanted), head).split(list(keep)))
        else:
            self._given[:, :, :bucket].copy_(_pinned(given, self.device), non_blocking=True)
            out = self._replay(bucket, head)
            logits = [
                out[slot, len(feed) - k : len(feed)].clone()
                for slot, feed, k in zip(self.slots, feeds, keep, strict=True)
            ]
        self.lengths = [n + len(feed) for n, feed in zip(self.lengths, feeds, strict=True)]
        return logits

    def _check(self, width: int) -> None:
        if max(self.lengths) + width > self.capacity:
            raise ValueError(
                f"the cache has room for {self.capacity} ids; {max(self.lengths) + width} are more."
            )

    def _replay(self, width: int, head: Tensor | None) -> Tensor:
        key = width, 0 if head is None else head.data_ptr()
        if key not in self._graphs:
            ids, places = self._given[0, :, :width], self._given[1, :, :width]

            def run() -> Tensor:
                states = self.forward(ids, places)
                logits = self.body.logits(states.reshape(-1, states.shape[-1]), head)
                return logits.view(self.rows, width, -1)

            self._graphs[key] = self.capture(run)
        graph, out = self._graphs[key]
        graph.replay()
        return out

    def crop(self, lengths: Sequence[int]) -> None:
        """See `Runner`."""
        self.lengths = [min(a, b) for a, b in zip(self.lengths, lengths, strict=True)]

    def select(self, rows: Sequence[int]) -> None:
        """See `Runner`."""
        self.slots = [self.slots[row] for row in rows]
        self.lengths = [self.lengths[row] for row in rows]


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
    before, so that any generator serves.

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
        self._said = torch.zeros(rows, most + 6, dtype=torch.long, device=device)
        self._host = _pinned(torch.zeros(rows, most + 6, dtype=torch.long), device)
        self._result = torch.zeros(rows, most + 2, dtype=torch.long, device=device)
        self._answer = _pinned(torch.zeros(rows, most + 2, dtype=torch.long), device)
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
    ) -> Settled:
        """Draft, verify and wait for the result.

        Args:
            pending: The one id of each row that the target has not seen.
            feeds: Ids that the drafter has not seen; none where nothing is drafted.
            limits: How many proposals of each row count; 0 where nothing is drafted.
            lookahead: Proposals to draft, 0 to 15.
            chance: Source of noise.
        """
        target, drafter, most = self._target, self._drafter, WIDTHS[-1]
        width = max(map(len, feeds), default=0) if lookahead else 0
        if width > most:  # A prompt: all but its end in one pass.
            drafter.extend([feed[:-1] for feed in feeds], [0] * len(feeds))
        behind = drafter.lengths
        self._host.zero_()
        self._host[:, most + 1] = 1
        fed = []
        for row, slot in enumerate(target.slots):
            feed = list(feeds[row][-1:] if width > most else feeds[row])
            fed.append(feed)
            self._host[slot, : len(feed)] = torch.tensor(feed, dtype=torch.long)
            numbers = [behind[row], max(len(feed), 1), target.lengths[row], pending[row]]
            self._host[slot, most : most + 5] = torch.tensor([*numbers, limits[row]])
        self._said.copy_(self._host, non_blocking=True)
        if not self._process.greedy:
            chance.fill(self._noise, "exponential")
            if lookahead:
                chance.fill(self._coins, "uniform")
                chance.fill(self._draft_noise[:, :lookahead], "exponential")
        if lookahead:
            bucket = next(w for w in WIDTHS if w >= max(map(len, fed)))
            self._draft(bucket, lookahead)
        self._verify(lookahead)
        self._answer.copy_(self._result, non_blocking=True)
        if target.device.type == "cuda":
            torch.cuda.current_stream(target.device).synchronize()
        answer = [self._answer[slot].tolist() for slot in target.slots]
        if any(line[0] < 0 for line in answer):
            raise ValueError("`target` gave logits that are no numbers.")
        result = Settled([], [], [], [])
        for row, line in enumerate(answer):
            drawn = line[2 : 2 + limits[row]]
            target.lengths[row] += 1 + line[0]
            result.accepted.append(line[0])
            result.following.append(line[1])
            result.proposed.append(drawn)
            held: list[int] = []
            if lookahead and feeds[row]:
                later = line[2 : 1 + lookahead]
                held = [*feeds[row], *(self._method.forth(token) for token in later)]
                drafter.lengths[row] = behind[row] + len(fed[row]) + len(later)
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
        broken = logits.isnan().view(len(said), -1).any(dim=1)
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
