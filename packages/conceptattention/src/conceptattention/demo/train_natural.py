"""Train a model on natural scenes in TAEF2's latent space and score its maps.

    python -m conceptattention.demo.train_natural --data FOLDER --taef2 FOLDER --output OUT

`--data` holds cutouts.zip and textures.zip, `--taef2` the autoencoder's safetensors. OUT gets
weights, natural.json with every figure, and maps.png.
"""

from __future__ import annotations

import logging
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from fourfold_common import pick_device

from ..maps import ConceptMaps, Reduce
from .evaluate import SPACES, noun_swap, reduced, score, segment_scenes, summarise
from .model import READING, DemoPipeline
from .natural import (
    PIXELS,
    Bank,
    NaturalScenes,
    build_natural_pipeline,
    held_out_natural,
    load_bank,
    load_natural_pipeline,
    sample_natural,
)
from .taef2 import TinyAutoencoder, load_taef2
from .training import Recipe, Trainer, begin, fit, training_options, write_report

_logger = logging.getLogger(__name__)
NOISE_LEVELS = (0.2, 0.4, 0.6, 0.8)
CHUNK = 64  # scenes composed and encoded at once


class NaturalSource:
    """Draws natural scenes as packed latents, from a pool that is renewed bit by bit.

    Composing and encoding a scene costs as much as a training step on it, so each is shown about
    `uses` times, at another noise level each time.

    Args:
        bank: The pictures.
        vae: The autoencoder.
        batch: Scenes per step.
        uses: How often a scene is shown, on average.
        pool: Size of the pool, in batches.
    """

    def __init__(
        self, bank: Bank, vae: TinyAutoencoder, batch: int, *, uses: int = 4, pool: int = 24
    ) -> None:
        self.bank, self.vae, self.batch, self.uses = bank, vae, batch, uses
        self.room = pool * batch
        self.drawn = self.step = 0
        self.latents = self.tokens = torch.empty(0)

    def __call__(self, progress: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return packed latents and captions."""
        if self.step % self.uses == 0:
            self._renew(generator)
        self.step += 1
        stored = min(self.drawn, self.room)
        device = generator.device
        pick = torch.randint(0, stored, (self.batch,), generator=generator, device=device)
        return self.latents[pick].float(), self.tokens[pick]

    def _renew(self, generator: torch.Generator) -> None:
        """Replace the oldest scenes of the pool by one batch of new ones."""
        for start in range(0, self.batch, CHUNK):
            count = min(CHUNK, self.batch - start)
            scenes = sample_natural(self.bank, count, generator)
            images = (2 * scenes.images - 1).contiguous(memory_format=torch.channels_last)
            with torch.autocast(images.device.type, torch.bfloat16):
                latents = self.vae.encode(images).latent_dist.mode()
            packed = DemoPipeline._pack_latents(latents, *latents.shape).bfloat16()
            if not self.drawn:
                self.latents = packed.new_empty(self.room, *packed.shape[1:])
                self.tokens = scenes.tokens.new_empty(self.room, scenes.tokens.shape[1])
            place = (torch.arange(count, device=packed.device) + self.drawn) % self.room
            self.latents[place], self.tokens[place] = packed, scenes.tokens
            self.drawn += count


def evaluate(pipe: DemoPipeline, bank: Bank, count: int) -> dict[str, Any]:
    """Return the binary protocol's metrics by data, space and noise level, and the noun swap.

    "compositions" are new scenes of the cut-outs that were trained on; "pictures" show cut-outs
    that were not, of words that were. "chance" are maps of noise.
    """
    rows, swaps = [], {}
    layers = range(len(pipe.transformer.transformer_blocks))
    generator = torch.Generator().manual_seed(0)
    for data in ("compositions", "pictures"):
        scenes = held_out_natural(bank, count, held_out=data == "pictures")
        for t in NOISE_LEVELS:
            found = segment_scenes(
                pipe, scenes, t=t, layers="all", store="layers", batch=32, kernels="torch"
            )
            default = list(layers[len(layers) // 2 :])
            cases: list[tuple[str, list[int], Reduce]] = [
                (space, default, reduce)
                for space in SPACES
                for reduce in ("softmax_mean", "mean_softmax")
            ]
            cases += [("output", [layer], "softmax_mean") for layer in layers]
            for space, chosen, reduce in cases:
                row = {
                    "data": data, "space": space, "t": t, "layers": chosen, "reduce": reduce
                }  # fmt: skip
                maps = reduced(found, reduce)
                strongest = score(maps, scenes, layers=chosen, space=space, protocol="argmax")
                row |= summarise(maps, scenes, layers=chosen, space=space)
                row |= {"argmax_accuracy": round(strongest.accuracy, 4)}
                rows.append(row)
                if chosen == default:
                    _logger.info("%s", {k: v for k, v in row.items() if k != "layers"})
        noise = [
            (chunk, words, {"chance": _noise(maps, generator)}) for chunk, words, maps in found
        ]
        rows.append({"data": data, "space": "chance", **summarise(noise, scenes, space="chance")})
        swaps[data] = {str(t): noun_swap(pipe, scenes, t) for t in NOISE_LEVELS}
        _logger.info("noun swap %s", {t: round(s["rise"], 3) for t, s in swaps[data].items()})
    return {"scenes": count, "segmentation": rows, "noun_swap": swaps}


def _noise(maps: dict[str, ConceptMaps], generator: torch.Generator) -> ConceptMaps:
    soft = torch.rand(maps["output"].soft.shape, generator=generator)
    return replace(maps["output"], raw=soft, soft=soft, space="chance")


def draw_maps(pipe: DemoPipeline, scenes: NaturalScenes, path: Path, t: float = 0.4) -> None:
    """Write a sheet: a row for every scene, with the picture and the overlay of each word."""
    from PIL import Image, ImageDraw

    columns = 1 + max(len(scenes.words(i)) for i in range(len(scenes)))
    side = PIXELS
    sheet = Image.new("RGB", (columns * side, len(scenes) * (side + 18)), "white")
    for chunk, words, by_space in segment_scenes(pipe, scenes, t=t, kernels="torch", **READING):
        for row, index in enumerate(chunk):
            pixels = (scenes.images[index].permute(1, 2, 0) * 255).byte().cpu().numpy()
            picture = Image.fromarray(pixels)
            maps = by_space["output"]
            for column in range(1 + len(words[row])):
                place = (column * side, index * (side + 18))
                if column:
                    one = _one(maps, row)[words[row][column - 1]]
                    sheet.paste(one.overlay(picture, scale="each"), (place[0], place[1] + 18))
                else:
                    sheet.paste(picture, (place[0], place[1] + 18))
                title = ["picture", *words[row]][column].replace("-", " ")
                ImageDraw.Draw(sheet).text((place[0] + 4, place[1] + 3), title, fill="black")
    sheet.save(path)


def _one(maps: ConceptMaps, row: int) -> ConceptMaps:
    """Return the maps of one picture of a batch that has a list of words for each."""
    names: Any = maps.concepts[row]
    return replace(
        maps, raw=maps.raw[:, row : row + 1], soft=maps.soft[:, row : row + 1], concepts=names
    )


@click.command()
@click.option(
    "--data",
    type=click.Path(path_type=Path, exists=True),
    required=True,
    help="Folder with cutouts.zip and textures.zip.",
)
@click.option(
    "--taef2",
    type=click.Path(path_type=Path, exists=True),
    required=True,
    help="Folder with TAEF2's encoder.safetensors.",
)
@training_options(minutes=7.0, batch=256, unit="scenes")
@click.option("--evaluation-scenes", default=200, help="Held-out scenes of each kind.")
@click.option("--resume", is_flag=True, help="Continue from OUTPUT's checkpoint.")
def main(
    data: Path,
    taef2: Path,
    output: Path,
    minutes: float,
    steps: int,
    batch: int,
    rate: float,
    seed: int,
    device: str,
    compiled: bool,
    evaluation_scenes: int,
    resume: bool,
) -> None:
    """Train the model of natural scenes and write weights and figures."""
    begin(output, __name__)
    place, _ = pick_device(device)
    bank = load_bank(data).to(place)
    vae = load_taef2(taef2).to(place).to(memory_format=torch.channels_last)
    recipe = Recipe(batch, rate, seed, noise_shift=1.0)
    trainer = Trainer(
        partial(build_natural_pipeline, bank.vocabulary, taef2), NaturalSource(bank, vae, batch),
        place, recipe, compiled=compiled,
    )  # fmt: skip
    trained = fit(trainer, output, minutes=minutes, steps=steps, resume=resume)
    pipe = load_natural_pipeline(output, taef2, device=place)
    report = {
        "settings": {**asdict(recipe), "minutes": minutes, "compiled": compiled},
        "cutouts": len(bank.names), "held_out_cutouts": int(bank.held_out.sum()),
        "textures": len(bank.textures), "words": len(bank.words),
        "parameters": sum(weight.numel() for weight in trainer.weights),
        **trained,
    }  # fmt: skip
    write_report(output / "natural.json", report)
    report["evaluation"] = evaluate(pipe, bank, evaluation_scenes)
    write_report(output / "natural.json", report)
    draw_maps(pipe, held_out_natural(bank, 5, held_out=False), output / "maps.png")
    _logger.info("done")


if __name__ == "__main__":
    main()
