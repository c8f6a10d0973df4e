"""The benchmark itself: contenders take turns, and what they did becomes figures."""

from __future__ import annotations

import copy
import logging
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fourfold_common import Results, seed_everything

from .._files import write_atomically
from ..decoder import HeteroSpeculativeDecoder
from ..pairs import Pair
from .contenders import COMPILED, EAGER, PLAIN, Contender, Decoders, find_contenders, wait
from .costs import Costs
from .exactness import judge_greedy, judge_sampled, openest
from .plots import draw

_logger = logging.getLogger(__name__)


class Decoding(NamedTuple):
    """How tokens are chosen.

    Attributes:
        temperature: 0 is greedy.
        top_p: Probability that the likeliest tokens must hold; 1 is all.
    """

    temperature: float
    top_p: float = 1.0

    def __str__(self) -> str:
        """Return what tables call it."""
        if not self.temperature:
            return "greedy"
        nucleus = f", top-p {self.top_p:g}" if self.top_p < 1 else ""
        return f"temperature {self.temperature:g}{nucleus}"

    @property
    def options(self) -> dict[str, Any]:
        """The same as options of `generate`."""
        if not self.temperature:
            return {"do_sample": False}
        chosen = {"temperature": self.temperature, "top_p": self.top_p, "top_k": 0}
        return {"do_sample": True, **chosen}


class _Group(NamedTuple):
    """Prompts that are decoded together, and the same padded on the left with a mask."""

    rows: list[Tensor]
    ids: Tensor
    mask: Tensor


def run_bench(
    pair: Pair,
    prompts: Mapping[str, Sequence[Tensor]],
    output: Path,
    *,
    methods: Sequence[str] = ("tli", "slem", "slrs", "auto"),
    lookaheads: Sequence[int] = (2, 4),
    decodings: Sequence[Decoding] = (Decoding(0.0), Decoding(1.0)),
    batches: Sequence[int] = (1,),
    tokens: int = 48,
    repeats: int = 3,
    draws: int = 0,
    peers: bool = True,
    peer_repeats: int | None = None,
    warm_ups: int | None = None,
    compiled: bool = False,
    seed: int = 0,
    command: str = "",
    progress: bool = True,
) -> Results:
    """Time all contenders in turn on every prompt, save figures, table and plots, and return them.

    Each decodes untimed first; then they take turns prompt by prompt, `repeats` times. Speeds are
    medians over the repeats of tokens by seconds, both summed over prompts; the prompt's own pass
    and its tokens count in the end-to-end speed alone. Our decoders stay from setting to setting,
    as a user's would, so that `auto` comes to a set of prompts with what it learnt from others.

    Args:
        pair: The models.
        prompts: Target ids of each prompt, shape `(1, length)`, by the name of their set.
        output: Folder for `bench.json`, `bench.md` and the plots; the first two are
            written anew after each setting.
        methods: Methods of ours.
        lookaheads: Lookaheads of each; `auto` chooses its own.
        decodings: Ways to choose tokens.
        batches: Numbers of prompts decoded together.
        tokens: New tokens of each prompt, 2 or more.
        repeats: Timed passes over the prompts, 1 or more.
        draws: Draws of one token, to compare with the target's law; 0 for no such test.
        peers: Time transformers' assisted generation and prompt lookup too, one row at a time.
        peer_repeats: Timed passes of transformers' own ways, which take longest; `repeats` if
            missing.
        warm_ups: Untimed passes of each; if missing 1, and of `auto` 3, in which it learns.
        compiled: Time transformers with a static cache, compiled, too; compiling takes minutes.
        seed: Seed of sampling.
        command: Command line to note.
        progress: Show a progress bar.

    Raises:
        ValueError: `repeats` or `tokens` is too small, or there is no prompt.
    """
    peer_repeats = repeats if peer_repeats is None else min(peer_repeats, repeats)
    if min(repeats, peer_repeats) < 1 or tokens < 2 or not prompts or not all(prompts.values()):
        raise ValueError(
            "`repeats` and `peer_repeats` must be 1 or more, `tokens` 2 or more, and `prompts` "
            "hold at least one of each set."
        )
    from tqdm.auto import tqdm

    seed_everything(seed)
    results = Results("hetero-sd", command=command, seed=seed)
    plain = HeteroSpeculativeDecoder(*pair.parts, method="tli" if "tli" in methods else "slem")
    known: Decoders = {}
    for batch in batches:
        for name, texts in prompts.items():
            groups = _groups(texts, batch, pair)
            context = sum(g.ids.shape[1] for g in groups) // len(groups) + tokens // 2
            for decoding in decodings:
                costs = Costs(plain, batch, context)
                contenders = find_contenders(
                    pair,
                    methods,
                    lookaheads,
                    sampled=decoding.temperature > 0,
                    peers=peers and batch == 1,
                    compiled=compiled,
                    known=known,
                )
                for contender in contenders:
                    contender.repeats = repeats if contender.ours else peer_repeats
                    contender.warm_ups = contender.warm_ups if warm_ups is None else warm_ups
                    if contender.name == EAGER and results.cases:
                        contender.warm_ups = 0  # It prepares nothing, and takes longest.
                    if contender.method == "auto":  # As warm-ups get the others ready.
                        room = max(group.ids.shape[1] for group in groups) + tokens
                        known["auto", "auto"].prepare(batch, length=room, **decoding.options)
                total = len(groups) * sum(c.warm_ups + c.repeats for c in contenders)
                options = {**decoding.options, "max_new_tokens": tokens}
                title = f"{name}, {decoding}, batch {batch}"
                with tqdm(total=total, disable=not progress, desc=title) as bar:
                    for turn in range(-max(c.warm_ups for c in contenders), repeats):
                        _take_turns(contenders, groups, options, seed, turn, bar)
                where = {
                    "target": pair.name,
                    "prompts": name,
                    "decoding": str(decoding),
                    "batch": batch,
                }
                table = _Table(results, where, contenders, costs, batch)
                for contender in contenders:
                    table.add_speeds(contender)
                    table.add_rounds(contender)
                    verdict = _judge(contender, contenders[0], groups, pair, options, draws, seed)
                    table.add_verdict(contender, *verdict)
                _save(results, output)
                contenders.clear()
    draw(results, output)
    return results


