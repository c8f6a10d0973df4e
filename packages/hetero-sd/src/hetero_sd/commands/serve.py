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
@click.option("--api-key", envvar="HETERO_SD_API_KEY", help="Key that clients must send.")
def serve(
    target: Path | None,
    drafter: Path | None,
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
    engine = Engine(decoder, rows=rows, window=window / 1000, queue=queue)
    app = create_app(engine, name=name or pair.name, api_key=api_key)
    uvicorn.run(app, host=host, port=port)
