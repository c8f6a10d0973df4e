"""Ways to draft: each turns what a drafter says into target tokens, and tells how it came by them.

A draft knows the law that its proposals were drawn from, and so how they are to be judged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from ._bytes import ByteEncoder, unfinished_tail
from .acceptance import Choice, laws_of_runs, settle, verify, verify_block, verify_runs
from .chance import Chance
from .context import DrafterMemory
from .devices import is_spread
from .processors import Processors
from .vocab import VocabMap

_LOOKBACK = 4  # Target tokens before a draft that are tokenised anew with it.
_LONGEST_RUN = 8  # Target tokens that one drafter token may be.


@runtime_checkable
class Draft(Protocol):
    """Proposals for one row."""

    @property
    def tokens(self) -> list[int]:
        """Target ids, in order."""
        ...

    def judge(self, p: Tensor, chance: Chance) -> tuple[int, Tensor]:
        """Return how many proposals are accepted, and weights of the law of the next token.

        Args:
            p: The target's law at each proposal and after the last.
            chance: Source of the coins.
        """
        ...


@dataclass(frozen=True)
class Certain:
    """Proposals that were certain, given what is known."""

    tokens: list[int] = field(default_factory=list)

    def judge(self, p: Tensor, chance: Chance) -> tuple[int, Tensor]:
        """See `Draft`."""
        proposed = torch.tensor(self.tokens, dtype=torch.long, device=p.device)
        return verify(p, proposed, chance.coins(len(self.tokens), p))


@dataclass(frozen=True)
class Drawn:
    """Proposals that were drawn one by one, each from a law over some target tokens.

    Attributes:
        tokens: Target ids.
        laws: The law of each over `kept`, shape `(proposals, kept)`.
        kept: Distinct target ids; all in order if missing.
        block: Whether they are judged as a block.
    """

    tokens: list[int]
    laws: Tensor
    kept: Tensor
    block: bool

    def judge(self, p: Tensor, chance: Chance) -> tuple[int, Tensor]:
        """See `Draft`."""
        proposed = torch.tensor(self.tokens, dtype=torch.long, device=p.device)
        coins = chance.coins(len(self.tokens), p)
        laws, kept = self.laws.to(p), self.kept.to(p.device)
        return (verify_block if self.block else verify)(p, proposed, coins, laws, kept)


@dataclass(frozen=True)
class Runs:
    """Proposals that are runs of target tokens, each run chosen among several.

    Attributes:
        tokens: Target ids; the last run may be cut short.
        steps: The choices.
        lengths: Tokens of each chosen run.
    """

    tokens: list[int]
    steps: list[Choice]
    lengths: list[int]

    def judge(self, p: Tensor, chance: Chance) -> tuple[int, Tensor]:
        """See `Draft`."""
        return verify_runs(p, self.steps, chance.coins(len(self.tokens), p))


def judge_together(
    drafts: Sequence[Draft], p: Tensor, chance: Chance
) -> list[tuple[int, int]] | None:
    """Return how many proposals of each draft are accepted, and the token after them.

    The same rules as each draft's own `judge`, for all rows at once and with one wait for the
    device. None if a draft is of a kind that has to be judged by itself; −1 accepted if a law is no
    numbers.

    Args:
        drafts: One for each row.
        p: The target's laws at each proposal and after the last, row after row.
        chance: Source of noise; it must serve the device.
    """
    if not all(isinstance(draft, Certain | Drawn | Runs) for draft in drafts):
        return None
    device, size = p.device, p.shape[1]
    limits = [len(draft.tokens) for draft in drafts]
    count = max(limits)
    starts = [place + sum(limits[:place]) for place in range(len(limits))]
    padded = [draft.tokens + [0] * (count - len(draft.tokens)) for draft in drafts]
    places = [
        [start + min(i, limit) for i in range(count + 1)]
        for start, limit in zip(starts, limits, strict=True)
    ]
    said = torch.tensor([[*a, *b, c] for a, b, c in zip(places, padded, limits, strict=True)])
    said = said.to(device)
    proposed = said[:, count + 1 : -1]
    q = p.new_zeros(len(drafts), count, size)
    if count:
        q.scatter_(2, proposed[:, :, None], 1.0)  # As for proposals that were certain.
    block = False
    for row, draft in enumerate(drafts):
        if isinstance(draft, Drawn):
            law = p.new_zeros(limits[row], size)
            q[row, : limits[row]] = law.index_copy_(1, draft.kept.to(device), draft.laws.to(p))
            block = draft.block
    runs = [(row, draft) for row, draft in enumerate(drafts) if isinstance(draft, Runs)]
    if runs:
        steps = [step for _, draft in runs for step in draft.steps]
        lengths = [length for _, draft in runs for length in draft.lengths]
        laws = iter(laws_of_runs(steps, lengths, p).split([sum(d.lengths) for _, d in runs]))
        for row, _ in runs:
            q[row, : limits[row]] = next(laws)[: limits[row]]
    coins, noise = p.new_empty(len(drafts), count), p.new_empty(len(drafts), size)
    chance.fill(coins, "uniform")
    chance.fill(noise, "exponential")
    everything = torch.arange(size, device=device)
    accepted, following = settle(
        p[said[:, : count + 1]], proposed, said[:, -1], coins, noise, q, proposed, everything, block
    )
    accepted = torch.where(p.isnan().any(), -1, accepted)
    both: list[list[int]] = torch.stack([accepted, following], dim=1).tolist()
    return [(taken, token) for taken, token in both]


@dataclass(frozen=True)
class Situation:
    """What a drafting method may look at.

    Attributes:
        memory: The drafter.
        processors: What is done to the target's logits.
        chance: Source of draws.
        histories: Target ids of each row, padding included, as processors see them.
        rows: For each row, its place in the batch that the processors were made for.
        recent: Target ids of each row without padding.
        rooms: Most target tokens to propose, in each row; 0 for none.
        lookahead: Steps to draft.
    """

    memory: DrafterMemory
    processors: Processors
    chance: Chance
    histories: list[list[int]]
    rows: list[int]
    recent: list[list[int]]
    rooms: list[int]
    lookahead: int


@runtime_checkable
class Method(Protocol):
    """A way to draft."""

    def draft(self, now: Situation) -> tuple[list[Draft], int]:
        """Return a draft for each row, and how many drafter tokens it took in all."""
        ...


def _nothing(count: int) -> list[Draft]:
    return [Certain() for _ in range(count)]


class SharedTokens:
    """TLI: draws from the drafter restricted to tokens that the target has too.

    Processors act on target ids, before the draw. Where the vocabularies are one, this is standard
    speculative decoding.

    Args:
        mapping: The vocabularies' map.
        eos: End tokens of the target.
        target_size: Rows of the target's head.
        device: Device of the drafter.
        block: Whether drafts are judged as blocks when sampling.

    Source: Timor et al. 2025, algorithm 4.
    """

    def __init__(
        self,
        mapping: VocabMap,
        eos: Sequence[int],
        target_size: int,
        device: torch.device,
        block: bool = True,
    ) -> None:
        self._eos = set(eos)
        self._size = target_size
        self._block = block
        # Distinct target ids that can be drafted, the column of each kept drafter id among them,
        # and the drafter id to go on with after each.
        distinct, column = mapping.to_target.unique(return_inverse=True)
        self.column = column.to(device) if len(distinct) < len(column) else None
        self.keep = mapping.keep if self.column is not None else mapping.keep[column.argsort()]
        self.keep = self.keep.to(device)
        self.kept_target = distinct.to(device)
        pairs = zip(mapping.to_target.tolist(), mapping.keep.tolist(), strict=True)
        self._forth: dict[int, int] = dict(reversed(list(pairs)))
        self.head: Tensor | None = None  # Set by `use_head`, else the whole head is computed.

    def use_head(self, weight: Tensor) -> None:
        """Compute these rows of the drafter's head alone, shape `(vocab, hidden)`."""
        whole = torch.arange(len(weight), device=weight.device)
        self.head = weight if torch.equal(self.keep, whole) else weight[self.keep]

    def forth(self, token: int) -> int:
        """Return the drafter id to go on with after a target token that was drafted."""
        return self._forth[token]

    def forth_of_columns(self) -> Tensor:
        """Return the same for each column of the law, shape `(kept,)`."""
        return torch.tensor([self._forth[token] for token in self.kept_target.tolist()])

    def shared_logits(self, logits: Tensor) -> Tensor:
        """Return logits over `kept_target` out of what the drafter gave, shape `(rows, kept)`."""
        if self.head is None:
            logits = logits[:, self.keep]
        if self.column is None:
            return logits
        # Several drafter ids for one target id: their probabilities add.
        peak = logits.amax(dim=1, keepdim=True)
        mass = logits.new_zeros(len(logits), len(self.kept_target))
        return mass.index_add_(1, self.column, (logits - peak).exp()).log() + peak

    def draft(self, now: Situation) -> tuple[list[Draft], int]:
        """See `Method`."""
        rooms = [min(room, now.lookahead) for room in now.rooms]
        feeds = now.memory.missing(rooms)
        tokens: list[list[int]] = [[] for _ in feeds]
        laws: list[list[Tensor]] = [[] for _ in feeds]
        active = [row for row, feed in enumerate(feeds) if feed]
        drafted = 0
        while active:
            said = now.memory.feed(feeds, self.head)
            logits = self.shared_logits(torch.cat([said[row] for row in active]))
            if now.processors.by_score:
                logits = now.processors.scores_only(logits)
            else:
                logits = torch.cat(
                    [
                        self._processed(now, row, logits[i : i + 1], tokens[row])
                        for i, row in enumerate(active)
                    ]
                )
            if now.processors.greedy:
                columns = logits.argmax(dim=1).tolist()
            else:
                law = logits.softmax(dim=1)
                usable = law.isfinite().all(dim=1)
                if not bool(usable.all()):  # The processors allow none of the shared tokens.
                    active = [
                        row for row, fits in zip(active, usable.tolist(), strict=True) if fits
                    ]
                    law = law[usable]
                    if not active:
                        break
                columns = now.chance.draw(law)
                for i, row in enumerate(active):
                    laws[row].append(law[i])
            feeds = [[] for _ in feeds]
            picked = self.kept_target[torch.tensor(columns, device=self.kept_target.device)]
            drafted += len(active)
            for row, token in zip(active, picked.tolist(), strict=True):
                tokens[row].append(token)
                if len(tokens[row]) < rooms[row] and token not in self._eos:
                    feeds[row] = [self._forth[token]]
            active = [row for row in active if feeds[row]]
        if now.processors.greedy:
            return [Certain(t) for t in tokens], drafted
        drafts = _nothing(len(feeds))
        for row, (t, law_list) in enumerate(zip(tokens, laws, strict=True)):
            if t:
                drafts[row] = Drawn(t, torch.stack(law_list), self.kept_target, self._block)
        return drafts, drafted

    def _processed(self, now: Situation, row: int, logits: Tensor, tokens: list[int]) -> Tensor:
        full = logits.new_full((1, self._size), float("-inf"))
        full[:, self.kept_target] = logits
        full = now.processors(full, now.histories[row] + tokens, now.rows[row])
        return full[:, self.kept_target]