def _save(results: Results, output: Path) -> None:
    results.save(output / "bench.json")
    table = report(results)
    write_atomically(output / "bench.md", lambda name: Path(name).write_text(table, "utf-8"))


_BRIEF = ("speed", "over plain", "acceptance", "block efficiency", "c", "o", "of predicted")


def report(results: Results, brief: bool = False) -> str:
    """Return a table for each setting, in Markdown.

    Args:
        results: What `run_bench` returned, or `Results.load` of its file.
        brief: Leave out what a terminal has no room for.
    """
    settings: dict[str, list[dict[str, Any]]] = {}
    for case in results.cases:
        if brief and case["metric"] not in (*_BRIEF, "verdict", "note"):
            continue
        where = case["parameters"]
        title = (
            f"{where['target']}: {where['prompts']}, {where['decoding']}, batch {where['batch']}"
        )
        settings.setdefault(title, []).append({**case, "parameters": {}})
    parts = []
    for title, cases in settings.items():
        one = copy.copy(results)
        one.cases = cases
        parts.append(f"### {title}\n\n{one.to_markdown()}\n")
    return "\n".join(parts)


def _groups(texts: Sequence[Tensor], batch: int, pair: Pair) -> list[_Group]:
    """Return the prompts, `batch` at a time; the last group is filled up with the first ones."""
    pad = pair.target_tokenizer.pad_token_id or 0
    groups = []
    for place in range(0, len(texts), batch):
        rows = [texts[(place + step) % len(texts)] for step in range(batch)]
        width = max(row.shape[1] for row in rows)
        ids, mask = torch.full((batch, width), pad), torch.zeros(batch, width, dtype=torch.long)
        for line, row in enumerate(rows):
            ids[line, width - row.shape[1] :] = row[0]
            mask[line, width - row.shape[1] :] = 1
        groups.append(_Group(rows, ids, mask))
    return groups


