"""Procedural captioned scenes with exact masks, drawn for a whole batch at once in tensor code.

A scene is one or two textured backgrounds, split by a wavy horizon, with one to three objects that
do not overlap. Twelve nouns have a palette, a texture and an outline of their own; four more are
"paintable": they take one of eight colours, and a pattern in a second one tells them apart.
Everything follows from the generator's seed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

BACKGROUNDS = ("grass", "water", "sand", "brick", "night", "snow", "wood", "clouds")
NOUNS = (
    "apple", "leaf", "coin", "fish", "moon", "star",
    "shell", "tile", "flower", "mushroom", "bee", "wheel",
)  # fmt: skip
PAINTABLE = ("box", "ball", "kite", "flag")
ITEMS = NOUNS + PAINTABLE
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "white")
LABELS = BACKGROUNDS + ITEMS
SYNONYMS = {
    "grass": "meadow", "water": "sea", "brick": "wall", "night": "dark", "wood": "planks",
    "clouds": "sky", "leaf": "foliage", "moon": "crescent", "coin": "penny", "wheel": "tyre",
    "box": "cube", "ball": "sphere", "flower": "blossom", "flag": "banner", "bee": "wasp",
}  # fmt: skip
FUNCTION_WORDS = ("on", "under", "with", "photo", "picture")
VOCABULARY = (
    "<pad>", "<unk>", *LABELS, *COLOURS, *SYNONYMS.values(), *FUNCTION_WORDS,
)  # fmt: skip
VERSION = 2  # of what scenes look like; stored with the weights that were trained on them
MAX_TOKENS = 12
MAX_OBJECTS = 4  # slots of a layout; sampled scenes fill up to three
_TOKEN = {word: index for index, word in enumerate(VOCABULARY)}

_COLOUR_RGB = (
    (0.86, 0.12, 0.14), (0.96, 0.52, 0.08), (0.97, 0.86, 0.16), (0.13, 0.62, 0.22),
    (0.13, 0.30, 0.86), (0.52, 0.18, 0.70), (0.97, 0.55, 0.74), (0.96, 0.96, 0.96),
)  # fmt: skip
# Two colours of each noun; its texture blends between them.
_NOUN_RGB = (
    ((0.85, 0.08, 0.12), (0.36, 0.20, 0.08)),  # apple: red, brown stem
    ((0.62, 0.80, 0.14), (0.20, 0.36, 0.04)),  # leaf: lime, dark veins
    ((0.78, 0.50, 0.20), (0.40, 0.22, 0.08)),  # coin: copper rings
    ((0.98, 0.48, 0.06), (0.98, 0.98, 0.96)),  # fish: orange, white stripes
    ((0.93, 0.92, 0.74), (0.66, 0.64, 0.50)),  # moon: pale, grey craters
    ((1.00, 0.88, 0.10), (1.00, 0.99, 0.80)),  # star: yellow, bright core
    ((0.97, 0.70, 0.66), (0.68, 0.30, 0.34)),  # shell: pink, dark ribs
    ((0.95, 0.96, 0.98), (0.10, 0.34, 0.70)),  # tile: white and blue squares
    ((0.66, 0.28, 0.82), (0.98, 0.84, 0.16)),  # flower: violet petals, yellow heart
    ((0.58, 0.05, 0.16), (0.98, 0.94, 0.90)),  # mushroom: crimson cap, white spots
    ((0.98, 0.78, 0.06), (0.08, 0.06, 0.05)),  # bee: yellow and black
    ((0.16, 0.16, 0.18), (0.74, 0.76, 0.80)),  # wheel: black tyre, grey spokes
)
# Second colours of the paintable items; None: white beside strong paints, grey beside pale ones.
_PATTERN_RGB = ((0.24, 0.13, 0.05), None, (0.0, 0.72, 0.74), (0.74, 0.03, 0.46))
_BACKGROUND_RGB = (
    ((0.20, 0.50, 0.14), (0.36, 0.66, 0.22)),  # grass
    ((0.05, 0.34, 0.56), (0.30, 0.66, 0.82)),  # water
    ((0.84, 0.72, 0.48), (0.70, 0.56, 0.34)),  # sand
    ((0.62, 0.26, 0.18), (0.82, 0.78, 0.72)),  # brick
    ((0.03, 0.04, 0.16), (0.85, 0.88, 1.00)),  # night
    ((0.90, 0.93, 0.98), (0.76, 0.82, 0.92)),  # snow
    ((0.52, 0.33, 0.17), (0.33, 0.19, 0.08)),  # wood
    ((0.46, 0.70, 0.94), (0.97, 0.98, 1.00)),  # clouds
)


@dataclass(frozen=True)
class Scenes:
    """A batch of scenes.

    Args:
        images: Colour in [0, 1], (batch, 3, size, size).
        labels: Index into `LABELS` of every pixel, (batch, size, size).
        tokens: Caption as indices into `VOCABULARY`, zero-padded, (batch, MAX_TOKENS).
        backgrounds: Lower and upper background, equal when there is no horizon, (batch, 2).
        items: Index into `ITEMS` of each object, -1 where there is none, (batch, MAX_OBJECTS).
        colours: Index into `COLOURS` of each object, -1 for nouns, (batch, MAX_OBJECTS).
    """

    images: Tensor
    labels: Tensor
    tokens: Tensor
    backgrounds: Tensor
    items: Tensor
    colours: Tensor
    names: ClassVar[tuple[str, ...]] = LABELS
    places: ClassVar[int] = len(BACKGROUNDS)
    first_token: ClassVar[int] = 2

    def __len__(self) -> int:
        """Return the number of scenes."""
        return len(self.images)

    def to(self, device: torch.device | str) -> Scenes:
        """Return the scenes on a device."""
        return Scenes(*(getattr(self, field.name).to(device) for field in fields(self)))

    def __getitem__(self, index: slice | Tensor | list[int]) -> Scenes:
        """Return the scenes at a slice or a list of positions."""
        return Scenes(*(getattr(self, field.name)[index] for field in fields(self)))

    def captions(self) -> list[str]:
        """Return the captions as text that the tokenizer maps back to `tokens`."""
        return [decode(row) for row in self.tokens.tolist()]

    def words(self, index: int) -> list[str]:
        """Return the label names in one scene's mask, objects first."""
        present = self.labels[index].unique().tolist()
        return [LABELS[i] for i in sorted(present, key=lambda i: (i < len(BACKGROUNDS), i))]