@dataclass(frozen=True)
class Text:
    """What the drafting methods need to turn drafter tokens into target tokens.

    Attributes:
        target: Encoder of the target's tokenizer.
        drafter: Encoder of the drafter's tokenizer.
        target_eos: End tokens of the target, first the one to propose.
        drafter_eos: End tokens of the drafter.
    """

    target: ByteEncoder
    drafter: ByteEncoder
    target_eos: list[int]
    drafter_eos: list[int]

    def retokenise(self, recent: Sequence[int], drafted: Sequence[int]) -> list[int]:
        """Return target tokens for drafted ones, as they would follow the last of the history."""
        data = self.drafter.spell(list(drafted))
        data = data[: len(data) - unfinished_tail(data)]
        if not data:
            return []
        table = self.target.table
        before: list[int] = []
        for token in reversed(recent[-_LOOKBACK:]):
            if token >= len(table) or table[token] is None:
                break
            before.insert(0, token)
        both = self.target.encode(self.target.spell(before) + data)
        if both[: len(before)] == before:
            return both[len(before) :]
        return self.target.encode(data)


class ExactText:
    """SLEM: the drafter writes its likeliest text, which the target's tokenizer turns into tokens.

    Args:
        text: The tokenizers.

    Source: Timor et al. 2025, algorithm 2.
    """

    def __init__(self, text: Text) -> None:
        self._text = text

    def draft(self, now: Situation) -> tuple[list[Draft], int]:
        """See `Method`."""
        text = self._text
        written, ended, drafted = self._write(now, now.lookahead)
        drafts = _nothing(len(written))
        for row, (ids, room) in enumerate(zip(written, now.rooms, strict=True)):
            if not room or not (ids or ended[row]):
                continue
            run = text.retokenise(now.recent[row], ids)
            if ended[row] and text.target_eos:
                run = [*run, text.target_eos[0]]
            drafts[row] = Certain(run[:room])
        return drafts, drafted

    def _write(self, now: Situation, steps: int) -> tuple[list[list[int]], list[bool], int]:
        """Return the drafter's likeliest tokens, whether it ended there, and how many it took."""
        rooms = [min(room, steps) for room in now.rooms]
        feeds = now.memory.missing(rooms)
        ends = self._text.drafter_eos
        written = now.memory.write(feeds, rooms, ends)
        ended = [bool(ids) and ids[-1] in ends for ids in written]
        drafted = sum(map(len, written))
        return (
            [ids[: len(ids) - end] for ids, end in zip(written, ended, strict=True)],
            ended,
            drafted,
        )


