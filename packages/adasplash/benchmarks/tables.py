"""Write the tables of the README from the stored results.

Run as `python packages/adasplash/benchmarks/tables.py`, after results have been put into
`benchmarks/results`. A table stands between `<!-- table: NAME -->` and `<!-- end -->`; what is
between them is replaced. A test compares the README with what this gives.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from fourfold_common import Results

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parents[1] / "README.md"
METRICS = ("forward", "forward + backward")
THEIRS = "adasplash 0.2.2"
NAMES = {
    "none": "no option", "blocks": "our blocks, told it", "alibi": "ALiBi", "padding": "key mask",
}  # fmt: skip
Case = dict[str, Any]


def cases(file: str, **parameters: object) -> list[Case]:
    """Return the stored cases that have all of some parameters."""
    return [
        case for case in Results.load(RESULTS / file).cases
        if parameters.items() <= case["parameters"].items()
    ]  # fmt: skip


def pick(found: list[Case], provider: str, metric: str) -> float:
    """Return the time of the only case of a provider and a metric; NaN if there is none."""
    times = [c["median"] for c in found if (c["provider"], c["metric"]) == (provider, metric)]
    return times[0] if len(times) == 1 else float("nan")


def ms(value: float) -> str:
    return "" if value != value else f"{value:.{3 if value < 1 else 2}f}"


def times(value: float) -> str:
    return "" if value != value else f"{value:.2f} x"


def table(head: str, rows: Iterable[list[str]]) -> str:
    """Return a table whose columns are text where `head` begins with `<`, else right-aligned."""
    names = head.split(" | ")
    rule = ["---" if name.startswith("<") else "---:" for name in names]
    lines = [[name.removeprefix("<") for name in names], rule, *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def densities(asked: float, file: str = "attention_h200.json") -> str:
    """Return our speed beside cuDNN's by length at one of the densities that were asked for."""
    rows = []
    for length in (2**i for i in range(10, 18)):
        cells, some = [f"{length:,}"], False
        for dim in (64, 128):
            shape = {"length": length, "dim_head": dim, "causal": True}
            soft = cases(file, **shape)
            ours = cases(file, **shape, asked=asked)
            ours = [c for c in ours if c["provider"] == "adasplash"]
            if asked < 1 and not ours:  # these inputs allow no lower density than another's
                ours = [] if asked > 0.05 else lowest(soft)
            density = {c["parameters"]["density"] for c in ours}
            cells.append(f"{density.pop():.3f}" if density else "")
            for metric in METRICS:
                own = pick(ours, "adasplash", metric)
                cells.append(times(pick(soft, "SDPA cuDNN", metric) / own))
            some |= bool(ours)
        if some:
            rows.append(cells)
    return table("tokens | density, head size 64 | forward | with backward | "
                 "density, 128 | forward | with backward", rows)  # fmt: skip


def lowest(found: list[Case]) -> list[Case]:
    """Return our cases of the lowest density."""
    ours = [c for c in found if c["provider"] == "adasplash"]
    least = min((c["parameters"]["density"] for c in ours), default=0.0)
    return [c for c in ours if c["parameters"]["density"] == least]


def options() -> str:
    """Return the times of options beside softmax attention with the same option."""
    names = list(
        dict.fromkeys(c["parameters"]["option"] for c in cases("options_before_h200.json"))
    )
    rows = []
    for name in names:
        cells = [NAMES.get(name, name)]
        for dim in (64, 128):
            found = cases("options_h200.json", option=name, dim=dim)
            found = found or cases("options_before_h200.json", option=name, dim=dim)
            peers = {c["provider"] for c in found} - {"adasplash", "FlexAttention"}
            best = [min((pick(found, p, metric) for p in peers), default=float("nan"))
                    for metric in METRICS]  # fmt: skip
            density = {c["parameters"].get("density") for c in found} - {None}
            cells.append(f"{density.pop():.3f}" if density else "")
            for pair in ([pick(found, "adasplash", m) for m in METRICS], best,
                         [pick(found, "FlexAttention", m) for m in METRICS]):  # fmt: skip
                cells.append(" / ".join(map(ms, pair)) if pair[0] == pair[0] else "")
        rows.append(cells)
    return table("<option | density, size 64 | adasplash | torch | FlexAttention | "
                 "density, 128 | adasplash | torch | FlexAttention", rows)  # fmt: skip