def _take_turns(
    contenders: list[Contender],
    groups: Sequence[_Group],
    options: dict[str, Any],
    seed: int,
    turn: int,
    bar: Any,
) -> None:
    """Let all contenders decode each prompt, one after another; turns below 0 are not timed.

    They take turns prompt by prompt, in another order each time, so that what else the machine does
    falls on all of them.
    """
    here = [c for c in contenders if -c.warm_ups <= turn < c.repeats]
    tokens, seconds = (
        dict.fromkeys((c.name for c in here), 0),
        dict.fromkeys((c.name for c in here), 0.0),
    )
    all_tokens, all_seconds = dict(tokens), dict(seconds)
    for contender in here:
        contender.written = []
    for place, group in enumerate(groups):
        first = (turn + place) % len(here)
        for contender in [*here[first:], *here[:first]]:
            bar.update()
            if contender.failed:
                continue
            torch.manual_seed(seed + 1000 * turn + place)
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            wait()
            try:
                took = contender.run(group.ids, group.mask, options)
            except Exception as error:  # A peer that cannot run is a finding, not an end.
                contender.failed = " ".join(f"{type(error).__name__}: {error}".split())[:200]
                _logger.debug("%s failed", contender.name, exc_info=True)
                continue
            contender.written.append(took.rows)
            if turn < 0:
                continue
            if torch.cuda.is_available():
                contender.peak = max(contender.peak, torch.cuda.max_memory_allocated())
            written = sum(map(len, took.rows))
            tokens[contender.name] += written - took.first_tokens
            seconds[contender.name] += took.seconds - took.first_seconds
            all_tokens[contender.name] += written
            all_seconds[contender.name] += took.seconds
            contender.firsts.append(took.first_seconds)
            if took.counts is not None:
                contender.counts.add(took.counts)
                for arm, count in took.arms.items():
                    contender.arms[arm] = contender.arms.get(arm, 0) + count
                contender.seconds += took.seconds - took.first_seconds
    for contender in here if turn >= 0 else ():
        if not contender.failed:
            name = contender.name
            if tokens[name]:  # Else all came with the prompts' passes.
                contender.speeds.append(tokens[name] / seconds[name])
            contender.whole_speeds.append(all_tokens[name] / all_seconds[name])


def _judge(
    contender: Contender,
    reference: Contender,
    groups: Sequence[_Group],
    pair: Pair,
    options: dict[str, Any],
    draws: int,
    seed: int,
) -> tuple[str, str]:
    """Return the verdict on a contender's texts, and what it rests on; "" if nothing was tested."""
    if contender.failed or contender is reference:
        return "", ""
    if not options["do_sample"]:
        rows = [row for group in groups for row in group.rows]
        found = [row for group in contender.written for row in group]
        wanted = [row for group in reference.written for row in group]
        verdict, same = judge_greedy(pair.target, rows, found, wanted)
        return verdict, f"{same} of {len(rows)} texts identical"
    if not draws or contender.name == COMPILED:
        return "", ""
    torch.manual_seed(seed)
    alone = contender.name.startswith(EAGER)
    place = openest(pair.target, groups[0].rows[0], reference.written[0][0], options)
    return judge_sampled(pair.target, contender, place, options, draws, alone)


