"""`hetero-sd verify` and `hetero-sd inspect-vocab`."""

from __future__ import annotations

import json
from pathlib import Path

import click

from .options import (
    check_targets,
    json_option,
    load,
    models,
    names,
    numbers,
    places,
    prompts_of,
    prompts_option,
    seed_option,
)


@click.command()
@models
@prompts_option
@click.option("--limit", type=click.IntRange(min=1), default=3, show_default=True, help="Prompts.")
@click.option(
    "--methods",
    callback=names,
    default="tli,slem,slrs",
    show_default=True,
    help="Methods to check.",
)
@click.option(
    "--lookaheads",
    callback=numbers(int, 1),
    default="1,4",
    show_default=True,
    help="Lookaheads to check each with.",
)
@click.option(
    "--tokens",
    type=click.IntRange(min=1),
    default=32,
    show_default=True,
    help="Tokens of each greedy text.",
)
@click.option(
    "--draws",
    type=click.IntRange(min=0),
    default=400,
    show_default=True,
    help="Sampled tokens to compare with the target's law; 0 for greedy checks alone.",
)
@seed_option
@json_option
def verify(
    target: Path | str | None,
    drafter: Path | str | None,
    dtype: str,
    device: str,
    small_target: bool,
    prompts: Path | None,
    limit: int,
    methods: list[str],
    lookaheads: list[int],
    tokens: int,
    draws: int,
    seed: int,
    as_json: bool,
) -> None:
    """Check that a pair writes what the target would.

    Greedy texts token for token; sampled ones by a statistical test, and a control that must fail.
    The exit status is 1 where a check fails.
    """
    pair = load(target, drafter, dtype, device, small_target)
    from dataclasses import asdict

    from ..verify import verify_pair

    checks = []
    for check in verify_pair(
        pair,
        prompts_of(pair, prompts, limit),
        methods=methods,
        lookaheads=lookaheads,
        tokens=tokens,
        draws=draws,
        seed=seed,
    ):
        checks.append(check)
        if not as_json:
            verdict = "ok" if check.passed else "FAILED"
            what = "wrong probabilities are noticed" if check.kind == "control" else check.kind
            click.echo(f"{verdict:6} {check.method} {check.lookahead}, {what}: {check.detail}")
    if as_json:
        click.echo(json.dumps([asdict(check) for check in checks], indent=1))
    failed = sum(not check.passed for check in checks)
    if failed:
        click.echo(f"Error: {failed} of {len(checks)} checks failed", err=True)
        raise SystemExit(1)


@click.command("inspect-vocab")
@places
@click.option(
    "--corpus",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Text like that to be generated; a short sample of ours if missing.",
)
@json_option
def inspect_vocab_command(
    target: Path | str | None,
    drafter: Path | str | None,
    small_target: bool,
    corpus: Path | None,
    as_json: bool,
) -> None:
    """Report what two tokenizers share; weights are not read."""
    from dataclasses import asdict

    from ..pairs import load_tokenizers, read_lines
    from ..vocab import inspect_vocab

    texts = None if corpus is None else read_lines(corpus)
    check_targets(target, small_target)
    report = inspect_vocab(*load_tokenizers(target, drafter, small=small_target), texts)
    click.echo(json.dumps(asdict(report), indent=1) if as_json else report.to_markdown())
