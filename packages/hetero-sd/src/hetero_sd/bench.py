"""Speed of plain and speculative decoding of one pair of models, with what explains it."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fourfold_common import Results, seed_everything

from ._files import write_atomically
from .decoder import HeteroSpeculativeDecoder
from .pairs import Pair
from .rounds import Stats

_logger = logging.getLogger(__name__)
ALONE = "transformers, target alone"


@dataclass
class _Contender:
    """Who decodes, and what came of it."""

    name: str
    run: Callable[[Tensor, dict[str, Any]], tuple[list[list[int]], Stats | None]]
    note: str = ""
    speeds: list[float] = field(default_factory=list)
    stats: list[Stats] = field(default_factory=list)
    same: int = 0
    failed: str = ""


def run_bench(
    pair: Pair,
    prompts: Sequence[Tensor],
    output: Path,
    *,
    methods: Sequence[str] = ("tli", "slem", "slrs", "auto"),
    lookaheads: Sequence[int] = (2, 4),
    temperatures: Sequence[float] = (0.0, 1.0),
    batch: int = 1,
    tokens: int = 48,
    repeats: int = 3,
    assisted: bool = True,
    compiled: bool = False,
    seed: int = 0,
    command: str = "",
    progress: bool = True,
) -> Results:
    """Time all contenders in turn on every prompt, save figures, table and plot, and return them.

    Each decodes once untimed; then they take turns, `repeats` times over all prompts. Speeds are
    medians over the repeats of tokens by seconds summed over prompts, prompt passes included.

    Args:
        pair: The models.
        prompts: Target ids of each prompt, shape `(1, length)`.
        output: Folder for `bench.json`, `bench.md` and `bench.png`.
        methods: Methods of ours.
        lookaheads: Lookaheads of each; `auto` chooses its own.
        temperatures: 0 is greedy.
        batch: Copies of each prompt decoded together.
        tokens: New tokens of each prompt.
        repeats: Timed passes over the prompts, 1 or more.
        assisted: Time transformers' assisted generation too, where it can run.
        compiled: Time transformers with a static cache, compiled, too; compiling takes minutes.
        seed: Seed of sampling.
        command: Command line to note.
        progress: Show a progress bar.

    Raises:
        ValueError: `repeats` is below 1 or there is no prompt.
    """
    if repeats < 1 or not prompts:
        raise ValueError("`repeats` must be 1 or more, and `prompts` hold at least one prompt.")
    from tqdm.auto import tqdm

    seed_everything(seed)
    results = Results("hetero-sd", command=command, seed=seed)
    plotted: dict[str, dict[str, float]] = {}
    for temperature in temperatures:
        options: dict[str, Any] = {"do_sample": False}
        if temperature > 0:
            options = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        options["max_new_tokens"] = tokens
        contenders = _contenders(
            pair, methods, lookaheads, temperature > 0, assisted and batch == 1, compiled
        )
        total = (1 + repeats) * len(contenders)
        with tqdm(total=total, disable=not progress, desc=f"temperature {temperature}") as bar:
            for turn in range(1 + repeats):
                wanted: list[list[list[int]]] = []
                for contender in contenders:
                    made, seconds = _turn(contender, prompts, batch, options, seed + turn)
                    bar.update()
                    if contender.failed:
                        continue
                    if contender.name == ALONE:
                        wanted = made
                    same = [_trimmed(a, pair) == _trimmed(b, pair) for a, b in _zip(made, wanted)]
                    contender.same = sum(same)
                    if turn:
                        count = sum(len(_trim(row, pair)) for rows in made for row in rows)
                        contender.speeds.append(count / seconds)
        mode = "greedy" if temperature == 0 else f"temperature {temperature:g}"
        plotted[mode] = _record(results, contenders, pair, mode, batch, len(prompts))
    results.save(output / "bench.json")
    table = results.to_markdown() + "\n"
    write_atomically(output / "bench.md", lambda name: Path(name).write_text(table, "utf-8"))
    _plot(output / "bench.png", pair.name, plotted)
    return results


def _zip(made: list[list[list[int]]], wanted: list[list[list[int]]]) -> list[Any]:
    return list(zip(made, wanted, strict=True))


def _trim(row: list[int], pair: Pair) -> list[int]:
    """Drop the padding after a row's end token."""
    ends = pair.target.generation_config.eos_token_id
    ends = {ends} if isinstance(ends, int) else set(ends or ())
    last = next((i for i, token in enumerate(row) if token in ends), len(row))
    return row[: last + 1]


def _trimmed(rows: list[list[int]], pair: Pair) -> list[list[int]]:
    return [_trim(row, pair) for row in rows]


