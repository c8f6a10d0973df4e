"""The paper's four ablations on the embedded model, with every metric and 95 % intervals.

    python benchmarks/demo_ablations.py --output results/demo-ablations.json

Held-out scenes with captions, every object by its own map above its mean (the paper's protocol):
spaces with and without the softmax over concepts, what concepts attend to, layers, noise levels.
Maps of noise and maps made from the masks show what the protocol gives at worst and at best; a last
table gives the IoU of every word, where the strongest of the words present wins a pixel.

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

from conceptattention.adapters import adapter_for
from conceptattention.demo.evaluate import (
    Found,
    held_out_scenes,
    reduced,
    score,
    segment_scenes,
    summarise,
)
from conceptattention.demo.model import load_pipeline
from conceptattention.demo.scenes import LABELS, Scenes
from conceptattention.harness import plot_sweeps
from conceptattention.maps import Reduce
from fourfold_common import environment_report

NOISE_LEVELS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
SPACES = ("output", "cross_attention", "value", "prompt_attention", "daam")
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
    """Run the ablations, print a table, write it, and draw the sweeps if matplotlib is there."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scenes", type=int, default=200)
    parser.add_argument("--noise", type=float, default=0.4, help="where noise is not swept")
    parser.add_argument("--assets", type=Path, help="weights other than the package's")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args()
    scenes = held_out_scenes(given.scenes)
    pipe = load_pipeline(given.assets, device=given.device)
    count = len(pipe.transformer.transformer_blocks)
    default = list(adapter_for(pipe.transformer).default_layers(pipe.transformer))
    rows: list[dict[str, Any]] = []

    def add(
        ablation: str, case: str, found: Found, space: str = "output",
        reduce: Reduce = "softmax_mean", layers: list[int] | None = None,
        noise: float = given.noise,
    ) -> None:  # fmt: skip
        row = summarise(reduced(found, reduce), scenes, space=space, layers=layers)
        single = layers[0] if layers is not None and len(layers) == 1 else None
        rows.append(
            {
                "ablation": ablation, "case": case, "space": space, "reduce": reduce,
                "noise": noise, "layer": single, "self_attention": case != "image", **row,
            }
        )  # fmt: skip
        low, high = row["miou_interval"]
        print(
            f"{ablation:10} {case:12} {space:16} {reduce:12} acc {row['accuracy']:.3f} "
            f"mIoU {row['miou']:.3f} [{low:.3f}, {high:.3f}] AP {row['ap']:.3f}", flush=True,
        )  # fmt: skip

    def write() -> None:
        result = {
            "scenes": given.scenes, "t": given.noise, "default_layers": default,
            "protocol": "objects, each map above its mean, words present as concepts",
            "rows": rows, "words": words, "environment": environment_report(),
        }  # fmt: skip
        given.output.write_text(json.dumps(result, indent=1) + "\n")

    words: list[dict[str, Any]] = []
    every = segment_scenes(
        pipe, scenes, t=given.noise, layers="all", store="layers", space=SPACES, progress=True
    )
    for name, row in bounds(every, scenes):
        rows.append({"ablation": "bounds", "case": name, "space": name, **row})
    for space in SPACES:
        for reduce in REDUCES:
            add("space", space, every, space, reduce, default)
    for attended in ATTENDED:
        with attending(attended) as settings:
            found = segment_scenes(pipe, scenes, t=given.noise, **settings)
        for reduce in REDUCES[1:]:
            add("attends to", attended, found, reduce=reduce)
    for space in SPACES:
        for layer in range(count):
            add("layers", str(layer), every, space, layers=[layer])
    later = list(range(count // 2, count))
    for name, chosen in (("all", list(range(count))), ("later half", later), ("default", default)):
        for reduce in REDUCES[1:]:
            add("layers", name, every, reduce=reduce, layers=chosen)
    write()
    for t in NOISE_LEVELS:
        found = segment_scenes(pipe, scenes, t=t, space=SPACES)
        for space in SPACES:
            for reduce in REDUCES[1:]:
                add("noise", f"{t:g}", found, space, reduce, noise=t)
    ious = {
        space: score(reduced(every, "mean_softmax"), scenes, layers=default, space=space,
                     protocol="argmax").iou
        for space in SPACES
    }  # fmt: skip
    words += [
        {"word": word, **{space: round(float(iou[i]), 4) for space, iou in ious.items()}}
        for i, word in enumerate(LABELS)
    ]
    write()
    sweeps = [row for row in rows if row["ablation"] in ("noise", "layers")]
    plot_sweeps(
        [row for row in sweeps if row["case"] not in ("all", "later half", "default")],
        given.output.parent,
    )


if __name__ == "__main__":
    main()
