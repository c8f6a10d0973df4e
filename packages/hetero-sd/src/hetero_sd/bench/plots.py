"""Plots of what the benchmark found, out of its results alone."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from fourfold_common import Results

from .._files import write_atomically
from ..speed import best_speedup
from .contenders import PLAIN

_logger = logging.getLogger(__name__)
_COSTS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.4)
_MARKERS = "os^Dv*PX"
_FEW = 24  # Points up to which each is named.


def draw(results: Results, output: Path) -> list[Path]:
    """Draw the speeds, and the speed-up over acceptance; return the files written.

    Args:
        results: What `run_bench` returned, or `Results.load` of its file.
        output: Folder for `bench.png` and, if anything was drafted, `speedup.png`.
    """
    try:
        import matplotlib
    except ImportError:
        _logger.warning("no plots: they need matplotlib")
        return []
    matplotlib.use("Agg")
    from matplotlib import pyplot

    output.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, make in (("bench.png", _speeds), ("speedup.png", _over_acceptance)):
        figure = make(results)
        if figure is not None:
            paths.append(output / name)
            write_atomically(paths[-1], partial(figure.savefig, dpi=130))
            pyplot.close(figure)
    return paths


def _found(results: Results, metric: str) -> Iterator[tuple[dict[str, Any], str, float]]:
    """Yield setting, contender and figure of all cases of a metric."""
    for case in results.cases:
        if case["metric"] == metric:
            yield case["parameters"], case["provider"], case["median"]


def _speeds(results: Results) -> Any:
    """Return bars of tokens a second: a column for each way to choose tokens."""
    from matplotlib import pyplot

    table: dict[tuple[str, int], dict[str, dict[str, float]]] = {}
    for where, who, speed in _found(results, "speed"):
        line = table.setdefault((where["prompts"], where["batch"]), {})
        line.setdefault(where["decoding"], {})[who] = speed
    if not table:
        return None
    columns = list(dict.fromkeys(decoding for line in table.values() for decoding in line))
    most = max(len(speeds) for line in table.values() for speeds in line.values())
    figure, axes = pyplot.subplots(
        len(table),
        len(columns),
        figsize=(5.2 * len(columns), 0.9 + len(table) * (0.5 + 0.28 * most)),
        layout="constrained",
        squeeze=False,
    )
    for line, ((prompts, batch), found) in zip(axes, table.items(), strict=True):
        for axis, decoding in zip(line, columns, strict=True):
            speeds = found.get(decoding, {})
            names = list(speeds)[::-1]
            ours = [name != PLAIN and "transformers" not in name for name in names]
            colours = ["#0072b2" if own else "#7f7f7f" for own in ours]
            bars = axis.barh(names, [speeds[name] for name in names], color=colours)
            axis.bar_label(bars, fmt="%.1f", fontsize=8, padding=2)
            axis.axvline(speeds.get(PLAIN, 0.0), color="#e69f00", linewidth=1)
            axis.set_title(f"{prompts}, {decoding}, batch {batch}", fontsize=10)
            axis.margins(x=0.15)
            axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[-1]:
        axis.set_xlabel("tokens per second")
    figure.suptitle(_target(results), fontsize=10)
    return figure


def _over_acceptance(results: Results) -> Any:
    """Return measured speed-ups over acceptance, by c, on the best that the model predicts."""
    from matplotlib import pyplot
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LogNorm

    gained = {(*where.values(), who): value for where, who, value in _found(results, "over plain")}
    costs = {(*where.values(), who): value for where, who, value in _found(results, "c")}
    points = []
    for where, who, acceptance in _found(results, "acceptance"):
        key = *where.values(), who
        if key in gained and key in costs:
            points.append((acceptance, gained[key], costs[key], who, where))
    if not points:
        return None
    figure, axis = pyplot.subplots(figsize=(7.5, 5), layout="constrained")
    scale, colours = LogNorm(_COSTS[0], _COSTS[-1]), pyplot.get_cmap("viridis")
    acceptances = [i / 100 for i in range(98)]
    for c in _COSTS:
        best = [best_speedup(acceptance, c)[0] for acceptance in acceptances]
        label = "model: best lookahead, v = 1, o = 0" if c == _COSTS[0] else None
        axis.plot(acceptances, best, color=colours(scale(c)), linewidth=1, label=label)
    kinds = list(dict.fromkeys((p[4]["decoding"], p[4]["batch"]) for p in points))
    for kind, marker in zip(kinds, _MARKERS * len(kinds), strict=False):
        here = [p for p in points if (p[4]["decoding"], p[4]["batch"]) == kind]
        axis.scatter(
            [p[0] for p in here],
            [p[1] for p in here],
            c=[p[2] for p in here],
            cmap=colours,
            norm=scale,
            marker=marker,
            s=26,
            label=f"{kind[0]}, batch {kind[1]}",
        )
        for acceptance, speed, _, who, _ in here if len(points) <= _FEW else ():
            axis.annotate(
                who, (acceptance, speed), fontsize=6, xytext=(3, 3), textcoords="offset points"
            )
    bar = figure.colorbar(ScalarMappable(scale, colours), ax=axis, ticks=_COSTS, format="%g")
    bar.set_label("c: cost of a drafter step in target steps")
    bar.minorticks_off()
    axis.axhline(1.0, color="#7f7f7f", linewidth=0.8, linestyle=":")
    axis.set_xlim(0, 1)
    axis.set_ylim(0, max(3.0, 1.15 * max(p[1] for p in points)))
    axis.set_xlabel("acceptance: share of judged proposals")
    axis.set_ylabel("speed over plain decoding")
    axis.legend(frameon=False, fontsize=7, loc="upper left")
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_title(_target(results), fontsize=10)
    return figure


def _target(results: Results) -> str:
    targets = dict.fromkeys(case["parameters"]["target"] for case in results.cases)
    return "\n".join(targets) if len(targets) < 4 else f"{len(targets)} pairs"
