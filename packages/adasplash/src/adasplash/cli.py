"""Command line of adasplash; heavy imports happen inside the commands."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

import click

from .__about__ import __version__

_logger = logging.getLogger(__name__)


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
            click.echo(f"Error: {error}", err=True)
            code = 2
        except Exception as error:
            _logger.debug("details", exc_info=True)
            message = " ".join(f"{type(error).__name__}: {error}".split())
            click.echo(f"Error: {message} (option -v shows where)", err=True)
            code = 1
        sys.exit(code if isinstance(code, int) else 0)


@click.group(cls=_OneLineErrors, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="adasplash")
@click.option("-v", "--verbose", is_flag=True, help="Log details, with tracebacks of errors.")
def main(verbose: bool) -> None:
    """Exact alpha-entmax attention whose sparsity adapts to the data."""
    level = logging.DEBUG if verbose else logging.WARNING
    logging.basicConfig(level=level, format="%(levelname)s %(name)s: %(message)s")


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of lines.")
def env(as_json: bool) -> None:
    """Print versions, devices and where this package was loaded from."""
    from fourfold_common import environment_report, triton_status

    report = {
        "package": "adasplash",
        "version": __version__,
        "origin": "independent implementation; not the project of this name on the package index",
        "location": str(Path(__file__).parent),
        "triton_interpreting": triton_status().interpreting,
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
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("demo-output/adasplash"),
    show_default=True,
    help="Folder for pictures and figures.",
)
@click.option("--prompt", default=None, help="Text to continue.")
@click.option("--new-tokens", type=click.IntRange(1, 400), default=60, show_default=True)
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True)
def demo(output: Path, prompt: str | None, new_tokens: int, seed: int) -> None:
    """Continue a prompt with sparse attention; show its zeros beside a softmax twin."""
    try:
        from .demo.run import PROMPT, run
    except ImportError as error:
        raise click.ClickException(
            f"the demo needs transformers, tqdm and matplotlib ({error}): "
            "install the extra, adasplash[demo]"
        ) from None
    losses, zeros, texts = run(
        output, prompt=PROMPT if prompt is None else prompt, new_tokens=new_tokens, seed=seed
    )
    for kind, text in texts.items():
        click.echo(f"\n{kind} continues: {text}")
    click.echo("\nValidation loss; the first column was computed just now:\n")
    click.echo(losses.to_markdown())
    click.echo("\nShare of the entmax model's causal attention that is exactly zero:\n")
    click.echo(zeros.to_markdown())
    click.echo(f"\nPictures and figures are in {output}")
