"""Captioned scenes of named cut-outs on named textures, with exact masks, from a user's folder.

The second data set of the package: photographs instead of drawings, and a latent space (TAEF2's)
instead of pixels. Neither pictures nor weights ship with the package.
"""

from __future__ import annotations

import io
import json
import math
import os
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .model import DemoPipeline, build_pipeline, load_pipeline
from .scenes import FUNCTION_WORDS, MAX_OBJECTS, MAX_TOKENS, place_objects
from .taef2 import load_taef2

PIXELS = 256
SIDE = 128  # of a stored cut-out
TRANSFORMER = {
    "in_channels": 128,
    "num_layers": 4,
    "num_single_layers": 3,
    "num_attention_heads": 6,
}
HELD_OUT_SEED = 2**42
_SPECIAL = ("<pad>", "<unk>")


@dataclass(frozen=True)
class Bank:
    """Every cut-out and texture, on one device.

    Args:
        cutouts: Colour times alpha, and alpha, 0 to 255, (pictures, 4, SIDE, SIDE).
        names: Index into `words` of every cut-out, (pictures,).
        held_out: What training never shows: one cut-out of each name with several, (pictures,).
        textures: 0 to 255, (textures, 3, PIXELS, PIXELS).
        words: Words of the textures, then of the cut-outs.
    """

    cutouts: Tensor
    names: Tensor
    held_out: Tensor
    textures: Tensor
    words: tuple[str, ...]

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """The tokens of a model of these scenes."""
        return (*_SPECIAL, *self.words, *FUNCTION_WORDS)

    def to(self, device: torch.device | str) -> Bank:
        """Return the bank on a device."""
        moved = {
            name: getattr(self, name).to(device)
            for name in ("cutouts", "names", "held_out", "textures")
        }
        return replace(self, **moved)


@dataclass(frozen=True)
class NaturalScenes:
    """A batch of scenes; the attributes are those of `Scenes`.

    Args:
        images: Colour in [0, 1], (batch, 3, size, size).
        labels: Index into `names` of every pixel, (batch, size, size).
        tokens: Caption, zero-padded, (batch, MAX_TOKENS).
        names: The words that label pixels, places first.
        places: How many of them are places.
        first_token: Token of the first name.
    """

    images: Tensor
    labels: Tensor
    tokens: Tensor
    names: tuple[str, ...]
    places: int
    first_token: int = len(_SPECIAL)

    def __len__(self) -> int:
        """Return the number of scenes."""
        return len(self.images)

    def captions(self) -> list[str]:
        """Return the captions as text that the tokenizer maps back to `tokens`."""
        words = (*_SPECIAL, *self.names, *FUNCTION_WORDS)
        return [" ".join(words[token] for token in row if token) for row in self.tokens.tolist()]

    def words(self, index: int) -> list[str]:
        """Return the words in one scene's mask, objects first."""
        present = self.labels[index].unique().tolist()
        return [self.names[i] for i in sorted(present, key=lambda i: (i < self.places, i))]


def load_bank(folder: str | os.PathLike[str]) -> Bank:
    """Read cutouts.zip and textures.zip.

    Each archive holds pictures and metadata.jsonl, one line a picture with `file` and `name`;
    cut-outs have an alpha channel and are cropped to the object.

    Raises:
        ValueError: An archive is missing or does not look so.
    """
    folder = Path(folder)
    try:
        cutouts = _read(folder / "cutouts.zip", _cutout)
        textures = _read(folder / "textures.zip", _texture)
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"`folder` must hold cutouts.zip and textures.zip with metadata.jsonl; "
            f"{str(folder)!r} does not: {error}."
        ) from error
    places = [name for name, _ in textures]
    things = sorted({name for name, _ in cutouts} - {*places})
    words = (*places, *things)
    names = torch.tensor([words.index(name) for name, _ in cutouts])
    last = {int(name): index for index, name in enumerate(names)}
    several = names.bincount(minlength=len(words)) > 1
    held_out = torch.zeros(len(names), dtype=torch.bool)
    held_out[[index for name, index in last.items() if several[name]]] = True
    stacked = (torch.stack([picture for _, picture in part]) for part in (cutouts, textures))
    pictures, grounds = stacked
    return Bank(pictures, names, held_out, grounds, words)


