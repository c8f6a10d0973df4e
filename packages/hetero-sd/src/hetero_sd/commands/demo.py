"""`hetero-sd demo`."""

from __future__ import annotations

from pathlib import Path

import click

from .options import yield_while_waiting


@click.command()
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
    """Answer questions with TLI, SLEM and the target alone."""
    yield_while_waiting()
    from ..demo.run import run

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
