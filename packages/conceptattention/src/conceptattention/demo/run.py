"""The main job behind `conceptattention demo`."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fourfold_common import Results

from ..maps import ConceptMaps
from ..observer import ConceptAttention
from ..segmentation import segment
from .evaluate import SPACES, held_out_scenes, score, segment_scenes
from .model import PIXELS, READING, DemoPipeline, load_pipeline
from .scenes import COLOURS, LABELS, SYNONYMS, VOCABULARY

if TYPE_CHECKING:
    from PIL.Image import Image

PROMPT = "a bee and a flower on grass under clouds"
DEFAULT_SCENE = 7  # of the held-out scenes; drawn anew from its seed
SIDE = 512
# Okabe and Ito's palette: told apart with every kind of colour vision.
_PALETTE = (
    (0, 114, 178), (230, 159, 0), (0, 158, 115), (204, 121, 167), (86, 180, 233), (213, 94, 0),
    (240, 228, 66), (120, 120, 120),
)  # fmt: skip


def content_words(text: str) -> list[str]:
    """Return the words of a text that name things or places, each once."""
    known = {*LABELS, *SYNONYMS.values()}
    words = re.findall(r"[a-z]+", text.lower())
    return [word for word in dict.fromkeys(words) if word in known]


def check_words(concepts: Sequence[str]) -> list[str]:
    """Return the concepts if the demo model knows them.

    Raises:
        ValueError: It does not.
    """
    known = [*LABELS, *COLOURS, *SYNONYMS.values()]
    for word in concepts:
        if word not in known:
            raise ValueError(
                f"`concepts` must be words of the demo model; got {word!r}. "
                f"It knows: {', '.join(known)}."
            )
    return list(concepts)


def run(
    output: Path,
    *,
    prompt: str = PROMPT,
    concepts: Sequence[str] | None = None,
    image: Path | None = None,
    seed: int = 0,
    steps: int = 12,
    guidance: float = 3.0,
    t: float = 0.5,
    scenes: int = 50,
    assets: Path | None = None,
    progress: bool = True,
    say: Callable[[str], None] = lambda line: None,
) -> Results:
    """Generate a picture with maps, segment another, and score the maps on held-out scenes.

    Args:
        output: Folder for pictures, maps and results.json.
        prompt: What to generate.
        concepts: Words to map; the things and places of `prompt` when None.
        image: Picture to segment; a held-out scene when None.
        seed: Seed of the noise.
        steps: Denoising steps, at least 1.
        guidance: Strength of classifier-free guidance; 1 turns it off.
        t: Noise level at which pictures are segmented.
        scenes: Number of held-out scenes to score, at least 1.
        assets: Folder with other weights than the package's.
        progress: Show progress bars on standard error.
        say: Receives lines for the user.

    Raises:
        ValueError: An argument is out of range, or a word is unknown to the demo model.
        OSError: A file cannot be read or written.
    """
    if steps < 1 or scenes < 1:
        raise ValueError(f"`steps` and `scenes` must be at least 1; got {steps} and {scenes}.")
    words = check_words(content_words(prompt) if concepts is None else concepts)
    if not words:
        raise ValueError(f"`prompt` must name something the demo model knows; got {prompt!r}.")
    picture, scene_words, caption = _picture(image, words)
    output.mkdir(parents=True, exist_ok=True)
    pipe = load_pipeline(assets)
    pipe.set_progress_bar_config(disable=not progress, desc="generating")
    results = Results("conceptattention", command="conceptattention demo", seed=seed)

    started = time.perf_counter()
    with ConceptAttention(pipe, words, **READING) as observer:
        generated = generate(pipe, prompt, seed, steps, guidance)
    seconds = time.perf_counter() - started
    maps = observer.heatmaps()
    say(f'generated "{prompt}" with maps of {", ".join(words)} in {seconds:.1f} s')
    _save_maps(output, "generated", generated, maps, words)

    found = segment(pipe, picture, scene_words, caption, t=t, seed=seed, **READING)
    if not isinstance(found, ConceptMaps):
        raise TypeError(f"`segment` must return one set of maps; got {type(found).__name__}.")
    _save_maps(output, "segmented", picture, found, scene_words)
    say(f"segmented {image or 'a held-out scene'} into {', '.join(scene_words)}")

    held_out = held_out_scenes(scenes)
    by_space = segment_scenes(pipe, held_out, t=t, batch=8, progress=progress, **READING)
    _add_random(by_space, seed)
    for space in (*SPACES, "random"):
        for protocol in ("binary", "argmax"):
            confusion = score(by_space, held_out, space=space, protocol=protocol)
            for metric, value in (("mIoU", confusion.miou), ("accuracy", confusion.accuracy)):
                results.add(space, f"{protocol} {metric}", 100 * value, "%", t=t, scenes=scenes)
    results.save(output / "results.json")
    return results


def _add_random(found: Sequence[tuple[Any, Any, dict[str, ConceptMaps]]], seed: int) -> None:
    """Add maps of uniform noise, so that every figure stands beside what chance gives."""
    generator = torch.Generator().manual_seed(seed)
    for _, _, by_space in found:
        maps = by_space["output"]
        noise = torch.rand(maps.soft.shape, generator=generator)
        by_space["random"] = replace(maps, raw=noise, soft=noise, space="random")


def generate(pipe: DemoPipeline, prompt: str, seed: int, steps: int, guidance: float) -> Image:
    """Return a picture of the demo model; guidance 1 is none."""
    generated: Any = pipe(
        prompt,
        negative_prompt="" if guidance > 1 else None,
        true_cfg_scale=guidance,
        num_inference_steps=steps,
        generator=torch.Generator().manual_seed(seed),
    )
    picture: Image = generated.images[0]
    return picture


def _picture(image: Path | None, words: list[str]) -> tuple[Image, list[str], str]:
    """Return the picture to segment, its words and its caption."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    if image is None:
        scene = held_out_scenes(DEFAULT_SCENE + 1)[[DEFAULT_SCENE]]
        pixels = (scene.images[0].permute(1, 2, 0) * 255).round().to(torch.uint8)
        return Image.fromarray(pixels.numpy()), scene.words(0), scene.captions()[0]
    try:
        with Image.open(image) as opened:
            picture = ImageOps.fit(opened.convert("RGB"), (PIXELS, PIXELS))
    except UnidentifiedImageError:
        raise ValueError(f"`image` must be a picture; {str(image)!r} is none.") from None
    return picture, words, ""


