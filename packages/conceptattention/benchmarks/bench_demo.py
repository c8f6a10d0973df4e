"""The embedded model on a CPU: generation with and without maps, and segmenting one picture.

    python benchmarks/bench_demo.py --output results/demo-cpu.json

Both ways of generating alternate; the picture must be the same bits.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

from conceptattention import ConceptAttention, segment
from conceptattention.demo.evaluate import held_out_scenes
from conceptattention.demo.model import READING, load_pipeline
from fourfold_common import environment_report

PROMPT = "a bee and a flower on grass under clouds"
WORDS = ["bee", "flower", "grass", "clouds", "water"]


def timed(function):
    """Return what a call returns, and its seconds."""
    start = time.perf_counter()
    made = function()
    return made, time.perf_counter() - start


def summary(seconds):
    """Return median and quartiles."""
    low, _, high = statistics.quantiles(seconds, n=4)
    return {"median_s": statistics.median(seconds), "quartiles_s": [low, high]}


def main():
    """Time everything and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    loading, seconds = timed(load_pipeline), {"plain": [], "observed": [], "segment": []}
    pipe = loading[0]
    scene = held_out_scenes(1)

    def generate():
        generator = torch.Generator().manual_seed(0)
        made = pipe(PROMPT, num_inference_steps=given.steps, generator=generator, output_type="pt")
        return made.images

    def observe():
        with ConceptAttention(pipe, WORDS, **READING) as observer:
            made = generate()
        observer.heatmaps()
        return made

    def find():
        return segment(pipe, scene.images, scene.words(0), scene.captions(), t=0.4, **READING)

    for function in (generate, observe, find):
        function()
    for _ in range(given.runs):
        plain, once = timed(generate)
        seen, twice = timed(observe)
        if not torch.equal(plain, seen):
            raise RuntimeError("the observer changed the picture")
        seconds["plain"].append(once)
        seconds["observed"].append(twice)
        seconds["segment"].append(timed(find)[1])
    pairs = zip(seconds["observed"], seconds["plain"], strict=True)
    report = {
        "steps": given.steps, "threads": given.threads, "runs": given.runs,
        "concepts": len(WORDS), "bit_identical": True, "load_s": loading[1],
        **{name: summary(values) for name, values in seconds.items()},
        "overhead_percent": 100 * (statistics.median(a / b for a, b in pairs) - 1),
        "environment": environment_report(),
    }  # fmt: skip
    print(json.dumps({key: report[key] for key in report if key != "environment"}, indent=1))
    if given.output is not None:
        given.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