class TokenRuns:
    """SLRS with a decision at every drafter token, each of which is a fixed run of target tokens.

    The drafter draws from its whole vocabulary. The law of a run's first token is a sum over all
    drafter tokens whose run begins with it; how a run goes on is a walk down the tree of runs.

    Args:
        text: The tokenizers.
        mapping: The vocabularies' map.
        drafter_size: Rows of the drafter's head.
        device: Device of the drafter.

    Source: SLRS, Timor et al. 2025, algorithm 5, in a form of our own.
    """

    def __init__(
        self, text: Text, mapping: VocabMap, drafter_size: int, device: torch.device
    ) -> None:
        self._text = text
        same = dict(zip(mapping.keep.tolist(), mapping.to_target.tolist(), strict=True))
        runs: list[list[int]] = []
        for index in range(drafter_size):
            spelled = mapping.drafter_bytes[index] if index < len(mapping.drafter_bytes) else None
            if index in same:
                run = [same[index]]
            elif spelled is None:
                run = []
            else:
                run = text.target.encode(spelled)
                if text.target.spell(run) != spelled or len(run) > _LONGEST_RUN:
                    run = []
            runs.append(run)
        usable = [index for index, run in enumerate(runs) if run]
        longest = max((len(runs[index]) for index in usable), default=1)
        self.usable = torch.tensor(usable, dtype=torch.long, device=device)
        padded = [runs[index] + [-1] * (longest - len(runs[index])) for index in usable]
        self.runs = torch.tensor(padded, device=device).view(len(usable), longest)
        self._run_of = [runs[index] for index in usable]
        self._usable = usable
        self._place = {index: place for place, index in enumerate(usable)}

    def draft(self, now: Situation) -> tuple[list[Draft], int]:
        """See `Method`."""
        rooms = [min(room, now.lookahead) for room in now.rooms]
        feeds = now.memory.missing(rooms)
        drafts = _nothing(len(feeds))
        if now.processors.greedy:
            written = now.memory.write(feeds, rooms, self._text.drafter_eos, self.usable)
            for row, ids in enumerate(written):
                run = [token for d in ids for token in self._run_of[self._place[d]]]
                drafts[row] = Certain(run[: now.rooms[row]])
            return drafts, sum(map(len, written))
        tokens: list[list[int]] = [[] for _ in feeds]
        steps: list[list[Choice]] = [[] for _ in feeds]
        lengths: list[list[int]] = [[] for _ in feeds]

        def take(row: int, law: Tensor, place: int) -> bool:
            """Append a run, and return whether another may follow."""
            steps[row].append(Choice(self.runs, law, place))
            tokens[row].extend(self._run_of[place])
            lengths[row].append(len(self._run_of[place]))
            ended = self._usable[place] in self._text.drafter_eos
            return len(tokens[row]) < now.rooms[row] and not ended

        drafted = 0
        active = [row for row, feed in enumerate(feeds) if feed]
        if active and now.memory.draws(now.processors, now.chance):
            drawn, laws = now.memory.draw(feeds, rooms, self.usable, now.processors, now.chance)
            drafted = sum(map(len, drawn))
            for row, places in enumerate(drawn):
                for step, place in enumerate(places):
                    if not take(row, laws[row, step], place):
                        break
            active = []
        while active:
            said = now.memory.feed(feeds)
            logits = torch.cat([said[row] for row in active])[:, self.usable]
            drafted += len(active)
            law = now.processors.scores_only(logits).softmax(dim=1)
            places = now.chance.draw(law)
            feeds = [[] for _ in feeds]
            for i, (row, place) in enumerate(zip(active, places, strict=True)):
                if take(row, law[i], place) and len(steps[row]) < rooms[row]:
                    feeds[row] = [self._usable[place]]
            active = [row for row in active if feeds[row]]
        for row, run in enumerate(tokens):
            if run:
                drafts[row] = Runs(run[: now.rooms[row]], steps[row], lengths[row])
        return drafts, drafted


