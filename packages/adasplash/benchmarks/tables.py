"""The tables of the README and the pages, from the stored results; `pages.py` writes them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from fourfold_common import Results

RESULTS = Path(__file__).parent / "results"
ROOT = Path(__file__).parents[3]
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


def both(forward: float, backward: float) -> str:
    return "" if forward != forward else f"{ms(forward)} / {ms(backward)}"


def table(head: str, rows: Iterable[list[str]]) -> str:
    """Return a table whose columns are text where `head` begins with `<`, else right-aligned."""
    names = head.split(" | ")
    rule = ["---" if name.startswith("<") else "---:" for name in names]
    lines = [[name.removeprefix("<") for name in names], rule, *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def densities(asked: float) -> str:
    """Return our speed beside cuDNN's by length at one of the densities that were asked for."""
    rows = []
    for length in (2**i for i in range(10, 18)):
        cells, some = [f"{length:,}"], False
        for dim in (64, 128):
            its = beside(asked, "attention_h200.json", length=length, dim_head=dim, causal=True)
            cells, some = cells + its, some or bool(its[0])
        if some:
            rows.append(cells)
    return table("tokens | density, head size 64 | forward | with backward | "
                 "density, 128 | forward | with backward", rows)  # fmt: skip


def summary() -> str:
    """Return our speed beside cuDNN's, causal, at head size 64, both ways in one cell."""
    rows = []
    for length in (2**i for i in range(12, 18)):
        cells = [f"{length:,}"]
        for asked in (0.05, 0.1, 0.25, 1.0):
            shape = {"length": length, "dim_head": 64, "causal": True}
            density, *its = beside(asked, "attention_h200.json", **shape)
            cells.append(f"{' / '.join(its)} at {density}" if density else "")
        rows.append(cells)
    return table("tokens | density about 0.05 | 0.1 | 0.25 | 1", rows)


def beside(asked: float, file: str, **shape: object) -> list[str]:
    """Return the density of a case, and how many times as fast as cuDNN we are, both ways."""
    soft, ours = cases(file, **shape), cases(file, **shape, asked=asked)
    ours = [c for c in ours if c["provider"] == "adasplash"]
    if asked <= 0.05 and not ours:  # these inputs allow no lower density than another's
        ours = lowest(soft)
    density = {c["parameters"]["density"] for c in ours}
    ratios = [
        times(pick(soft, "SDPA cuDNN", metric) / pick(ours, "adasplash", metric))
        for metric in METRICS
    ]
    return [f"{density.pop():.3f}" if density else "", *ratios]


def others() -> str:
    """Return our speed beside cuDNN's without a causal mask, and on other inputs."""
    rows = []
    for name, file, causal in (
        ("not causal", "attention_h200.json", False),
        ("local heads", "attention_local_h200.json", True),
    ):
        for length in (8192, 32768):
            for asked in (0.05, 0.1, 0.25, 1.0):
                its = beside(asked, file, length=length, dim_head=64, causal=causal)
                if its[0]:
                    rows.append([name, f"{length:,}", *its])
    return table("<inputs | tokens | density | forward | with backward", rows)


def lowest(found: list[Case]) -> list[Case]:
    """Return our cases of the lowest density."""
    ours = [c for c in found if c["provider"] == "adasplash"]
    least = min((c["parameters"]["density"] for c in ours), default=0.0)
    return [c for c in ours if c["parameters"]["density"] == least]


def options() -> str:
    """Return the times of options beside softmax attention with the same option."""
    files = {64: "options_h200.json", 128: "options_128_h200.json"}
    rows = []
    for name in dict.fromkeys(c["parameters"]["option"] for c in cases(files[64])):
        cells = [NAMES.get(name, name)]
        for dim, file in files.items():
            found = cases(file, option=name, dim=dim)
            peers = {c["provider"] for c in found} - {"adasplash", "FlexAttention"}
            best = [min((pick(found, p, metric) for p in peers), default=float("nan"))
                    for metric in METRICS]  # fmt: skip
            density = {c["parameters"].get("density") for c in found} - {None}
            cells.append(f"{density.pop():.3f}" if density else "")
            for pair in ([pick(found, "adasplash", m) for m in METRICS], best,
                         [pick(found, "FlexAttention", m) for m in METRICS]):  # fmt: skip
                cells.append(both(*pair))
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


def kernels() -> str:
    """Return the time of every kernel, and of cuDNN, at 8,192 tokens of 32 heads of 64."""
    columns = {
        gain: cases("kernels_h200.json", what="plain", length=8192, dim_head=64, causal=True,
                    gain=gain)
        for gain in (1.127, 0.747, 0.549, 0.0)
    }  # fmt: skip
    rows = []
    for label, provider, metric in (
        ("screening", "adasplash", "screen"), ("list of blocks", "adasplash", "list"),
        ("threshold", "adasplash", "threshold"), ("output", "adasplash", "output"),
        ("delta and dQ", "adasplash", "queries"), ("dK and dV", "adasplash", "keys"),
        ("forward", "adasplash", "forward"), ("with backward", "adasplash", "forward + backward"),
        ("cuDNN, forward", "SDPA cuDNN", "forward"),
        ("cuDNN, with backward", "SDPA cuDNN", "forward + backward"),
    ):  # fmt: skip
        found = (pick(column, provider, metric) for column in columns.values())
        rows.append([label, *(f"{x:.3f}" for x in found)])
    at = [f"{found[0]['parameters']['density']:.3f}" for found in columns.values()]
    return table(f"<kernel | density {' | '.join(at)}", rows)