def _save_maps(
    output: Path, stem: str, picture: Image, maps: ConceptMaps, words: Sequence[str]
) -> None:
    """Write picture, heatmaps, overlays, segmentation and an overview with titles."""
    from PIL import Image

    size = (SIDE, SIDE)
    large = picture.resize(size, Image.Resampling.NEAREST)
    large.save(output / f"{stem}.png")
    heats, overlays = [], []
    for word in words:
        heats.append(maps[word].to_image(size, scale="each"))
        overlays.append(maps[word].overlay(large, scale="each"))
        heats[-1].save(output / f"{stem}-heatmap-{word}.png")
        overlays[-1].save(output / f"{stem}-overlay-{word}.png")
    labels = maps.resize(size, "bilinear").argmax()[0]
    segmented = _paint(labels)
    segmented.save(output / f"{stem}-segmentation.png")
    maps.save(output / f"{stem}-maps.npz")
    _overview(output / f"{stem}-overview.png", large, words, heats, overlays, labels)


def _paint(labels: Tensor) -> Image:
    from PIL import Image

    palette = torch.tensor(_PALETTE, dtype=torch.uint8)
    return Image.fromarray(palette[labels % len(_PALETTE)].numpy())


def _overview(
    path: Path,
    picture: Image,
    words: Sequence[str],
    heats: Sequence[Image],
    overlays: Sequence[Image],
    labels: Tensor,
) -> None:
    """Write one figure with titles, if matplotlib is installed."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ImportError:
        return
    columns = len(words) + 1
    figure = Figure(figsize=(2.3 * columns, 5.4), dpi=150, layout="constrained")
    engine: Any = figure.get_layout_engine()
    engine.set(h_pad=0.12)
    axes: Any = figure.subplots(2, columns)
    for axis in axes.flat:
        axis.set_axis_off()
    axes[0, 0].imshow(picture)
    axes[0, 0].set_title("picture")
    axes[1, 0].imshow(_paint(labels))
    axes[1, 0].set_title("strongest concept")
    for column, (word, heat, overlay) in enumerate(zip(words, heats, overlays, strict=True), 1):
        axes[0, column].imshow(heat)
        axes[0, column].set_title(word)
        axes[1, column].imshow(overlay)
    legend = [
        Patch(color=[c / 255 for c in _PALETTE[i % len(_PALETTE)]], label=word)
        for i, word in enumerate(words)
    ]
    figure.legend(
        handles=legend, loc="outside lower center", ncols=min(len(words), 8), frameon=False
    )
    figure.savefig(path)


__all__ = ["PROMPT", "VOCABULARY", "check_words", "content_words", "generate", "run"]
