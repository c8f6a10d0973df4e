"""The `conceptattention` command."""

import json
import logging
import sys
from pathlib import Path
from typing import Any

import click

from .__about__ import __version__
from .cli_options import (
    CONCEPTS,
    DEVICE,
    GUIDANCE,
    HEIGHT,
    LAYERS,
    MODEL,
    OFFLOAD,
    OUTPUT,
    REDUCE,
    SEEN,
    WIDTH,
    chosen,
    file_name,
    guided,
    load,
    numbers,
    open_picture,
    quiet,
    reading,
    save_overlays,
    words,
)

_logger = logging.getLogger(__name__)

_ORIGIN = "independent implementation of ConceptAttention (arXiv 2502.04320)"


class _OneLineErrors(click.Group):
    """A command group whose user errors are one line on stderr and exit status 2."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run the command; turn a user's mistake into one line and exit status 2."""
        kwargs["standalone_mode"] = False
        try:
            code = super().main(*args, **kwargs)
        except click.exceptions.NoArgsIsHelpError as error:
            click.echo(error.format_message())
            code = 0
        except click.Abort:
            click.echo("Aborted.", err=True)
            code = 130
        except click.ClickException as error:
            click.echo(f"Error: {error.format_message()}", err=True)
            code = 2
        except (ValueError, OSError) as error:
            _logger.debug("details", exc_info=True)
            message = " ".join(str(error).split())
            click.echo(f"Error: {message}", err=True)
            code = 2
        except RuntimeError as error:
            if type(error).__name__ != "OutOfMemoryError":  # torch's
                raise
            _logger.debug("details", exc_info=True)
            message = "try `--offload model`, a smaller picture, or `--device cpu`."
            click.echo(f"Error: out of GPU memory: {message}", err=True)
            code = 2
        sys.exit(code if isinstance(code, int) else 0)


@click.group(cls=_OneLineErrors, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="conceptattention")
@click.option("-v", "--verbose", is_flag=True, help="Log details, with tracebacks of errors.")
def main(verbose: bool) -> None:
    """Saliency maps of text concepts from diffusion transformers, and a demonstration."""
    logging.basicConfig(
        level=logging.DEBUG if verbose else logging.WARNING,
        format="%(levelname)s %(name)s: %(message)s",
    )


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of lines.")
def env(as_json: bool) -> None:
    """Print versions, devices and where this package was loaded from."""
    from fourfold_common import environment_report

    report = {
        "package": "conceptattention",
        "version": __version__,
        "origin": _ORIGIN,
        "location": str(Path(__file__).parent),
        **environment_report(),
    }
    if as_json:
        click.echo(json.dumps(report, indent=1))
        return
    for key, value in report.items():
        click.echo(f"{key}: {value}")


@main.command()
@click.option(
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("demo-output/conceptattention"),
    show_default=True,
    help="Folder for pictures and results.json.",
)
@click.option("--prompt", default=None, help="What to generate, in the demo model's words.")
@click.option("--concepts", default=None, help="Words to map, separated by commas.")
@click.option(
    "--image",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    default=None,
    help="Picture to segment; a held-out scene by default.",
)
@click.option("--seed", default=0, show_default=True, help="Seed of the noise.")
@click.option(
    "--steps", default=12, show_default=True, type=click.IntRange(1), help="Denoising steps."
)
@click.option(
    "--scenes", default=50, show_default=True, type=click.IntRange(1), help="Held-out scenes."
)
@click.option(
    "--assets",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    default=None,
    help="Folder with other weights, as written by conceptattention.demo.train.",
)
@click.option("--progress/--no-progress", default=True, help="Show progress bars.")
def demo(
    output: Path,
    prompt: str | None,
    concepts: str | None,
    image: Path | None,
    seed: int,
    steps: int,
    scenes: int,
    assets: Path | None,
    progress: bool,
) -> None:
    """Generate a picture with maps, segment another, and score maps on held-out scenes."""
    quiet()
    from .demo.run import PROMPT, run

    results = run(
        output,
        prompt=PROMPT if prompt is None else prompt,
        concepts=None if concepts is None else words(concepts),
        image=image,
        seed=seed,
        steps=steps,
        scenes=scenes,
        assets=assets,
        progress=progress,
        say=click.echo,
    )
    click.echo("")
    click.echo(results.to_markdown())
    click.echo("\n`random` scores maps of noise: what chance gives under the same protocol.")
    if _best(results, "output") < _best(results, "random") + 5:
        click.echo(
            "These weights' maps do not find objects better than chance: they were trained too "
            "briefly (see training.json); the observer itself is exact."
        )
    click.echo(f"Pictures, maps and results.json are in {output}.")


