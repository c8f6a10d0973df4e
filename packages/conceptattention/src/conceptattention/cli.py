"""The `conceptattention` command."""

import json
import logging
import sys
from pathlib import Path
from typing import Any

import click

from .__about__ import __version__

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
    # Their import-time advice about torchvision and float32 modules is not the user's concern.
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    from diffusers.utils import logging as diffusers_logging

    diffusers_logging.set_verbosity_error()

    from .demo.run import PROMPT, run

    words = None
    if concepts is not None:
        words = [word.strip() for word in concepts.split(",") if word.strip()]
    results = run(
        output,
        prompt=PROMPT if prompt is None else prompt,
        concepts=words,
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


def _best(results: Any, provider: str) -> float:
    """Return the highest mIoU of one kind of maps, in percent."""
    return max(
        float(case["median"])
        for case in results.cases
        if case["provider"] == provider and case["metric"].endswith("mIoU")
    )
