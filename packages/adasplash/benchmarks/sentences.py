"""Figures that stand in sentences of the README and the pages, from the stored results.

A sentence is found by its words, wherever its lines break; `{}` stands for a figure.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from functools import partial
from statistics import median

import bench_attention
import tables
from tables import METRICS, cases, of_theirs, pick

from fourfold_common import Results

_FIGURE = r"\d+(?:[.,]\d+)*"


def ranges(dim: int) -> list[str]:
    """Return the least and the largest density of crossing, forward and with backward."""
    stored = Results.load(tables.RESULTS / "attention_h200.json")
    found = []
    for metric in METRICS:
        crossings = [
            bench_attention.crossover(points)
            for grid, points in bench_attention.ratios(stored, metric).items()
            if grid.causal and grid.dim_head == dim and grid.length >= 4096
        ]
        known = [x for x in crossings if x is not None]
        found += [f"{min(known):.2f}", f"{max(known):.2f}"]
    return found


def kernel(metric: str, gain: float, provider: str = "adasplash", **shape: object) -> float:
    """Return the ms of a kernel or of a call at 8,192 tokens, or at another shape."""
    case = {"what": "plain", "length": 8192, "dim_head": 64, "causal": True, "gain": gain, **shape}
    return pick(cases("kernels_h200.json", **case), provider, metric)


def faster(metric: str, gain: float, **shape: object) -> float:
    """Return how many times as fast as cuDNN's our attention is."""
    return kernel(metric, gain, "SDPA cuDNN", **shape) / kernel(metric, gain, **shape)


def memory() -> Iterable[str]:
    """Return what is kept for the backward, and the most that a call needs, in MiB."""
    shapes = [cases("attention_h200.json", dim_head=64, causal=True, asked=1.0, length=length)
              for length in (8192, 131072)]  # fmt: skip
    for found in shapes:
        kept = {c["parameters"]["saved_mib"] for c in found if c["provider"] == "adasplash"}
        yield f"{kept.pop():.2f}"
    for found in shapes:
        for provider in ("adasplash", "SDPA cuDNN"):
            peaks = (c["peak_mib"] for c in found if c["provider"] == provider)
            yield f"{max(peaks):.0f}"


def parallel() -> list[str]:
    """Return the ms on two devices and on one, forward and with backward."""
    return [
        f"{pick(cases('context_parallel_h200.json', ranks=ranks), 'adasplash', metric):.1f}"
        for metric in METRICS for ranks in (2, 1)
    ]  # fmt: skip


def host() -> list[str]:
    """Return what a call costs the host in ms, forward and with backward, and torch's own."""
    stored = json.loads((tables.RESULTS / "host_h200.json").read_text(encoding="utf-8"))
    ours = [median(stored[f"now, turn {turn}"][way] for turn in (1, 2, 3))
            for way in ("forward", "both")]  # fmt: skip
    return [f"{x / 1e3:.2f}" for x in (*ours, stored["SDPA both"])]


def first_call() -> list[str]:
    """Return the s of a first call, kernels side by side and alone; the ms of a new length."""
    rows = tables.rows_of("first_h200.json")
    slowest = [max(row["with backward"] for row in rows if row["how"] == how)
               for how in ("together", "alone")]  # fmt: skip
    new = max(row["another length"] for row in rows if row["how"] == "together")
    return [*(f"{x:.1f}" for x in slowest), f"{1e3 * new:.0f}"]


def decoding() -> list[str]:
    """Return our speed beside SDPA at 65,536 keys: with bounds, without, all keys matter."""
    found = []
    for noise, gain, ways in (
        (0.1, 1.0, ("adasplash, bounds", "adasplash, pages, bounds")),
        (1.0, 1.0, ("adasplash", "adasplash, pages")),
        (1.0, 0.0, ("adasplash", "adasplash, pages")),
    ):
        stored = cases("decode_h200.json", keys=65536, noise=noise, gain=gain)
        peers = {c["provider"] for c in stored if c["provider"].startswith("SDPA")}
        best = min(pick(stored, provider, "decode") for provider in peers)
        found.append(f"{best / min(pick(stored, way, 'decode') for way in ways):.1f}")
    return found


def of_plain() -> float:
    """Return the largest error of half formats over that of plain PyTorch with float32 scores."""
    ours, plain = (
        [c["parameters"] for c in cases("kernels_h200.json")
         if (c["provider"], c["metric"]) == (provider, "worst relative error")]
        for provider in ("adasplash", "plain PyTorch, float32 scores")
    )  # fmt: skip
    return max(
        mine[what] / theirs[what]
        for mine, theirs in zip(ours, plain, strict=True)
        if mine["dtype"] != "float32"
        for what in ("output", "dq", "dk", "dv")
    )