def decode(tokens: Sequence[int]) -> str:
    """Return the words of a token row, joined by spaces, without padding."""
    return " ".join(VOCABULARY[token] for token in tokens if token)


def allowed_pairs() -> tuple[Tensor, Tensor]:
    """Return which (item, background) and (paintable, colour) pairs training may show.

    One pair in ten is held out, so that evaluation meets combinations that were never trained.

    Returns:
        Boolean (16, 8) and (4, 8).
    """
    item, background = torch.meshgrid(torch.arange(16), torch.arange(8), indexing="ij")
    paintable, colour = torch.meshgrid(torch.arange(4), torch.arange(8), indexing="ij")
    return (3 * item + 7 * background) % 10 != 0, (5 * paintable + 3 * colour) % 10 != 0


def sample_scenes(
    count: int,
    generator: torch.Generator,
    *,
    size: int = 64,
    held_out_pairs: bool = False,
    plain_captions: bool = False,
) -> Scenes:
    """Return random scenes, drawn on the generator's device.

    Args:
        count: Number of scenes, above 0.
        generator: Source of all randomness; the same seed and device give the same scenes.
        size: Height and width in pixels, a multiple of 2.
        held_out_pairs: Also draw the pairs that `allowed_pairs` keeps from training.
        plain_captions: Captions name everything once, without synonyms or omissions.

    Raises:
        ValueError: `count` or `size` is out of range.

    Source: own.
    """
    if count < 1:
        raise ValueError(f"`count` must be at least 1; got {count}.")
    if size < 16 or size % 2:
        raise ValueError(f"`size` must be an even number of at least 16 pixels; got {size}.")
    device = generator.device

    def uniform(*shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        return torch.rand(shape, generator=generator, device=device) * (high - low) + low

    def choose(weight: Tensor, number: int) -> Tensor:
        # Exponential races draw without replacement and, unlike multinomial, without a device sync.
        return (
            (torch.empty_like(weight).exponential_(generator=generator) / weight)
            .topk(number, largest=False)
            .indices
        )

    constant = _constants(device)
    pairs, colour_pairs = constant["pairs"], constant["colour_pairs"]
    if held_out_pairs:
        pairs, colour_pairs = torch.ones_like(pairs), torch.ones_like(colour_pairs)
    backgrounds = choose(torch.ones(count, len(BACKGROUNDS), device=device), 2)
    single = uniform(count) < 0.5
    backgrounds[:, 1] = torch.where(single, backgrounds[:, 0], backgrounds[:, 1])
    fits = pairs.T[backgrounds].all(dim=1)  # [count, items]
    items = choose(fits.float(), MAX_OBJECTS)
    # One object in 40 % of the scenes, two in 35 %, three in 25 %.
    present = uniform(count, 1) > constant["fewer"]
    paint = (items - len(NOUNS)).clamp(min=0)
    colours = choose(colour_pairs[paint].float(), 1)[..., 0]
    items = items.masked_fill(~present, -1)
    colours = colours.masked_fill(items < len(NOUNS), -1)

    centres, radii = place_objects(present, generator)
    layout = _Layout(
        backgrounds=backgrounds,
        items=items,
        colours=colours,
        centres=centres,
        radii=radii,
        angles=uniform(count, MAX_OBJECTS, low=-0.7, high=0.7)
        + (uniform(count, MAX_OBJECTS) < 0.3) * uniform(count, MAX_OBJECTS, high=2 * math.pi),
        shade=uniform(count, MAX_OBJECTS, 3, low=-0.06, high=0.06),
        phase=uniform(count, 2, 4),
        horizon=uniform(count, 3),
        light=uniform(count, 2, low=-0.14, high=0.14),
        coarse=uniform(count, 2, 8, 8),
        fine=uniform(count, 2, size // 2, size // 2),
        grain=torch.randn((count, 3, size, size), generator=generator, device=device),
    )
    images, labels = _draw(layout, size, constant)
    tokens = _captions(items, colours, backgrounds, generator, plain_captions)
    return Scenes(images, labels, tokens, backgrounds, items, colours)


@lru_cache(maxsize=8)
def _constants(device: torch.device) -> dict[str, Tensor]:
    """Return the tables on a device; copied once, as every copy would wait for the device."""
    pairs, colour_pairs = allowed_pairs()
    synonym = torch.arange(len(VOCABULARY))
    for word, other in SYNONYMS.items():
        synonym[_TOKEN[word]] = _TOKEN[other]
    paint = torch.tensor(_COLOUR_RGB)
    light = 1 - 0.6 * paint.amin(1, keepdim=True)
    second = torch.stack(
        [
            torch.tensor(rgb).expand_as(paint) if rgb else light.expand_as(paint)
            for rgb in _PATTERN_RGB
        ]
    )
    tables = {
        "pairs": pairs,
        "colour_pairs": colour_pairs,
        "fewer": torch.tensor([-1.0, 0.4, 0.75, 1.0]),
        "radius_low": torch.tensor([0.31, 0.25, 0.20]),
        "radius_range": torch.tensor([0.17, 0.09, 0.06]),
        "synonym": synonym,
        "noun_rgb": torch.tensor(_NOUN_RGB),
        "paint_rgb": torch.stack(
            [paint.expand(4, -1, -1), second], dim=2
        ),  # [items, colours, 2, 3]
        "background_rgb": torch.tensor(_BACKGROUND_RGB),
    }
    return {name: table.to(device) for name, table in tables.items()}


@dataclass(frozen=True)
class _Layout:
    """Every random number that a picture depends on."""

    backgrounds: Tensor
    items: Tensor
    colours: Tensor
    centres: Tensor
    radii: Tensor
    angles: Tensor
    shade: Tensor
    phase: Tensor
    horizon: Tensor
    light: Tensor
    coarse: Tensor
    fine: Tensor
    grain: Tensor


def place_objects(present: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return centres and radii of objects that do not overlap, as fractions of the picture.

    Many placements are tried at once; the roomiest is kept and its radii are shrunk until no two
    objects touch.
    """
    count, tries, device = len(present), 48, present.device
    number = present.sum(1)
    constant = _constants(device)
    spread = torch.rand((count, MAX_OBJECTS), generator=generator, device=device)
    low, wide = (constant[name][number - 1, None] for name in ("radius_low", "radius_range"))
    radii = low + wide * spread
    draw = torch.rand((count, tries, MAX_OBJECTS, 2), generator=generator, device=device)
    margin = 0.9 * radii[:, None, :, None]
    centres = margin + draw * (1 - 2 * margin)
    distance = (centres[:, :, :, None] - centres[:, :, None]).norm(dim=-1)
    reach = (radii[:, :, None] + radii[:, None, :])[:, None]
    pair = present[:, :, None] & present[:, None, :]
    pair = pair & ~torch.eye(MAX_OBJECTS, dtype=torch.bool, device=device)
    room = (distance / reach).masked_fill(~pair[:, None], 2.0).amin((2, 3))  # [count, tries]
    best = room.argmax(1)
    rows = torch.arange(count, device=device)
    shrink = room[rows, best].clamp(max=1.0)
    return centres[rows, best], radii * shrink[:, None]


def _draw(layout: _Layout, size: int, tables: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return images in [0, 1] and label maps."""
    device = layout.items.device
    axis = (torch.arange(size, device=device) + 0.5) / size
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    rgb, labels = _draw_backgrounds(layout, x, y, size, tables["background_rgb"])

    offset_x = (x - layout.centres[..., 0, None, None]) / layout.radii[..., None, None]
    offset_y = (y - layout.centres[..., 1, None, None]) / layout.radii[..., None, None]
    cos, sin = layout.angles.cos()[..., None, None], layout.angles.sin()[..., None, None]
    u, v = cos * offset_x + sin * offset_y, cos * offset_y - sin * offset_x
    inside, blend = _outline_and_texture(u, v, layout.items[..., None, None])
    base = torch.where(
        (layout.colours >= 0)[..., None, None],
        tables["paint_rgb"][(layout.items - len(NOUNS)).clamp(min=0), layout.colours.clamp(min=0)],
        tables["noun_rgb"][layout.items.clamp(0, len(NOUNS) - 1)],
    )  # [count, objects, 2, 3]
    base = (base + layout.shade[:, :, None]).clamp(0, 1)
    blend = blend[:, :, None]  # [count, objects, 1, size, size]
    colour = base[:, :, 0, :, None, None] * (1 - blend) + base[:, :, 1, :, None, None] * blend
    # `inside` is a distance in units of the radius: soften the edge over one pixel.
    edge = (inside * layout.radii[..., None, None] * size + 0.5).clamp(0, 1)
    edge = edge * (layout.items >= 0)[..., None, None]
    for k in range(MAX_OBJECTS):
        alpha = edge[:, k, None]
        rgb = rgb * (1 - alpha) + colour[:, k] * alpha
        value = (layout.items[:, k] + len(BACKGROUNDS))[:, None, None]
        labels = torch.where(edge[:, k] >= 0.5, value, labels)
    light = 1 + layout.light[:, 0, None, None] * (2 * x - 1)
    light = light + layout.light[:, 1, None, None] * (2 * y - 1)
    return (rgb * light[:, None] + 0.015 * layout.grain).clamp(0, 1), labels


def _draw_backgrounds(
    layout: _Layout, x: Tensor, y: Tensor, size: int, palette: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the backgrounds' colours and labels."""
    level, slope, wave = layout.horizon.unbind(1)
    line = 0.3 + 0.4 * level[:, None, None] + 0.2 * (slope[:, None, None] - 0.5) * (x - 0.5)
    line = line + 0.02 * torch.sin(2 * math.pi * (2 * x + wave[:, None, None]))
    above = y < line
    coarse = F.interpolate(layout.coarse, size, mode="bicubic")
    fine = F.interpolate(layout.fine, size)
    blend = torch.zeros_like(line)
    which = torch.where(
        above, layout.backgrounds[:, 1, None, None], layout.backgrounds[:, 0, None, None]
    )
    for side in range(2):
        mine = above if side else ~above
        texture = _background_texture(
            x,
            y,
            layout.backgrounds[:, side, None, None],
            layout.phase[:, side],
            coarse[:, side],
            fine[:, side],
        )
        blend = torch.where(mine, texture, blend)
    pair = palette[which]  # [count, size, size, 2, 3]
    rgb = pair[..., 0, :] * (1 - blend[..., None]) + pair[..., 1, :] * blend[..., None]
    return rgb.permute(0, 3, 1, 2), which


def _background_texture(
    x: Tensor, y: Tensor, which: Tensor, phase: Tensor, coarse: Tensor, fine: Tensor
) -> Tensor:
    """Return the share of each background's second colour, in [0, 1]."""
    p, q, r, s = (part[:, None, None] for part in phase.unbind(1))
    turn = 2 * math.pi
    row = ((y * 7 + p) % 1, (y * 7 + p).floor())
    brick_x = (x * (3.2 + q) + 0.5 * (row[1] % 2) + r) % 1
    plank = (x * 4 + p) % 1
    textures = (
        0.55 * fine + 0.3 * coarse + 0.15 * torch.sin(turn * (14 * x + 2 * fine)),
        0.5
        + 0.35 * torch.sin(turn * (6 * y + 0.5 * torch.sin(turn * (2 * x + p)) + q))
        + 0.3 * (coarse - 0.5),
        0.25
        + 0.5 * coarse
        + 0.25 * torch.sin(turn * (4 * (x + 0.6 * y) + 0.6 * coarse + p))
        + 0.2 * (fine - 0.5),
        torch.maximum((row[0] < 0.2).float(), (brick_x < 0.12).float()) + 0.15 * (fine - 0.5),
        (fine > 0.955).float() * (0.6 + 0.4 * r) + 0.06 * coarse,
        0.2 + 0.7 * (coarse - 0.3) + 0.12 * fine,
        (plank < 0.1).float()
        + 0.4
        + 0.35 * torch.sin(turn * (5 * coarse + 3 * x + s)) * (plank >= 0.1),
        (2.6 * (coarse - 0.42)),
    )
    blend = torch.zeros_like(coarse)
    for index, texture in enumerate(textures):
        blend = torch.where(which == index, texture, blend)
    return blend.clamp(0, 1)


def _outline_and_texture(u: Tensor, v: Tensor, item: Tensor) -> tuple[Tensor, Tensor]:
    """Return signed depth below each item's outline and the share of its second colour.

    Args:
        u: Horizontal offset from the centre in units of the radius, growing to the right.
        v: Vertical offset, growing downwards.
        item: Index into `ITEMS`, broadcast against `u`.
    """
    radius = (u * u + v * v).sqrt()
    angle = torch.atan2(v, u)
    disc = 0.95 - radius
    square = 0.8 - torch.maximum(u.abs(), v.abs())
    up = (angle + math.pi / 2).abs()
    up = torch.minimum(up, 2 * math.pi - up)
    body = 0.62 - ((u + 0.22) ** 2 / 1.2 + (v * 1.35) ** 2).sqrt()
    tail = torch.minimum(u - 0.25, torch.minimum(0.95 - u, 0.85 * (u - 0.2) - v.abs()))
    cap = torch.minimum(0.9 - (u * u + (v * 1.1 - 0.15) ** 2).sqrt(), 0.1 - v)
    stem = torch.minimum(0.26 - u.abs(), torch.minimum(v - 0.05, 0.9 - v))
    spots = 0.5 + 0.5 * torch.sin(7.5 * u + 0.6) * torch.sin(7.5 * v)
    wave = v + 0.12 * torch.sin(4.5 * u)
    flag = torch.minimum(torch.minimum(u + 0.72, 0.9 - u), torch.minimum(wave + 0.75, 0.25 - wave))
    pole = torch.minimum(0.1 - (u + 0.8).abs(), 0.95 - v.abs())
    outlines = (
        0.88 - 0.3 * torch.exp(-((up / 0.35) ** 2)) - radius,
        1.35 - torch.maximum(((v - 0.78) ** 2 + u * u).sqrt(), ((v + 0.78) ** 2 + u * u).sqrt()),
        disc * 0.9 - 0.05,
        torch.maximum(body, tail),
        torch.minimum(disc, ((u - 0.45) ** 2 + v * v).sqrt() - 0.72),
        0.66 + 0.3 * torch.cos(5 * (angle + math.pi / 2)) - radius,
        torch.minimum(0.95 - (u * u + (v - 0.45) ** 2).sqrt() * 0.8, 0.5 - v),
        square,
        0.72 + 0.22 * torch.cos(6 * angle) - radius,
        torch.maximum(cap, stem),
        0.62 - ((u * 0.68) ** 2 + v * v).sqrt(),
        disc,
        square,
        disc - 0.05,
        0.95 - (u.abs() * 1.35 + v.abs()),
        torch.maximum(flag, pole),
    )
    checks = torch.sin(4.5 * math.pi * u * 0.8) * torch.sin(4.5 * math.pi * v * 0.8)
    textures = (
        ((u.abs() < 0.13) & (v < -0.3)).float(),
        torch.maximum(
            (v.abs() < 0.09).float(), (torch.sin(11 * (u.abs() - v.abs())) > 0.72).float()
        ),
        ((radius * 3.2) % 1 < 0.42).float(),
        (torch.sin(8.5 * u + 0.8) > 0.25).float(),
        (torch.sin(9 * u + 1) * torch.sin(9 * v) > 0.35).float(),
        (1.1 - 2.2 * radius).clamp(0, 1),
        (torch.sin(14 * torch.atan2(u, 1.0 - v)) > 0.2).float() * 0.9,
        (checks > 0).float(),
        (radius < 0.34).float(),
        torch.where(v > 0.1, torch.ones_like(v), (spots > 0.72).float()),
        (torch.sin(9.5 * u) > 0.1).float(),
        ((radius < 0.62) & ((torch.sin(3 * angle).abs() > 0.45) | (radius < 0.18))).float(),
        torch.maximum((square < 0.22).float(), ((u - v).abs() < 0.17).float()),
        (torch.sin(3 * angle) > 0).float(),
        (u * v > 0).float(),
        torch.maximum((u < -0.7).float(), (torch.sin(11 * wave + 0.4) > 0).float()),
    )
    inside, blend = torch.full_like(u, -1.0), torch.zeros_like(u)
    for index, (outline, texture) in enumerate(zip(outlines, textures, strict=True)):
        mine = item == index
        inside = torch.where(mine, outline, inside)
        blend = torch.where(mine, texture, blend)
    return inside, blend


def _captions(
    items: Tensor, colours: Tensor, backgrounds: Tensor, generator: torch.Generator, plain: bool
) -> Int[Tensor, "batch tokens"]:
    """Return captions as token rows: objects, then "on" and "under" backgrounds, or reversed.

    Unless `plain`, a fifth of the captions is a single word, as concepts are, and one in twenty
    empty, for guidance; one word in twenty is left out and one in ten replaced by a synonym.
    """
    count, device = len(items), items.device
    first_label, first_colour = _TOKEN[LABELS[0]], _TOKEN[COLOURS[0]]
    synonym = _constants(device)["synonym"]

    def chance(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, device=device)

    nouns = torch.where(items >= 0, items + len(BACKGROUNDS) + first_label, 0)
    paints = torch.where(colours >= 0, colours + first_colour, 0)
    places = backgrounds + first_label
    two = backgrounds[:, 0] != backgrounds[:, 1]
    swap = chance(4, count, MAX_OBJECTS)
    place_swap = chance(2, count, 2)
    shape = chance(3, count)
    if not plain:
        nouns = torch.where(swap[0] < 0.1, synonym[nouns], nouns)
        places = torch.where(place_swap[0] < 0.1, synonym[places], places)
        left_out = swap[1] < 0.05
        nouns = nouns.masked_fill(left_out, 0)
        paints = paints.masked_fill(left_out | (swap[2] < 0.05), 0)
        places = places.masked_fill(place_swap[1] < 0.05, 0)
    on = torch.where(places[:, 0] > 0, _TOKEN["on"], 0)
    under = torch.where(two & (places[:, 1] > 0), _TOKEN["under"], 0)
    upper = places[:, 1] * two
    things = torch.stack([paints, nouns], dim=2).flatten(1)
    backward = torch.stack(
        [
            places[:, 0],
            torch.where(under > 0, _TOKEN["under"], 0),
            upper,
            torch.full_like(on, _TOKEN["with"]),
        ],
        dim=1,
    )
    forward = torch.stack([on, places[:, 0], under, upper], dim=1)
    opening = torch.where(
        shape[0] < 0.15, _TOKEN["photo"], torch.where(shape[0] < 0.3, _TOKEN["picture"], 0)
    )[:, None]
    if plain:
        rows = torch.cat([opening * 0, things, forward], dim=1)
    else:
        rows = torch.where(
            (shape[1] < 0.25)[:, None],
            torch.cat([opening, backward, things], dim=1),
            torch.cat([opening, things, forward], dim=1),
        )
        lone = torch.zeros_like(rows)
        word = torch.where((shape[1] < 0.5) | (nouns[:, 0] == 0), places[:, 0], nouns[:, 0])
        lone[:, 0] = word
        rows = torch.where((shape[2] < 0.2)[:, None], lone, rows)
        rows = rows.masked_fill((shape[2] > 0.95)[:, None], 0)
    order = (rows == 0).to(torch.int8).argsort(dim=1, stable=True)
    return rows.gather(1, order)[:, :MAX_TOKENS]


def patchify(images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch patches 12"]:
    """Return pictures in [0, 1] as packed latents in [-1, 1], as Flux pipelines pack them."""
    batch, channels, height, width = images.shape
    grid = (2 * images - 1).view(batch, channels, height // 2, 2, width // 2, 2)
    return grid.permute(0, 2, 4, 1, 3, 5).reshape(batch, height * width // 4, 4 * channels)