def upstream() -> str:
    """Return the times of the paper's package beside ours."""
    rows = []
    for length, file in ((8192, "upstream_h200.json"), (32768, "upstream_32k_h200.json")):
        for causal, version, gain in ((True, 2, 1), (True, 2, 0), (False, 1, 1), (False, 1, 0)):
            shape = {"length": length, "causal": causal, "gain": gain}
            how = "graph" if version == 2 else "calls"
            ours = cases(file, **shape, how=how)
            theirs = cases(file, **shape, how=how, version=version,
                           niter=1 if version == 2 else 4)  # fmt: skip
            soft = cases(file, **shape | {"gain": 1}, how=how)
            density = next(c["parameters"]["density"] for c in ours if c["provider"] == "adasplash")
            cells = [f"{length:,}{'' if causal else ', not causal'}", f"{density:.3f}"]
            for found, provider in ((ours, "adasplash"), (theirs, THEIRS), (soft, "SDPA cuDNN")):
                cells.append(" / ".join(ms(pick(found, provider, m)) for m in METRICS))
            ratios = [pick(theirs, THEIRS, m) / pick(ours, "adasplash", m) for m in METRICS]
            cells.append(" / ".join(map(times, ratios)))
            rows.append(cells)
    return table("<tokens | density | adasplash | <version 2; 1 where not causal | cuDNN | "
                 "they take", rows)  # fmt: skip


def dense() -> str:
    """Return the times of the dense map."""
    rows = []
    for length in (512, 2048, 8192, 32768):
        found = cases("ops_h200.json", length=length)
        cells = [f"{length:,}"]
        for provider in ("adasplash", "torch.softmax", "entmax package"):
            parts = [ms(pick(found, provider, f"dense {way}")) for way in ("forward", "backward")]
            cells.append(f"{parts[0]} + {parts[1]} ms")
        rows.append(cells)
    return table("numbers in a row | `entmax15` | `torch.softmax` | "
                 "`entmax15` of the package entmax 1.3", rows)  # fmt: skip


def decode() -> str:
    """Return the times of decoding."""
    kinds = {(1.0, 1.0): "a topic and as much noise", (1.0, 0.1): "a topic and a tenth of noise"}
    rows = []
    stored = cases("decode_h200.json")
    shapes = dict.fromkeys(
        (
            *(c["parameters"][x] for x in ("keys", "gain", "noise", "near_blocks")),
            c["parameters"].get("batch", 8),
        )
        for c in stored
    )
    for keys, gain, noise, near, batch in sorted(shapes, key=lambda s: (s[0], s[3], -s[2])):
        found = cases("decode_h200.json", keys=keys, gain=gain, noise=noise)
        cells = [f"{keys:,}", f"{batch}", kinds.get((gain, noise), "noise"), f"{near:g}"]
        ours = ("adasplash", "adasplash, bounds", "adasplash, pages", "adasplash, pages, bounds")
        found_ms = [pick(found, provider, "decode") for provider in ours]
        peers = {c["provider"] for c in found if c["provider"].startswith("SDPA")}
        best = min(pick(found, provider, "decode") for provider in peers)
        rows.append([*cells, *(f"{ms(x)} ms" for x in (*found_ms, best)),
                     times(best / min(found_ms))])  # fmt: skip
    head = "keys | sequences | <of one page | near the maximum | `adasplash_decode` | with page "
    return table(head + "bounds | in pages | with bounds | SDPA | at best", rows)


