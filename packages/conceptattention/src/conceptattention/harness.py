"""Evaluation on data sets: resumable, over any number of processes, with baselines and sweeps."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .datasets import Dataset, Sample
from .evaluation import Confusion, ap_paper, average_precision, bootstrap_interval
from .maps import ConceptMaps, Reduce
from .segmentation import segment
from .selection import Selection
from .stream import PROMPT_SPACES, Space

Protocol = Literal["binary", "multiclass"]
METRICS: tuple[Literal["accuracy", "miou", "fg_iou", "miou_paper"], ...] = (
    "accuracy", "miou", "fg_iou", "miou_paper",
)  # fmt: skip


# Okabe and Ito's palette: told apart with every kind of colour vision.
_COLOURS = {
    "output": "#0072b2", "cross_attention": "#d55e00", "prompt_attention": "#009e73",
    "daam": "#cc79a7", "value": "#777777",
}  # fmt: skip
_STYLES = {"softmax_mean": "-", "mean_softmax": ":", "raw": "--"}


@dataclass(frozen=True)
class Settings:
    """What is evaluated; every combination of the lists is one row of the table.

    Args:
        protocol: "binary" scores each class present by its map above its mean; "multiclass" the
            strongest concept of every pixel.
        spaces: Where maps come from; "prompt_attention" and "daam" are read from the
            caption's own tokens.
        reduces: Orders of reduction, with ("softmax_mean") and without ("raw") the softmax.
        noise: Noise levels.
        self_attention: Whether concepts attend to each other.
        layers: Which layers, as in `ConceptAttention`.
        each_layer: Score every layer by itself too.
        samples: Noise draws to average.
        seed: Of the noise, the same for every picture.
        size: Side to which pictures are resized; None keeps them.
        score_size: Side at which masks are compared, by nearest neighbour; None for the map's grid.
        temperature: As in `ConceptAttention`.
    """

    protocol: Protocol = "binary"
    spaces: tuple[Space, ...] = ("output", "cross_attention", "value")
    reduces: tuple[Reduce, ...] = ("softmax_mean", "raw")
    noise: tuple[float, ...] = (0.5,)
    self_attention: tuple[bool, ...] = (True,)
    layers: Selection = "default"
    each_layer: bool = False
    samples: int = 1
    seed: int = 0
    size: int | None = None
    score_size: int | None = 224
    temperature: float | Literal["auto"] = 1.0

    def __post_init__(self) -> None:
        """Check the settings that `segment` does not check.

        Raises:
            ValueError: One is out of range.
        """
        for name, values, known in (
            ("protocol", (self.protocol,), get_args(Protocol)),
            ("spaces", self.spaces, get_args(Space)),
            ("reduces", self.reduces, get_args(Reduce)),
        ):
            if not values or any(value not in known for value in values):
                raise ValueError(f"`{name}` must be among {known}; got {values!r}.")
        for name in ("size", "score_size"):
            side = getattr(self, name)
            if side is not None and side < 1:
                raise ValueError(f"`{name}` must be at least 1; got {side}.")
        for level in self.noise:
            if not 0 < level <= 1:
                raise ValueError(f"`noise` must be above 0 and at most 1; got {level}.")


def evaluate(
    pipe: Any,
    dataset: Dataset,
    output: Path,
    settings: Settings | None = None,
    *,
    limit: int | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Score maps on a data set and return the table, which is also written as JSON and Markdown.

    Every picture's counts are one file, written whole or not at all: an interrupted run goes on
    where it stopped, and processes started by `accelerate launch` share the pictures that are
    missing. The result does not depend on their number.

    Args:
        pipe: A pipeline whose pictures `segment` can encode.
        dataset: The pictures.
        output: Folder for samples/*.json, results.json, results.md and plots of sweeps.
        settings: What is evaluated.
        limit: Only the first pictures; all when None.
        progress: Show a progress bar on standard error.

    Raises:
        ValueError: `output` holds a run with other settings.
    """
    settings = settings or Settings()
    rank, world = _place()
    folder = output / "samples"
    folder.mkdir(parents=True, exist_ok=True)
    count = len(dataset) if limit is None else min(limit, len(dataset))
    head = {
        "dataset": dataset.name,
        "split": dataset.split,
        "folder": str(dataset.root.resolve()) if dataset.reads_folder else None,
        "model": type(pipe).__name__,
        "weights": str(getattr(pipe, "name_or_path", "") or ""),
        "settings": json.loads(json.dumps(asdict(settings), default=str)),
    }
    _check_head(output / "settings.json", head)
    files = [folder / f"{_file_name(dataset.ids[index])}.json" for index in range(count)]
    missing = [index for index, path in enumerate(files) if _stored(path) is None]
    _wait(world)  # every process has the same list before the first writes
    with tqdm(missing[rank::world], desc=dataset.name, disable=not progress or rank > 0) as bar:
        for index in bar:
            write_text(files[index], json.dumps(list(score(pipe, dataset, index, settings))))
    _wait(world)
    rows: list[dict[str, Any]] = []
    if rank == 0:
        found = [json.loads(path.read_text()) for path in files]
        rows = table(found, 2 if settings.protocol == "binary" else dataset.classes)
        result = {**head, "pictures": count, "rows": rows}
        write_text(output / "results.json", json.dumps(result, indent=1))
        write_text(output / "results.md", to_markdown(rows))
        plot_sweeps(rows, output)
    _wait(world)
    return {**head, "pictures": count, "rows": rows}


