"""The same in PyTorch: the oracle of the kernels, and what runs without Triton."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ...acceptance import settle
from .noise import COINS, DRAFT, FOLLOWING, exponential, uniform

CERTAIN, COLUMNS, DENSE = 0, 1, 2
PARTS = 3  # Tokens accepted beyond what a drafter keeps, for `advance`; more are left out.
JOINS = 3  # Ids that may go as what comes next joins them.


@dataclass(frozen=True)
class Law:
    """The laws of proposals, as the rules of judging read them.

    Attributes:
        kind: `CERTAIN`: point masses, the rest is not read. `COLUMNS`: softmax of scores over
            distinct target ids. `DENSE`: masses over the target's vocabulary.
        weights: Scores `(rows, proposals, columns)`, or masses `(rows, proposals, vocab)`.
        norms: Logarithm of each sum of exponentials, or the sum of the masses. Shape
            `(rows, proposals)`.
        column_of: Column of each target id in int32, −1 where it has none. Shape `(vocab,)`.
    """

    kind: int
    weights: Tensor
    norms: Tensor
    column_of: Tensor

    @classmethod
    def certain(cls, device: torch.device) -> Law:
        """Return the law of proposals that were certain."""
        nothing = torch.zeros(1, 1, 1, device=device)
        return cls(CERTAIN, nothing, nothing[0], nothing[0, 0].int())

    def dense(self, tokens: Tensor, vocab: int, dtype: torch.dtype) -> Tensor:
        """Return probabilities over the target's vocabulary, shape `(rows, proposals, vocab)`."""
        rows, count = tokens.shape
        if self.kind == CERTAIN:
            zeros = torch.zeros(rows, count, vocab, dtype=dtype, device=tokens.device)
            return zeros.scatter_(2, tokens[:, :, None], 1.0)
        weights, norms = self.weights[:, :count], self.norms[:, :count, None]
        if self.kind == DENSE:
            return (weights / norms).to(dtype)
        law = (weights - norms).exp().to(dtype)
        column = self.column_of.long()
        return law[:, :, column.clamp(min=0)].masked_fill(column < 0, 0.0)


@dataclass(frozen=True)
class Warp:
    """What is done to a line of logits by its numbers alone, in this order, as `generate` does it.

    Attributes:
        temperature: What logits are divided by, above 0.
        top_k: How many of the likeliest tokens stay, and those like the last; 0 for all.
        top_p: Share of the mass, in [0, 1], that the likeliest tokens reach together: of those
            like the last, the last ones stay. 1 for all.
        min_p: Least probability of a token that stays, as a share of the likeliest one's.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    @property
    def cuts(self) -> bool:
        """Whether any token may go."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0


class Cut(NamedTuple):
    """Which tokens of a line stay: those above `value`, and from `first` on those that equal it.

    Attributes:
        value: Logits before the temperature, shape `(lines,)`.
        first: Indices, int32, shape `(lines,)`.
    """

    value: Tensor
    first: Tensor

    def apply(self, z: Tensor) -> Tensor:
        """Return logits with minus infinity for what goes, shape `(lines, size)`."""
        value, first = self.value[:, None], self.first[:, None]
        later = torch.arange(z.shape[1], device=z.device) >= first
        return z.masked_fill(~((z > value) | ((z == value) & later)), float("-inf"))


class Line(NamedTuple):
    """Where things stand in a row's line of the board that host and device share.

    Attributes:
        last: Place of the last id that the drafter is fed.
        ids: Ids that it is fed.
        places: Their places in its cache.
        later: Places of the ids that it writes behind them.
        pending: The target's one id that it has not seen.
        target_places: Places of this one and of the proposals in its cache.
        tokens: Proposals.
        limit: How many of them may count.
        accepted: How many proposals were accepted.
        following: The token after them.
        columns: Columns picked.
        reach: After how many proposals each is accepted, where the host says it.
        width: How many ids, places and target places there are, each; of later ones one less.
    """

    last: int
    ids: int
    places: int
    later: int
    pending: int
    target_places: int
    tokens: int
    limit: int
    accepted: int
    following: int
    columns: int
    reach: int
    width: int


