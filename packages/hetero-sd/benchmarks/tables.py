"""The tables of the README and the documentation, out of the figures in `results`.

    python packages/hetero-sd/benchmarks/tables.py write
    python packages/hetero-sd/benchmarks/tables.py join results/bench-h200.json OUT/*/bench.json

`write` fills what stands between `<!-- table: NAME -->` and `<!-- end -->`, and draws the plot.
`join` puts the settings of several runs into one file; of a setting that is in several of them, the
last counts.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import click

from fourfold_common import Results
from hetero_sd.bench import draw

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
PAGES = (HERE.parent / "README.md", HERE.parents[2] / "docs/hetero-sd/index.md")
PAIR = "SmolLM2-135M-Instruct, inflated to 5.40 B; drafter 4m"
METHODS = ("tli 4", "slem 4", "slrs 4", "auto")
GREEDY, SAMPLED = "greedy", "temperature 1"
NAMES = {
    "spec_bench": "Spec-Bench",
    "human_eval": "HumanEval",
    "gsm8k_test": "GSM8K",
    "summarization": "summaries (Spec-Bench)",
    "long": "summaries of 3,000 tokens",
    "questions": "questions",
}


class Setting(NamedTuple):
    """What was timed together."""

    target: str
    prompts: str
    batch: int
    decoding: str


Figures = dict[str, dict[str, Any]]  # Of each contender, by metric.


def load(name: str) -> dict[Setting, Figures]:
    """Return the figures of a file by setting, contender and metric."""
    found: dict[Setting, Figures] = {}
    for case in json.loads((RESULTS / name).read_text("utf-8"))["cases"]:
        setting = Setting(**{key: case["parameters"][key] for key in Setting._fields})
        figures = found.setdefault(setting, {}).setdefault(case["provider"], {})
        figures[case["metric"]] = case["median"]
    return found


def rows_of(header: list[str], rows: list[list[str]], texts: int) -> str:
    """Return a Markdown table whose first columns are texts, and the others figures."""
    rule = ["---"] * texts + ["---:"] * (len(header) - texts)
    return "\n".join(
        "|" + "".join(f" {cell} |" if cell else " |" for cell in row)
        for row in [header, rule, *rows]
    )


def figure(value: float | None, digits: int = 2) -> str:
    """Return a figure, or nothing where it was not measured."""
    return "" if value is None else f"{value:,.{digits}f}"


def speed(value: float | None) -> str:
    """Return tokens a second."""
    return figure(value, 0 if value is not None and value >= 100 else 1)


def contenders() -> str:
    """All contenders on one pair, greedy and sampled."""
    shipped = "transformers, assisted tli, as shipped"
    names = {
        "transformers": "transformers, eager",
        "transformers, prompt lookup": "transformers, prompt lookup",
        "assisted": "transformers, assisted (SLEM; sampled, TLI in order)",
        shipped: "transformers, assisted (TLI as shipped, not exact)",
        "plain": "target alone, in our loop",
        **{who: f"`{who.split()[0]}`" + ", lookahead 4" * who.endswith("4") for who in METHODS},
    }
    assisted = {
        GREEDY: "transformers, assisted slem",
        SAMPLED: "transformers, assisted tli, in order",
    }
    found, rows = load("bench-h200.json"), []
    for who, name in names.items():
        row = [name]
        for decoding in (GREEDY, SAMPLED):
            contender = assisted[decoding] if who == "assisted" else who
            figures = found[Setting(PAIR, "spec_bench, 3", 1, decoding)].get(contender, {})
            row.append(speed(figures.get("speed")))
            metrics = "over plain", "acceptance", "block efficiency", "of predicted"
            row += [figure(figures.get(metric)) for metric in metrics]
        rows.append(row)
    header = ["", "greedy, tokens/s", *(more := ["over plain", "acceptance", "tokens a pass"])]
    return rows_of(
        [*header, "of predicted", "temperature 1, tokens/s", *more, "of predicted"], rows, 1
    )


def _over_plain(figures: Figures, who: str) -> str:
    """Return a speed over plain decoding, and the acceptance, as in `1.42 (0.41)`."""
    mine = figures.get(who, {})
    if "over plain" not in mine:
        return ""
    acceptance = f" ({mine['acceptance']:.2f})" if "acceptance" in mine else ""
    return f"{mine['over plain']:.2f}{acceptance}"


def _prompts(name: str) -> str:
    kind, count = name.split(", ")
    return f"{NAMES[kind]}, {count}"


def prompts() -> str:
    """The shipped pair at batch 1 on all sets of prompts."""
    rows = []
    for setting, found in _settings(lambda s: s.target == PAIR and s.batch == 1):
        row = [_prompts(setting.prompts), setting.decoding, speed(found["plain"]["speed"])]
        row += [_over_plain(found, who) for who in METHODS]
        rows.append([*row, figure(found["auto"].get("over transformers"), 1)])
    header = ["prompts", "decoding", "plain, tokens/s", *(f"`{who.split()[0]}`" for who in METHODS)]
    return rows_of([*header, "`auto` over transformers"], rows, 2)


def pairs() -> str:
    """All other pairs, and batches."""
    rows = []
    for setting, found in _settings(lambda s: s.target != PAIR or s.batch > 1):
        c = next((f["c"] for f in found.values() if "c" in f), None)
        row = [setting.target.replace("-135M-Instruct", ""), str(setting.batch), setting.decoding]
        row += [speed(found["plain"]["speed"]), figure(c, 3)]
        rows.append([*row, *(_over_plain(found, who) for who in METHODS)])
    header = ["target; drafter", "batch", "decoding", "plain, tokens/s", "c"]
    return rows_of([*header, *(f"`{who.split()[0]}`" for who in METHODS)], rows, 1)


def _settings(wanted: Callable[[Setting], bool]) -> Iterator[tuple[Setting, Figures]]:
    """Yield settings: the shipped pair first, then by batch, prompts and decoding."""
    found = load("bench-h200.json")
    kinds, ways = list(NAMES), [GREEDY, "temperature 0.7, top-p 0.9", SAMPLED]

    def place(setting: Setting) -> tuple[Any, ...]:
        kind, count = setting.prompts.split(", ")
        first = setting.target != PAIR, setting.target, setting.batch
        return *first, kinds.index(kind), int(count), ways.index(setting.decoding)

    for setting in sorted(filter(wanted, found), key=place):
        yield setting, found[setting]


def loop() -> str:
    """What a round costs beside its passes."""
    measured = json.loads((RESULTS / "loop-h200.json").read_text("utf-8"))["now"]
    costs = {(e["decoding"], e["batch"], e["method"]): e["overhead_ms"] for e in measured}
    kinds = {"greedy": "greedy", "T=1": SAMPLED, "top-p": "temperature 0.7, top-p 0.9"}
    methods, rows = ("plain", "tli", "slem", "slrs", "c-slrs"), []
    for batch in (1, 8):
        for kind, name in kinds.items():
            found = [costs.get((kind, batch, method)) for method in methods]
            if any(cost is not None for cost in found):
                cells = ["under 0.01" if c is not None and c < 0.005 else figure(c) for c in found]
                rows.append([name + f", batch {batch}" * (batch > 1), *cells])
    return rows_of(["", "plain", *(f"`{method}`" for method in methods[1:])], rows, 1)


def goals() -> str:
    """The design's goals, and what came of them."""
    found = load("bench-h200.json")
    loops = json.loads((RESULTS / "loop-h200.json").read_text("utf-8"))["now"]
    here = {how: found[Setting(PAIR, "spec_bench, 3", 1, how)] for how in (GREEDY, SAMPLED)}
    fixed = METHODS[:3]
    costs = {
        entry["method"]: entry["overhead_ms"]
        for entry in loops
        if entry["decoding"] == GREEDY and entry["batch"] == 1 and entry["method"] != "plain"
    }
    shares = [figures[who]["o"] for figures in here.values() for who in fixed]
    reached = [figures[who]["of predicted"] for figures in here.values() for who in fixed]
    peers = [
        here[GREEDY]["slem 4"]["speed"] / here[GREEDY]["transformers, assisted slem"]["speed"],
        here[SAMPLED]["tli 4"]["speed"]
        / here[SAMPLED]["transformers, assisted tli, in order"]["speed"],
    ]
    large = load_cases("plain-h200.json", "plain over it")
    eager, compiled = large["transformers"], large["transformers, static and compiled"]
    auto = {setting: figures["auto"]["over plain"] for setting, figures in found.items()}
    worst = [x for setting, x in auto.items() if "random" in setting.target]
    single = [x for s, x in auto.items() if s.batch == 1 and "random" not in s.target]
    batched = [x for s, x in auto.items() if s.batch > 1 and "random" not in s.target]
    high = [
        figures[who]["over plain"]
        for setting, figures in found.items()
        for who in METHODS
        if setting.batch == 8 and figures.get(who, {}).get("acceptance", 0) >= 0.7
    ]
    (cpu,) = load("bench-cpu-float32.json").values()
    spent = ", ".join(f"`{method}` {cost:.2f}" for method, cost in costs.items())
    rows = [
        (
            "a round costs at most 0.15 ms, or 0.03 of a 5 B target's step, beside its passes",
            f"greedy {spent} ms with the small target; shares with SmolLM2 {spread(shares)}",
            max(costs.values()) <= 0.15 or max(shares) <= 0.03,
        ),
        (
            "at least 0.9 of the speed predicted",
            f"{spread(reached)} (`tli`, `slem`, `slrs`, greedy and temperature 1)",
            min(reached) >= 0.9,
        ),
        (
            "3 times transformers' assisted generation",
            f"{peers[0]:.1f} (SLEM, greedy), {peers[1]:.1f} (TLI in order, temperature 1)",
            min(peers) >= 3,
        ),
        (
            "8 B shape: 4 times transformers eager, 1.4 times compiled",
            f"{eager:.2f}, {compiled:.2f}",
            eager >= 4 and compiled >= 1.4,
        ),
        (
            "`auto` at least 0.97 of plain",
            f"batch 1 {spread(single)}; batches of 4 and 8 {spread(batched)}; a drafter that "
            f"knows nothing {spread(worst)}",
            min(auto.values()) >= 0.97,
        ),
        (
            "batch 8, acceptance 0.7 and more: 1.2",
            spread(high),
            min(high) >= 1.2,
        ),
        (
            "CPU, SmolLM2 in float32: 1.3, exact",
            f"{cpu['slem 2']['over plain']:.2f}, {cpu['slem 2']['tested']}",
            cpu["slem 2"]["over plain"] >= 1.3 and cpu["slem 2"]["verdict"] == "exact",
        ),
    ]
    cells = [[goal, what, "met" if met else "missed"] for goal, what, met in rows]
    return rows_of(["goal", "measured", ""], cells, 3)