def _read(path: Path, convert: Any) -> list[tuple[str, Tensor]]:
    """Return the pictures of an archive with their words, each one token."""
    from PIL import Image

    with zipfile.ZipFile(path) as archive:
        rows = [json.loads(line) for line in archive.read("metadata.jsonl").splitlines() if line]
        return [
            (
                "-".join(row["name"].lower().split()),
                convert(Image.open(io.BytesIO(archive.read(row["file"])))),
            )
            for row in rows
        ]


def _pixels(picture: Any) -> Tensor:
    import numpy as np

    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float()


def _cutout(picture: Any) -> Tensor:
    """Return a cut-out as (4, SIDE, SIDE), in the middle, its longer side filling the square."""
    pixels = _pixels(picture.convert("RGBA"))
    pixels[:3] *= pixels[3:] / 255
    scale = SIDE / max(pixels.shape[1:])
    size = [max(1, round(side * scale)) for side in pixels.shape[1:]]
    pixels = F.interpolate(pixels[None], size, mode="bilinear", antialias=True)[0]
    square = torch.zeros(4, SIDE, SIDE)
    top, left = ((SIDE - side) // 2 for side in size)
    square[:, top : top + size[0], left : left + size[1]] = pixels
    return square.round().clamp(0, 255).byte()


def _texture(picture: Any) -> Tensor:
    """Return a texture as (3, PIXELS, PIXELS): cut in the middle, or repeated."""
    pixels = _pixels(picture.convert("RGB"))
    if min(pixels.shape[1:]) > PIXELS:
        scale = PIXELS / min(pixels.shape[1:])
        size = [math.ceil(side * scale) for side in pixels.shape[1:]]
        pixels = F.interpolate(pixels[None], size, mode="bilinear", antialias=True)[0]
    repeats = [math.ceil(PIXELS / side) for side in pixels.shape[1:]]
    pixels = pixels.repeat(1, *repeats)
    top, left = ((side - PIXELS) // 2 for side in pixels.shape[1:])
    return pixels[:, top : top + PIXELS, left : left + PIXELS].clamp(0, 255).round().byte()


def sample_natural(
    bank: Bank,
    count: int,
    generator: torch.Generator,
    *,
    held_out: bool = False,
    plain_captions: bool = False,
) -> NaturalScenes:
    """Return random scenes: one to three cut-outs that do not overlap much, on a texture.

    Args:
        bank: The pictures, on the generator's device.
        count: Number of scenes.
        generator: Source of all randomness.
        held_out: Show the cut-outs that training never shows, and only those.
        plain_captions: Captions name everything; otherwise some words or all are left out.

    Source: own.
    """
    device = generator.device

    def uniform(*shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        return torch.rand(shape, generator=generator, device=device) * (high - low) + low

    places = len(bank.textures)
    allowed = bank.held_out == held_out
    order = uniform(count, len(bank.names)) * allowed
    chosen = order.topk(MAX_OBJECTS).indices
    names = bank.names[chosen]
    present = uniform(count, 1) > torch.tensor([-1.0, 0.45, 0.85, 1.0], device=device)
    again = (names[:, :, None] == names[:, None]).tril(-1).any(2)  # two pictures of one name
    present &= ~again & allowed[chosen]
    ground = (uniform(count) * places).long()
    images = _grounds(bank.textures[ground], uniform(count, 6))
    labels = ground[:, None, None].expand(-1, PIXELS, PIXELS)
    centres, radii = place_objects(present, generator)
    turn = uniform(count, MAX_OBJECTS, low=-0.35, high=0.35)
    flip = (uniform(count, MAX_OBJECTS) < 0.5) * 2.0 - 1
    light = 1 + uniform(count, MAX_OBJECTS, low=-0.15, high=0.15)
    axis = (torch.arange(PIXELS, device=device) + 0.5) / PIXELS
    for k in range(MAX_OBJECTS - 1):
        x = (axis - centres[:, k, None, 0]) / radii[:, k, None]  # [count, size]
        y = (axis - centres[:, k, None, 1]) / radii[:, k, None]
        cos, sin = turn[:, k].cos()[:, None, None], turn[:, k].sin()[:, None, None]
        u = flip[:, k, None, None] * (cos * x[:, None] + sin * y[:, :, None])
        v = cos * y[:, :, None] - sin * x[:, None]
        layer = bank.cutouts[chosen[:, k]].float() / 255
        layer = F.grid_sample(layer, torch.stack([u, v], -1), align_corners=False)
        layer = layer * present[:, k, None, None, None]
        colour, alpha = layer[:, :3] * light[:, k, None, None, None], layer[:, 3:]
        images = images * (1 - alpha) + colour
        labels = torch.where(alpha[:, 0] > 0.5, names[:, k, None, None], labels)
    shown = names.masked_fill(~present, -1)
    tokens = _captions(shown, ground, uniform(count, 3), len(bank.words), plain_captions)
    return NaturalScenes(images.clamp(0, 1), labels, tokens, bank.words, places)


def _grounds(textures: Tensor, draw: Tensor) -> Tensor:
    """Return random parts of textures, mirrored and lit at random, in [0, 1]."""
    count = len(textures)
    zoom = 0.45 + 0.55 * draw[:, 0]
    theta = torch.zeros(count, 2, 3, device=textures.device)
    theta[:, 0, 0] = zoom * ((draw[:, 1] < 0.5) * 2.0 - 1)
    theta[:, 1, 1] = zoom
    theta[:, 0, 2] = (1 - zoom) * (2 * draw[:, 2] - 1)
    theta[:, 1, 2] = (1 - zoom) * (2 * draw[:, 3] - 1)
    shape = [count, 3, PIXELS, PIXELS]
    grid = F.affine_grid(theta, shape, align_corners=False)
    part = F.grid_sample(
        textures.float() / 255, grid, padding_mode="reflection", align_corners=False
    )
    return part * (0.85 + 0.3 * draw[:, 4, None, None, None])


def _captions(items: Tensor, ground: Tensor, draw: Tensor, words: int, plain: bool) -> Tensor:
    """Return captions: the objects, "on", the texture; a fifth is one word, one in 20 empty."""
    first = len(_SPECIAL)
    on = torch.full_like(ground, first + words + FUNCTION_WORDS.index("on"))
    things = torch.where(items >= 0, items + first, 0)
    rows = torch.cat([things, on[:, None], (ground + first)[:, None]], dim=1)
    if not plain:
        lone = torch.zeros_like(rows)
        lone[:, 0] = torch.where(draw[:, 0] < 0.3, ground + first, things[:, 0])
        rows = torch.where(draw[:, 1, None] < 0.2, lone, rows)
        rows = rows.masked_fill(draw[:, 2, None] < 0.05, 0)
    rows = rows.gather(1, (rows == 0).to(torch.int8).argsort(dim=1, stable=True))
    return F.pad(rows, (0, MAX_TOKENS - rows.shape[1]))


def held_out_natural(bank: Bank, count: int, *, held_out: bool) -> NaturalScenes:
    """Return scenes that training never draws; with `held_out`, of cut-outs that it never shows.

    Labels are those of every fourth pixel: maps are 16 x 16, and precision sorts pixels.
    """
    generator = torch.Generator().manual_seed(HELD_OUT_SEED + held_out)
    scenes = sample_natural(
        bank.to("cpu"), count, generator, held_out=held_out, plain_captions=True
    )
    return replace(scenes, labels=scenes.labels[:, 2::4, 2::4])


def build_natural_pipeline(
    vocabulary: tuple[str, ...], taef2: str | os.PathLike[str]
) -> DemoPipeline:
    """Return a Flux.1 pipeline in TAEF2's latent space, with random transformer weights."""
    pipe = build_pipeline(TRANSFORMER, vocabulary=vocabulary, vae=load_taef2(taef2))
    pipe.default_sample_size = PIXELS // pipe.vae_scale_factor
    return pipe


def load_natural_pipeline(
    folder: str | os.PathLike[str], taef2: str | os.PathLike[str], **settings: Any
) -> DemoPipeline:
    """Return a pipeline that `train_natural` has written.

    Args:
        folder: Where it wrote.
        taef2: Folder of TAEF2's weights.
        **settings: As in `load_pipeline`.

    Raises:
        ValueError: A file is missing or of another version.
    """
    pipe = load_pipeline(folder, vae=load_taef2(taef2), **settings)
    pipe.default_sample_size = PIXELS // pipe.vae_scale_factor
    return pipe
