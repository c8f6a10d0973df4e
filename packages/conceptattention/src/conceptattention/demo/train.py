"""Train the demo model: rectified flow on procedural scenes drawn on the device.

Reproduces the package's assets:

    python -m conceptattention.demo.train --output OUT

The run is time-boxed: the learning rate follows the clock, or the step count with `--steps`.
Figures go to training.json and training_log.csv; everything the package ships is also packed into
assets.tar, rewritten at every checkpoint, so a crash loses minutes only.
"""

from __future__ import annotations

import copy
import logging
import os
import tarfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from fourfold_common import pick_device

from ..adapters import adapter_for
from ..maps import Reduce
from . import scenes as scene_module
from .evaluate import (
    SPACES,
    held_out_scenes,
    noun_swap,
    predict,
    reduced,
    score,
    segment_scenes,
    summarise,
)
from .model import PIXELS, DemoPipeline, build_pipeline, load_pipeline
from .scenes import patchify, sample_scenes
from .training import Recipe, Trainer, begin, fit, training_options, write_report

_logger = logging.getLogger(__name__)
SMALL_PIXELS = 32
NOISE_LEVELS = (0.2, 0.4, 0.6, 0.8)
SWAP_LEVELS = (*NOISE_LEVELS, 0.9)
SAMPLE_PROMPTS = (
    "a red box and a fish on grass", "an apple on wood", "a bee and a flower on grass under clouds",
    "a moon under night", "a blue ball on sand under clouds", "a shell on sand",
    "a star and a yellow kite on water", "a mushroom on grass under night",
    "a wheel and a coin on brick", "a leaf on snow", "a purple flag on snow under clouds",
    "a tile and a green ball on wood",
)  # fmt: skip