def option(name: str) -> list[str]:
    """Return the ms of an option at head size 64, forward and with backward."""
    found = cases("options_h200.json", option=name, dim=64)
    return [f"{pick(found, 'adasplash', metric):.2f}" for metric in METRICS]


def gpt2() -> list[str]:
    """Return what the text says of the GPT-2 models."""
    found = cases("gpt2_h200.json")
    at = cases("gpt2_h200.json", length=4096)
    behind = pick(found, "entmax", "validation loss") - pick(found, "softmax", "validation loss")
    zeros, empty = (
        [100 * c["median"] for c in at if c["metric"] == metric]
        for metric in ("zero weights", "empty 64x64 blocks")
    )
    spent = {
        provider: sum(
            c["median"] for c in at if (c["provider"], c["metric"]) == (provider, METRICS[1])
        )
        for provider in ("adasplash", "SDPA cuDNN")
    }
    return [f"{behind:.2f}", f"{min(zeros):.1f}", f"{max(zeros):.1f}", f"{min(empty):.0f}",
            f"{max(empty):.0f}", f"{spent['adasplash'] / spent['SDPA cuDNN']:.1f}"]  # fmt: skip


def mostly_zero() -> list[str]:
    """Return the mean share of zero weights of the GPT-2, and its most empty layer's blocks."""
    at = [c for c in cases("gpt2_h200.json", length=4096) if c["metric"] == "zero weights"]
    return [f"{100 * sum(c['median'] for c in at) / len(at):.0f}", gpt2()[4]]


def encoder() -> list[float]:
    """Return the s of a step at 8,192 tokens: alpha moves, alpha 1.5, softmax."""
    found = cases("encoder_h100.json", length=8192)
    moving = pick(found, "alpha 1.5", "step while alpha moves")
    return [moving, pick(found, "alpha 1.5", "step"), pick(found, "softmax", "step")]


def demo() -> list[str]:
    """Return the share of zero weights in the demo's later layers and first, and empty blocks."""
    stored = cases("demo_sparsity.json")
    layers = [
        [c["median"] for c in stored
         if c["provider"] == "zero weights" and (c["parameters"]["layer"] == 0) == first]
        for first in (False, True)
    ]  # fmt: skip
    empty = max(c["median"] for c in stored if c["provider"] == "empty 64x64 blocks")
    return [*(f"{x:.0f}" for shares in layers for x in (min(shares), max(shares))), f"{empty:.0f}"]


