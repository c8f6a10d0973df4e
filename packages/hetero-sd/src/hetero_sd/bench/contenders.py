"""The ways to decode that the benchmark compares."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..decoder import HeteroSpeculativeDecoder
from ..pairs import Pair
from ..rounds import COUNTS, Stats
from . import assisted

EAGER = "transformers"
COMPILED = "transformers, static and compiled"
LOOKUP = "transformers, prompt lookup"
PLAIN = "plain"


@dataclass
class Counts:
    """What rounds of draft and verification did; the prompt's own round is left out.

    Attributes:
        rounds: Forward passes of the target.
        row_rounds: The same, counted once for each row that took part.
        generated: New tokens, of all rows.
        drafted: Tokens that the drafter drafted.
        proposed: Target tokens proposed.
        accepted: Proposals accepted.
        judged: Proposals that were accepted, or were the first of their draft to be refused.
    """

    rounds: int = 0
    row_rounds: int = 0
    generated: int = 0
    drafted: int = 0
    proposed: int = 0
    accepted: int = 0
    judged: int = 0

    def add(self, other: Counts) -> None:
        """Add another generation's."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)

    @classmethod
    def between(cls, first: Stats, last: Stats) -> Counts:
        """Return what was done between two states of one generation."""
        return cls(**{name: getattr(last, name) - getattr(first, name) for name in COUNTS})


@dataclass(frozen=True)
class Took:
    """One generation: what was written, and how long it took.

    Attributes:
        rows: New tokens of each row.
        first_tokens: How many of them the prompt's own pass brought.
        first_seconds: Time until these.
        seconds: Time in all.
        counts: What the rounds after that did, if there are any drafts.
        arms: Rounds of ours by method and lookahead.
    """

    rows: list[list[int]]
    first_tokens: int
    first_seconds: float
    seconds: float
    counts: Counts | None = None
    arms: dict[str, int] = field(default_factory=dict)


Run = Callable[[Tensor, Tensor, dict[str, Any]], Took]


@dataclass
class Contender:
    """A way to decode, and what came of it.

    Attributes:
        name: What it is called in tables.
        run: Continues prompts, given ids and mask, padded on the left, and options of `generate`.
        method: Drafting method of ours, or "" for others.
        warm_ups: Passes over the prompts that are not timed.
        repeats: Passes that are.
        note: What the reader of its figures should know.
        speeds: Tokens a second of each timed pass over the prompts, prompts left out.
        whole_speeds: The same with the prompts' passes.
        firsts: Seconds until the first token, for each prompt and pass.
        counts: What its rounds did, over all timed passes.
        arms: How many of them were of each method and lookahead.
        seconds: Time of these rounds.
        written: Rows written in the last pass, by prompt.
        peak: Most device memory in use meanwhile, in bytes.
        failed: Why it cannot run.
    """

    name: str
    run: Run
    method: str = ""
    warm_ups: int = 1
    repeats: int = 1
    note: str = ""
    speeds: list[float] = field(default_factory=list)
    whole_speeds: list[float] = field(default_factory=list)
    firsts: list[float] = field(default_factory=list)
    counts: Counts = field(default_factory=Counts)
    arms: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    written: list[list[list[int]]] = field(default_factory=list)
    peak: int = 0
    failed: str = ""

    @property
    def ours(self) -> bool:
        """Whether it is not one of transformers' own."""
        return not self.name.startswith(EAGER)


class _Watch:
    """Notes when each pass of transformers' `generate` ended, in the place of a streamer."""

    def __init__(self) -> None:
        self.passes: list[tuple[float, int]] = []

    def put(self, value: Tensor) -> None:
        """Take note of new tokens; the first are the prompt."""
        self.passes.append((time.perf_counter(), value.numel()))

    def end(self) -> None:
        """Nothing is left to be done."""


