"""The front page's table of figures and its picture, from the packages' stored results.

    make figures                     # fills README.md, draws docs/assets/figures.png (matplotlib)

What stands in README.md between `<!-- table: figures -->` and `<!-- end -->` is written here and
compared by a test, so that no figure on the front page can part from the file it is from.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PICTURE = "docs/assets/figures.png"
_BLOCK = re.compile(r"(<!-- table: figures -->\n).*?(\n<!-- end -->)", re.DOTALL)
_BLUE, _ORANGE, _GREY, _GREEN = "#0072B2", "#E69F00", "#999999", "#009E73"

DENSITIES = (0.05, 0.1, 0.25, 1.0)
TARGET = "SmolLM2-135M-Instruct, inflated to 5.40 B; drafter 4m"
CONTENDERS = {
    "transformers": "transformers", "transformers, assisted slem": "transformers, assisted",
    "plain": "target alone, our loop", "tli 4": "TLI", "slem 4": "SLEM", "slrs 4": "SLRS",
    "auto": "auto",
}  # fmt: skip
STORES = {
    "MoLE-4E nf4 pinned": "nf4, host memory", "MoLE-4E fp16 pinned": "fp16, host memory",
    "MoLE-4E nf4 disk warm": "nf4, file in page cache", "MoLE-4E nf4 disk cold": "nf4, cold file",
    "MoLE-4E fp16 pageable": "fp16, authors' way", "MoE-10E resident": "mixture in GPU memory",
}  # fmt: skip


def read(package: str, name: str) -> Any:
    """Return a stored result of a package."""
    path = ROOT / "packages" / package / "benchmarks" / "results" / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8"))


def median(package: str, name: str, provider: str, metric: str, **parameters: object) -> float:
    """Return the figure of the only case that fits.

    Raises:
        LookupError: None fits, or several do.
    """
    found = [
        case["median"]
        for case in read(package, name)["cases"]
        if (case["provider"], case["metric"]) == (provider, metric)
        and parameters.items() <= case["parameters"].items()
    ]
    if len(found) != 1:
        raise LookupError(f"{package}/{name}: {len(found)} of {provider}, {metric}, {parameters}")
    return float(found[0])


def attention(length: int, asked: float) -> tuple[float, float]:
    """Return the measured density, and our speed with backward over cuDNN's."""
    shape = {"length": length, "dim_head": 64, "causal": True, "inputs": "topics"}
    where = ("adasplash", "attention_h200")
    (case,) = (
        case
        for case in read(*where)["cases"]
        if (case["provider"], case["metric"]) == ("adasplash", "forward + backward")
        and (shape | {"asked": asked}).items() <= case["parameters"].items()
    )
    theirs = median(*where, "SDPA cuDNN", "forward + backward", **shape)
    return case["parameters"]["density"], theirs / case["median"]


def decoding(provider: str, batch: int) -> float:
    """Return a decoding step of `mole` over the dense model's."""
    return median("mole", "decode_h200", provider, "over dense", batch=batch)


def drafting(contender: str, metric: str = "speed") -> float:
    """Return a figure of greedy generation with the large target of `hetero-sd`."""
    setting = {"target": TARGET, "prompts": "spec_bench, 3", "batch": 1, "decoding": "greedy"}
    return median("hetero-sd", "bench-h200", contender, metric, **setting)


def observing(shape: str, contender: str, name: str = "overhead-compiled-h200") -> float:
    """Return what observing adds to a pass, in percent."""
    (row,) = (
        row
        for row in read("conceptattention", name)["rows"]
        if (row["shape"], row["contender"], row["concepts"]) == (shape, contender, 5)
    )
    return float(row["overhead_percent"])


def maps(space: str) -> float:
    """Return the mIoU of the embedded model's maps in percent, as its commands read them."""
    (row,) = (
        row
        for row in read("conceptattention", "demo-ablations")["rows"]
        if (row["ablation"], row["case"], row.get("reduce")) == ("space", space, "mean_softmax")
    )
    return 100 * float(row["miou"])


