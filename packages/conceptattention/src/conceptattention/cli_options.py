"""Options that several commands share, and how their values are read."""

from pathlib import Path
from typing import Any

import click

MODEL = click.option(
    "--model",
    default="demo",
    show_default=True,
    help="Folder or hub name of a diffusers pipeline; `demo` is the small model inside.",
)
CONCEPTS = click.option("--concepts", required=True, help="Words to map, separated by commas.")
OUTPUT = click.option(
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("concept-maps"),
    show_default=True,
    help="Folder for the pictures and maps.npz.",
)
DEVICE = click.option(
    "--device", default="auto", show_default=True, help="Such as cuda or cpu, or auto."
)
OFFLOAD = click.option(
    "--offload",
    type=click.Choice(["none", "model", "sequential"]),
    default="none",
    show_default=True,
    help="Keep weights on the CPU until they are needed: a whole part of the pipeline at a time, "
    "or a layer, slowly. Needs a GPU and accelerate.",
)
GUIDANCE = click.option(
    "--guidance",
    type=click.FloatRange(min=0),
    help="Guidance scale; the model's own by default, of the small model of pictures 3.",
)


def _numbers(context: click.Context, option: click.Parameter, text: str) -> str | list[int]:
    """Return a word, or numbers separated by commas."""
    try:
        return [int(word) for word in words(text)] or text
    except ValueError:
        return text


LAYERS = click.option(
    "--layers", default="default", show_default=True, callback=_numbers,
    help="default, all, last:N, or numbers separated by commas.",
)  # fmt: skip

SEEN = click.option(
    "--seen-steps", default="all", show_default=True, callback=_numbers,
    help="Steps whose maps count: all, noise:LOW-HIGH, or numbers separated by commas.",
)  # fmt: skip
WIDTH, HEIGHT = (
    click.option(name, type=click.IntRange(8), help="In pixels; the model's own by default.")
    for name in ("--width", "--height")
)
REDUCE = click.option(
    "--reduce", type=click.Choice(["auto", "softmax_mean", "mean_softmax"]), default="auto",
    show_default=True,
    help="Softmax of each layer, then the mean, or of the mean; auto: what suits the small model "
    "inside, softmax_mean for others.",
)  # fmt: skip


def quiet() -> None:
    """Silence import-time advice of the libraries, which is not the user's concern."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    diffusers_logging.set_verbosity_error()


def load(model: str, device: str, *, offload: str = "none", video: bool = False) -> Any:
    """Return a pipeline on its device: from a folder, the hub, or one of the small ones inside.

    Args:
        model: Folder, name on the hub, "demo" or "tiny-video".
        device: As `--device` takes it.
        offload: As `--offload` takes it.
        video: Let "demo" be the small model of videos.

    Raises:
        ValueError: The device is not there, or none that weights can be offloaded from, or `model`
            is neither a folder nor a name on the hub.
    """
    import warnings

    import torch

    from fourfold_common import pick_device

    quiet()
    try:
        place = pick_device(device)[0]
    except ValueError as error:
        raise ValueError(str(error).replace("`request`", "`--device`")) from error
    if offload != "none" and place.type != "cuda":
        raise ValueError(f"`--offload` needs a CUDA device; `--device` is {place.type!r}.")
    if model == "demo" and video:
        from .demo.video import load_video_pipeline

        return load_video_pipeline().to(place)
    if model == "demo":
        from .demo.model import load_pipeline

        return load_pipeline().to(place)
    if model == "tiny-video":
        from .testing import tiny_cogvideox

        return tiny_cogvideox().to(place)
    from diffusers import DiffusionPipeline

    # A folder's name that is no folder is a slip of the pen, not the name of something to download.
    if not Path(model).is_dir() and (model.count("/") != 1 or model[0] in "./~"):
        raise ValueError(
            f"`--model` must be a folder, a hub name like owner/name, or demo; got {model!r}."
        )
    dtype = torch.bfloat16 if place.type == "cuda" else torch.float32
    with warnings.catch_warnings():
        # The name that every version takes; newer ones advise another.
        warnings.filterwarnings("ignore", message=".*torch_dtype.*")
        pipe = DiffusionPipeline.from_pretrained(model, torch_dtype=dtype)
    if offload == "model":
        pipe.enable_model_cpu_offload(device=place)
    elif offload == "sequential":
        pipe.enable_sequential_cpu_offload(device=place)
    else:
        pipe.to(place)
    return pipe


def reading(model: str, reduce: str) -> dict[str, Any]:
    """Return how the maps of a model are read, as arguments of `ConceptAttention`."""
    if reduce != "auto":
        return {"reduce": reduce}
    if model != "demo":
        return {}
    from .demo.model import READING

    return READING


def chosen(**given: Any) -> dict[str, Any]:
    """Return the arguments of a pipeline that were given; it has its own for the others."""
    return {name: value for name, value in given.items() if value is not None}


def guided(pipe: Any, guidance: float | None) -> dict[str, Any]:
    """Return a guidance scale as the pipeline takes it.

    Models that were not trained on a scale get an empty negative prompt and a second pass.
    """
    from inspect import signature

    if guidance is None:
        return {}
    trained = getattr(pipe.transformer.config, "guidance_embeds", False)
    if trained or "true_cfg_scale" not in signature(type(pipe).__call__).parameters:
        return {"guidance_scale": guidance}
    return {"true_cfg_scale": guidance, "negative_prompt": ""} if guidance > 1 else {}


def save_overlays(maps: Any, picture: Any, folder: Path) -> Path:
    """Write the picture under the map of each concept, one file per concept; return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in maps.names():
        maps[name].overlay(picture).save(folder / f"{file_name(name)}.png")
    return folder


def open_picture(path: Path) -> Any:
    """Return a picture in colour.

    Raises:
        ValueError: The file is none.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as opened:
            return opened.convert("RGB")
    except UnidentifiedImageError:
        raise ValueError(f"`--image` must be a picture; {str(path)!r} is none.") from None


def file_name(word: str) -> str:
    """Return a word without characters that folders give a meaning."""
    return "".join(c if c.isalnum() else "-" for c in word)


def words(text: str) -> list[str]:
    """Return the words of a text that commas separate."""
    return [word.strip() for word in text.split(",") if word.strip()]


def numbers(text: str) -> tuple[float, ...]:
    """Return the noise levels of a text that commas separate.

    Raises:
        ValueError: One is no number.
    """
    try:
        return tuple(float(word) for word in words(text))
    except ValueError:
        raise ValueError(f"`--noise` must be numbers separated by commas; got {text!r}.") from None