def shelf() -> str:
    """Two pretrained models, each drafting for the other."""
    rows = []
    names = {"SmolLM2-135M-Instruct": "Gemma 3 270M", "Gemma 3 270M": "SmolLM2-135M-Instruct"}
    for setting, found in load("off-the-shelf-cpu.json").items():
        row = [setting.target, names[setting.target], setting.decoding]
        for method in ("tli 3", "slem 3", "slrs 3"):
            row += [figure(found[method][m]) for m in ("acceptance", "block efficiency")]
        rows.append(row)
    header = ["target", "drafter", "decoding", "`tli` acceptance", "tokens a pass"]
    return rows_of([*header, "`slem`", "tokens a pass", "`slrs`", "tokens a pass"], rows, 3)


def demo() -> str:
    """What the demo's drafts brought."""
    found: dict[tuple[str, str], dict[str, float]] = {}
    for case in json.loads((RESULTS / "demo-cpu.json").read_text("utf-8"))["cases"]:
        key = case["parameters"]["decoding"], case["provider"]
        found.setdefault(key, {})[case["metric"]] = case["median"]
    rows = [
        [decoding, f"`{who}`", figure(figures["block efficiency"]), figure(figures["acceptance"])]
        for (decoding, who), figures in found.items()
        if "acceptance" in figures
    ]
    return rows_of(["decoding", "", "block efficiency (tokens/pass)", "acceptance"], rows, 2)