def combine(logits: Tensor, among: Tensor | None) -> Tensor:
    """Return logits of columns, each of one id or of the sum of some ids' probabilities.

    Args:
        logits: Shape `(rows, ids)`.
        among: Ids of each column, padded with −1, shape `(columns, most)`; one by one if missing.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if among is None:
        return logits
    parts = logits[:, among.clamp(min=0)].masked_fill(among < 0, float("-inf"))
    return parts[:, :, 0] if among.shape[1] == 1 else parts.logsumexp(dim=2)


def cut(
    logits: Float[Tensor, "lines ids"],
    among: Int[Tensor, "columns most"] | None,
    size: int,
    warp: Warp,
    exact: bool = True,
) -> Cut:
    """Return which columns of each line stay, as transformers' processors would leave them.

    Those sort a line from below, and of like tokens lower indices go first where the sort is
    stable.

    Args:
        logits: Before the temperature.
        among: As for `combine`.
        size: Columns.
        warp: What is asked for.
        exact: Not read: whether numbers that differ in their last bits alone may be taken for like.
    """
    z = combine(logits, among)[:, :size]
    value, first = z.new_full((len(z),), float("-inf")), z.new_zeros(len(z), dtype=torch.int32)
    if warp.top_k:
        value = z.topk(min(warp.top_k, size), dim=1).values[:, -1]
    if warp.top_p < 1:
        left = z.masked_fill(z < value[:, None], float("-inf"))
        ordered, index = left.sort(dim=1, stable=True)
        mass = (ordered / warp.temperature).softmax(dim=1).cumsum(dim=1)
        gone = (mass[:, :-1] <= 1 - warp.top_p).sum(dim=1, keepdim=True)
        value, first = ordered.gather(1, gone)[:, 0], index.gather(1, gone)[:, 0].int()
    if warp.min_p > 0:
        least = z.amax(dim=1) + warp.temperature * math.log(warp.min_p)
        first = first.masked_fill(least > value, 0)
        value = torch.maximum(value, least)
    return Cut(value, first)


def pick(
    logits: Float[Tensor, "rows ids"],
    among: Int[Tensor, "columns most"] | None,
    forth: Int[Tensor, " columns"],
    columns: Int[Tensor, " rows"],
    following: Int[Tensor, " rows"],
    draws: tuple[Tensor, Tensor, Tensor, float, int] | None = None,
    left: Cut | None = None,
) -> None:
    """Choose a column of each row, the likeliest or drawn.

    Args:
        logits: The drafter's.
        among: As for `combine`.
        forth: The drafter id that each column goes on with.
        columns: Where to write the columns.
        following: Where to write the ids to go on with.
        draws: Scores to write, shape `(rows, columns)`, their logarithmic sums, shape `(rows,)`,
            the noise's state, temperature and step of the draft; nothing is drawn if missing.
        left: Which columns may be drawn; all if missing.
    """
    z = combine(logits, among)
    z = z if left is None else left.apply(z)
    if draws is not None:
        scores, norms, state, temperature, step = draws
        z = z / temperature
        scores.copy_(z)
        norms.copy_(z.logsumexp(dim=1))
        z = z - exponential(state, DRAFT + step, z.shape[0], z.shape[1], z.dtype).log()
    best = z.argmax(dim=1)
    columns.copy_(best)
    following.copy_(forth[best])


def pack(
    columns: Int[Tensor, "rows most"],
    runs: Int[Tensor, "columns longest"],
    tokens: Int[Tensor, "rows room"],
    origin: Int[Tensor, "rows room"],
    total: Int[Tensor, " rows"],
    limits: Int[Tensor, " rows"],
    steps: int,
) -> None:
    """Lay the target tokens of the columns picked one after another, as far as there is room.

    Args:
        columns: Columns picked.
        runs: Target tokens of each column, padded with −1; each has at least one.
        tokens: Where to write the tokens.
        origin: Where to write for each its step, times `longest`, plus its place in its run.
        total: Where to write how many of them count in each row.
        limits: At most so many do.
        steps: Columns picked in each row.
    """
    run = runs[columns[:, :steps]]
    real = run >= 0
    length = real.sum(dim=2)
    room, longest = tokens.shape[1], runs.shape[1]
    depth = torch.arange(longest, device=runs.device)
    place = (length.cumsum(dim=1) - length)[:, :, None] + depth
    source = torch.arange(steps, device=runs.device)[:, None] * longest + depth
    place = torch.where(real & (place < room), place, room).flatten(1)  # The rest behind it.
    for wanted, values in ((tokens, run), (origin, source.expand_as(run))):
        wide = torch.cat([wanted, wanted[:, :1]], dim=1)
        wanted.copy_(wide.scatter_(1, place, values.flatten(1))[:, :room])
    total.copy_(torch.minimum(length.sum(dim=1).clamp(max=room), limits))


def spread(
    scores: Float[Tensor, "rows steps columns"],
    norms: Float[Tensor, "rows steps"],
    columns: Int[Tensor, "rows most"],
    runs: Int[Tensor, "columns longest"],
    origin: Int[Tensor, "rows room"],
    total: Int[Tensor, " rows"],
    law: Float[Tensor, "rows room vocab"],
    mass: Float[Tensor, "rows room"],
) -> None:
    """Write the law of each token that `pack` laid, given the tokens before it.

    Its masses are those of all columns whose runs agree with the chosen one so far and go on with
    a token; that the chosen run does not end there is given.

    Args:
        scores: As `pick` wrote them, for each step.
        norms: The same.
        columns: The same.
        runs: As for `pack`.
        origin: As `pack` wrote it.
        total: The same.
        law: Where to write the masses.
        mass: Where to write their sums.
    """
    rows, room, _ = law.shape
    longest = runs.shape[1]
    row = torch.arange(rows, device=law.device)[:, None]
    there = torch.arange(room, device=law.device) < total[:, None]
    origin = torch.where(there, origin, 0)
    step, depth = origin // longest, origin % longest
    weight = (scores[row, step] - norms[row, step, None]).exp()
    chosen = runs[columns[row, step]]
    place = torch.arange(longest, device=law.device)
    before = place < depth[:, :, None]
    agree = ((runs == chosen[:, :, None]) | ~before[:, :, None]).all(dim=3)
    going = runs.T[depth]
    weight = torch.where(agree & (going >= 0) & there[:, :, None], weight, 0.0)
    law.zero_().scatter_add_(2, going.clamp(min=0), weight.to(law.dtype))
    mass.copy_(weight.sum(dim=2))


def judge(
    logits: Float[Tensor, "lines vocab"],
    tokens: Int[Tensor, "rows proposals"],
    limits: Int[Tensor, " rows"],
    law: Law,
    accepted: Int[Tensor, " rows"],
    following: Int[Tensor, " rows"],
    draws: tuple[Tensor, float] | None = None,
    block: bool = False,
    left: Cut | None = None,
) -> None:
    """Accept or refuse proposals, and choose the token after them; see `acceptance.settle`.

    Args:
        logits: The target's at each proposal and after the last, for each row.
        tokens: Proposals.
        limits: How many of a row's count, if there are so many.
        law: What they were drawn from; not read unless something is drawn.
        accepted: Where to write how many are accepted; −1 where a logit is no number.
        following: Where to write the token after them.
        draws: The noise's state, whose number of the round goes up, and the temperature; the
            likeliest tokens are taken if missing.
        block: Whether drafts are judged as blocks, unless they were certain.
        left: Which tokens of each line the target's law allows when drawing; all if missing.
    """
    rows, count = tokens.shape
    limits = limits.clamp(max=count)
    broken = logits.isnan().any(dim=1).view(rows, -1).any(dim=1)
    if draws is None:
        best = logits.argmax(dim=1).view(rows, -1)
        counts = torch.arange(count, device=tokens.device) < limits[:, None]
        fits = (best[:, :count] == tokens) & counts
        taken = fits.long().cumprod(dim=1).sum(dim=1)
        after = best.gather(1, taken[:, None])[:, 0]
    else:
        state, temperature = draws
        state[1] += 1
        wide = torch.promote_types(logits.dtype, torch.float32)
        z = logits.to(wide) if left is None else left.apply(logits.to(wide))
        p = (z / temperature).softmax(dim=1).view(rows, count + 1, -1)
        vocab = p.shape[2]
        coins = uniform(state, COINS, rows, count, p.dtype)
        noise = exponential(state, FOLLOWING, rows, vocab, p.dtype)
        there = torch.arange(count, device=tokens.device) < limits[:, None]
        proposed = torch.where(there, tokens, 0)
        q = law.dense(proposed, vocab, p.dtype)
        everything = torch.arange(vocab, device=p.device)
        block = block and law.kind != CERTAIN
        taken, weights = settle(p, proposed, limits, coins, q, proposed, everything, block)
        after = (weights / noise).argmax(dim=1)
    accepted.copy_(torch.where(broken, -1, taken))
    following.copy_(after)


class Spelling(NamedTuple):
    """How the drafter's tokenizer most likely writes target tokens behind a text.

    Attributes:
        each: Drafter ids of each target token, in int32, padded with −1. Shape `(vocab, pieces)`.
        joins: Buckets of pairs of drafter ids and the one id that they become side by side, in
            int32, padded with −1; see `bucket_of`. Shape `(buckets, ways, 3)`.
    """

    each: Tensor
    joins: Tensor


def bucket_of(left: Tensor, right: Tensor, buckets: int) -> Tensor:
    """Return the bucket of pairs of ids, int64; there are a power of two."""
    return ((left * 0x9E3779B1 + right * 0x85EBCA77) >> 8) & (buckets - 1)


def _join(left: Tensor, right: Tensor, joins: Tensor) -> Tensor:
    """Return the ids that pairs become; −1 where they stay apart."""
    found = joins[bucket_of(left, right, len(joins))].long()
    same = (found[..., 0] == left[..., None]) & (found[..., 1] == right[..., None])
    return torch.where(same, found[..., 2], -1).amax(dim=-1)


def advance(
    board: Int[Tensor, "rows numbers"],
    line: Line,
    known: tuple[Tensor, Tensor] | None,
    spelling: Spelling,
    steps: int,
    most: int,
    ends: tuple[int, int],
) -> None:
    """Write what the next round begins with, should nobody know better.

    The drafter keeps the columns whose runs were accepted to the end, and is fed what it has not
    seen: the last column, where none was refused, and the ids of each target token after these.
    Where the first of them joins with what stands before, that goes.

    Args:
        board: What the round that was judged began with, and what came of it.
        line: Where it stands.
        known: The drafter id that each column goes on with, and its target tokens, padded with −1,
            of which each has at least one; if missing, columns are the ids in the cache, and the
            line has `reach`: of each, and behind them what is never reached.
        spelling: How target tokens are written.
        steps: Columns picked in each row.
        most: Ids that the drafter can be fed; those beyond are left out.
        ends: The last place of the drafter's cache, and of the target's.
    """
    each, rows, width = spelling.each, len(board), line.width
    columns = board[:, line.columns : line.columns + steps]
    accepted = board[:, line.accepted].clamp(min=0)
    following = board[:, line.following].clamp(0, len(each) - 1)
    if known is None:
        reach, forth = board[:, line.reach : line.reach + steps], columns
    else:
        reach, forth = (known[1][columns] >= 0).sum(dim=2).cumsum(dim=1), known[0][columns]
    kept = (reach <= accepted[:, None]).sum(dim=1)
    done = torch.where(reach <= accepted[:, None], reach, 0).amax(dim=1)
    lane = torch.arange(width, device=board.device)
    tokens = board[:, line.tokens : line.tokens + width - 1]
    stop = torch.minimum(accepted, done + PARTS)
    there = (lane[:-1] >= done[:, None]) & (lane[:-1] < stop[:, None])
    begun = each[torch.where(there, tokens, 0)].long().masked_fill(~there[:, :, None], -1)
    ids = torch.cat([begun.flatten(1), each[following].long()], dim=1)
    real = ids >= 0
    place = torch.where(real, real.cumsum(dim=1) - 1, width).clamp(max=width)  # The rest behind.
    fed = board.new_zeros(rows, width + 1).scatter_(1, place, ids)[:, :width]
    count = real.sum(dim=1).clamp(max=width)

    start = board[:, line.places] + board[:, line.last] + 1
    before = torch.cat([board[:, line.ids : line.ids + width], forth], dim=1)
    first, going, gone = fed[:, 0], count > 0, torch.zeros_like(kept)
    for back in range(JOINS):
        where = kept - 1 - back
        at = torch.where(where < 0, board[:, line.last] + 1 + where, width + where)
        left = torch.where(at >= 0, before.gather(1, at.clamp(min=0)[:, None])[:, 0], -1)
        joined = _join(left, first, spelling.joins)
        going = going & (joined >= 0) & (left >= 0)
        first, gone = torch.where(going, joined, first), gone + going
    fed[:, 0] = first
    held = torch.minimum(kept - gone, kept.clamp(max=steps - 1))
    leads = (kept - gone > held)[:, None]  # The last column, which the cache does not hold.
    fed = torch.where(leads, torch.cat([forth[:, -1:], fed[:, :-1]], dim=1), fed)
    count = (count + leads[:, 0]).clamp(1, most)
    board[:, line.last] = count - 1
    board[:, line.ids : line.ids + width] = fed
    for place_of, begin, end, size in (
        (line.places, start + held, ends[0], width),
        (line.later, start + held + count, ends[0], width - 1),
        (line.target_places, board[:, line.target_places] + 1 + accepted, ends[1], width),
    ):
        board[:, place_of : place_of + size] = (begin[:, None] + lane[:size]).clamp(max=end)
    board[:, line.pending] = following
    board[:, line.limit] = (board[:, line.limit] - 1 - accepted).clamp(min=0)
