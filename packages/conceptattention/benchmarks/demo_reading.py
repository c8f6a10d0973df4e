"""Where maps mislead: words left out, words of absent things, near synonyms. Figures and a picture.

    python benchmarks/demo_reading.py --output results/demo-reading.json --picture reading.png

Held-out scenes of the embedded model with two objects; the strongest word wins a pixel. The picture
shows one scene under each list of words.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw

from conceptattention import segment
from conceptattention.demo.evaluate import held_out_scenes
from conceptattention.demo.model import READING, DemoPipeline, load_pipeline
from conceptattention.demo.scenes import BACKGROUNDS, ITEMS, SYNONYMS, Scenes
from conceptattention.maps import ConceptMaps
from fourfold_common import environment_report

SIDE = 192


def maps_of(
    pipe: DemoPipeline, scenes: Scenes, index: int, words: Sequence[str], t: float
) -> ConceptMaps:
    """Return the maps of some words in one scene, with its caption."""
    found = segment(
        pipe, scenes.images[[index]], words, scenes.captions()[index], t=t, seed=index, **READING
    )
    assert isinstance(found, ConceptMaps)
    return found


def shares(maps: ConceptMaps, mask: torch.Tensor) -> dict[str, float]:
    """Return the share of a mask's pixels that each word wins."""
    size = mask.shape[-1]
    best = maps.argmax()[0].float()[None, None]
    best = torch.nn.functional.interpolate(best, (size, size), mode="nearest")[0, 0].long()
    names = maps.names()
    return {word: float((best[mask] == i).float().mean()) for i, word in enumerate(names)}


def mean(values: Sequence[float]) -> float:
    """Return the mean, rounded."""
    return round(sum(values) / len(values), 4)


def measure(pipe: DemoPipeline, scenes: Scenes, chosen: Sequence[int], t: float) -> dict[str, Any]:
    """Return what becomes of the first object's pixels, on average over scenes."""
    own: dict[str, list[float]] = {
        name: [] for name in ("all", "absent", "synonym", "synonym_wins", "absent_wins")
    }
    left_out: dict[str, list[float]] = {"other object": [], "place": []}
    for index in chosen:
        words = scenes.words(index)
        target, other = words[0], words[1]
        mask = scenes.labels[index] == scenes.names.index(target)
        whole = torch.ones_like(mask)
        own["all"].append(shares(maps_of(pipe, scenes, index, words, t), mask)[target])
        without = shares(maps_of(pipe, scenes, index, words[1:], t), mask)
        left_out["other object"].append(without[other])
        left_out["place"].append(sum(without[word] for word in without if word in BACKGROUNDS))
        absent = [word for word in ITEMS if word not in words][index % 10]
        more = maps_of(pipe, scenes, index, [*words, absent], t)
        own["absent"].append(shares(more, mask)[target])
        own["absent_wins"].append(shares(more, whole)[absent])
        if target in SYNONYMS:
            twice = shares(maps_of(pipe, scenes, index, [*words, SYNONYMS[target]], t), mask)
            own["synonym"].append(twice[target])
            own["synonym_wins"].append(twice[SYNONYMS[target]])
    return {
        "object_found": mean(own["all"]),
        "left_out": {name: mean(values) for name, values in left_out.items()},
        "absent_word": {
            "object_found": mean(own["absent"]), "share_of_picture": mean(own["absent_wins"])
        },
        "synonym": {
            "scenes": len(own["synonym"]), "object_found": mean(own["synonym"]),
            "synonym_found": mean(own["synonym_wins"]),
        },
    }  # fmt: skip


def draw(pipe: DemoPipeline, scenes: Scenes, index: int, t: float, path: Path) -> None:
    """Write a sheet: one row for each list of words, with the overlay of each."""
    words = scenes.words(index)
    target = words[0]
    absent = next(word for word in ITEMS if word not in words)
    lists: list[tuple[str, list[str]]] = [
        ("all words", words), (f"without {target}", words[1:]),
        (f"{absent} is not there", [*words, absent]),
        ("two names of one thing", [*words, SYNONYMS[target]]),
    ]  # fmt: skip
    columns = 1 + max(len(row) for _, row in lists)
    sheet = Image.new("RGB", (columns * SIDE, len(lists) * (SIDE + 20)), "white")
    pen = ImageDraw.Draw(sheet)
    pixels = (scenes.images[index].permute(1, 2, 0) * 255).round().byte().numpy()
    picture = Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.NEAREST)
    for row, (title, names) in enumerate(lists):
        maps, top = maps_of(pipe, scenes, index, names, t), row * (SIDE + 20)
        sheet.paste(picture, (0, top + 20))
        pen.text((4, top + 4), title, fill="black")
        for column, word in enumerate(names, 1):
            sheet.paste(maps[word].overlay(picture, scale="joint"), (column * SIDE, top + 20))
            pen.text((column * SIDE + 4, top + 4), word, fill="black")
    sheet.save(path)


def main() -> None:
    """Measure, print, write the figures and the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scenes", type=int, default=100)
    parser.add_argument("--noise", type=float, default=0.4)
    parser.add_argument("--assets", type=Path, help="weights other than the package's")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--picture", type=Path, required=True)
    given = parser.parse_args()
    scenes = held_out_scenes(4 * given.scenes)
    pipe = load_pipeline(given.assets)

    def two_objects(index: int) -> bool:
        return sum(word in ITEMS for word in scenes.words(index)) == 2

    chosen = [index for index in range(len(scenes)) if two_objects(index)][: given.scenes]
    result = measure(pipe, scenes, chosen, given.noise)
    print(json.dumps(result, indent=1))
    named: Callable[[int], bool] = lambda index: scenes.words(index)[0] in SYNONYMS  # noqa: E731
    draw(pipe, scenes, next(filter(named, chosen)), given.noise, given.picture)
    report = {"scenes": len(chosen), "t": given.noise, "reading": READING, **result}
    report["environment"] = environment_report()
    given.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