class _Table:
    """Turns what contenders did in one setting into figures.

    Args:
        results: Where to put them.
        where: What the setting is.
        contenders: All of them.
        costs: Times of single passes.
        batch: Rows decoded together.
    """

    def __init__(
        self,
        results: Results,
        where: dict[str, Any],
        contenders: list[Contender],
        costs: Costs,
        batch: int,
    ) -> None:
        self._results, self._where, self._costs, self._batch = results, where, costs, batch
        speeds = {c.name: statistics.median(c.speeds) for c in contenders if c.speeds}
        self._eager, self._plain = speeds.get(EAGER), speeds.get(PLAIN)
        self._speeds = speeds
        (plain,) = (c for c in contenders if c.name == PLAIN)
        self._plain_pass = plain.counts.generated / max(plain.counts.rounds, 1)
        self._step = plain.seconds / max(plain.counts.rounds, 1)  # Seconds of a plain round.

    def _add(
        self, who: Contender, metric: str, value: float | str, unit: str = "", **more: Any
    ) -> None:
        self._results.add(who.name, metric, value, unit, **more, **self._where)

    def add_speeds(self, who: Contender) -> None:
        """Add tokens a second, and how they compare."""
        if who.failed:
            self._add(who, "note", who.failed)
            return
        speed = self._speeds.get(who.name)
        if speed is not None:
            self._add(who, "speed", speed, "tokens/s", **_spread(who.speeds), **_peak(who))
        if speed is not None and self._eager:
            self._add(who, "over transformers", speed / self._eager, "x")
        if speed is not None and self._plain:
            self._add(who, "over plain", speed / self._plain, "x")
        whole = statistics.median(who.whole_speeds)
        self._add(who, "end to end", whole, "tokens/s", **_spread(who.whole_speeds))
        firsts = [1e3 * seconds for seconds in who.firsts]
        self._add(who, "first token", statistics.median(firsts), "ms", **_spread(firsts))

    def add_rounds(self, who: Contender) -> None:
        """Add what drafts brought, what they cost, and the speed that both predict."""
        counts = who.counts
        if who.method == "auto" and who.arms:
            often = sorted(who.arms.items(), key=lambda pair: -pair[1])
            self._add(who, "rounds", ", ".join(f"{count} of {arm}" for arm, count in often))
        if who.name == PLAIN and counts.rounds:
            self._add(who, "overhead", 1e3 * (self._step - self._costs.target(1)), "ms/round")
        if who.failed or not counts.proposed:
            return
        efficiency = counts.generated / counts.row_rounds
        self._add(who, "accepted", counts.accepted / counts.proposed)
        self._add(who, "acceptance", counts.accepted / counts.judged)
        self._add(who, "block efficiency", efficiency, "tokens/pass")
        if not who.method or not self._plain:
            return
        one, steps = self._costs.target(1), counts.drafted / counts.row_rounds
        draft = self._costs.drafter(who.method in ("tli", "standard"))
        verify = self._costs.target(1 + counts.proposed / counts.row_rounds)
        c, v, seconds = draft / one, verify / one, who.seconds / counts.rounds
        self._add(who, "c", c)
        self._add(who, "v", v)
        # In plain rounds, which were timed in the same minutes, and not long after as passes were.
        self._add(who, "o", seconds / self._step - c * steps - v)
        self._add(who, "overhead", 1e3 * (seconds - steps * draft - verify), "ms/round")
        # Of a batch, whose rows end at their own time, what a pass brings to all of them counts.
        gain = counts.generated / counts.rounds / self._plain_pass
        predicted = gain / (c * steps + v)
        self._add(who, "predicted over plain", predicted, "x")
        self._add(who, "of predicted", self._speeds[who.name] / self._plain / predicted, "x")

    def add_verdict(self, who: Contender, verdict: str, detail: str) -> None:
        """Add whether its texts are the target's own."""
        if verdict:
            self._add(who, "verdict", verdict)
            self._add(who, "tested", detail)
        if who.note and not who.failed:
            self._add(who, "note", who.note)


def _spread(values: Sequence[float]) -> dict[str, Any]:
    ordered = sorted(values)
    fifth = len(ordered) // 5
    return {"p20": ordered[fifth], "p80": ordered[-1 - fifth], "n": len(ordered)}


def _peak(who: Contender) -> dict[str, Any]:
    return {"peak_mib": who.peak / 2**20} if who.peak else {}
