"""Decoding on the CPU: the shipped model from its table, in expert form, and the dense twin.

    python packages/mole/benchmarks/bench_decode.py [--threads 1] [--output FOLDER]

Before anything is timed, the table's logits are compared with the experts'.
"""

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
@click.option(
    "--output", type=click.Path(path_type=Path), default=Path(__file__).parent / "results"
)
def main(threads: int, output: Path) -> None:
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
        speed = decode_speed(models, text)
    for name, (median, p20, p80) in speed.items():
        results.add(
            name, "decode", median, "ms/token", p20=p20, p80=p80, error=gaps.get(name),
            threads=threads,
        )  # fmt: skip
        results.add(name, "over dense", median / speed["dense"][0], "x", threads=threads)
    click.echo(results.to_markdown())
    click.echo(f"wrote {results.save(output / 'decode_cpu.json')}")


if __name__ == "__main__":
    main()
