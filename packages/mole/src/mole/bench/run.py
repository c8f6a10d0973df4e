"""Run benchmark topics and write JSON and a table."""

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from fourfold_common import Results, pick_device

# Where each topic's function is, in this package.
_HOME = {
    "hw": ("hw", "measure"),
    "decode": ("decode", "measure"),
    "prefill": ("prefill", "measure"),
    "convert": ("tables", "measure_convert"),
    "train": ("train", "measure"),
    "quant": ("tables", "measure_quant"),
    "cache": ("tables", "measure_cache"),
}
TOPICS = tuple(_HOME)
# The shape "tiny" is for trying a topic out: on a CPU it takes a minute at most.
_TINY: dict[str, dict[str, Any]] = {
    "decode": {"length": 64, "steps": 4},
    "prefill": {"length": 256},
    "train": {
        "context": 64,
        "cases": (("dense", 2), ("micro", 2), ("off", 2), ("dense", 4), ("step", 4)),
    },
}


def run(
    topic: str,
    output: Path,
    say: Callable[[str], None],
    device: str = "auto",
    **options: Any,
) -> Path:
    """Run one topic and return the file of its figures, written even if a case fails.

    Args:
        topic: One of `TOPICS`.
        output: Folder for `TOPIC.json`.
        say: Prints a line of progress.
        device: `"auto"`, `"cpu"` or `"cuda"`.
        **options: Passed on to the topic's `measure`; with the shape `"tiny"` texts are short.

    Raises:
        ValueError: The topic is unknown, or a check before timing failed.
    """
    if topic not in TOPICS:
        raise ValueError(f"`topic` must be one of {', '.join(TOPICS)}; got {topic!r}.")
    where, reason = pick_device(device)
    where = torch.device(where)
    say(f"{topic} on {where} ({reason})")
    results = Results("mole", command=f"mole bench {topic}", seed=0)
    module, name = _HOME[topic]
    measure = getattr(import_module(f".{module}", __package__), name)
    path = output / f"{topic}.json"
    small = _TINY.get(topic, {}) if options.get("shape") == "tiny" else {}
    try:
        measure(results, say, where, **(small | options))
    finally:
        if results.cases:
            path = results.save(path)
    return path


__all__ = ["TOPICS", "run"]