def masks() -> str:
    """Return the times of key masks and a window at 8,192 tokens of 32 heads of 64."""
    names = {
        "plain": "no mask", "ones": "hides nothing", "left tenth hidden": "hides the first tenth",
        "right quarter hidden": "hides the last quarter", "holes": "holes everywhere",
        "window of 1,024": "window of 1,024 keys",
    }  # fmt: skip
    rows = []
    for what, label in names.items():
        found = cases("kernels_h200.json", what=what, length=8192, dim_head=64, causal=True,
                      gain=4.0)  # fmt: skip
        density = found[0]["parameters"]["density"]
        rows.append([label, f"{density:.3f}",
                     *(ms(pick(found, "adasplash", metric)) for metric in METRICS)])  # fmt: skip
    return table("<mask | density | forward | with backward", rows)


def gpt2() -> str:
    """Return losses and steps of the two GPT-2 models."""
    rows = []
    for provider, label in (("softmax", "softmax (SDPA)"), ("entmax", "alpha 1.5")):
        found = cases("gpt2_h200.json")
        moving = pick(found, provider, "step while alpha moves")
        rows.append([label, f"{pick(found, provider, 'validation loss'):.3f} nats",
                     f"{pick(found, provider, 'step'):.3f} s",
                     f"{moving:.3f} s" if moving == moving else ""])  # fmt: skip
    return table("<attention | validation loss | step | while alpha moves", rows)


def encoder() -> str:
    """Return what became of the encoder at every length."""
    rows = []
    for length in (512, 2048, 8192):
        for provider in ("softmax", "alpha 1.5", "alpha 2"):
            found = [c for c in cases("encoder_h100.json", length=length)
                     if c["provider"] == provider]  # fmt: skip
            moving = pick(found, provider, "step while alpha moves")
            peak = next(c["peak_mib"] for c in found if c["metric"] == "step")
            empty = [c["median"] for c in found if c["metric"] == "empty 64x64 blocks"]
            rows.append([
                f"{length:,}", provider, f"{pick(found, provider, 'accuracy'):.3f}",
                f"{pick(found, provider, 'nDCG@10'):.3f}",
                f"{1e3 * pick(found, provider, 'step'):.0f} ms",
                f"{1e3 * moving:.0f} ms" if moving == moving else "", f"{peak:,.0f} MiB",
                f"{100 * sum(empty) / len(empty):.0f} %" if empty else "",
            ])  # fmt: skip
    return table("tokens | <attention | accuracy | nDCG@10 | step | while alpha moves | "
                 "peak memory | empty blocks", rows)  # fmt: skip


def empty() -> str:
    """Return the share of empty blocks by layer of the trained models."""
    rows = []
    found = cases("gpt2_h200.json", length=4096)
    shares = [100 * c["median"] for c in found if c["metric"] == "empty 64x64 blocks"]
    rows.append(["GPT-2, 90 M, from scratch", "4,096",
                 f"{min(shares):.0f} to {max(shares):.0f} %", ""])  # fmt: skip
    for length in (512, 2048, 8192):
        cells = ["all-MiniLM-L6-v2, fine-tuned", f"{length:,}"]
        for provider in ("alpha 1.5", "alpha 2"):
            layers = [
                f"{100 * c['median']:.0f}" for c in cases("encoder_h100.json", length=length)
                if (c["provider"], c["metric"]) == (provider, "empty 64x64 blocks")
            ]  # fmt: skip
            cells.append(f"{', '.join(layers)} %")
        rows.append(cells)
    return table("<model | tokens | <empty blocks at alpha 1.5, by layer | <at alpha 2", rows)


def demo_models() -> dict[str, Any]:
    """Return what is stored of the training of the demo's two models."""
    assets = ROOT / "packages/adasplash/src/adasplash/demo/assets/training.json"
    return json.loads(assets.read_text(encoding="utf-8"))["models"]


def demo() -> str:
    """Return how the demo's two models came out of their training."""
    models = demo_models()
    rows = [
        [label, f"{models[name]['validation_loss_nats']:.3f}",
         f"{models[name]['seconds_per_step']:.3f}"]
        for name, label in (("entmax", "1.5-entmax"), ("softmax", "softmax (SDPA)"))
    ]  # fmt: skip
    return table("<attention | validation loss, nats per token | seconds per step", rows)


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
    "density 1": lambda: densities(1.0),
    "other inputs": others, "summary": summary, "goals": goals, "kernels": kernels,
    "masks": masks, "errors": errors, "options": options, "upstream": upstream, "dense": dense,
    "decode": decode, "demo": demo, "gpt2": gpt2, "encoder": encoder, "empty": empty,
}  # fmt: skip
