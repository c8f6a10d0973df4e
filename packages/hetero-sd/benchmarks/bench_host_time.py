"""Times what a round costs the host: passes are replaced by results that are there at once.

    python packages/hetero-sd/benchmarks/bench_host_time.py --output host.json

The shipped models run by the steps that a CUDA device takes, each captured pass once in earnest and
then not at all, so that only the loop's own work is left: texts and tokens, choices, copies.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch

from fourfold_common import Results
from hetero_sd import HeteroSpeculativeDecoder
from hetero_sd.demo.models import load_model
from hetero_sd.graphs import GraphRunner

PROMPT = "<s>user\nWrite a short story about the sea.</s>\n<s>assistant\n"


class Still:
    """A graph whose replay leaves everything as its first run did."""

    def __init__(self, run: Callable[[], Any]) -> None:
        self.out = run()

    def replay(self) -> None:
        """Do nothing."""


def milliseconds_a_round(decoder: HeteroSpeculativeDecoder, rows: int, tokens: int) -> float:
    """Return the median time of a round but the prompt's, in milliseconds."""
    rounds = decoder.start([PROMPT] * rows, max_new_tokens=tokens, eos_token_id=[])
    steps = rounds.run()
    next(steps)
    taken, begun = [], time.perf_counter()
    for _ in steps:
        taken.append(time.perf_counter() - begun)
        begun = time.perf_counter()
    return 1e3 * statistics.median(taken)


@click.command()
@click.option("--rows", default="1,8", show_default=True, help="Batches, between commas.")
@click.option("--lookahead", default=4, show_default=True, help="Tokens drafted a round.")
@click.option("--tokens", default=192, show_default=True, help="New tokens of each row.")
@click.option("--repeats", default=5, show_default=True, help="Generations of each setting.")
@click.option("--code", default="", help="Version of the package, to note with the figures.")
@click.option("--output", type=click.Path(path_type=Path), help="File for the figures.")
def main(
    rows: str, lookahead: int, tokens: int, repeats: int, code: str, output: Path | None
) -> None:
    """Time greedy rounds of every method; figures are added to those in the file."""
    torch.set_num_threads(1)
    parts = [load_model(name) for name in ("target", "drafter")]
    models, tokenizers = zip(*parts, strict=True)
    results = Results("hetero-sd host time", command="bench_host_time.py")
    GraphRunner.capture = lambda self, run: (graph := Still(run), graph.out)  # type: ignore
    for count in map(int, rows.split(",")):
        for method, steps in (("tli", 0), *((m, lookahead) for m in ("tli", "slem", "slrs"))):
            decoder = HeteroSpeculativeDecoder(
                *models, *tokenizers, method=method, lookahead=steps, backend="cudagraph"
            )
            milliseconds_a_round(decoder, count, tokens)
            taken = [milliseconds_a_round(decoder, count, tokens) for _ in range(repeats)]
            results.add(
                f"{method} {steps}" if steps else "plain",
                "host time",
                statistics.median(taken),
                "ms/round",
                p20=min(taken),
                p80=max(taken),
                n=repeats,
                batch=count,
                code=code,
            )
    click.echo(results.to_markdown())
    if output is not None:
        if output.is_file():
            results.cases = [*Results.load(output).cases, *results.cases]
        results.save(output)


if __name__ == "__main__":
    main()
