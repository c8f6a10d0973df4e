"""The paper's four ablations on the embedded model, with every metric and 95 % intervals.

    python benchmarks/demo_ablations.py --output results/demo-ablations.json

Held-out scenes with captions, every object by its own map above its mean (the paper's protocol):
spaces with and without the softmax over concepts, what concepts attend to, layers, noise levels.
Maps of noise and maps made from the masks show what the protocol gives at worst and at best.

Source: Helbling et al. 2025, tables 2 to 4 and the appendix.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from conceptattention.demo.evaluate import (
    Found,
    held_out_scenes,
    reduced,
    segment_scenes,
    summarise,
)
from conceptattention.demo.model import load_pipeline
from conceptattention.demo.scenes import LABELS, Scenes
from conceptattention.maps import Reduce
from fourfold_common import environment_report

NOISE_LEVELS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
SPACES = ("output", "cross_attention", "value")
REDUCES: tuple[Reduce, ...] = ("raw", "softmax_mean", "mean_softmax")
ATTENDED = ("nothing", "concepts", "image", "both")


def _concepts_alone(q: Tensor, k: Tensor, v: Tensor, *image: Any) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def _nothing(q: Tensor, k: Tensor, v: Tensor, *image: Any) -> Tensor:
    return v


@contextmanager
def attending(to: str) -> Iterator[dict[str, Any]]:
    """Let concepts attend to "nothing" (their output is their value), "concepts", "image", "both".

    Yields:
        Settings of `ConceptAttention`.
    """
    other = {"nothing": _nothing, "concepts": _concepts_alone}.get(to)
    if other is None:
        yield {"self_attention": to == "both"}
        return
    with mock.patch("conceptattention.stream.reference.concept_attention", other):
        yield {"kernels": "torch"}


def bounds(found: Found, scenes: Scenes) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the metrics of maps of noise, and of the masks themselves at the maps' resolution."""
    generator = torch.Generator().manual_seed(0)
    for name in ("noise", "masks"):
        made = []
        for chunk, words, by_space in found:
            maps = by_space["output"]
            values = torch.rand(maps.soft.shape, generator=generator)
            if name == "masks":
                numbers = torch.tensor([[LABELS.index(word) for word in row] for row in words])
                masks = scenes.labels[chunk].cpu()[:, None] == numbers[:, :, None, None]
                values = F.adaptive_avg_pool2d(
                    masks.float(), (maps.soft.shape[-2], maps.soft.shape[-1])
                )[None]
                values = values.expand_as(maps.soft)
            made.append((chunk, words, {name: dataclasses.replace(maps, raw=values, soft=values)}))
        yield name, summarise(made, scenes, space=name)


def main() -> None:
    """Run the ablations, print a table and write it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scenes", type=int, default=200)
    parser.add_argument("--noise", type=float, default=0.4, help="where noise is not swept")
    parser.add_argument("--assets", type=Path, help="weights other than the package's")
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args()
    scenes = held_out_scenes(given.scenes)
    pipe = load_pipeline(given.assets)
    count = len(pipe.transformer.transformer_blocks)
    rows: list[dict[str, Any]] = []

    def add(ablation: str, case: str, found: Found, space: str = "output", **chosen: Any) -> None:
        row = summarise(found, scenes, space=space, **chosen)
        rows.append({"ablation": ablation, "case": case, "space": space, **row})
        low, high = row["miou_interval"]
        print(
            f"{ablation:10} {case:24} {space:16} acc {row['accuracy']:.3f} mIoU {row['miou']:.3f} "
            f"[{low:.3f}, {high:.3f}] AP {row['ap']:.3f}", flush=True,
        )  # fmt: skip

    every = segment_scenes(
        pipe, scenes, t=given.noise, layers="all", store="layers", space=SPACES, progress=True
    )
    default = list(range(count // 2, count))
    for name, row in bounds(every, scenes):
        rows.append({"ablation": "bounds", "case": name, "space": name, **row})
        print(name, row)
    for space in SPACES:
        for reduce in REDUCES:
            add("space", reduce, reduced(every, reduce), space, layers=default)
    for attended in ATTENDED:
        with attending(attended) as settings:
            add("attends to", attended, segment_scenes(pipe, scenes, t=given.noise, **settings))
    for layer in range(count):
        add("layers", str(layer), every, layers=[layer])
    for name, chosen in (("all", list(range(count))), ("default", default)):
        add("layers", name, every, layers=chosen)
    for t in NOISE_LEVELS:
        found = segment_scenes(pipe, scenes, t=t)
        for space in SPACES[:2]:
            add("noise", f"{t:g}", found, space)
    result = {
        "scenes": given.scenes, "t": given.noise, "default_layers": default,
        "protocol": "objects, each map above its mean, words present as concepts", "rows": rows,
        "environment": environment_report(),
    }  # fmt: skip
    given.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