SENTENCES: list[tuple[str, Callable[[], Iterable[str]]]] = [
    (
        "the forward overtakes softmax below a density of {} to {} at head size 64 and of {} to {} "
        "at 128, forward and backward together below {} to {} and {} to {}",
        lambda: [*(a := ranges(64))[:2], *(b := ranges(128))[:2], *a[2:], *b[2:]],
    ),
    (
        "a threshold for every row and a bit for every block, {} MiB for 32 heads of 8,192 tokens, "
        "{} MiB for 2 of 131,072. The most that forward and backward need at a time is {} MiB at "
        "8,192 tokens and head size 64, with cuDNN {}; at 131,072 tokens {}, with cuDNN {}.",
        memory,
    ),
    (
        "it takes {} of cuDNN's time for the whole forward",
        lambda: [f"{kernel('screen', 0.747) / kernel('forward', 0.747, 'SDPA cuDNN'):.2f}"],
    ),
    (
        "The dense pass over the scores is always paid: {} of a softmax forward.",
        lambda: [f"{kernel('screen', 0.747) / kernel('forward', 0.747, 'SDPA cuDNN'):.2f}"],
    ),
    (
        "it would have to be all but {} ms of the forward for the goal, where lists, threshold and "
        "output take {} ms",
        lambda: [
            f"{kernel('forward', 0.747, 'SDPA cuDNN') / 1.5 - kernel('screen', 0.747):.2f}",
            f"{sum(kernel(part, 0.747) for part in ('list', 'threshold', 'output')):.2f}",
        ],
    ),
    ("forward {} ms instead of {}, with backward {} instead of {}", parallel),
    ("the forward takes {} ms on two instead of {} on one, with the backward {} instead of {}",
     parallel),
    (
        "The first call of a head size takes {} s, forward and backward, with nothing compiled "
        "before (the goal was 10; {} s if kernels were compiled one after another), a new length "
        "{} ms",
        first_call,
    ),
    ("A call costs the host {} ms forward and {} ms with the backward, torch's own {} ms with it (",
     host),
    ("A call costs the host {} ms forward and {} ms with the backward (", lambda: host()[:2]),
    ("A call costs it {} ms forward and {} ms with the backward.", lambda: host()[:2]),
    (
        "adasplash 0.2.2 takes {} ms in a run where ours takes {} (",
        lambda: [f"{pick(cases('upstream_h200.json'), provider, 'dense forward'):.3f}"
                 for provider in (tables.THEIRS, "adasplash")],
    ),
    ("it is {} times where the bounds of pages tell them apart, and {} times where they do not.",
     lambda: decoding()[:2]),
    (
        "at 65,536 keys is {} times as fast as SDPA where the bounds of pages tell keys apart, {} "
        "times where they do not, {} times where all keys matter",
        decoding,
    ),
    ("ours are {} times as large at most (", lambda: [f"{of_plain():.2f}"]),
    (
        "After so few steps the sparse twin is behind by {} nats, and its attention is sparse in "
        "single weights ({} to {} % are zero at 4,096 tokens), not in blocks: {} to {} % of a "
        "layer's are empty. So our kernels take {} times the time of cuDNN's",
        gpt2,
    ),
    (
        "for the measurements {} % of the weights are zero, and {} % of a layer's blocks at most.",
        mostly_zero,
    ),
    (
        "may have {} % of zero weights and hardly an empty block: the GPT-2 of 90 M parameters "
        "above, after 407 steps, has {} % of empty blocks at most at 4,096 tokens",
        mostly_zero,
    ),
    (
        "takes {} times our time forward and {} times with the backward at 8,192 tokens, {} and {} "
        "times at 32,768,",
        lambda: [f"{of_theirs(file, True, metric):.1f}"
                 for file in ("upstream_h200.json", "upstream_32k_h200.json")
                 for metric in METRICS],
    ),
    (
        "forward and backward {} times as fast at 8,192 tokens and a density of 0.05, {} times at "
        "0.1, {} times at 32,768 tokens and 0.02; {} times as fast where every block holds weight",
        lambda: [*(f"{faster(METRICS[1], gain):.1f}" for gain in (1.127, 0.747)),
                 f"{faster(METRICS[1], 1.0, length=32768):.1f}", f"{faster(METRICS[1], 0.0):.2f}"],
    ),
    (
        "An additive bias is read by the dense pass: {} and {} ms instead of {} and {} at 8,192 "
        "tokens; a key mask with holes takes {} and {} ms, a window of 1,024 keys {} and {} (",
        lambda: [ms for name in ("bias", "none", "padding", "window") for ms in option(name)],
    ),
    (
        "The dense map `entmax15` takes {} ms over 8,192 rows of 8,192 float32 numbers, "
        "`torch.softmax` {}",
        lambda: [f"{pick(cases('ops_h200.json', length=8192), provider, 'dense forward'):.2f}"
                 for provider in ("adasplash", "torch.softmax")],
    ),
    (
        "has {} to {} % exact zeros in the heads of layers 1 to 4 and {} to {} % in those of "
        "layer 0, but few *empty blocks* of 64x64 at its context of 512: none in most heads, {} % "
        "at most",
        demo,
    ),
    ("Its validation loss is {} nats per token, that of its softmax twin {} (",
     lambda: [f"{tables.demo_models()[name]['validation_loss_nats']:.3f}"
              for name in ("entmax", "softmax")]),
    (
        "({} s against {} s in an encoder at 8,192 tokens, {} s against {} s in a GPT-2 at 4,096)",
        lambda: [*(f"{x:.3f}" for x in encoder()[:2]),
                 *(f"{pick(cases('gpt2_h200.json'), 'entmax', metric):.3f}"
                   for metric in ("step while alpha moves", "step"))],
    ),
    ("a training step of that encoder takes {} ms at alpha 1.5, with softmax {};",
     lambda: [f"{1e3 * x:.0f}" for x in encoder()[1:]]),
]  # fmt: skip


def pattern_of(sentence: str) -> re.Pattern[str]:
    """Return what finds a sentence: figures are groups of their own, and so is what is between."""
    words = r"\s+".join(map(re.escape, sentence.split()))
    return re.compile("(" + words.replace(r"\{\}", f"){_FIGURE}(") + ")")


def said(text: str) -> str:
    """Return a page with the figures of its sentences written anew."""

    def written(found: re.Match[str], figures: list[str]) -> str:
        first, *rest = found.groups()
        return first + "".join(x + y for x, y in zip(figures, rest, strict=True))

    for sentence, figures in SENTENCES:
        pattern = pattern_of(sentence)
        if pattern.search(text):
            text = pattern.sub(partial(written, figures=list(figures())), text)
    return text