@main.command()
@MODEL
@click.option("--prompt", required=True, help="What to generate.")
@CONCEPTS
@OUTPUT
@click.option("--steps", default=12, show_default=True, type=click.IntRange(1), help="Steps.")
@GUIDANCE
@WIDTH
@HEIGHT
@click.option("--seed", default=0, show_default=True, help="Seed of the noise, drawn on the CPU.")
@LAYERS
@SEEN
@REDUCE
@DEVICE
@OFFLOAD
def generate(
    model: str, prompt: str, concepts: str, output: Path, steps: int, guidance: float | None,
    width: int | None, height: int | None, seed: int, layers: Any, seen_steps: Any, reduce: str,
    device: str, offload: str,
) -> None:  # fmt: skip
    """Generate a picture or a video and the maps of its concepts."""
    import torch

    from .observer import ConceptAttention

    pipe = load(model, device, offload=offload)
    read = reading(model, reduce)
    if model == "demo" and guidance is None:
        guidance = 3.0
    given = chosen(width=width, height=height) | guided(pipe, guidance)
    with ConceptAttention(
        pipe, words(concepts), layers=layers, steps=seen_steps, **read
    ) as observer:
        result = pipe(
            prompt, num_inference_steps=steps, generator=torch.Generator().manual_seed(seed),
            **given,
        )  # fmt: skip
    output.mkdir(parents=True, exist_ok=True)
    maps = observer.heatmaps()
    if maps.raw.ndim == 6:
        frames = result.frames[0]
        for name in maps.names():
            click.echo(maps[name].to_video(output / f"{file_name(name)}.gif", frames))
    else:
        picture = result.images[0]
        picture.save(output / "image.png")
        maps.plot(picture).save(output / "maps.png")
        click.echo(output / "image.png")
        click.echo(output / "maps.png")
        click.echo(save_overlays(maps, picture, output / "overlays"))
    click.echo(maps.save(output / "maps.npz"))


@main.command()
@MODEL
@click.option(
    "--image",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    required=True,
    help="Picture to segment.",
)
@CONCEPTS
@click.option("--prompt", default="", help="Caption of the picture; may stay empty.")
@OUTPUT
@click.option(
    "--noise", default=0.5, show_default=True, type=click.FloatRange(0, 1, min_open=True),
    help="Noise level.",
)  # fmt: skip
@click.option(
    "--samples",
    default=1,
    show_default=True,
    type=click.IntRange(1),
    help="Noise draws to average.",
)
@click.option(
    "--size", default=1024, show_default=True, type=click.IntRange(8),
    help="Pictures with a longer side are scaled down to it; the small model inside takes 64 x 64.",
)  # fmt: skip
@click.option("--seed", default=0, show_default=True, help="Seed of the noise.")
@LAYERS
@REDUCE
@DEVICE
@OFFLOAD
def segment(
    model: str, image: Path, concepts: str, prompt: str, output: Path, noise: float, samples: int,
    size: int, seed: int, layers: Any, reduce: str, device: str, offload: str,
) -> None:  # fmt: skip
    """Map concepts in a picture that exists already."""
    from .maps import ConceptMaps
    from .segmentation import segment as run

    pipe = load(model, device, offload=offload)
    picture = open_picture(image)
    if model == "demo":
        picture = picture.resize((64, 64))
    picture.thumbnail((size, size))
    maps = run(
        pipe, picture, words(concepts), prompt, t=noise, samples=samples, seed=seed, layers=layers,
        **reading(model, reduce),
    )  # fmt: skip
    if not isinstance(maps, ConceptMaps):
        raise TypeError("one space gives one set of maps")
    output.mkdir(parents=True, exist_ok=True)
    maps.plot(picture).save(output / "maps.png")
    best = maps.argmax()[0]
    share = {name: float((best == place).float().mean()) for place, name in enumerate(maps.names())}
    for name, part in share.items():
        click.echo(f"{name}: strongest in {part:.0%} of the picture")
    click.echo(output / "maps.png")
    click.echo(save_overlays(maps, picture, output / "overlays"))
    click.echo(maps.save(output / "maps.npz"))


