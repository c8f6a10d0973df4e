"""The pictures of the documentation's gallery, from the embedded model.

    python benchmarks/gallery.py --output docs/conceptattention

gallery.png: generated pictures and a map of every concept, the last one a word that is not in the
prompt. gallery-layers.png: one word's map in every layer and every third step of one run, each
scaled by itself.
"""

import argparse
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from conceptattention import ConceptAttention
from conceptattention.demo.model import READING, load_pipeline

SIDE, STEPS, GUIDANCE = 128, 16, 3.0
ROWS = (
    ("a bee and a mushroom on grass under clouds", "bee", "mushroom", "grass", "clouds"),
    ("a fish and a shell on sand", "fish", "shell", "sand", "water"),
    ("a red box and a coin on wood", "box", "coin", "wood", "brick"),
    ("a star and a blue kite on snow under night", "star", "kite", "snow", "night"),
)


def generate(pipe, prompt, seed):
    """Return one picture of a prompt."""
    return pipe(
        prompt, num_inference_steps=STEPS, true_cfg_scale=GUIDANCE, negative_prompt="",
        generator=torch.Generator().manual_seed(seed),
    ).images[0]  # fmt: skip


def rows(pipe):
    """Return a sheet: a row for each prompt, the picture and the overlay of each concept."""
    strips = []
    for seed, (prompt, *words) in enumerate(ROWS):
        with ConceptAttention(pipe, words, **READING) as observer:
            picture = generate(pipe, prompt, seed)
        strip = observer.heatmaps().plot(picture, size=SIDE)
        ImageDraw.Draw(strip).text((3, 2), f"{seed + 1}", fill="black")
        strips.append(strip)
    return stack(strips)


def layers(pipe):
    """Return a sheet of one word's maps: a row for each layer, a column for each third step."""
    prompt, *words = ROWS[0]
    with ConceptAttention(pipe, words, layers="all", store="all", steps=range(0, STEPS, 3)) as seen:
        generate(pipe, prompt, 0)
    maps = seen.heatmaps()
    steps = sorted({step for _, step in maps.keys})
    count = len(pipe.transformer.transformer_blocks)
    sheet = Image.new("RGB", (SIDE * len(steps), (SIDE + 16) * count), "white")
    pen = ImageDraw.Draw(sheet)
    for layer in range(count):
        for column, step in enumerate(steps):
            one = maps.select(layers=[layer], steps=[step])[words[0]]
            place = (column * SIDE, layer * (SIDE + 16))
            sheet.paste(one.to_image((SIDE, SIDE), scale="each"), (place[0], place[1] + 16))
            pen.text((place[0] + 3, place[1] + 2), f"layer {layer}, step {step}", fill="black")
    return sheet


def stack(strips):
    """Return pictures below each other."""
    sheet = Image.new("RGB", (strips[0].width, sum(strip.height for strip in strips)), "white")
    top = 0
    for strip in strips:
        sheet.paste(strip, (0, top))
        top += strip.height
    return sheet


def main():
    """Draw both sheets."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args()
    given.output.mkdir(parents=True, exist_ok=True)
    pipe = load_pipeline()
    for name, sheet in (("gallery", rows(pipe)), ("gallery-layers", layers(pipe))):
        sheet.quantize(256).save(given.output / f"{name}.png", optimize=True)


if __name__ == "__main__":
    main()
