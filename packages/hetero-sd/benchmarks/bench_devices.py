"""Target and drafter on two GPUs, apart and spread: greedy texts against transformers', and times.

    python packages/hetero-sd/benchmarks/bench_devices.py --output devices.json

The target is the package's small one, inflated, in float32. "Spread" is accelerate's `device_map`.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch

from fourfold_common import Results
from hetero_sd import HeteroSpeculativeDecoder
from hetero_sd.demo.inflate import inflate
from hetero_sd.demo.models import load_model

QUESTIONS = ("What is bread?", "Write a story about a dog.", "Why is the sky blue?")
LAYERS = 12
OPTIONS = {"do_sample": False}


def spread(model: Any, layers: int) -> Any:
    """Return a model with the later half of its layers on the second GPU."""
    from accelerate import dispatch_model

    places = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.norm": 1, "lm_head": 0}
    places |= {f"model.layers.{i}": int(2 * i >= layers) for i in range(layers)}
    return dispatch_model(model, places)


def timed(run: Callable[[], Any]) -> tuple[Any, float]:
    """Return a result and the seconds that its second computation took."""
    run()
    for device in range(torch.cuda.device_count()):
        torch.cuda.synchronize(device)
    begun = time.perf_counter()
    out = run()
    for device in range(torch.cuda.device_count()):
        torch.cuda.synchronize(device)
    return out, time.perf_counter() - begun


@click.command()
@click.option("--tokens", default=24, show_default=True, help="New tokens of each row.")
@click.option("--only", default="", help="Placements whose names hold this text.")
@click.option("--output", type=click.Path(path_type=Path), required=True)
def main(tokens: int, only: str, output: Path) -> None:
    """Compare every placement with transformers; figures are written after each."""
    small, tokenizer = load_model("target")
    drafter, drafter_tokenizer = load_model("drafter")
    texts = [f"<s>user\n{question}</s>\n<s>assistant\n" for question in QUESTIONS]
    large = inflate(small, 4, LAYERS, dtype=torch.float32, device="cuda:0")
    first, second = (copy.deepcopy(drafter).float().to(f"cuda:{i}") for i in range(2))
    other = copy.deepcopy(large).to("cuda:1")
    wide = spread(copy.deepcopy(large), LAYERS)
    layers = drafter.config.num_hidden_layers
    placements = {
        "target on the first, drafter on the second": (large, second),
        "target on the second, drafter on the first": (other, first),
        "target spread, drafter on the second": (wide, second),
        "target and drafter spread": (wide, spread(copy.deepcopy(drafter).float(), layers)),
        "both on the second": (other, second),
    }
    results = Results("hetero-sd devices", command=f"bench_devices.py --tokens {tokens}")
    for name, (target, helper) in placements.items():
        if only not in name:
            continue
        for prompts in (texts[:1], texts):
            rows = [tokenizer(text).input_ids for text in prompts]
            width = max(map(len, rows))
            ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
            mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
            here, seen = ids.to(target.device), mask.to(target.device)
            wanted, theirs = timed(
                lambda here=here, seen=seen, target=target: target.generate(
                    here, attention_mask=seen, **OPTIONS, max_new_tokens=tokens
                )
            )
            where = {"placement": name, "rows": len(rows)}
            results.add("transformers", "time", 1e3 * theirs, "ms", **where)
            for method, lookahead in (("slem", 0), ("tli", 4), ("slem", 4), ("slrs", 4)):
                decoder = HeteroSpeculativeDecoder(
                    target,
                    helper,
                    tokenizer,
                    drafter_tokenizer,
                    method=method,
                    lookahead=lookahead,
                )
                made, ours = timed(
                    lambda decoder=decoder, ids=ids, mask=mask: decoder.generate(
                        input_ids=ids, attention_mask=mask, **OPTIONS, max_new_tokens=tokens
                    )
                )
                who = f"{method} {lookahead}" if lookahead else "plain"
                same = made.sequences[:, width:].tolist() == wanted[:, width:].tolist()
                results.add(who, "time", 1e3 * ours, "ms", **where)
                results.add(who, "over transformers", theirs / ours, "x", **where)
                results.add(who, "verdict", "exact" if same else "NOT EXACT", "", **where)
                results.save(output)
    click.echo(results.to_markdown())


if __name__ == "__main__":
    main()
