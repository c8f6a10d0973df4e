"""`hetero-sd generate`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .options import json_option, load, lookahead_option, method_option, models, seed_option

if TYPE_CHECKING:
    from ..rounds import Stats


@click.command()
@models
@click.option(
    "--prompt", required=True, help="Text to continue, or question with --chat; - reads it."
)
@click.option("--chat", is_flag=True, help="Ask the prompt in the target's chat template.")
@click.option("--system", help="With --chat: the system's message.")
@method_option
@lookahead_option
@click.option(
    "--max-new-tokens",
    type=click.IntRange(min=1),
    default=64,
    show_default=True,
    help="Most tokens to write.",
)
@click.option(
    "--temperature",
    type=click.FloatRange(min=0),
    default=0.0,
    show_default=True,
    help="0 is greedy.",
)
@click.option(
    "--top-k", type=click.IntRange(min=0), default=0, show_default=True, help="0 is all tokens."
)
@click.option(
    "--top-p",
    type=click.FloatRange(0, 1, min_open=True),
    default=1.0,
    show_default=True,
    help="1 is all tokens.",
)
@click.option(
    "--min-p",
    type=click.FloatRange(0, 1),
    default=0.0,
    show_default=True,
    help="Least probability, of the likeliest token's; 0 is all tokens.",
)
@click.option(
    "--repetition-penalty",
    type=click.FloatRange(0, min_open=True),
    default=1.0,
    show_default=True,
    help="Above 1, tokens that are there come less often.",
)
@click.option("--stop", multiple=True, help="Text that ends the output; may be repeated.")
@click.option(
    "--sequences",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Texts to write, when sampling.",
)
@click.option("--stream", is_flag=True, help="Print the text while it is written.")
@seed_option
@json_option
def generate(
    target: Path | str | None,
    drafter: Path | str | None,
    dtype: str,
    device: str,
    small_target: bool,
    prompt: str,
    chat: bool,
    system: str | None,
    method: str,
    lookahead: int | str,
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    repetition_penalty: float,
    stop: tuple[str, ...],
    sequences: int,
    stream: bool,
    seed: int,
    as_json: bool,
) -> None:
    """Continue a text, or answer a question."""
    if prompt == "-":
        prompt = sys.stdin.read()
    if not prompt:
        raise click.UsageError("--prompt must not be empty.")
    if system is not None and not chat:
        raise click.UsageError("--system is for --chat.")
    if stream and (as_json or sequences > 1):
        raise click.UsageError("--stream writes one text; leave out --json and --sequences.")
    if sequences > 1 and temperature == 0:
        raise click.UsageError("--sequences needs --temperature above 0.")
    pair = load(target, drafter, dtype, device, small_target)
    if chat and not pair.target_tokenizer.chat_template:
        raise click.UsageError("the target has no chat template; leave out --chat.")
    from fourfold_common import seed_everything

    from ..decoder import HeteroSpeculativeDecoder

    seed_everything(seed)
    decoder = HeteroSpeculativeDecoder(*pair.parts, method=method, lookahead=lookahead)
    options: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "repetition_penalty": repetition_penalty,
        "do_sample": temperature > 0,
        "num_return_sequences": sequences,
    }
    if chat:
        said = [{"role": "system", "content": system}] if system is not None else []
        options["messages"] = [*said, {"role": "user", "content": prompt}]
    else:
        options["prompts"] = prompt
    if temperature > 0:
        options.update(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    if stop:
        options["stop_strings"] = list(stop)
    if stream:
        rounds = decoder.start(**options)
        for piece in decoder.pieces(rounds):
            click.echo(piece, nl=False)
        click.echo()
        click.echo(_summary(rounds.stats), err=True)
        return
    made = decoder.generate(**options)
    stats = made.stats
    if as_json:
        figures = {
            "texts": made.texts,
            "tokens": made.tokens,
            "tokens_per_second": stats.tokens_per_second,
            "acceptance": stats.acceptance,
            "block_efficiency": stats.block_efficiency,
            "arms": stats.arms,
            "seconds": stats.seconds,
        }
        click.echo(json.dumps(figures, indent=1, ensure_ascii=False))
        return
    for text in made.texts:
        click.echo(text)
    click.echo(_summary(stats), err=True)


def _summary(stats: Stats) -> str:
    """Return what a generation took, in one line."""
    arms = sorted(stats.arms.items(), key=lambda arm: -arm[1])
    return (
        f"{stats.generated} tokens, {stats.tokens_per_second:.1f} tokens/s, acceptance "
        f"{stats.acceptance:.2f}, {stats.block_efficiency:.2f} tokens a target pass; rounds: "
        + ", ".join(f"{count} {name}" for name, count in arms)
    )
