"""`hetero-sd generate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from .options import json_option, load, lookahead_option, method_option, models, seed_option


@click.command()
@models
@click.option("--prompt", required=True, help="Text to continue, or question with --chat.")
@click.option("--chat", is_flag=True, help="Ask the prompt in the target's chat template.")
@method_option
@lookahead_option
@click.option(
    "--max-new-tokens",
    type=click.IntRange(min=1),
    default=64,
    show_default=True,
    help="Most tokens to write.",
)
@click.option("--temperature", type=click.FloatRange(min=0), default=0.0, help="0 is greedy.")
@click.option("--top-k", type=click.IntRange(min=0), default=0, help="0 is all.")
@click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), default=1.0, help="1 is all.")
@click.option(
    "--repetition-penalty",
    type=click.FloatRange(0, min_open=True),
    default=1.0,
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
    target: Path | None,
    drafter: Path | None,
    dtype: str,
    device: str,
    small_target: bool,
    prompt: str,
    chat: bool,
    method: str,
    lookahead: int | str,
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    repetition_penalty: float,
    stop: tuple[str, ...],
    sequences: int,
    stream: bool,
    seed: int,
    as_json: bool,
) -> None:
    """Continue a text, or answer a question."""
    if not prompt:
        raise click.UsageError("--prompt must not be empty.")
    if stream and (as_json or sequences > 1):
        raise click.UsageError("--stream writes one text; leave out --json and --sequences.")
    if sequences > 1 and temperature == 0:
        raise click.UsageError("--sequences needs --temperature above 0.")
    pair = load(target, drafter, dtype, device, small_target)
    from fourfold_common import seed_everything

    from ..decoder import HeteroSpeculativeDecoder
    from ..pairs import prompt_ids

    seed_everything(seed)
    decoder = HeteroSpeculativeDecoder(*pair.parts, method=method, lookahead=lookahead)
    options: dict[str, Any] = {
        "input_ids": prompt_ids(pair.target_tokenizer, prompt, chat),
        "max_new_tokens": max_new_tokens,
        "repetition_penalty": repetition_penalty,
        "do_sample": temperature > 0,
    }
    if temperature > 0:
        options.update(temperature=temperature, top_k=top_k, top_p=top_p)
        options["num_return_sequences"] = sequences
    if stop:
        options["stop_strings"] = list(stop)
    if stream:
        for piece in decoder.stream(**options):
            click.echo(piece, nl=False)
        click.echo()
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
    click.echo(
        f"{stats.generated} tokens, {stats.tokens_per_second:.1f} tokens/s, acceptance "
        f"{stats.acceptance:.2f}, {stats.block_efficiency:.2f} tokens a target pass",
        err=True,
    )