def score(pipe: Any, dataset: Dataset, index: int, settings: Settings) -> Iterator[dict[str, Any]]:
    """Yield one picture's counts for every combination of settings."""
    sample = dataset[index]
    present = sample.present
    if not present:
        return
    image = sample.image
    if settings.size is not None:
        image = image.resize((settings.size, settings.size))
    words = [sample.names[number] for number in present]
    caption = sample.caption if sample.caption is not None else "a " + ", a ".join(words)
    queries = [[number] for number in present] if settings.protocol == "binary" else [present]
    store = "layers" if settings.each_layer else "mean"
    for noise in settings.noise:
        for together in settings.self_attention:
            for query in queries:
                for spaces, concepts in _groups(settings, sample, query, dataset.background):
                    maps = segment(
                        pipe, image, concepts, caption, t=noise, samples=settings.samples,
                        seed=settings.seed, space=spaces, layers=settings.layers, store=store,
                        self_attention=together, temperature=settings.temperature,
                    )  # fmt: skip
                    by_space: Mapping[Any, ConceptMaps] = (
                        maps if isinstance(maps, dict) else {spaces[0]: maps}
                    )
                    for space, layer, reduce, chosen in _cases(by_space, settings):
                        yield {
                            "noise": noise, "self_attention": together, "space": space,
                            "layer": layer, "reduce": reduce,
                            **_compare(chosen, sample, query, dataset, settings),
                        }  # fmt: skip


def _groups(
    settings: Settings, sample: Sample, query: list[int], background: Sequence[str]
) -> Iterator[tuple[list[Space], list[str]]]:
    """Yield the spaces that share their concepts, and those: the words asked for come first."""
    words = [sample.names[number] for number in query]
    others = list(background) or [sample.names[n] for n in sample.present if n not in query]
    shared: list[Space] = [space for space in settings.spaces if space not in PROMPT_SPACES]
    if shared:
        yield shared, list(dict.fromkeys([*words, *others]))
    asked: list[Space] = [space for space in settings.spaces if space in PROMPT_SPACES]
    if asked:  # only words of the caption have tokens there
        yield asked, words


def _cases(
    by_space: Mapping[Any, ConceptMaps], settings: Settings
) -> Iterator[tuple[str, int | None, str, ConceptMaps]]:
    for space, maps in by_space.items():
        layers = sorted({layer for layer, _ in maps.keys}) if settings.each_layer else []
        for layer in (None, *layers):
            chosen = maps if layer is None else maps.select(layers=[layer])
            for reduce in settings.reduces:
                if len(maps) == 1 and reduce != "raw":
                    continue  # a softmax over one concept is constant
                yield space, layer, reduce, chosen.with_reduce(reduce)


