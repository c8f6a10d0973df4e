"""Real photographs with masks: the model of natural scenes on the classes whose words it knows.

    python benchmarks/real_photos.py --photos real_photos.zip --model FOLDER --taef2 FOLDER \\
        --output results/real-photos.json

The archive holds index.jsonl (a line per picture: `set`, `id`, `image`, `mask`) and classes.json
(by set, `names` by index). Protocol of `conceptattention eval`, binary: a class's map above its
mean, beside words of places; masks compared at 224 x 224.
"""

from __future__ import annotations

import argparse
import io
import json
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from conceptattention.datasets import Folder
from conceptattention.demo.natural import PIXELS, load_natural_pipeline
from conceptattention.harness import Settings, evaluate
from fourfold_common import environment_report

WORDS = {
    "car": "car",
    "tree": "tree",
    "horse": "horse",
    "bus": "bus",
    "chair": "chair",
    "sofa": "couch",
}
PLACES = ("grass", "paving-stone", "grey-tile", "cloudy-sky")  # what photographs show otherwise


def export(archive: Path, folder: Path, sets: list[str] | None = None) -> int:
    """Write the pictures with a known class as a data set of `eval`; return their number."""
    words = list(dict.fromkeys(WORDS.values()))
    lines = []
    with zipfile.ZipFile(archive) as source:
        names = {key: row["names"] for key, row in json.loads(source.read("classes.json")).items()}
        for line in source.read("index.jsonl").splitlines():
            row = json.loads(line)
            if sets and row["set"] not in sets:
                continue
            known = np.zeros(256, dtype=np.uint8)
            for number, name in enumerate(names[row["set"]]):
                word = WORDS.get(name.split(",")[0].split(";")[0])
                if word is not None:
                    known[number] = 1 + words.index(word)
            mask = known[np.array(Image.open(io.BytesIO(source.read(row["mask"]))))]
            present = [word for i, word in enumerate(words, 1) if (mask == i).mean() >= 0.005]
            if not present:
                continue
            mask[~np.isin(mask, [1 + words.index(word) for word in present])] = 0
            key = f"{row['set']}-{row['id']}"
            (folder / f"{key}.jpg").write_bytes(source.read(row["image"]))
            Image.fromarray(mask).save(folder / f"{key}.png")
            caption = " ".join(present)
            lines.append(
                {"id": key, "image": f"{key}.jpg", "mask": f"{key}.png", "caption": caption}
            )
    text = "\n".join(json.dumps(line) for line in lines)
    (folder / "index.jsonl").write_text(text, encoding="utf-8")
    classes = {"names": ["background", *words], "background": list(PLACES)}
    (folder / "classes.json").write_text(json.dumps(classes), encoding="utf-8")
    return len(lines)


def main() -> None:
    """Export, evaluate, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("photos", "model", "taef2", "output"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--noise", type=float, default=0.4)
    parser.add_argument("--sets", nargs="+", help="only these sets of the archive")
    given = parser.parse_args()
    pipe = load_natural_pipeline(given.model, given.taef2)
    settings = Settings(
        spaces=("output", "cross_attention"), reduces=("softmax_mean", "mean_softmax"),
        noise=(given.noise,), size=PIXELS,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as work:
        data, scores = Path(work) / "data", Path(work) / "scores"
        data.mkdir()
        count = export(given.photos, data, given.sets)
        found: dict[str, Any] = evaluate(pipe, Folder(data), scores, settings)
        print((scores / "results.md").read_text())
    result = {
        "sets": given.sets or "all", "pictures": count, "words": WORDS, "places": PLACES,
        "t": given.noise, "rows": found["rows"], "environment": environment_report(),
    }  # fmt: skip
    given.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