class LastTokenRuns(ExactText):
    """C-SLRS: all drafter tokens but the last are given; the last one's every choice is weighed.

    The drafter writes its likeliest tokens and draws the last among its best `top` ones; each of
    these makes a text, and so a run of target tokens.

    Args:
        text: The tokenizers.
        top: Choices of the last drafter token, 1 or more.

    Source: own.
    """

    def __init__(self, text: Text, top: int = 16) -> None:
        super().__init__(text)
        self._top = top

    def draft(self, now: Situation) -> tuple[list[Draft], int]:
        """See `Method`."""
        if now.processors.greedy:
            return super().draft(now)
        text = self._text
        written, ended, drafted = self._write(now, now.lookahead - 1)
        drafts = _nothing(len(written))
        feeds: list[list[int]] = []
        if now.lookahead > 1:
            for row, ids in enumerate(written):
                feeds.append(ids[-1:] if ids and not ended[row] else [])
                if ended[row] and text.target_eos:
                    run = [*text.retokenise(now.recent[row], ids), text.target_eos[0]]
                    drafts[row] = Certain(run[: now.rooms[row]])
        else:
            feeds = now.memory.missing([min(room, 1) for room in now.rooms])
        active = [row for row, feed in enumerate(feeds) if feed]
        if not active:
            return drafts, drafted
        said = now.memory.feed(feeds)
        logits = torch.cat([said[row] for row in active])
        law = now.processors.scores_only(logits).softmax(dim=1)
        best, tokens = law.topk(min(self._top, law.shape[1]), dim=1)
        best = best / best.sum(dim=1, keepdim=True)
        for i, row in enumerate(active):
            runs = []
            for token, mass in zip(tokens[i].tolist(), best[i].tolist(), strict=True):
                end = token in text.drafter_eos
                ids = written[row] if end else [*written[row], token]
                run = text.retokenise(now.recent[row], ids) if mass > 0 else []
                if end:
                    run = [*run, *text.target_eos[:1]]
                runs.append(run[: now.rooms[row]])
            mass = best[i] * torch.tensor([bool(run) for run in runs], device=best.device)
            if not bool(mass.sum() > 0):
                continue
            mass = mass / mass.sum()
            longest = max(map(len, runs))
            padded = [run + [-1] * (longest - len(run)) for run in runs]
            table = torch.tensor(padded, device=best.device)
            (chosen,) = now.chance.draw(mass[None])
            run = runs[chosen]
            drafts[row] = Runs(run, [Choice(table, mass, chosen)], [len(run)])
        return drafts, drafted + len(active)


def find_head(drafter: Any, keep: Tensor) -> Tensor | None:
    """Return the weight of a drafter's head, if its logits are a plain product with it.

    Checked by running it, since some models scale or cap their logits.

    Args:
        drafter: A causal language model of `transformers`.
        keep: Drafter ids to compare at.
    """
    head, body = drafter.get_output_embeddings(), drafter.base_model
    weight = getattr(head, "weight", None)
    if body is drafter or weight is None or not weight.is_floating_point():
        return None
    if getattr(head, "bias", None) is not None or is_spread(drafter):
        return None
    rows: Tensor = weight.detach()
    probe = keep[:2][None]
    with torch.no_grad():
        wanted = drafter(input_ids=probe, use_cache=False).logits[0, -1, keep]
        hidden = body(input_ids=probe, use_cache=False).last_hidden_state[0, -1]
        found = hidden.to(rows) @ rows[keep].T
    slack = 1e-3 * float(wanted.abs().max()) + 1e-6
    error = float((wanted - found.to(wanted)).abs().max())
    return rows if error <= slack * (1 if rows.dtype == torch.float32 else 30) else None
