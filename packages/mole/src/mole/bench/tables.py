"""What tables cost and keep: conversion speed, loss by format, hit rate of a cache."""

import os
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from fourfold_common import Results

from ..conversion import convert, verify
from ..demo import ASSETS
from ..demo.train import encode
from ..evaluation import window_losses
from ..lut import FORMATS, CachedStore, open_lut
from ..modeling import MoleForCausalLM
from .shapes import random_model


def _shipped() -> tuple[Any, torch.Tensor]:
    """Return the shipped model in expert form and held-out text for it."""
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "tokenizer")
    model = MoleForCausalLM.from_pretrained(ASSETS / "mole", dtype=torch.float32).eval()
    return model, encode(tokenizer, [(ASSETS / "snippet.txt").read_text(encoding="utf-8")])


def measure_quant(
    results: Results, say: Callable[[str], None], device: torch.device, tokens: int | None = None
) -> None:
    """Add the shipped model's loss on its held-out excerpt, by format of the table."""
    model, text = _shipped()
    model, text = model.to(device), text[:tokens]
    context = min(len(text), model.config.max_position_embeddings)
    exact = window_losses(model, text, context).double().mean().item()
    results.add("experts", "loss", exact, "nats/token")
    with tempfile.TemporaryDirectory() as folder:
        for fmt in FORMATS:
            target = convert(model, Path(folder) / fmt, fmt, progress=False)
            table: Any = MoleForCausalLM.from_pretrained(target).to(device).eval()
            loss = window_losses(table, text, context).double().mean().item()
            size = table.lut.meta.row_bytes
            results.add(fmt, "loss", loss, "nats/token")
            results.add(
                fmt, "perplexity over experts", torch.tensor(loss - exact).exp().item(), "x"
            )
            results.add(fmt, "read", size, "B/token")
            say(f"{fmt}: loss {loss:.4f} ({loss - exact:+.4f} to the experts), {size:,} B/token")


def measure_convert(
    results: Results,
    say: Callable[[str], None],
    device: torch.device,
    fmt: str = "fp16",
    shape: str | None = None,
    experts: int = 4,
    folder: str | None = None,
    rounds: int = 3,
) -> None:
    """Add the speed of a conversion, next to writing as many bytes with fsync, and its memory.

    Args:
        results: Where figures go.
        say: Prints a line.
        device: Where the experts run.
        fmt: Format of the table.
        shape: One of `SHAPES`, with random weights; the shipped model if None.
        experts: Lookup experts in a layer of a shape.
        folder: Where the table is written; the folder for temporary files if None.
        rounds: Times to convert and to write, in turns.
    """
    if shape is None:
        model = _shipped()[0].to(device)
    else:
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        model = random_model("mole", shape, device, dtype, num_lookup_experts=experts).eval()
    name: dict[str, Any] = {"model": shape or "shipped", "format": fmt}
    times: dict[str, list[float]] = {"convert": [], "plain write": []}
    with suppress(OSError):  # Linux: the peak of what ran before does not count
        Path("/proc/self/clear_refs").write_text("5")
    before, grown = _peak_memory(), 0
    for _ in range(rounds):
        with tempfile.TemporaryDirectory(dir=folder) as place:
            begin = time.perf_counter()
            target = convert(model, Path(place) / "table", fmt, progress=False)
            times["convert"].append(time.perf_counter() - begin)
            grown = grown or _peak_memory() - before
            verify(target / "lut", model)
            size = sum(file.stat().st_size for file in target.rglob("*") if file.is_file())
            (target / "lut" / "lut.safetensors").unlink()
            times["plain write"].append(_plain_write(Path(place) / "plain", size))
    seconds = {way: torch.tensor(found) for way, found in times.items()}
    share = seconds["plain write"] / seconds["convert"]
    for provider, metric, unit, found in (
        ("convert", "speed", "GB/s", size / seconds["convert"] / 1e9),
        ("plain write", "speed", "GB/s", size / seconds["plain write"] / 1e9),
        ("convert", "of a plain write", "x", share),
    ):
        low, middle, high = (float(found.quantile(q)) for q in (0.2, 0.5, 0.8))
        results.add(provider, metric, middle, unit, p20=low, p80=high, n=rounds, **name)
    results.add("convert", "peak memory over the model", grown / 2**20, "MiB", **name)
    say(
        f"convert {fmt}: {size / 1e9:.2f} GB, seconds {times['convert']}, of a plain "
        f"write's speed {[round(x, 2) for x in share.tolist()]}, {grown / 2**20:,.0f} MiB over the "
        "model"
    )


def _plain_write(path: Path, size: int) -> float:
    """Return the seconds that writing so many bytes takes, until they are on the disk."""
    block = os.urandom(8 * 2**20)
    begin = time.perf_counter()
    with open(path, "wb") as file:
        left = size
        while left:
            left -= file.write(block[:left])
        file.flush()
        os.fsync(file.fileno())
    return time.perf_counter() - begin


def _peak_memory() -> int:
    """Return the largest resident memory of this process so far, in bytes."""
    import resource  # there is none on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def measure_cache(
    results: Results, say: Callable[[str], None], device: torch.device, tokens: int | None = None
) -> None:
    """Add the share of tokens that a cache serves while the held-out excerpt goes by."""
    model, text = _shipped()
    with tempfile.TemporaryDirectory() as folder:
        target = convert(model, folder, "nf4", progress=False)
        for capacity in (64, 256, 1024):
            store: Any = open_lut(target / "lut", cache=capacity, device=device)
            if not isinstance(store, CachedStore):
                raise TypeError("a cache was asked for and none was opened")
            for token in text[:tokens].long().split(1):
                store.read(token)
            rate = store.hits / (store.hits + store.misses)
            results.add("CLOCK", "hit rate", rate, "", rows=capacity, tokens=len(text[:tokens]))
            say(f"cache of {capacity} rows: {100 * rate:.1f} % of {len(text[:tokens]):,} tokens")


__all__ = ["measure_cache", "measure_convert", "measure_quant"]
