"""Plots of benchmark results, made from their JSON files alone."""

from pathlib import Path
from typing import Any

from fourfold_common import Results

_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#999999")

# What each topic shows: its metrics, the axis, and a line that marks equality or a limit.
_BARS: dict[str, tuple[tuple[str, ...], str, float | None]] = {
    "decode": (("over dense",), "time of a decoding step, times the dense model's", 1.0),
    "prefill": (("over dense",), "time to read the prompts, times the dense model's", 1.0),
    "train": (("train",), "tokens per second", None),
    "convert": (("speed",), "GB/s", None),
    "hw": (("sequential write", "random rows", "host to device"), "GB/s", None),
}
_HIDDEN = {
    "length", "format", "row_bytes", "direct", "resident", "hit_rate", "page_cache", "mebibytes",
    "tokens_micro", "ids_micro", "ids_step",
}  # fmt: skip


def draw(path: str | Path) -> Path | None:
    """Draw a topic's results and return the picture beside them, or None without matplotlib.

    Args:
        path: A file that `mole bench` wrote.

    Raises:
        ValueError: The file holds no results, or no topic's.
    """
    results = Results.load(path)
    topic = results.command.removeprefix("mole bench ")
    if topic not in (*_BARS, "quant", "cache"):
        raise ValueError(f"`path` must hold results of `mole bench`; got those of {topic!r}.")
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    if topic in _BARS:
        metrics, label, line = _BARS[topic]
        found = [case for case in results.cases if case["metric"] in metrics]
        figure, axis = pyplot.subplots(figsize=(8, 0.8 + 0.32 * len(found)), layout="constrained")
        _bars(axis, found, line)
        axis.set_xlabel(label)
    else:
        figure, axis = pyplot.subplots(figsize=(6, 4), layout="constrained")
        (_quant if topic == "quant" else _cache)(axis, results.cases)
    gpus = results.environment.get("gpus") or ["CPU"]
    axis.set_title(f"mole bench {topic} ({gpus[0]})", fontsize=10, loc="left")
    picture = Path(path).with_suffix(".png")
    save(figure, picture)
    return picture


def save(figure: Any, path: Path) -> None:
    """Write a figure as PNG, whole or not at all, without the frames above and to the right."""
    from matplotlib import pyplot

    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
    partial = path.with_name(path.name + ".tmp")
    figure.savefig(partial, dpi=150, format="png")
    pyplot.close(figure)
    partial.replace(path)


def held_out_losses(axis: Any, models: dict[str, Any], colours: dict[str, str], text: str) -> None:
    """Draw a point with its interval for the `validation` of every model of a report."""
    figures = [model["validation"] for model in models.values()]
    nats = [f["nats"] for f in figures]
    errors = [[f["nats"] - f["low"] for f in figures], [f["high"] - f["nats"] for f in figures]]
    axis.errorbar(nats, range(len(nats)), xerr=errors, fmt="none", ecolor="#444444", capsize=4)
    axis.scatter(nats, range(len(nats)), color=[colours[name] for name in models], zorder=3)
    axis.set_yticks(range(len(nats)), list(models))
    axis.invert_yaxis()
    axis.set_xlabel(f"loss on {text}, nats per token (95 % interval)")


def _bars(axis: Any, cases: list[dict[str, Any]], line: float | None) -> None:
    """Draw a bar for every case, one colour for each setting, with the middle 60 %."""
    settings = [
        ", ".join(f"{k} {v}" for k, v in case["parameters"].items() if k not in _HIDDEN)
        for case in cases
    ]
    kinds = list(dict.fromkeys(settings))
    for place, (case, setting) in enumerate(zip(cases, settings, strict=True)):
        middle = case["median"]
        ends = (case["p20"], case["p80"])
        error = None if None in ends else [[middle - ends[0]], [ends[1] - middle]]
        colour = _COLOURS[kinds.index(setting) % len(_COLOURS)]
        bar = axis.barh(place, middle, xerr=error, color=colour, height=0.7, capsize=2)
        form = "{:,.0f}" if middle >= 1000 else "{:.4g}"
        axis.bar_label(bar, fmt=form, padding=4, fontsize=8)
    names = [
        f"{case['provider']}{f' ({setting})' if setting else ''}"
        for case, setting in zip(cases, settings, strict=True)
    ]
    axis.set_yticks(range(len(names)), names, fontsize=8)
    axis.invert_yaxis()
    axis.margins(x=0.12)
    if line is not None:
        axis.axvline(line, color="#444444", linewidth=0.8)


def _quant(axis: Any, cases: list[dict[str, Any]]) -> None:
    """Draw the loss of every format over the bytes that it reads for a token."""
    loss = {case["provider"]: case["median"] for case in cases if case["metric"] == "loss"}
    size = {case["provider"]: case["median"] for case in cases if case["metric"] == "read"}
    for place, fmt in enumerate(size):
        colour = _COLOURS[place % len(_COLOURS)]
        axis.scatter(size[fmt], loss[fmt], color=colour, zorder=3)
        axis.annotate(fmt, (size[fmt], loss[fmt]), (4, 4), textcoords="offset points", fontsize=9)
    axis.axhline(loss["experts"], color="#444444", linewidth=0.8, label="experts")
    axis.set_xscale("log", base=2)
    axis.set_xlabel("bytes read per token")
    axis.set_ylabel("loss on unseen text, nats per token")
    axis.legend(frameon=False)


def _cache(axis: Any, cases: list[dict[str, Any]]) -> None:
    """Draw the hit rate over the rows of the cache."""
    rows = [case["parameters"]["rows"] for case in cases]
    axis.plot(rows, [100 * case["median"] for case in cases], "o-", color=_COLOURS[0])
    axis.set_xscale("log", base=2)
    axis.set_xlabel("rows kept")
    axis.set_ylabel("tokens served, %")
    axis.set_ylim(0, 100)


__all__ = ["draw"]