@main.command()
@click.option(
    "--model",
    default="demo",
    show_default=True,
    help="Folder or hub name of a video pipeline; `demo` is the small video model inside, "
    "`tiny-video` has random weights.",
)
@click.option("--prompt", required=True, help="What to generate.")
@CONCEPTS
@OUTPUT
@click.option("--steps", default=50, show_default=True, type=click.IntRange(1), help="Steps.")
@click.option("--frames", type=click.IntRange(1), help="Pixel frames; the model's own by default.")
@GUIDANCE
@WIDTH
@HEIGHT
@click.option("--fps", default=8.0, show_default=True, help="Frames per second.")
@click.option(
    "--format",
    "ending",
    type=click.Choice(["gif", "mp4"]),
    default="gif",
    show_default=True,
    help="mp4 needs the extra `video`.",
)
@click.option("--pictures/--no-pictures", default=True, help="Write every frame as PNG too.")
@click.option("--seed", default=0, show_default=True, help="Seed of the noise, drawn on the CPU.")
@LAYERS
@SEEN
@REDUCE
@DEVICE
@OFFLOAD
def video(
    model: str, prompt: str, concepts: str, output: Path, steps: int, frames: int | None,
    guidance: float | None, width: int | None, height: int | None, fps: float, ending: str,
    pictures: bool, seed: int, layers: Any, seen_steps: Any, reduce: str, device: str,
    offload: str,
) -> None:  # fmt: skip
    """Generate a video and write the maps of its concepts over its frames."""
    import torch

    from .maps import check_video_format, write_video
    from .observer import ConceptAttention

    check_video_format(f"video.{ending}", fps)
    pipe = load(model, device, offload=offload, video=True)
    given = chosen(num_frames=frames, width=width, height=height) | guided(pipe, guidance)
    read = reading("", reduce)
    with ConceptAttention(
        pipe, words(concepts), layers=layers, steps=seen_steps, **read
    ) as observer:
        result = pipe(
            prompt,
            num_inference_steps=steps,
            generator=torch.Generator().manual_seed(seed),
            output_type="pil",
            **given,
        )
    if not hasattr(result, "frames"):
        raise ValueError(f"`--model` makes pictures, not videos ({type(pipe).__name__}).")
    made, maps = result.frames[0], observer.heatmaps()
    click.echo(write_video(output / f"video.{ending}", made, fps))
    click.echo(maps.to_video(output / f"maps.{ending}", made, fps=fps))
    for name in maps.names():
        drawn = maps[name].frames(made)
        place = output / file_name(name)
        click.echo(write_video(place.with_suffix(f".{ending}"), drawn, fps))
        if pictures:
            place.mkdir(parents=True, exist_ok=True)
            for number, picture in enumerate(drawn):
                picture.save(place / f"{number:04}.png")
            click.echo(place)
    click.echo(maps.save(output / "maps.npz"))