def _compare(
    maps: ConceptMaps, sample: Sample, query: list[int], dataset: Dataset, settings: Settings
) -> dict[str, Any]:
    """Return the counts of one set of maps as [target, guess, pixels], and its AP."""
    grid = tuple(maps.raw.shape[-2:])
    size = grid if settings.score_size is None else (settings.score_size,) * 2
    labels = _nearest(sample.labels, size)
    known = labels >= 0
    if settings.protocol == "binary":
        truth = (labels == query[0])[known]
        guess = _nearest(maps.to_masks("mean")[0, 0], size)[known]
        scores = _nearest(maps.values[0, 0], size)[known]
        confusion = Confusion(2)
        if truth.numel():
            confusion.add(guess, truth)
        found: dict[str, Any] = {"class": query[0]}
        if truth.any():
            found |= {"ap": average_precision(scores, truth), "ap_paper": ap_paper(scores, truth)}
    else:
        numbers = torch.tensor([*query, *[0] * (len(maps) - len(query))])
        guess = _nearest(numbers[maps.argmax()[0]], size)[known]
        confusion, found = Confusion(dataset.classes), {}
        if guess.numel():
            confusion.add(guess, labels[known])
    places = confusion.counts.nonzero()
    counts = confusion.counts[places[:, 0], places[:, 1]]
    return {**found, "counts": torch.cat([places, counts[:, None]], dim=1).tolist()}


def _nearest(values: Tensor, size: tuple[int, ...]) -> Tensor:
    """Return a map (height, width) at another size, by nearest neighbour, in its own type."""
    shape: list[int] = list(size)
    wide = torch.nn.functional.interpolate(values[None, None].double(), size=shape, mode="nearest")
    return wide[0, 0].to(values.dtype)


def table(found: Sequence[Sequence[Mapping[str, Any]]], classes: int) -> list[dict[str, Any]]:
    """Return one row of metrics, with 95 % intervals over pictures, for every case.

    Args:
        found: Output of `score` for every picture.
        classes: Number of classes of the counts.
    """
    names = ("space", "reduce", "noise", "self_attention", "layer")
    cases: dict[tuple[Any, ...], list[list[Mapping[str, Any]]]] = {}
    for entries in found:
        of_picture: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
        for entry in entries:
            of_picture.setdefault(tuple(entry[name] for name in names), []).append(entry)
        for key, part in of_picture.items():
            cases.setdefault(key, []).append(part)
    rows = []
    for key, pictures in cases.items():
        counts = torch.zeros(len(pictures), classes, classes, dtype=torch.int64)
        for row, part in enumerate(pictures):
            for entry in part:
                for target, guess, pixels in entry["counts"]:
                    counts[row, target, guess] += pixels
        pooled = Confusion(classes)
        pooled.counts = counts.sum(0)
        line: dict[str, Any] = dict(zip(names, key, strict=True)) | {"pictures": len(pictures)}
        for metric in METRICS:
            line[metric] = float(getattr(pooled, metric))
            line[f"{metric}_interval"] = list(bootstrap_interval(counts, metric, samples=1000))
        for name in ("ap", "ap_paper"):
            values = [entry[name] for part in pictures for entry in part if name in entry]
            if values:
                line[name] = sum(values) / len(values)
        rows.append(line)
    return rows