def _turn(
    contender: _Contender, prompts: Sequence[Tensor], batch: int, options: dict[str, Any], seed: int
) -> tuple[list[list[list[int]]], float]:
    """Decode all prompts; return the new tokens and the seconds it took."""
    made, seconds = [], 0.0
    for place, ids in enumerate(prompts):
        if contender.failed:
            break
        torch.manual_seed(seed + place)
        _wait()
        begun = time.perf_counter()
        try:
            rows, stats = contender.run(ids.expand(batch, -1), options)
        except Exception as error:  # A peer that cannot run is a finding, not an end.
            contender.failed = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            _logger.debug("%s failed", contender.name, exc_info=True)
            break
        _wait()
        seconds += time.perf_counter() - begun
        made.append(rows)
        if stats is not None:
            contender.stats.append(stats)
    return made, seconds


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _contenders(
    pair: Pair,
    methods: Sequence[str],
    lookaheads: Sequence[int],
    sampled: bool,
    assisted: bool,
    compiled: bool,
) -> list[_Contender]:
    target = pair.target

    def library(**extra: Any) -> Callable[..., tuple[list[list[int]], None]]:
        def run(ids: Tensor, options: dict[str, Any]) -> tuple[list[list[int]], None]:
            ids = ids.to(target.device)
            mask = torch.ones_like(ids)
            made = target.generate(ids, attention_mask=mask, **options, **extra)
            return made[:, ids.shape[1] :].tolist(), None

        return run

    def ours(**settings: Any) -> Callable[..., tuple[list[list[int]], Stats]]:
        decoder = HeteroSpeculativeDecoder(*pair.parts, **settings)

        def run(ids: Tensor, options: dict[str, Any]) -> tuple[list[list[int]], Stats]:
            made = decoder.generate(input_ids=ids, **options)
            return made.tokens, made.stats

        return run

    found = [_Contender(ALONE, library())]
    if compiled:
        static = library(cache_implementation="static")
        found.append(_Contender("transformers, static and compiled", static))
    found.append(_Contender("target alone", ours(lookahead=0)))
    if assisted:
        extra = {
            "assistant_model": pair.drafter,
            "tokenizer": pair.target_tokenizer,
            "assistant_tokenizer": pair.drafter_tokenizer,
        }
        note = "not lossless as shipped" if sampled else ""
        name = "transformers, assisted " + ("tli" if sampled else "slem")
        found.append(_Contender(name, _on_a_copy(pair, extra), note))
    for method in methods:
        for lookahead in ("auto",) if method == "auto" else lookaheads:
            name = "auto" if method == "auto" else f"{method} {lookahead}"
            found.append(_Contender(name, ours(method=method, lookahead=lookahead)))
    return found


def _on_a_copy(pair: Pair, extra: dict[str, Any]) -> Callable[..., tuple[list[list[int]], None]]:
    """Assisted generation on copies of both models, since it changes what it is given."""
    import copy

    target, drafter = copy.deepcopy(pair.target), copy.deepcopy(pair.drafter)

    def run(ids: Tensor, options: dict[str, Any]) -> tuple[list[list[int]], None]:
        ids = ids.to(target.device)
        made = target.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            **options,
            **{**extra, "assistant_model": drafter},
        )
        return made[:, ids.shape[1] :].tolist(), None

    return run


def _record(
    results: Results,
    contenders: list[_Contender],
    pair: Pair,
    mode: str,
    batch: int,
    prompts: int,
) -> dict[str, float]:
    by_name = {contender.name: contender for contender in contenders}
    base = statistics.median(by_name[ALONE].speeds)
    plain = statistics.median(by_name["target alone"].speeds)
    speeds: dict[str, float] = {}
    for contender in contenders:
        where = {"target": pair.name, "decoding": mode, "batch": batch}

        def add(
            metric: str,
            value: float | str,
            unit: str = "",
            who: str = contender.name,
            where: dict[str, Any] = where,
            **more: Any,
        ) -> None:
            results.add(who, metric, value, unit, **more, **where)

        if contender.failed:
            add("note", contender.failed)
            continue
        ordered = sorted(contender.speeds)
        speed = statistics.median(ordered)
        speeds[contender.name] = speed
        add(
            "speed",
            speed,
            "tokens/s",
            p20=ordered[len(ordered) // 5],
            p80=ordered[-1 - len(ordered) // 5],
            n=len(ordered),
        )
        add("speed-up over transformers", speed / base, "x")
        add("speed-up over plain", speed / plain, "x")
        stats = contender.stats
        proposed = sum(s.proposed for s in stats)
        if proposed:
            rounds, row_rounds = sum(s.rounds for s in stats), sum(s.row_rounds for s in stats)
            drafted = sum(s.drafted for s in stats)
            efficiency = sum(s.generated for s in stats) / row_rounds
            step = batch / plain  # Seconds of a plain round.
            seconds = {
                part: sum(s.seconds[part] for s in stats) / rounds for part in stats[0].seconds
            }
            add("acceptance", sum(s.accepted for s in stats) / proposed)
            add("block efficiency", efficiency, "tokens/pass")
            # Where a whole round is one graph, its drafting is not timed apart.
            if seconds["draft"] > 0:
                add("c", seconds["draft"] / step * rounds * batch / max(drafted, 1))
                add("v", seconds["verify"] / step)
                rest = seconds["total"] - seconds["draft"] - seconds["verify"]
                add("o", rest / step)
                cost = (seconds["draft"] + step) / step
                add("predicted speed-up over plain", efficiency / cost, "x")
        if mode == "greedy":
            add("identical", f"{contender.same} of {prompts}")
        if contender.note:
            add("note", contender.note)
    return speeds


def _plot(path: Path, name: str, plotted: dict[str, dict[str, float]]) -> None:
    """Draw tokens a second of each contender."""
    try:
        import matplotlib
    except ImportError:
        _logger.warning("no plot: it needs matplotlib")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    most = max(len(speeds) for speeds in plotted.values())
    figure, axes = pyplot.subplots(
        1,
        len(plotted),
        figsize=(4.5 * len(plotted), 0.9 + 0.32 * most),
        layout="constrained",
        squeeze=False,
    )
    for axis, (mode, speeds) in zip(axes[0], plotted.items(), strict=True):
        names = list(speeds)[::-1]
        colours = ["#7f7f7f" if "alone" in n or "transformers" in n else "#0072b2" for n in names]
        bars = axis.barh(names, [speeds[n] for n in names], color=colours)
        axis.bar_label(bars, fmt="%.1f", fontsize=8, padding=2)
        axis.axvline(speeds.get("target alone", 0.0), color="#e69f00", linewidth=1)
        axis.set_xlabel("tokens per second")
        axis.set_title(mode, fontsize=10)
        axis.margins(x=0.15)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(name, fontsize=10)
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=130))
    pyplot.close(figure)
