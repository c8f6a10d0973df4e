"""A round as a whole on one device, with one wait for it; runners and rounds are kept for later."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from .ahead import Foresight
from .chance import Chance
from .devices import on
from .drafting import Table
from .drafts import Certain, Weighed
from .graphs import (
    DRAFT_LINE,
    IDS,
    LAST,
    LATER,
    MOST,
    PLACES,
    WIDTHS,
    Answer,
    GraphRunner,
    pinned,
    seconds_of,
)
from .kernels.judge import COLUMNS, DENSE, Law, Line, Spelling, Warp, pick_rules
from .kernels.judge.reference import combine
from .processors import Processors

# A row's line on the board that host and device share, after what the host says of its draft: the
# target's one id, proposals, their positions and how many count; then what the device says: how
# many it accepts, the next token, how many there are, and the columns drafted. Where the host wrote
# the proposals, it says what was drafted, and after how many proposals each of it is accepted.
_PENDING = DRAFT_LINE
_TOKENS = _PENDING + 1
_PLACES = _TOKENS + MOST
_LIMIT = _PLACES + MOST + 1
_ACCEPTED, _FOLLOWING, _TOTAL = range(_LIMIT + 1, _LIMIT + 4)
_COLUMNS = _TOTAL + 1
_REACH = _COLUMNS + MOST
_LINE = _REACH + MOST
_BOARD = Line(
    last=LAST,
    ids=IDS,
    places=PLACES,
    later=LATER,
    pending=_PENDING,
    target_places=_PLACES,
    tokens=_TOKENS,
    limit=_LIMIT,
    accepted=_ACCEPTED,
    following=_FOLLOWING,
    columns=_COLUMNS,
    reach=_REACH,
    width=MOST + 1,
)
_AHEAD = 0  # Instead of a width: of a draft that begins with what the device has found itself.
_WEIGHED = 16  # Tokens that a law of the host's may have.


@dataclass(frozen=True)
class Settled:
    """What a round brought to each row.

    Attributes:
        proposed: Target ids proposed.
        accepted: How many of them are accepted.
        following: The token after these.
        fed: Ids that the drafter was fed, and holds: those of its draft that were accepted too.
    """

    proposed: list[list[int]]
    accepted: list[int]
    following: list[int]
    fed: list[list[int]]


class GraphRound:
    """Rounds on one device: drafts, verification and judgement as graphs, with one wait.

    Of plain rounds that follow each other, each begins before the result of the last one is read.
    So does a draft, by what the device takes it to be fed; the host, which knows, has it done again
    where that was wrong, with the same noise: what is drafted, judged and written stays the same.
    Noise is made on the device from a key and the number of the round; see `kernels.judge`.

    Args:
        target: Runner of the target.
        drafter: Runner of the drafter, on the same device.
        tables: What each method that a device can draft by itself drafts among.
        processors: What is done to the target's logits; all by scores alone.
        spelling: How the drafter's tokenizer writes target tokens; see `ahead.foretell`.

    Attributes:
        foresight: Whether drafts begin before the host has read the last round.
    """

    def __init__(
        self,
        target: GraphRunner,
        drafter: GraphRunner,
        tables: Mapping[str, Table],
        processors: Processors,
        spelling: Spelling,
    ) -> None:
        self._target, self._drafter, self._tables = target, drafter, tables
        self._spelling = spelling
        self._process, self._rules = processors, pick_rules(target.device)
        self._warp = processors.warp
        rows, device = target.rows, target.device

        def whole(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.long, device=device)

        self._board = whole(rows, _LINE)  # One copy each way tells all that there is to tell.
        self._host = pinned(torch.zeros(rows, _LINE, dtype=torch.long), device)
        self._lines = self._host.numpy()
        self._tokens = self._board[:, _TOKENS:_PLACES]
        self._columns = self._board[:, _COLUMNS:]
        # Of plain rounds one may be begun while the last one's answer is not read yet.
        self._answer, *self._answers = (Answer(rows, _LINE, device) for _ in range(3))
        self._flying: Answer | None = None  # Of a plain round that was begun ahead.
        self.foresight = Foresight()
        self._begun: tuple[str, int] | None = None  # Method and steps of a draft begun ahead,
        self._seen: tuple[str, int, list[list[int]]] | None = None  # and of what one would be fed.
        self._ends = drafter.capacity - 1, target.capacity - 1
        self._took: dict[tuple[str, int], float] = {}  # Seconds of a draft.
        self._next, self._origin, self._state = whole(rows), whole(rows, MOST), whole(2)
        self._certain = Law.certain(device)
        self._scores: dict[str, tuple[Tensor, Tensor]] = {}
        self._forth = {name: table.forth.tolist() for name, table in tables.items()}
        self._draft_graphs: dict[tuple[str, int, int], Any] = {}
        self._verify_graphs: dict[tuple[str, int], Any] = {}

    @cached_property
    def _weights(self) -> _Weights:
        return _Weights(self._target)

    @property
    def methods(self) -> Collection[str]:
        """What can be played without the host."""
        return self._tables.keys()

    def begin(self, chance: Chance) -> None:
        """Take the key of a generation's noise from its source of randomness."""
        self.land()
        if not self._process.greedy:
            self._state.copy_(torch.tensor([chance.key(), 0]))

    def land(self) -> None:
        """Forget what was begun ahead."""
        self._flying = self._begun = self._seen = None

    def play(
        self,
        method: str,
        pending: Sequence[int],
        feeds: Sequence[Sequence[int]],
        limits: Sequence[int],
        lookahead: int,
        ahead: bool = False,
    ) -> Callable[[], Settled]:
        """Draft and verify; return what waits for the result.

        Args:
            method: How to draft.
            pending: The one id of each row that the target has not seen.
            feeds: Ids that the drafter has not seen; none where nothing is drafted.
            limits: How many proposals of each row may count; 0 where nothing is drafted.
            lookahead: Drafter tokens to draft, 0 to 15.
            ahead: Whether the next round will be of the same kind: it begins before the result of
                this one is read, which the device goes on from by itself. For plain rounds it must
                be, of others the draft alone begins, and a wrong guess costs time.
        """
        begun, self._begun = self._begun, None
        with on(self._target.device):
            if lookahead:
                foreseen = self._foreseen(method, pending, feeds, limits, lookahead)
                if not foreseen or begun != (method, lookahead):
                    self._say(pending, feeds, limits)
                    width = min(max(map(len, feeds)), MOST + 1)
                    widths = self._drafter.draft_widths
                    self._draft(method, next(w for w in widths if w >= width), lookahead)
                self._flying, flying = None, self._fly(method, lookahead)
                if ahead and self.foresight.pays(self._took.get((method, lookahead), 0.0)):
                    self._draft_graphs[method, _AHEAD, lookahead].replay()
                    self._begun = method, lookahead
            else:
                if self._flying is None:
                    self._say(pending, feeds, limits)
                    self._board.copy_(self._host, non_blocking=True)
                    self._flying = self._fly("plain", 0)
                flying, self._flying = self._flying, self._fly("plain", 0) if ahead else None
        return lambda: self._settled(flying.read(), method, feeds, lookahead)

    def judge(
        self, pending: Sequence[int], drafts: Sequence[Certain | Weighed], ahead: bool = False
    ) -> list[tuple[int, int]]:
        """Verify proposals; return how many are accepted, and the next token.

        Args:
            pending: As for `play`.
            drafts: Of each row, with at most 15 proposals.
            ahead: Whether the drafter will draft as it has: it begins before the result is read.
        """
        self.land()
        proposals = [draft.tokens for draft in drafts]
        width = max(map(len, proposals))
        count = next(w for w in WIDTHS if w > width) - 1
        weighed = count > 0 and any(isinstance(draft, Weighed) for draft in drafts)
        with on(self._target.device):
            self._say(pending, (), list(map(len, proposals)), proposals)
            kept = [draft.kept for draft in drafts if draft.kept is not None]
            known = count > 0 and len(kept) == len(drafts)
            if known:
                self._say_kept(kept)
            if weighed:
                self._weights.say(self._target.slots, drafts)
            if not count:
                self._board.copy_(self._host, non_blocking=True)
            flying = self._fly("weighed" if weighed else "told" if count else "plain", count)
            if known:
                self._drafter.go_on_ahead(self._board, ahead and self._drafter.pays)
        answer = flying.read()
        if known:
            self._drafter.expect(answer)
        return [self._verdict(answer[slot], row) for row, slot in enumerate(self._target.slots)]

    def _foreseen(
        self,
        method: str,
        pending: Sequence[int],
        feeds: Sequence[Sequence[int]],
        limits: Sequence[int],
        lookahead: int,
    ) -> bool:
        """Return whether the device took a round to begin as it does; see `play`."""
        seen, self._seen = self._seen, None
        if seen is None:
            return False
        hit = seen[:2] == (method, lookahead) and all(
            self._row_foreseen(seen[2][slot], row, pending[row], list(feeds[row]), limits[row])
            for row, slot in enumerate(self._target.slots)
        )
        self.foresight.see(hit)
        return hit

    def _row_foreseen(
        self, line: list[int], row: int, pending: int, feed: list[int], limit: int
    ) -> bool:
        length = self._target.lengths[row]
        if (line[_PENDING], line[_PLACES], line[_LIMIT]) != (pending, length, limit):
            return False
        return self._drafter.begins(line, row, feed) if feed else limit == 0

    def _say(
        self,
        pending: Sequence[int],
        feeds: Sequence[Sequence[int]],
        limits: Sequence[int],
        proposals: Sequence[Sequence[int]] = (),
    ) -> None:
        """Write down what the device needs to know of a round; its first graph copies that."""
        target, drafter, lines = self._target, self._drafter, self._lines
        if max(map(len, feeds), default=0) > MOST + 1:  # A prompt: all but its end in one pass.
            drafter.extend([feed[:-1] for feed in feeds], [0] * len(feeds))
            feeds = [feed[-1:] for feed in feeds]
        if len(target.slots) < target.rows:
            lines[:] = 0
        for row, slot in enumerate(target.slots):
            line, length = lines[slot], target.lengths[row]
            if feeds:
                drafter.tell(line, drafter.lengths[row], feeds[row])
            line[_PENDING] = pending[row]
            line[_PLACES:_LIMIT] = target.places[length : length + MOST + 1]
            line[_LIMIT] = limits[row]
            if proposals:
                line[_TOKENS : _TOKENS + len(proposals[row])] = proposals[row]

    def _say_kept(self, drafts: Sequence[list[tuple[int, int]]]) -> None:
        """Write down what the drafter keeps, by how many of its draft's proposals are accepted."""
        for row, (slot, kept) in enumerate(zip(self._target.slots, drafts, strict=True)):
            line, held = self._lines[slot], len(kept)
            line[LAST], line[IDS] = 0, self._drafter.fed[row]
            line[PLACES] = self._drafter.lengths[row] - held - 1
            line[_REACH + held : _LINE] = MOST + 1  # Never.
            for place, (index, reach) in enumerate(kept):
                line[_COLUMNS + place], line[_REACH + place] = index, reach

    def _fly(self, method: str, lookahead: int) -> Answer:
        """Begin a verification, and return what its result will be read from."""
        key = method, lookahead
        if key not in self._verify_graphs:
            wanted = [key]
            if self._target.device.type == "cuda":
                # All widths of what the host proposes, and a plain round beside any other: no later
                # text waits for a capture.
                told = method in ("told", "weighed")
                keys = [(method, w - 1) for w in WIDTHS[1:]] if told else [key]
                keys = list(dict.fromkeys([*keys, ("plain", 0)]))
                wanted = [other for other in keys if other not in self._verify_graphs]
            turn, board = self._state.clone(), self._board.clone()
            for other in wanted:
                self._verify_graphs[other], _ = self._target.capture(
                    partial(self._run_verify, *other)
                )
            self._board.copy_(board)  # As they were before the passes of the capture.
            self._state.copy_(turn)
        self._verify_graphs[key].replay()
        answer = self._answer
        if method == "plain":
            self._answers.reverse()
            answer = self._answers[0]
            answer.put(self._board)
        answer.mark()
        return answer

    def _verdict(self, line: list[int], row: int) -> tuple[int, int]:
        accepted, following = line[_ACCEPTED], line[_FOLLOWING]
        if accepted < 0:
            raise ValueError("`target` gave logits that are no numbers.")
        self._target.lengths[row] += 1 + accepted
        return accepted, following

    def _settled(
        self,
        answer: list[list[int]],
        method: str,
        feeds: Sequence[Sequence[int]],
        lookahead: int,
    ) -> Settled:
        self.foresight.read()
        self._seen = (method, lookahead, answer) if lookahead else None
        drafter = self._drafter
        result = Settled([], [], [], [])
        wide = lookahead and max(map(len, feeds)) > MOST + 1
        for row, slot in enumerate(self._target.slots):
            line = answer[slot]
            accepted, following = self._verdict(line, row)
            result.accepted.append(accepted)
            result.following.append(following)
            result.proposed.append(line[_TOKENS : _TOKENS + line[_TOTAL]])
            held: list[int] = []
            if lookahead and feeds[row]:
                forth = self._forth[method]
                began = drafter.lengths[row] + (1 if wide else len(feeds[row]))
                drafter.lengths[row] = line[PLACES]
                columns = line[_COLUMNS : _COLUMNS + lookahead - 1]
                held = [*feeds[row], *[forth[column] for column in columns]]
                held = held[: max(len(feeds[row]) + line[PLACES] - began, 0)]
            result.fed.append(held)
        return result

    def _draft(self, method: str, width: int, lookahead: int) -> None:
        key, drafter = (method, width, lookahead), self._drafter
        if key not in self._draft_graphs:  # All widths at once, and none in a later text.
            last = self._lines[:, LAST].copy()
            self._lines[:, LAST] = 0  # A place that each width has.
            widths = drafter.draft_widths if drafter.device.type == "cuda" else (width,)
            for other in (*widths, _AHEAD):
                self._draft_graphs[method, other, lookahead], _ = drafter.capture(
                    partial(self._run_draft, method, other, lookahead)
                )
            self._lines[:, LAST] = last
            self._took[method, lookahead] = seconds_of(self._draft_graphs[key], drafter.device)
        self._draft_graphs[key].replay()

    def _run_draft(self, method: str, width: int, lookahead: int) -> None:
        drafter, table = self._drafter, self._tables[method]
        if width != _AHEAD:
            self._board.copy_(self._host, non_blocking=True)

        def choose(step: int, state: Tensor) -> Tensor:
            logits = drafter.body.raw_logits(state, table.head)
            among, warp, left = table.among, self._warp, None
            if warp is None:
                logits, among = self._process.scores_only(combine(logits, among)), None
            elif warp.cuts:
                left = self._rules.cut(logits, among, len(table.forth), warp, False)
            draws = None
            if not self._process.greedy:
                scores, norms = self._laws(method)
                temperature = 1.0 if warp is None else warp.temperature
                draws = scores[:, step], norms[:, step], self._state, temperature, step
            column = self._columns[:, step]
            self._rules.pick(logits, among, table.forth, column, self._next, draws, left)
            return self._next

        drafter.go_on(self._board, width or drafter.draft_widths[0], lookahead, choose)

    def _laws(self, method: str) -> tuple[Tensor, Tensor]:
        """Return scores and their logarithmic sums for each step of a draft."""
        if method not in self._scores:
            wide = torch.promote_types(self._target.body.weight.dtype, torch.float32)
            shape = len(self._board), MOST, len(self._tables[method].forth)
            scores = torch.zeros(shape, dtype=wide, device=self._board.device)
            self._scores[method] = scores, scores.new_zeros(shape[:2])
        return self._scores[method]

    def _run_verify(self, method: str, lookahead: int) -> None:
        board, target, table = self._board, self._target, self._tables.get(method)
        count = lookahead
        if table is not None and table.runs.shape[1] > 1:  # Room for runs of several tokens.
            count = next(w for w in WIDTHS if w > min(lookahead * 3 // 2, MOST)) - 1
        if method in ("told", "weighed"):
            board.copy_(self._host, non_blocking=True)
        tokens, limits = self._tokens[:, :count], board[:, _LIMIT]
        if table is not None:
            total, origin = board[:, _TOTAL], self._origin[:, :count]
            self._rules.pack(self._columns, table.runs, tokens, origin, total, limits, lookahead)
            limits = total
        ids = board[:, _PENDING : _TOKENS + count]
        places = board[:, _PLACES : _PLACES + count + 1]
        states = target.forward(ids, places)
        logits = target.body.raw_logits(states.reshape(-1, states.shape[-1]))
        warp, left = self._warp, None
        if warp is None:
            wide = torch.promote_types(logits.dtype, torch.float32)
            logits, warp = self._process.scores_only(logits.to(wide)), Warp()
        elif warp.cuts:
            left = self._rules.cut(logits, None, logits.shape[1], warp)
        self._rules.judge(
            logits,
            tokens,
            limits,
            self._law(method, tokens, logits.shape[1]),
            board[:, _ACCEPTED],
            board[:, _FOLLOWING],
            None if self._process.greedy else (self._state, warp.temperature),
            table is not None and table.block,
            left,
        )
        if method == "plain":  # What the next round needs to know, if it is plain too.
            board[:, _PLACES] += 1
            board[:, _PENDING] = board[:, _FOLLOWING]
            return
        known = None if table is None else (table.forth, table.runs)
        steps, most = lookahead if table is not None else MOST, self._drafter.draft_widths[0]
        self._rules.advance(board, _BOARD, known, self._spelling, steps, most, self._ends)
        self._answer.put(board)

    def _law(self, method: str, tokens: Tensor, vocab: int) -> Law:
        """Return the law of what was drafted; where it is spread over runs, compute it."""
        if method == "weighed":
            return self._weights.law(tokens.shape[1], vocab)
        table = self._tables.get(method)
        if table is None or self._process.greedy:
            return self._certain
        scores, norms = self._laws(method)
        if table.column_of is not None:
            return Law(COLUMNS, scores, norms, table.column_of)
        law = scores.new_empty(*tokens.shape, vocab)
        mass = scores.new_empty(tokens.shape)
        laid = table.runs, self._origin[:, : tokens.shape[1]], self._board[:, _TOTAL]
        self._rules.spread(scores, norms, self._columns, *laid, law, mass)
        return Law(DENSE, law, mass, table.forth)


class _Weights:
    """Laws of few tokens each, which the host tells the device.

    Args:
        target: Runner of the target.
    """

    def __init__(self, target: GraphRunner) -> None:
        self._device, shape = target.device, (target.rows, MOST, _WEIGHED)
        self._kind = torch.promote_types(target.body.weight.dtype, torch.float32)
        self._ids_host = pinned(torch.zeros(shape, dtype=torch.long), self._device)
        self._masses_host = pinned(torch.zeros(shape, dtype=self._kind), self._device)
        self._ids = torch.zeros_like(self._ids_host, device=self._device)
        self._masses = torch.zeros_like(self._masses_host, device=self._device)

    def say(self, slots: Sequence[int], drafts: Sequence[Certain | Weighed]) -> None:
        """Write down the laws of each row; the graph copies them."""
        ids, masses = self._ids_host.numpy(), self._masses_host.numpy()
        masses[:] = 0.0
        for slot, draft in zip(slots, drafts, strict=True):
            certain = [{token: 1.0} for token in draft.tokens]
            for place, law in enumerate(draft.laws if isinstance(draft, Weighed) else certain):
                ids[slot, place, : len(law)] = list(law)
                masses[slot, place, : len(law)] = list(law.values())

    def law(self, count: int, vocab: int) -> Law:
        """Return the laws of the first proposals, as a graph computes them."""
        self._ids.copy_(self._ids_host, non_blocking=True)
        self._masses.copy_(self._masses_host, non_blocking=True)
        law = self._masses.new_zeros(len(self._ids), count, vocab)
        law.scatter_add_(2, self._ids[:, :count], self._masses[:, :count])
        norms = self._masses.new_ones(law.shape[:2])
        return Law(DENSE, law, norms, norms[0].int())


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
        names: Sequence[Hashable],
        table: Callable[[str], Table | None],
        processors: Processors,
        spelling: Callable[[], Spelling],
    ) -> GraphRound:
        """Return the graphs of these runners, methods and processors.

        Args:
            target: Runner of the target.
            drafter: Runner of the drafter.
            names: Methods, and what else tells their tables from others'.
            table: Returns what a method drafts among, or None.
            processors: As for `GraphRound`.
            spelling: Returns what it has beside.
        """
        key = id(target), id(drafter), processors.key, *names
        if key not in self._rounds:
            while len(self._rounds) >= 16:
                self._rounds.pop(next(iter(self._rounds)))
            made = {name: table(name) for name in names if isinstance(name, str)}
            tables = {name: one for name, one in made.items() if one is not None}
            self._rounds[key] = GraphRound(target, drafter, tables, processors, spelling())
        return self._rounds[key]
