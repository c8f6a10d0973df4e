"""Decoding on the CPU: the shipped model from its table, in expert form, and the dense twin.

    python packages/mole/benchmarks/bench_decode.py [--threads 1] [--output FOLDER]

Before anything is timed, the table's logits are compared with the experts'.
"""

import statistics
import tempfile
from pathlib import Path

import click
import torch
from transformers import AutoTokenizer
from transformers.utils import logging

from fourfold_common import Results
from mole import DenseForCausalLM, MoleForCausalLM, convert
from mole.demo import ASSETS
from mole.demo.run import decode_speed
from mole.demo.train import encode
from mole.lut import FORMATS


@click.command()
@click.option("--threads", default=1, show_default=True, help="CPU threads.")
@click.option("--rounds", default=7, show_default=True, help="Times to decode the text.")
@click.option(
    "--output", type=click.Path(path_type=Path), default=Path(__file__).parent / "results"
)
def main(threads: int, rounds: int, output: Path) -> None:
    logging.disable_progress_bar()
    torch.set_num_threads(threads)
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "tokenizer")
    text = encode(tokenizer, [(ASSETS / "snippet.txt").read_text(encoding="utf-8")])
    experts = MoleForCausalLM.from_pretrained(ASSETS / "mole", dtype=torch.float32).eval()
    models = {
        "dense": DenseForCausalLM.from_pretrained(ASSETS / "dense", dtype=torch.float32).eval(),
        "experts": experts,
    }
    results = Results("mole", command=f"bench_decode.py --threads {threads}")
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        window = text[None, :256].long()
        exact = experts(window).logits
        gaps = {}
        for fmt in FORMATS:
            target = convert(experts, Path(folder) / fmt, fmt, progress=False)
            for store in ("mmap", "device"):
                name = f"table {fmt}, {store}"
                models[name] = MoleForCausalLM.from_pretrained(target, lut_store=store).eval()
                gaps[name] = (models[name](window).logits - exact).abs().max().item()
        if gaps["table fp32, mmap"] > 1e-4:
            raise click.ClickException(f"the table's logits are wrong: {gaps}")
        runs = [decode_speed(models, text) for _ in range(rounds)]
    for name in models:
        # Within a round the models take turns, token by token; rounds say how sure a ratio is.
        for metric, unit, found, error in (
            ("decode", "ms/token", [run[name][0] for run in runs], gaps.get(name)),
            ("over dense", "x", [run[name][0] / run["dense"][0] for run in runs], None),
        ):
            low, high = statistics.quantiles(found, n=5)[::3] if rounds > 1 else found * 2
            results.add(
                name, metric, statistics.median(found), unit, p20=low, p80=high, n=rounds,
                error=error, threads=threads,
            )  # fmt: skip
    click.echo(results.to_markdown())
    click.echo(f"wrote {results.save(output / 'decode_cpu.json')}")


if __name__ == "__main__":
    main()
