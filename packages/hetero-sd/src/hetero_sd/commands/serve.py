"""`hetero-sd serve`."""

from __future__ import annotations

from pathlib import Path

import click

from .options import load, lookahead_option, method_option, models, yield_while_waiting


@click.command()
@models
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 is any."
)
@click.option("--name", help="What clients call the model; the target's own name if missing.")
@method_option
@lookahead_option
@click.option(
    "--rows",
    type=click.IntRange(min=1),
    default=8,
    show_default=True,
    help="Texts in work at a time.",
)
@click.option(
    "--window",
    type=click.FloatRange(min=0),
    default=5.0,
    show_default=True,
    help="Milliseconds that an idle server waits for a second request, to write both together.",
)
@click.option(
    "--queue",
    type=click.IntRange(min=1),
    default=256,
    show_default=True,
    help="Texts that may wait; more are refused.",
)
@click.option(
    "--api-key",
    envvar="HETERO_SD_API_KEY",
    show_envvar=True,
    help="Key that clients must send.",
)
@click.option(
    "--allow-origin",
    multiple=True,
    help="Web page that may call the server, such as http://localhost:3000; * is any.",
)
@click.option(
    "--warm-up/--no-warm-up",
    default=True,
    show_default=True,
    help="Get ready first what the first clients would wait for.",
)
def serve(
    target: Path | str | None,
    drafter: Path | str | None,
    dtype: str,
    device: str,
    small_target: bool,
    host: str,
    port: int,
    name: str | None,
    method: str,
    lookahead: int | str,
    rows: int,
    window: float,
    queue: int,
    api_key: str | None,
    allow_origin: tuple[str, ...],
    warm_up: bool,
) -> None:
    """Serve OpenAI's completions and chat API over HTTP."""
    if api_key == "":
        raise click.UsageError("--api-key must not be empty; leave it out to serve all clients.")
    yield_while_waiting()
    try:
        import uvicorn

        from ..serving import Engine, create_app
    except ImportError as error:
        raise click.ClickException(
            f"`serve` needs the extra of that name: pip install 'hetero-sd[serve]' ({error})"
        ) from None
    pair = load(target, drafter, dtype, device, small_target)
    from ..decoder import HeteroSpeculativeDecoder

    decoder = HeteroSpeculativeDecoder(*pair.parts, method=method, lookahead=lookahead)
    if warm_up:
        click.echo("warming up", err=True)
        for sampled in (False, True):
            decoder.prepare(do_sample=sampled, **({"top_k": 0} if sampled else {}))
    engine = Engine(decoder, rows=rows, window=window / 1000, queue=queue)
    name = name or pair.name
    app = create_app(engine, name=name, api_key=api_key, origins=allow_origin)
    click.echo(f"the model is {name!r}; clients' base URL is http://{host}:{port}/v1", err=True)
    uvicorn.run(app, host=host, port=port)