def _library(pair: Pair, drafts: bool = False, **extra: Any) -> Run:
    """Return transformers' own `generate`."""
    target = pair.target
    ends = target.generation_config.eos_token_id
    ends = {ends} if isinstance(ends, int) else set(ends or ())

    def trim(row: list[int]) -> list[int]:
        """Drop the padding after a row's end token."""
        last = next((i for i, token in enumerate(row) if token in ends), len(row))
        return row[: last + 1]

    def run(ids: Tensor, mask: Tensor, options: dict[str, Any]) -> Took:
        ids, mask = ids.to(target.device), mask.to(target.device)
        watch, widths = _Watch(), []
        hook = (
            target.register_forward_hook(
                lambda module, given, out: widths.append(out.logits.shape[1])
            )
            if drafts
            else None
        )
        begun = time.perf_counter()
        try:
            made = target.generate(ids, attention_mask=mask, streamer=watch, **options, **extra)
            ended = time.perf_counter()
        finally:
            if hook is not None:
                hook.remove()
        (_, _), (first, first_tokens), *later = watch.passes
        counts = None
        if drafts:
            counts = Counts(rounds=len(later), row_rounds=len(later))
            for (_, settled), width in zip(later, widths[1:], strict=True):
                counts.generated += settled
                counts.proposed += width - 1
                counts.accepted += settled - 1
                counts.judged += min(settled, width - 1)
        rows = [trim(row) for row in made[:, ids.shape[1] :].tolist()]
        return Took(rows, first_tokens, first - begun, ended - begun, counts)

    return run


Decoders = dict[tuple[str, int | str], HeteroSpeculativeDecoder]


def _ours(pair: Pair, known: Decoders, method: str, lookahead: int | str) -> Run:
    """Return how a decoder of ours runs, the same one in every setting."""
    if (method, lookahead) not in known:
        settings: dict[str, Any] = {"method": method, "lookahead": lookahead}
        known[method, lookahead] = HeteroSpeculativeDecoder(*pair.parts, **settings)
    decoder = known[method, lookahead]

    def run(ids: Tensor, mask: Tensor, options: dict[str, Any]) -> Took:
        begun = time.perf_counter()
        rounds = decoder.start(input_ids=ids, attention_mask=mask, **options)
        rows = list(rounds.rows)
        steps = rounds.run()
        first_tokens = sum(len(new) for _, new in next(steps))
        first, before = time.perf_counter(), copy.deepcopy(rounds.stats)
        for _ in steps:
            pass
        ended = time.perf_counter()
        counts = Counts.between(before, rounds.stats)
        return Took(
            [row.new for row in rows],
            first_tokens,
            first - begun,
            ended - begun,
            counts,
            rounds.stats.arms,
        )

    return run


def find_contenders(
    pair: Pair,
    methods: Sequence[str],
    lookaheads: Sequence[int],
    *,
    sampled: bool,
    peers: bool,
    compiled: bool,
    known: Decoders | None = None,
) -> list[Contender]:
    """Return all who decode this pair, plain decoding of transformers and of ours first.

    Args:
        pair: The models.
        methods: Methods of ours.
        lookaheads: Lookaheads of each; `auto` chooses its own.
        sampled: Whether tokens are sampled.
        peers: With transformers' own assisted generation and prompt lookup.
        compiled: With transformers' static cache and compiled passes.
        known: Our decoders of this pair from earlier settings; new ones are added.
    """
    known = {} if known is None else known
    found = [Contender(EAGER, _library(pair)), Contender(PLAIN, _ours(pair, known, "auto", 0))]
    if compiled:
        found.append(Contender(COMPILED, _library(pair, **_static())))
    if peers:
        lookup = _library(pair, drafts=True, prompt_lookup_num_tokens=10)
        found.append(Contender(LOOKUP, lookup))
        if sampled:
            name = "transformers, assisted tli, as shipped"
            run = _library(pair, drafts=True, **assisted.on_a_copy(pair))
            note = "judges drafts by other tokens' probabilities"
            found.append(Contender(name, run, note=note))
            name = "transformers, assisted tli, in order"
            run = _library(pair, drafts=True, **assisted.in_order(pair))
            found.append(Contender(name, run))
        else:
            name = "transformers, assisted slem"
            run = _library(pair, drafts=True, **assisted.on_a_copy(pair))
            found.append(Contender(name, run))
    for method in methods:
        if method == "auto":
            run = _ours(pair, known, "auto", "auto")
            found.append(Contender("auto", run, method="auto", warm_ups=3))
            continue
        for lookahead in lookaheads:
            run = _ours(pair, known, method, lookahead)
            found.append(Contender(f"{method} {lookahead}", run, method=method))
    return found


def _static() -> dict[str, Any]:
    """Return the arguments that make `generate` compile its passes, on any device."""
    from transformers import CompileConfig

    compiling = CompileConfig()
    compiling._compile_all_devices = True
    return {"cache_implementation": "static", "compile_config": compiling}


def wait() -> None:
    """Wait for the device."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
