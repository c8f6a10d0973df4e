"""Which words the embedded model's maps find: the IoU of each, on held-out scenes.

    python benchmarks/demo_classes.py --output results/demo-classes.json

The strongest of the words present wins every pixel; noise is scored beside the maps.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

import torch

from conceptattention.demo.evaluate import held_out_scenes, score, segment_scenes
from conceptattention.demo.model import load_pipeline
from conceptattention.demo.scenes import LABELS
from fourfold_common import environment_report


def main() -> None:
    """Score the maps, print a table and write it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scenes", type=int, default=200)
    parser.add_argument("--noise", type=float, default=0.6)
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args()
    scenes = held_out_scenes(given.scenes)
    found = segment_scenes(load_pipeline(), scenes, t=given.noise, progress=True)
    generator = torch.Generator().manual_seed(0)
    noise = []
    for chunk, words, maps in found:
        drawn = torch.rand(maps["output"].soft.shape, generator=generator)
        noise.append((chunk, words, {"noise": dataclasses.replace(maps["output"], soft=drawn)}))
    columns = {
        "output": score(found, scenes, space="output", protocol="argmax").iou,
        "cross_attention": score(found, scenes, space="cross_attention", protocol="argmax").iou,
        "noise": score(noise, scenes, space="noise", protocol="argmax").iou,
    }
    rows = [
        {"word": word, **{name: round(float(iou[i]), 4) for name, iou in columns.items()}}
        for i, word in enumerate(LABELS)
    ]
    for row in sorted(rows, key=lambda row: -row["output"]):
        print(*row.values(), sep="\t")
    result = {
        "scenes": given.scenes, "t": given.noise, "metric": "IoU, argmax over the words present",
        "rows": rows, "environment": environment_report(),
    }  # fmt: skip
    given.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