def to_markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the table in percent; intervals are 95 % over pictures."""
    names = {
        "accuracy": "Acc", "miou": "mIoU", "fg_iou": "fg IoU", "miou_paper": "Acc/(2-Acc)",
        "ap": "AP", "ap_paper": "AP (paper)",
    }  # fmt: skip
    shown = [name for name in names if any(name in row for row in rows)]
    lines = [
        "| Space | Softmax | t | Self-attention | Layer | "
        + " | ".join(names[name] for name in shown)
        + " |",
        "|---|---|---|---|---|" + "---:|" * len(shown),
    ]
    for row in rows:
        cells = []
        for name in shown:
            text = f"{100 * row[name]:.2f}" if name in row else ""
            if f"{name}_interval" in row:
                low, high = (100 * bound for bound in row[f"{name}_interval"])
                text += f" [{low:.1f}, {high:.1f}]"
            cells.append(text)
        layer = "mean" if row["layer"] is None else str(row["layer"])
        kept = {"softmax_mean": "each, then mean", "mean_softmax": "of the mean", "raw": "no"}
        lines.append(
            f"| {row['space']} | {kept[row['reduce']]} | {row['noise']:g} | "
            f"{'yes' if row['self_attention'] else 'no'} | {layer} | " + " | ".join(cells) + " |"
        )
    return "\n".join(lines) + "\n"


def plot_sweeps(rows: Sequence[Mapping[str, Any]], output: Path) -> list[Path]:
    """Draw mIoU over layers and over noise levels, where several were evaluated."""
    from importlib.util import find_spec

    if find_spec("matplotlib") is None:
        return []
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    written = []
    for axis, title in (("layer", "layer"), ("noise", "noise level t")):
        points = [r for r in rows if (r["layer"] is None) == (axis == "noise")]
        if len({row[axis] for row in points}) < 2:
            continue
        lines: dict[str, list[Mapping[str, Any]]] = {}
        for row in points:
            rest = [row["space"], row["reduce"]]
            if axis == "layer" and len({r["noise"] for r in points}) > 1:
                rest.append(f"t={row['noise']:g}")
            if not row["self_attention"]:
                rest.append("no self-attention")
            lines.setdefault(", ".join(rest), []).append(row)
        figure = Figure(figsize=(9, max(4, 1 + 0.2 * len(lines))), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        for name, line in lines.items():
            line.sort(key=lambda row: row[axis])
            places, first = [row[axis] for row in line], line[0]
            colour, style = _COLOURS[first["space"]], _STYLES[first["reduce"]]
            marker = "o" if first["self_attention"] else "x"
            values = [100 * row["miou"] for row in line]
            axes.plot(places, values, style, marker=marker, color=colour, label=name)
            if first["reduce"] == "softmax_mean":  # 95 % over pictures
                low, high = ([100 * row["miou_interval"][side] for row in line] for side in (0, 1))
                axes.fill_between(places, low, high, color=colour, alpha=0.08, linewidth=0)
        axes.set(xlabel=title, ylabel="mIoU (%)", xticks=sorted({row[axis] for row in points}))
        axes.grid(alpha=0.3)
        figure.legend(loc="outside right upper", fontsize="small")
        path = output / f"{axis}.png"
        figure.savefig(path, dpi=120)
        written.append(path)
    return written


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def _check_head(path: Path, head: dict[str, Any]) -> None:
    """Write what is evaluated, or compare it with what the folder's run evaluated."""
    if path.exists():
        before = json.loads(path.read_text())
        changed = [name for name in head if before.get(name) != head[name]]
        if changed:
            raise ValueError(
                f"`output` {str(path.parent)!r} holds a run with other {', '.join(changed)}; "
                "choose another folder."
            )
    else:
        write_text(path, json.dumps(head, indent=1))


def _file_name(key: str) -> str:
    """Return a name without characters that folders give a meaning."""
    return "".join(c if c.isalnum() or c in "-_." else f"%{ord(c):x}" for c in key)


def _stored(path: Path) -> Any:
    """Return a picture's counts; None where there are none or the file is damaged."""
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return None


def _place() -> tuple[int, int]:
    """Return this process's number and the number of processes."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return 0, 1
    from accelerate import PartialState

    # Processes meet only when all are done, and pictures differ: the usual ten minutes are short.
    state = PartialState(timeout=timedelta(days=1))
    return int(state.process_index), int(state.num_processes)


def _wait(world: int) -> None:
    if world > 1:
        from accelerate import PartialState

        cast(Any, PartialState()).wait_for_everyone()
