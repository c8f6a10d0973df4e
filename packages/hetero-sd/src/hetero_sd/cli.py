"""The command `hetero-sd`."""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

import click

from .__about__ import __version__
from .control import METHODS

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


def _yield_while_waiting() -> None:
    """Let PyTorch's idle threads sleep, which on a busy CPU makes small steps 2 to 3 times faster.

    Read when PyTorch is first imported, hence before it.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


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
    """Print versions, devices and where this package was loaded from."""
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


@main.command()
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("demo-output/hetero-sd"),
    show_default=True,
    help="Folder for the results.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of sampling.")
@click.option(
    "--tokens",
    type=click.IntRange(min=1),
    default=24,
    show_default=True,
    help="New tokens a prompt.",
)
@click.option("--small-target", is_flag=True, help="Use the package's small target, not SmolLM2.")
@click.option("--progress/--no-progress", default=True, help="Show a progress bar.")
def demo(output: Path, seed: int, tokens: int, small_target: bool, progress: bool) -> None:
    """Generate real answers with TLI and SLEM and compare with the target alone."""
    _yield_while_waiting()
    from .demo.run import run

    outcome = run(output, seed=seed, tokens=tokens, embedded=small_target, progress=progress)
    for note in outcome.notes:
        click.echo(note)
    for method, (same, total) in outcome.identical.items():
        verdict = "token for token the target's own" if same == total else "DIFFERENT"
        click.echo(f"{method} greedy: {verdict} in {same} of {total} prompts")
    click.echo()
    click.echo(outcome.results.to_markdown())
    click.echo()
    first = outcome.samples[0]
    click.echo(f"> {first['prompt']}")
    click.echo(first["greedy, slem"].strip())
    click.echo()
    click.echo(f"written to {output}: {', '.join(path.name for path in outcome.files)}")
    if any(same != total for same, total in outcome.identical.values()):
        raise click.ClickException("a greedy output differs from the target's own")


class _Lookahead(click.ParamType):  # type: ignore[type-arg]
    """A number of tokens, or `auto`."""

    name = "integer|auto"

    def convert(self, value: Any, param: Any, ctx: Any) -> int | str:
        """Return the number, or `"auto"`."""
        if value == "auto" or (str(value).isdigit()):
            return "auto" if value == "auto" else int(value)
        self.fail(f"{value!r} is neither 'auto' nor an integer of 0 or more.", param, ctx)


def _folder(name: str) -> Any:
    return click.option(
        f"--{name}",
        type=click.Path(exists=True, file_okay=False, path_type=Path),
        required=True,
        help=f"Folder of the {name}, as `save_pretrained` writes it.",
    )


@main.command()
@_folder("target")
@_folder("drafter")
@click.option("--prompt", required=True, help="Text to continue.")
@click.option("--method", type=click.Choice(METHODS), default="auto", show_default=True)
@click.option("--lookahead", type=_Lookahead(), default="auto", show_default=True)
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=64, show_default=True)
@click.option("--temperature", type=click.FloatRange(min=0), default=0.0, help="0 is greedy.")
@click.option("--top-k", type=click.IntRange(min=0), default=0, help="0 is all.")
@click.option("--top-p", type=float, default=1.0, help="1 is all.")
@click.option("--seed", type=int, default=0, show_default=True)
def generate(
    target: Path,
    drafter: Path,
    prompt: str,
    method: Any,
    lookahead: int | str,
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int,
) -> None:
    """Continue a text with two models from local folders."""
    _yield_while_waiting()
    from transformers import AutoModelForCausalLM

    from fourfold_common import pick_device, seed_everything

    from .decoder import HeteroSpeculativeDecoder

    seed_everything(seed)
    device, _ = pick_device()
    models = [
        AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).to(device).eval()
        for folder in (target, drafter)
    ]
    decoder = HeteroSpeculativeDecoder(
        models[0],
        models[1],
        _tokenizer(target),
        _tokenizer(drafter),
        method=method,
        lookahead=lookahead,
    )
    made = decoder.generate(
        prompt,
        max_new_tokens=max_new_tokens,
        do_sample=temperature > 0,
        temperature=temperature or 1.0,
        top_k=top_k,
        top_p=top_p,
    )
    click.echo(made.text)
    stats = made.stats
    click.echo(
        f"{stats.generated} tokens, {stats.tokens_per_second:.1f} tokens/s, acceptance "
        f"{stats.acceptance:.2f}, {stats.block_efficiency:.2f} tokens a target pass",
        err=True,
    )


@main.command("inspect-vocab")
@_folder("target")
@_folder("drafter")
@click.option(
    "--corpus",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Text like that to be generated; a short sample of ours if missing.",
)
def inspect_vocab_command(target: Path, drafter: Path, corpus: Path | None) -> None:
    """Report what two tokenizers share."""
    from .vocab import inspect_vocab

    texts = None if corpus is None else corpus.read_text(encoding="utf-8").splitlines()
    click.echo(inspect_vocab(_tokenizer(target), _tokenizer(drafter), texts).to_markdown())


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True)
