"""What several commands ask for: models, prompts, and lists of numbers and names."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from ..control import METHODS

TEMPLATE = 64  # Tokens that a chat template may take.


def yield_while_waiting() -> None:
    """Let PyTorch's idle threads sleep, which on a busy CPU makes small steps 2 to 3 times faster.

    Read when PyTorch is first imported, hence before it.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


class Lookahead(click.ParamType):  # type: ignore[type-arg]
    """A number of tokens, or `auto`."""

    name = "integer|auto"

    def convert(self, value: Any, param: Any, ctx: Any) -> int | str:
        """Return the number, or `"auto"`."""
        if value == "auto" or (str(value).isdigit()):
            return "auto" if value == "auto" else int(value)
        self.fail(f"{value!r} is neither 'auto' nor an integer of 0 or more.", param, ctx)


class Place(click.ParamType):  # type: ignore[type-arg]
    """A folder, a GGUF file, or a name on the hub."""

    name = "folder|file|hub name"

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        """Return the path, or the name."""
        from ..pairs import find_place

        try:
            return find_place(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


def _add(options: Sequence[Any], command: Any) -> Any:
    for decorate in reversed(options):  # The last is shown first.
        command = decorate(command)
    return command


def places(command: Any) -> Any:
    """Add the options that name where a target and a drafter are."""
    here = "folder as `save_pretrained` writes it, GGUF file, or name on the Hugging Face hub."
    options = (
        click.option("--target", type=Place(), help=f"The target: {here} The demo's if missing."),
        click.option("--drafter", type=Place(), help="The drafter, likewise."),
        click.option("--small-target", is_flag=True, help="The demo's small target, not SmolLM2."),
    )
    return _add(options, command)


def models(command: Any) -> Any:
    """Add the options that name a pair of models, and how to load them."""
    options = (
        click.option(
            "--dtype",
            default="auto",
            show_default="bfloat16 on a GPU, else float32",
            help="Type of the weights.",
        ),
        click.option("--device", default="auto", show_default=True, help="Such as cpu or cuda:1."),
    )
    return places(_add(options, command))


def check_targets(target: Path | str | None, small_target: bool) -> None:
    """Refuse two targets."""
    if small_target and target is not None:
        raise click.UsageError("--small-target is a target itself; leave out --target.")


def load(
    target: Path | str | None,
    drafter: Path | str | None,
    dtype: str,
    device: str,
    small_target: bool,
    size: float | None = None,
) -> Any:
    """Return the pair that the options of `models` name, and print its notes."""
    check_targets(target, small_target)
    yield_while_waiting()
    if sys.stderr.isatty():
        click.echo("loading both models", err=True)
    from ..pairs import load_pair

    pair = load_pair(target, drafter, dtype=dtype, device=device, small=small_target, size=size)
    for note in pair.notes:
        click.echo(note, err=True)
    return pair


def prompts_of(
    pair: Any,
    path: Path | None,
    limit: int,
    categories: tuple[str, ...] = (),
    most: int | None = None,
) -> list[Any]:
    """Return the ids of each prompt of a file, or of the demo's; see `pairs.read_prompts`."""
    from ..demo.models import ASSETS
    from ..pairs import prompt_ids, read_prompts

    if path is None:
        texts = json.loads((ASSETS / "prompts.json").read_text(encoding="utf-8"))[:limit]
    else:
        texts = read_prompts(path, limit, categories)
    chat = bool(pair.target_tokenizer.chat_template)
    return [prompt_ids(pair.target_tokenizer, text, chat, most) for text in texts]


prompts_option = click.option(
    "--prompts",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="File of JSON lines with `prompt`, `turns`, `question` or `text`, or of text lines.",
)
method_option = click.option(
    "--method",
    type=click.Choice(METHODS),
    default="auto",
    show_default=True,
    help="Way to draft; auto measures which is fastest.",
)
lookahead_option = click.option(
    "--lookahead",
    type=Lookahead(),
    default="auto",
    show_default=True,
    help="Tokens drafted a round; 0 is the target alone.",
)
seed_option = click.option(
    "--seed", type=int, default=0, show_default=True, help="Seed of sampling."
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def numbers(kind: type, least: int) -> Any:
    """Return a converter of lists such as 1,2,4."""

    def convert(ctx: Any, param: Any, value: str) -> list[Any]:
        try:
            found = [kind(part) for part in value.split(",")]
        except ValueError:
            found = []
        if not found or min(found) < least:
            message = f"{value!r} is no list of numbers of {least} or more, such as {least},4."
            raise click.BadParameter(message)
        return found

    return convert


def decodings(ctx: Any, param: Any, value: str) -> list[tuple[float, float]]:
    """Read temperatures, each with its top-p or without, such as 0,1,0.7:0.9."""
    found = []
    for part in value.split(","):
        heat, _, nucleus = part.partition(":")
        try:
            found.append((float(heat), float(nucleus or 1)))
        except ValueError:
            found.append((-1.0, 1.0))
        if found[-1][0] < 0 or not 0 < found[-1][1] <= 1:
            raise click.BadParameter(f"{part!r} is no temperature, or temperature:top-p.")
    return found


def names(ctx: Any, param: Any, value: str) -> list[str]:
    """Read names of methods, such as tli,slem."""
    found = [name.strip() for name in value.split(",")]
    wrong = [name for name in found if name not in METHODS]
    if wrong:
        raise click.BadParameter(f"{wrong[0]!r} is not one of {', '.join(METHODS)}.")
    return found
