"""A round as a whole on one device, with one wait for it; runners and rounds are kept for later."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .acceptance import settle
from .chance import Chance
from .devices import on
from .graphs import DRAFT_WIDTHS, WIDTHS, GraphRunner, pinned
from .processors import Processors
from .shared import SharedTokens

_IDLE = [*[0] * (WIDTHS[-1] + 1), 1, 0, 0, 0]  # What a round says of a row that has ended.


class _Answer:
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
        self._host = pinned(torch.zeros(rows, most + 5, dtype=torch.long), device)
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
            self._draft(next(w for w in DRAFT_WIDTHS if w >= max(map(len, feeds))), lookahead)

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
        if key not in self._draft_graphs:  # All widths at once, and none in a later text.
            for other in DRAFT_WIDTHS if self._drafter.device.type == "cuda" else (width,):
                self._draft_graphs[other, lookahead], _ = self._drafter.capture(
                    lambda other=other: self._run_draft(other, lookahead)  # type: ignore[misc]
                )
        self._draft_graphs[key].replay()

    def _run_draft(self, width: int, lookahead: int) -> None:
        said, most, drafter = self._said, WIDTHS[-1], self._drafter
        start, length = said[:, most, None], said[:, most + 1, None]
        end = drafter.capacity - 1
        steps = torch.arange(width, device=said.device)
        states = drafter.forward(said[:, :width], (start + steps).clamp(max=end))
        line = torch.arange(len(said), device=said.device)
        state = states[line, (length[:, 0] - 1).clamp(max=width - 1)]
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
