"""The command `hetero-sd`."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

import click

from .__about__ import __version__
from .commands.bench import bench
from .commands.check import inspect_vocab_command, verify
from .commands.demo import demo
from .commands.generate import generate
from .commands.serve import serve

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
        except (ValueError, TypeError, OSError, ImportError) as error:
            _logger.debug("details", exc_info=True)
            click.echo(f"Error: {' '.join(str(error).split())}", err=True)
            code = 2
        sys.exit(code if isinstance(code, int) else 0)


@click.group(cls=_OneLineErrors, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="hetero-sd")
@click.option("-v", "--verbose", is_flag=True, help="Log details, with tracebacks of errors.")
def main(verbose: bool) -> None:
    """Lossless speculative decoding for models with different vocabularies."""
    logging.basicConfig(
        level=logging.DEBUG if verbose else logging.WARNING,
        format="%(levelname)s %(name)s: %(message)s",
    )


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of lines.")
def env(as_json: bool) -> None:
    """Print versions and devices.

    And where this package was loaded from.
    """
    from fourfold_common import environment_report

    report = {
        "package": "hetero-sd",
        "version": __version__,
        "location": str(Path(__file__).parent),
        **environment_report(),
    }
    if as_json:
        click.echo(json.dumps(report, indent=1))
        return
    for key, value in report.items():
        click.echo(f"{key}: {value}")


for _command in (demo, generate, bench, verify, inspect_vocab_command, serve):
    main.add_command(_command)