@main.command("eval")
@MODEL
@click.option(
    "--dataset",
    required=True,
    help="imagenet-segmentation, voc, camvid, ccp, folder, or scenes of the demo model.",
)
@click.option(
    "--root",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    default=Path(),
    help="The data set's folder.",
)
@click.option("--split", default=None, help="Part of the data set, such as val or val-single.")
@click.option(
    "--protocol",
    type=click.Choice(["binary", "multiclass"]),
    default="binary",
    show_default=True,
    help="Every class by its mean threshold, or the strongest concept of every pixel.",
)
@click.option(
    "--spaces", default="output,cross_attention,value", show_default=True,
    help="Also prompt_attention and daam.",
)  # fmt: skip
@click.option("--noise", default="0.5", show_default=True, help="Levels, separated by commas.")
@LAYERS
@click.option("--each-layer", is_flag=True, help="Score every layer by itself too.")
@click.option("--ablate", is_flag=True, help="Repeat without self-attention of the concepts.")
@click.option(
    "--samples", default=1, show_default=True, type=click.IntRange(1), help="Noise draws."
)
@click.option("--size", type=click.IntRange(1), help="Side of the pictures; kept by default.")
@click.option(
    "--score-size", type=click.IntRange(1),
    help="Side of the compared masks: 224 for binary, the map's grid for multiclass.",
)  # fmt: skip
@click.option("--limit", type=click.IntRange(1), help="Only the first pictures.")
@click.option("--seed", default=0, show_default=True, help="Seed of the noise.")
@click.option(
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("evaluation"),
    show_default=True,
    help="Folder of the run; a run that was interrupted goes on from it.",
)
@click.option("--progress/--no-progress", default=True, help="Show a progress bar.")
@DEVICE
def evaluate(
    model: str, dataset: str, root: Path, split: str | None, protocol: Any, spaces: str,
    noise: str, layers: Any, each_layer: bool, ablate: bool, samples: int, size: int | None,
    score_size: int | None, limit: int | None, seed: int, output: Path, progress: bool,
    device: str,
) -> None:  # fmt: skip
    """Score maps on a segmentation data set, also under `accelerate launch`."""
    import os

    from .datasets import load_dataset
    from .harness import Settings, to_markdown
    from .harness import evaluate as run

    names: Any = tuple(words(spaces))
    settings = Settings(
        protocol=protocol,
        spaces=names,
        noise=numbers(noise),
        self_attention=(True, False) if ablate else (True,),
        layers=layers,
        each_layer=each_layer,
        samples=samples,
        seed=seed,
        size=size,
        score_size=224 if score_size is None and protocol == "binary" else score_size,
    )
    try:
        pictures = load_dataset(dataset, root, split)
    except (ValueError, OSError) as error:
        message = str(error)
        for name, option in (("name", "dataset"), ("split", "split"), ("root", "root")):
            message = message.replace(f"`{name}`", f"`--{option}`")
        raise ValueError(message) from error
    if device == "auto" and "LOCAL_RANK" in os.environ:
        import torch

        if torch.cuda.is_available():
            device = f"cuda:{os.environ['LOCAL_RANK']}"
    pipe = load(model, device)
    result = run(pipe, pictures, output, settings, limit=limit, progress=progress)
    if int(os.environ.get("RANK", "0")) == 0:
        click.echo(to_markdown(result["rows"]))
        click.echo(f"{result['pictures']} pictures; results.json and results.md are in {output}.")


@main.command()
@MODEL
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port", default=7860, show_default=True, type=click.IntRange(0, 65535), help="0: any free."
)
@DEVICE
def app(model: str, host: str, port: int, device: str) -> None:
    """Serve a web page: prompt and concepts in, picture and maps out."""
    from .app import serve

    serve(load(model, device), host, port, click.echo)


@main.command()
def models() -> None:
    """List the model families that can be observed, and how far."""
    from .adapters import Adapter, known_adapters

    click.echo(f"{'family':20}{'transformer':34}{'makes':10}single-stream layers")
    for adapter in known_adapters():
        name = getattr(adapter, "model_class", type(adapter).__name__)
        makes = "videos" if adapter.films else "pictures"
        single = type(adapter).single_blocks is not Adapter.single_blocks
        click.echo(f"{adapter.family:20}{name:34}{makes:10}{'too' if single else 'no'}")


def _best(results: Any, provider: str) -> float:
    """Return the highest mIoU of one kind of maps, in percent."""
    return max(
        float(case["median"])
        for case in results.cases
        if case["provider"] == provider and case["metric"].endswith("mIoU")
    )
