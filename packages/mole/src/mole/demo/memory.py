"""Measure what one model holds in memory: `python -m mole.demo.memory FOLDER TOKENS`.

Runs in a process of its own and prints one line of JSON: bytes of the weights, growth of resident
memory from before loading until after generating, and how much of it are pages of the table. A
throw-away model runs first, so that code loaded on first use is not counted.
"""

import gc
import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from ..config import MoleConfig
from ..modeling import MoleForCausalLM

_MIB = 2**20


def resident_bytes(name: str = "VmRSS") -> int | None:
    """Return a line of `/proc/self/status` in bytes; None where there is none (not Linux)."""
    try:
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def mapped_bytes(name: str) -> int | None:
    """Return how many bytes of mapped files whose path ends in `name` are resident here."""
    total, inside = 0, False
    try:
        for line in Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines():
            first = line.split(maxsplit=1)[0]
            if not first.endswith(":"):
                inside = line.endswith(name)
            elif inside and first == "Rss:":
                total += int(line.split()[1]) * 1024
    except OSError:
        return None
    return total


def _generate(model: Any, tokens: int) -> None:
    ids = torch.arange(1, 9)[None]
    with torch.inference_mode():
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            min_new_tokens=tokens,
            max_new_tokens=tokens,
            do_sample=True,
            pad_token_id=0,
        )


def main() -> None:
    """Load the model that the command line names, generate, and print the figures."""
    folder, tokens = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    torch.manual_seed(0)
    small = MoleConfig(
        vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=1,
    )  # fmt: skip
    _generate(MoleForCausalLM(small).eval(), tokens)
    gc.collect()
    before = resident_bytes()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    _generate(model, tokens)
    gc.collect()
    after = resident_bytes()
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    table = mapped_bytes("lut.safetensors")
    figures = {
        "weights_mib": weights / _MIB,
        "resident_mib": None if before is None or after is None else (after - before) / _MIB,
        "table_mib": None if table is None else table / _MIB,
    }
    sys.stdout.write(json.dumps(figures) + "\n")


if __name__ == "__main__":
    main()