class SceneSource:
    """Draws procedural scenes: small ones, a quarter of the tokens, for the first part of a run.

    Words bind to pictures within so many scenes, not so many pixels.

    Args:
        batch: Scenes of full size per step; small ones come twice as many.
        small_share: Share of the run that is drawn at `SMALL_PIXELS`.
    """

    def __init__(self, batch: int, small_share: float) -> None:
        self.batch, self.small_share = batch, small_share

    def __call__(self, progress: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return packed pixels and captions."""
        small = progress < self.small_share
        count, size = (2 * self.batch, SMALL_PIXELS) if small else (self.batch, PIXELS)
        scenes = sample_scenes(count, generator, size=size)
        return patchify(scenes.images), scenes.tokens


def count_flops(pipe: DemoPipeline) -> float:
    """Return the floating-point operations of one forward pass of one picture."""
    from torch.utils.flop_counter import FlopCounterMode

    scenes = held_out_scenes(1)
    with FlopCounterMode(display=False) as counter:
        predict(pipe, patchify(scenes.images), scenes.tokens, 0.5)
    return float(counter.get_total_flops())


def check_observer(pipe: DemoPipeline) -> dict[str, Any]:
    """Return whether pictures are the same bits with the observer attached, and its cost."""
    from .. import ConceptAttention

    def generate() -> Any:
        generator = torch.Generator().manual_seed(0)
        return pipe(
            ["a red box on grass"] * 4, num_inference_steps=8, output_type="pt",
            generator=generator, negative_prompt=[""] * 4, true_cfg_scale=2.0,
        ).images  # fmt: skip

    def timed() -> tuple[Any, float]:
        started = time.perf_counter()
        images = generate()
        images.sum().item()
        return images, time.perf_counter() - started

    if pipe.device.type == "cpu":
        return {}
    generate()
    plain, plain_seconds = min((timed() for _ in range(3)), key=lambda pair: pair[1])
    with ConceptAttention(pipe, ["box", "grass", "fish"]) as observer:
        generate()
        seen, seen_seconds = min((timed() for _ in range(3)), key=lambda pair: pair[1])
        observer.heatmaps()
    return {
        "bit_identical": torch.equal(plain, seen),
        "seconds_plain": round(plain_seconds, 4),
        "seconds_observed": round(seen_seconds, 4),
    }


def evaluate(pipe: DemoPipeline, count: int) -> dict[str, Any]:
    """Return the held-out figures by space, noise level, order of reduction and layer; noun swap.

    "caption" tells whether the model is given the caption; every metric of the binary protocol, and
    mIoU of the strongest word under "argmax_miou".
    """
    scenes = held_out_scenes(count)
    layers = range(len(pipe.transformer.transformer_blocks))
    default = list(adapter_for(pipe.transformer).default_layers(pipe.transformer))
    cases: list[tuple[list[int], Reduce]] = [
        (default, "softmax_mean"), (default, "mean_softmax"),
        *(([layer], "softmax_mean") for layer in layers),
    ]  # fmt: skip
    rows = []
    for captions in (True, False):
        for t in NOISE_LEVELS:
            found = segment_scenes(
                pipe, scenes, t=t, captions=captions, layers="all", store="layers", kernels="torch"
            )
            for space in SPACES:
                for chosen, reduce in cases if captions else cases[:2]:
                    maps = reduced(found, reduce)
                    strongest = score(maps, scenes, layers=chosen, space=space, protocol="argmax")
                    row: dict[str, Any] = {
                        "t": t, "caption": captions, "space": space, "layers": chosen,
                        "reduce": reduce, **summarise(maps, scenes, layers=chosen, space=space),
                        "argmax_miou": round(strongest.miou, 4),
                    }  # fmt: skip
                    rows.append(row)
                    _logger.info("%s", {k: row[k] for k in (*row,)[:5]} | {"miou": row["miou"]})
    swaps = {str(t): noun_swap(pipe, scenes, t) for t in SWAP_LEVELS}
    _logger.info("noun swap %s", {t: round(swap["rise"], 3) for t, swap in swaps.items()})
    return {"scenes": count, "segmentation": rows, "noun_swap": swaps}


def draw_samples(pipe: DemoPipeline, path: Path, *, guidance: float = 3.0, steps: int = 16) -> None:
    """Write a grid of generated pictures, two rows of six prompts."""
    from PIL import Image

    pictures = pipe(
        list(SAMPLE_PROMPTS), num_inference_steps=steps, output_type="pt",
        generator=torch.Generator().manual_seed(0), true_cfg_scale=guidance,
        negative_prompt=[""] * len(SAMPLE_PROMPTS),
    ).images  # fmt: skip
    rows = pictures.float().cpu().unflatten(0, (2, -1)).permute(0, 3, 1, 4, 2).flatten(2, 3)
    grid = (rows.flatten(0, 1) * 255).round().to(torch.uint8)
    picture = Image.fromarray(grid.numpy())
    picture.resize((2 * picture.width, 2 * picture.height), Image.Resampling.NEAREST).save(path)


def pack(folder: Path) -> None:
    """Write assets.tar with everything the package ships, whole or not at all."""
    temporary = folder / "assets.tar.tmp"
    names = (
        "weights.safetensors", "config.json", "training.json", "training_log.csv", "samples.png",
    )  # fmt: skip
    with tarfile.open(temporary, "w") as tar:
        for name in names:
            if (folder / name).exists():
                tar.add(folder / name, arcname=name)
    os.replace(temporary, folder / "assets.tar")


@click.command()
@training_options(minutes=7.4, batch=256, unit="scenes")
@click.option("--small-share", default=0.65, help="Share of the run with small pictures.")
@click.option("--evaluation-scenes", default=200, help="Held-out scenes of the evaluation.")
@click.option("--resume", is_flag=True, help="Continue from OUTPUT's checkpoint.")
def main(
    output: Path,
    minutes: float,
    steps: int,
    batch: int,
    rate: float,
    seed: int,
    device: str,
    compiled: bool,
    small_share: float,
    evaluation_scenes: int,
    resume: bool,
) -> None:
    """Train the demo model and write its assets and figures."""
    begin(output, __name__)
    place, reason = pick_device(device)
    recipe = Recipe(batch, rate, seed)
    source = SceneSource(batch, small_share)
    trainer = Trainer(build_pipeline, source, place, recipe, compiled=compiled)
    _logger.info("%s (%s)", place.type, reason)
    probes = [held_out_scenes(128, size) for size in (PIXELS, SMALL_PIXELS)]

    def probe(progress: float) -> None:
        rise = noun_swap(trainer.average, probes[progress < small_share], 0.8)["rise"]
        _logger.info("another noun raises the loss by %.1f %%", 100 * rise)

    report: dict[str, Any] = {
        "settings": {
            "scenes": scene_module.VERSION, **asdict(recipe), "minutes": minutes,
            "compiled": compiled, "small_share": small_share,
        },
        **fit(
            trainer, output, minutes=minutes, steps=steps, resume=resume, probe=probe,
            saved=lambda: pack(output),
        ),
    }  # fmt: skip
    write_report(output / "training.json", report)
    pipe = load_pipeline(output, device=place)
    report["forward_flops"] = count_flops(pipe)
    report["observer_on_device"] = check_observer(copy.deepcopy(pipe).to(torch.bfloat16))
    report["evaluation"] = evaluate(pipe, evaluation_scenes)
    write_report(output / "training.json", report)
    draw_samples(pipe, output / "samples.png")
    pack(output)
    _logger.info("done")


if __name__ == "__main__":
    main()