def load_cases(name: str, metric: str) -> dict[str, float]:
    """Return one metric of a file by contender."""
    cases = json.loads((RESULTS / name).read_text("utf-8"))["cases"]
    return {case["provider"]: case["median"] for case in cases if case["metric"] == metric}


def spread(values: list[float]) -> str:
    """Return the least and the most of some figures."""
    low, high = f"{min(values):.2f}", f"{max(values):.2f}"
    return low if low == high else f"{low} to {high}"


TABLES = {make.__name__: make for make in (contenders, prompts, pairs, loop, goals, shelf, demo)}
_BLOCK = re.compile(r"(<!-- table: (\w+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def filled(page: str) -> str:
    """Return a page with its tables made anew."""
    return _BLOCK.sub(lambda found: f"{found[1]}\n{TABLES[found[2]]()}\n\n{found[4]}", page)


@click.group(context_settings={"max_content_width": 100})
def main() -> None:
    """Make the tables of the pages, or join the files they are made of."""


@main.command()
def write() -> None:
    """Fill the tables of README and documentation, and draw the latter's plot."""
    for page in PAGES:
        page.write_text(filled(page.read_text("utf-8")), "utf-8")
    with tempfile.TemporaryDirectory() as folder:
        for path in draw(Results.load(RESULTS / "bench-h200.json"), Path(folder)):
            if path.name == "speedup.png":
                shutil.copyfile(path, PAGES[1].parent / path.name)


@main.command()
@click.argument("output", type=click.Path(path_type=Path))
@click.argument("parts", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--note", default="", help="What the reader of the file should know.")
def join(output: Path, parts: tuple[Path, ...], note: str) -> None:
    """Put the settings of several runs into one file."""
    settings: dict[str, list[dict[str, Any]]] = {}
    for part in parts:
        own: dict[str, list[dict[str, Any]]] = {}
        for case in Results.load(part).cases:
            own.setdefault(json.dumps(case["parameters"]), []).append(case)
        settings |= own
    content = json.loads(parts[-1].read_text("utf-8"))
    cases = [json.dumps(case) for cases in settings.values() for case in cases]
    head = json.dumps({"note": note, **content, "cases": []}, indent=1).removesuffix("]\n}")
    output.write_text(head + "\n  " + ",\n  ".join(cases) + "\n ]\n}\n", "utf-8")


if __name__ == "__main__":
    main()
