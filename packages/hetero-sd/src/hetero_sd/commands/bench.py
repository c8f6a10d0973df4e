"""`hetero-sd bench`."""

from __future__ import annotations

import json
from pathlib import Path

import click

from .options import (
    TEMPLATE,
    decodings,
    json_option,
    load,
    models,
    names,
    numbers,
    prompts_of,
    seed_option,
)


@click.command()
@models
@click.option(
    "--inflate",
    type=click.FloatRange(min=0, min_open=True),
    metavar="PARAMETERS",
    help="Make the target this large, such as 5e9: the same function at a large model's cost.",
)
@click.option(
    "--prompts",
    multiple=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="File of JSON lines with `prompt`, `turns`, `question` or `text`, or of text lines, plain "
    "or gzipped; may be repeated. The demo's if missing.",
)
@click.option("--category", multiple=True, help="Of prompts with a category, only these.")
@click.option(
    "--limit", type=click.IntRange(min=1), default=3, show_default=True, help="Prompts a file."
)
@click.option(
    "--prompt-tokens", type=click.IntRange(min=1), help="Tokens of a prompt to keep, the first."
)
@click.option(
    "--methods",
    callback=names,
    default="tli,slem,slrs,auto",
    show_default=True,
    help="Methods of ours to time.",
)
@click.option(
    "--lookaheads",
    callback=numbers(int, 1),
    default="2,4",
    show_default=True,
    help="Lookaheads to time each with; auto chooses its own.",
)
@click.option(
    "--temperatures",
    callback=decodings,
    default="0,1",
    show_default=True,
    help="0 is greedy; 0.7:0.9 is a temperature with its top-p.",
)
@click.option(
    "--batch",
    "batches",
    callback=numbers(int, 1),
    default="1",
    show_default=True,
    help="Rows decoded together, such as 1,4,8.",
)
@click.option(
    "--tokens",
    type=click.IntRange(min=2),
    default=48,
    show_default=True,
    help="New tokens a prompt.",
)
@click.option(
    "--repeats",
    type=click.IntRange(min=1),
    default=3,
    show_default=True,
    help="Timed passes over the prompts.",
)
@click.option(
    "--draws",
    type=click.IntRange(min=0),
    default=200,
    show_default=True,
    help="Sampled tokens to compare with the target's law, for the verdict.",
)
@click.option(
    "--peers/--no-peers",
    default=True,
    help="Time transformers' assisted generation and prompt lookup too.",
)
@click.option(
    "--peer-repeats", type=click.IntRange(min=1), help="Timed passes of transformers; else as ours."
)
@click.option(
    "--warm-ups",
    type=click.IntRange(min=0),
    help="Untimed passes over the prompts; 1, and of auto 3, if missing.",
)
@click.option("--compiled", is_flag=True, help="Time transformers static and compiled too.")
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("bench-output/hetero-sd"),
    show_default=True,
    help="Folder for bench.json, bench.md, bench.png and speedup.png.",
)
@seed_option
@click.option("--progress/--no-progress", default=True, help="Show a progress bar.")
@json_option
def bench(
    target: Path | str | None,
    drafter: Path | str | None,
    dtype: str,
    device: str,
    small_target: bool,
    inflate: float | None,
    prompts: tuple[Path, ...],
    category: tuple[str, ...],
    limit: int,
    prompt_tokens: int | None,
    methods: list[str],
    lookaheads: list[int],
    temperatures: list[tuple[float, float]],
    batches: list[int],
    tokens: int,
    repeats: int,
    draws: int,
    peers: bool,
    peer_repeats: int | None,
    warm_ups: int | None,
    compiled: bool,
    output: Path,
    seed: int,
    progress: bool,
    as_json: bool,
) -> None:
    """Time every way to decode, side by side.

    Beside speeds: acceptance, costs, what both predict, and whether each is exact.
    """
    pair = load(target, drafter, dtype, device, small_target, inflate)
    from ..bench import Decoding, report, run_bench

    room = getattr(pair.target.config, "max_position_embeddings", None) or 1 << 30
    most = min(prompt_tokens or room, room - tokens - TEMPLATE)
    if most < 1:
        raise click.UsageError(f"--tokens {tokens} leaves no room for a prompt of {room} in all.")
    sets = {
        " ".join([path.name.split(".")[0], *category]) if path else "demo": prompts_of(
            pair, path, limit, category, most
        )
        for path in prompts or (None,)
    }
    command = ["hetero-sd bench", f"--dtype {dtype}"]
    command += [f"--inflate {inflate:g}"] if inflate else []
    command += [f"--prompts {path.name}" for path in prompts]
    command += [f"--category {name}" for name in category]
    command += [
        f"--limit {limit} --methods {','.join(methods)}",
        f"--lookaheads {','.join(map(str, lookaheads))}",
        f"--temperatures {','.join(f'{t:g}' + f':{p:g}' * (p < 1) for t, p in temperatures)}",
        f"--batch {','.join(map(str, batches))} --tokens {tokens} --repeats {repeats}",
        f"--draws {draws}" + " --compiled" * compiled + " --no-peers" * (not peers),
    ]
    given = {
        "--prompt-tokens": prompt_tokens,
        "--peer-repeats": peer_repeats,
        "--warm-ups": warm_ups,
    }
    command += [f"{name} {value}" for name, value in given.items() if value is not None]
    results = run_bench(
        pair,
        sets,
        output,
        methods=methods,
        lookaheads=lookaheads,
        decodings=[Decoding(*how) for how in temperatures],
        batches=batches,
        tokens=tokens,
        repeats=repeats,
        draws=draws,
        peers=peers,
        peer_repeats=peer_repeats,
        warm_ups=warm_ups,
        compiled=compiled,
        seed=seed,
        command=" ".join(command),
        progress=progress,
    )
    click.echo(json.dumps(results.cases, indent=1) if as_json else report(results, brief=True))
    click.echo(f"written to {output}: all figures in bench.md and bench.json", err=True)