def rows() -> list[tuple[str, str, str]]:
    """Return package, what was measured, and where, of every line."""
    long, short, dense = attention(32768, 0.05), attention(8192, 0.05), attention(8192, 1.0)
    best = max(drafting(who, "over transformers") for who in ("tli 4", "slem 4", "slrs 4", "auto"))
    cpu = [
        median("hetero-sd", f"bench-cpu-{kind}", who, "over plain", prompts="spec_bench")
        for kind, who in (("bfloat16", "slem 3"), ("bfloat16", "auto"), ("float32", "slem 2"))
    ]
    pinned = [
        decoding(f"MoLE-4E {fmt} pinned", batch) for fmt in ("nf4", "fp16") for batch in (1, 32)
    ]
    offload = "MoE-10E offloaded by accelerate, eager"
    slow = min(
        median("mole", "decode_h200", offload, "over lookup experts", batch=batch)
        for batch in (1, 32)
    )
    two = [
        median("mole", "train_two_h100", who, "train", processes=count)
        for who, count in (("two", 2), ("one", 1))
    ]
    return [
        (
            "adasplash",
            f"forward and backward at {long[1]:.1f} times the speed of cuDNN's softmax attention "
            f"at 32,768 tokens where {100 * long[0]:.0f} % of the blocks hold weight, "
            f"{short[1]:.1f} times at 8,192 tokens and {100 * short[0]:.0f} %, "
            f"{dense[1]:.2f} times where all do",
            "one H200",
        ),
        (
            "hetero-sd",
            f"a target of 5.40 B parameters at {best:.1f} times transformers' speed with drafts "
            f"of another vocabulary, {drafting('plain', 'over transformers'):.1f} times without, "
            f"transformers' own assisted generation at "
            f"{drafting('transformers, assisted slem', 'over transformers'):.2f} times",
            "one H200",
        ),
        (
            "hetero-sd",
            f"SmolLM2-135M-Instruct over 30 questions of Spec-Bench at {cpu[0]:.2f} to "
            f"{cpu[1]:.2f} times plain decoding in the same loop in bfloat16, {cpu[2]:.2f} times "
            "in float32",
            "one CPU thread, a busy machine",
        ),
        (
            "conceptattention",
            f"maps of the embedded model reach {maps('output'):.0f} % mIoU, those of its "
            f"cross-attention {maps('cross_attention'):.0f} %",
            "200 held-out scenes",
        ),
        (
            "conceptattention",
            f"the maps of five words add {observing('flux1-1024', 'triton'):.1f} % to a pass of "
            "Flux.1 at 1024 x 1024, and not a bit of the picture changes",
            "one H200",
        ),
        (
            "mole",
            f"a decoding step from a table in host memory takes {min(pinned):.2f} to "
            f"{max(pinned):.2f} times the dense model's of 410 M parameters, at batch 1 and 32; "
            f"a mixture whose experts accelerate offloads takes {slow:.0f} times as long as lookup "
            "experts, both in eager steps",
            "one H200",
        ),
        ("mole", f"training on two GPUs at {two[0] / two[1]:.2f} times one's speed", "two H100s"),
    ]


def table() -> str:
    """Return the table in Markdown."""
    lines = ["| | measured | on |", "| --- | --- | --- |"]
    return "\n".join(
        [*lines, *(f"| `{name}` | {what} | {where} |" for name, what, where in rows())]
    )


def filled(text: str) -> str:
    """Return a page with the table in its place.

    Raises:
        ValueError: It has no place for it.
    """
    if not _BLOCK.search(text):
        raise ValueError("README.md must hold `<!-- table: figures -->` and `<!-- end -->`.")
    return _BLOCK.sub(lambda found: found[1] + table() + found[2], text)


def draw(path: Path) -> None:
    """Draw one panel for each package."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    mpl.rcParams.update({"font.size": 9, "axes.titlesize": 10})
    figure, panels = plt.subplots(2, 2, figsize=(11, 6.4), layout="constrained", dpi=110)
    _attention(panels[0, 0])
    _bars(
        panels[0, 1], {name: drafting(who) for who, name in CONTENDERS.items()}, "tokens/s",
        "hetero-sd: 5.4 B target, drafter of another vocabulary", "{:.0f}", _ORANGE,
    )  # fmt: skip
    gallery = plt.imread(ROOT / "docs/conceptattention/gallery.png")
    height = len(gallery) // 4  # of a row
    panels[1, 0].imshow(np.concatenate([gallery[:height], gallery[3 * height :]]))
    panels[1, 0].set_axis_off()
    panels[1, 0].set_title("conceptattention: generated pictures, maps of four words each")
    _bars(
        panels[1, 1], {name: 100 * decoding(who, 32) - 100 for who, name in STORES.items()},
        "time of a decoding step over the dense model's, %, batch 32",
        "mole: lookup experts beside a mixture of experts", "{:+.0f} %", _BLUE,
    )  # fmt: skip
    figure.savefig(path)
    plt.close(figure)


def _attention(panel: Any) -> None:
    lengths = sorted({
        case["parameters"]["length"]
        for case in read("adasplash", "attention_h200")["cases"]
        if case["parameters"]["length"] >= 4096
    })  # fmt: skip
    colours = (_BLUE, _ORANGE, _GREEN, _GREY)
    for asked, colour in zip(DENSITIES, colours, strict=True):
        points = []
        for length in lengths:
            try:
                points.append((length, attention(length, asked)[1]))
            except (LookupError, ValueError):
                continue
        name = "all blocks" if asked == 1 else f"about {100 * asked:.0f} % of blocks"
        panel.plot(*zip(*points, strict=True), "o-", color=colour)
        end, high = points[-1]
        panel.annotate(name, (end, high), (8, 0), textcoords="offset points", va="center")
    panel.axhline(1, color="black", linewidth=0.8)
    panel.set_xscale("log", base=2)
    panel.set_xticks(lengths, [f"{length // 1024}K" for length in lengths])
    panel.set_ylim(bottom=0)
    panel.set_xlabel("tokens")
    panel.set_ylabel("speed over cuDNN's softmax attention")
    panel.set_title("adasplash: forward and backward, by blocks that hold weight")
    panel.set_xlim(right=1.1 * 2**19)  # room for the names
    panel.spines[["top", "right"]].set_visible(False)


def _bars(
    panel: Any, values: dict[str, float], label: str, title: str, form: str, colour: str
) -> None:  # fmt: skip
    """Draw horizontal bars, the first value on top; those that others make in grey."""
    names, found = list(values), list(values.values())
    others = ("transformers", "target alone", "fp16, authors", "mixture")
    colours = [_GREY if name.startswith(others) else colour for name in names]
    bars = panel.barh(names, found, color=colours)
    panel.bar_label(bars, [form.format(value) for value in found], padding=3)
    panel.invert_yaxis()
    panel.margins(x=0.15)
    panel.set_xlabel(label)
    panel.set_title(title)
    panel.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    page = ROOT / "README.md"
    page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")
    draw(ROOT / PICTURE)
    print(f"wrote the figures of README.md and {PICTURE}")