def errors() -> str:
    """Return the largest errors, and how they compare with plain PyTorch's."""
    rows = []
    for dtype in ("float32", "float16", "bfloat16"):
        found = cases("errors_h200.json", dtype=dtype)
        cells = [dtype]
        for provider in ("adasplash", "plain PyTorch"):
            worst = max(
                c["median"]
                for c in found
                if (c["provider"], c["metric"]) == (provider, "worst relative error")
            )
            cells.append(f"{worst:.1e}")  # fmt: skip
        ratios = [c["median"] for c in found if c["metric"] == "times the error of plain PyTorch"]
        rows.append([*cells, times(max(ratios)), str(len(ratios))])
    return table("<dtype | largest relative error | plain PyTorch's | most times plain PyTorch's, "
                 "output or one gradient | cases", rows)  # fmt: skip


def beside_cudnn(metric: str, **case: object) -> float:
    """Return how many times as fast as cuDNN's our attention is, with the last kernels."""
    found = cases("kernels_h200.json", what="plain", **case)
    return pick(found, "SDPA cuDNN", metric) / pick(found, "adasplash", metric)


def of_theirs(file: str, causal: bool, metric: str) -> float:
    """Return how many times as fast as the published package ours is at a low density."""
    how = {"how": "graph" if causal else "calls", "causal": causal, "gain": 1}
    theirs = cases(file, **how, niter=1 if causal else 4)
    return pick(theirs, THEIRS, metric) / pick(cases(file, **how), "adasplash", metric)


# Density, and inputs that have it, at 8,192 and 32,768 tokens; None where there are none.
_LOW, _TENTH, _ALL = (1.127, 1.0), (0.747, None), (0.0, 0.0)


def goals() -> str:
    """Return what was asked for and what was measured, at head size 64."""
    rows = []
    for causal in (True, False):
        for place, metric in enumerate(METRICS):
            for what, gains, asked, invert in (
                ("", _LOW if causal else (1.0, None), (1.5, 3.0), False),
                ("", _TENTH if causal else (None, None), (1.5, 3.0), False),
                (", time over cuDNN's", _ALL if causal else (0.0, None), (2.0, 1.7), True),
            ):
                cells = []
                for length, gain in zip((8192, 32768), gains, strict=True):
                    case = {"length": length, "dim_head": 64, "causal": causal, "gain": gain}
                    found = cases("kernels_h200.json", what="plain", **case)
                    if gain is None or not found:
                        cells.append("")
                        continue
                    ratio = beside_cudnn(metric, **case)
                    density = found[0]["parameters"]["density"]
                    cells.append(f"{times(1 / ratio if invert else ratio)} at {density:.3f}")
                if any(cells):
                    least = f"{asked[place]} x or {'less' if invert else 'more'}"
                    label = f"{metric}{'' if causal else ', not causal'}{what or ', of cuDNN'}"
                    rows.append([label, least, *cells])
            peer, least = ("0.2.2", (5, 3)[place]) if causal else ("its first version", 20)
            files = "upstream_h200.json", "upstream_32k_h200.json"
            label = f"{metric}{'' if causal else ', not causal'}, of {peer}"
            ratios = [times(of_theirs(file, causal, metric)) for file in files]
            rows.append([label, f"{least} x or more", *ratios])
    return table("<goal | asked | 8,192 tokens, at density | 32,768 tokens, at density", rows)


TABLES: dict[str, Callable[[], str]] = {
    "low density": lambda: densities(0.05),
    "density 0.1": lambda: densities(0.1),
    "density 1": lambda: densities(1.0, "attention_last_h200.json"),
    "goals": goals, "errors": errors, "options": options, "upstream": upstream, "dense": dense,
    "decode": decode,
}  # fmt: skip
_MARKED = re.compile(r"(<!-- table: (.+?) -->\n\n).*?(\n\n<!-- end -->)", re.DOTALL)


def filled(text: str) -> str:
    """Return a page with its tables written anew."""
    return _MARKED.sub(lambda found: found[1] + TABLES[found[2]]() + found[3], text)


if __name__ == "__main__":
    README.write_text(filled(README.read_text(encoding="utf-8")), encoding="utf-8")
