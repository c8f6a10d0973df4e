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
_TEMPLATE = 64  # Tokens that a chat template may take.


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


def _models(command: Any) -> Any:
    """Add the options that name a pair of models."""
    place = click.Path(exists=True, path_type=Path)
    missing = " The demo's if missing."
    for decorate in (
        click.option("--target", type=place, help=f"Folder or GGUF file of the target.{missing}"),
        click.option("--drafter", type=place, help=f"The same of the drafter.{missing}"),
        click.option("--dtype", default="auto", show_default=True, help="Type of the weights."),
        click.option("--device", default="auto", show_default=True, help="Such as cpu or cuda:1."),
        click.option("--small-target", is_flag=True, help="Of the demo's, the small target."),
    ):
        command = decorate(command)
    return command


def _load(
    target: Path | None,
    drafter: Path | None,
    dtype: str,
    device: str,
    small_target: bool,
    size: float | None = None,
) -> Any:
    _yield_while_waiting()
    from .pairs import load_pair

    pair = load_pair(target, drafter, dtype=dtype, device=device, small=small_target, size=size)
    for note in pair.notes:
        click.echo(note, err=True)
    return pair


def _prompts(
    pair: Any,
    path: Path | None,
    limit: int,
    categories: tuple[str, ...] = (),
    most: int | None = None,
) -> list[Any]:
    from .demo.run import ASSETS
    from .pairs import prompt_ids, read_prompts

    if path is None:
        texts = json.loads((ASSETS / "prompts.json").read_text(encoding="utf-8"))[:limit]
    else:
        texts = read_prompts(path, limit, categories)
    chat = bool(pair.target_tokenizer.chat_template)
    return [prompt_ids(pair.target_tokenizer, text, chat, most) for text in texts]


_prompts_option = click.option(
    "--prompts",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="File of JSON lines with `prompt`, `turns`, `question` or `text`, or of text lines.",
)
_json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def _numbers(kind: type, least: int) -> Any:
    """Return a converter of lists such as 1,2,4."""

    def convert(ctx: Any, param: Any, value: str) -> list[Any]:
        try:
            found = [kind(part) for part in value.split(",")]
        except ValueError:
            found = []
        if not found or min(found) < least:
            raise click.BadParameter(f"{value!r} is no list of numbers of {least} or more.")
        return found

    return convert


def _decodings(ctx: Any, param: Any, value: str) -> list[tuple[float, float]]:
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


def _names(ctx: Any, param: Any, value: str) -> list[str]:
    names = value.split(",")
    wrong = [name for name in names if name not in METHODS]
    if wrong:
        raise click.BadParameter(f"{wrong[0]!r} is not one of {', '.join(METHODS)}.")
    return names


@main.command()
@_models
@click.option("--prompt", required=True, help="Text to continue, or question with --chat.")
@click.option("--chat", is_flag=True, help="Ask the prompt in the target's chat template.")
@click.option("--method", type=click.Choice(METHODS), default="auto", show_default=True)
@click.option("--lookahead", type=_Lookahead(), default="auto", show_default=True)
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=64, show_default=True)
@click.option("--temperature", type=click.FloatRange(min=0), default=0.0, help="0 is greedy.")
@click.option("--top-k", type=click.IntRange(min=0), default=0, help="0 is all.")
@click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), default=1.0, help="1 is all.")
@click.option("--repetition-penalty", type=click.FloatRange(0, min_open=True), default=1.0)
@click.option("--stop", multiple=True, help="Text that ends the output; may be repeated.")
@click.option("--sequences", type=click.IntRange(min=1), default=1, show_default=True)
@click.option("--stream", is_flag=True, help="Print the text while it is written.")
@click.option("--seed", type=int, default=0, show_default=True)
@_json_option
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
    if stream and (as_json or sequences > 1):
        raise click.UsageError("--stream writes one text; leave out --json and --sequences.")
    if sequences > 1 and temperature == 0:
        raise click.UsageError("--sequences needs --temperature above 0.")
    pair = _load(target, drafter, dtype, device, small_target)
    from fourfold_common import seed_everything

    from .decoder import HeteroSpeculativeDecoder
    from .pairs import prompt_ids

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


@main.command()
@_models
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
    help="As for `verify`; may be repeated. The demo's if missing.",
)
@click.option("--category", multiple=True, help="Of prompts with a category, only these.")
@click.option(
    "--limit", type=click.IntRange(min=1), default=3, show_default=True, help="Prompts a file."
)
@click.option(
    "--prompt-tokens", type=click.IntRange(min=1), help="Tokens of a prompt to keep, the first."
)
@click.option("--methods", callback=_names, default="tli,slem,slrs,auto", show_default=True)
@click.option("--lookaheads", callback=_numbers(int, 1), default="2,4", show_default=True)
@click.option(
    "--temperatures",
    callback=_decodings,
    default="0,1",
    show_default=True,
    help="0 is greedy; 0.7:0.9 is a temperature with its top-p.",
)
@click.option(
    "--batch",
    "batches",
    callback=_numbers(int, 1),
    default="1",
    show_default=True,
    help="Rows decoded together, such as 1,4,8.",
)
@click.option("--tokens", type=click.IntRange(min=2), default=48, show_default=True)
@click.option("--repeats", type=click.IntRange(min=1), default=3, show_default=True)
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
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--progress/--no-progress", default=True, help="Show a progress bar.")
@_json_option
def bench(
    target: Path | None,
    drafter: Path | None,
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
    """Time every way to decode, side by side, with what explains its speed."""
    pair = _load(target, drafter, dtype, device, small_target, inflate)
    from .bench import Decoding, report, run_bench

    room = getattr(pair.target.config, "max_position_embeddings", None) or 1 << 30
    most = min(prompt_tokens or room, room - tokens - _TEMPLATE)
    if most < 1:
        raise click.UsageError(f"--tokens {tokens} leaves no room for a prompt of {room} in all.")
    sets = {
        " ".join([path.name.split(".")[0], *category]) if path else "demo": _prompts(
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
    click.echo(json.dumps(results.cases, indent=1) if as_json else report(results))
    click.echo(f"written to {output}", err=True)


@main.command()
@_models
@_prompts_option
@click.option("--limit", type=click.IntRange(min=1), default=3, show_default=True, help="Prompts.")
@click.option("--methods", callback=_names, default="tli,slem,slrs", show_default=True)
@click.option("--lookaheads", callback=_numbers(int, 1), default="1,4", show_default=True)
@click.option("--tokens", type=click.IntRange(min=1), default=32, show_default=True)
@click.option("--draws", type=click.IntRange(min=0), default=400, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@_json_option
def verify(
    target: Path | None,
    drafter: Path | None,
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
    """Check that what is written is the target's own, on your pair of models."""
    pair = _load(target, drafter, dtype, device, small_target)
    from dataclasses import asdict

    from .verify import verify_pair

    checks = verify_pair(
        pair,
        _prompts(pair, prompts, limit),
        methods=methods,
        lookaheads=lookaheads,
        tokens=tokens,
        draws=draws,
        seed=seed,
    )
    if as_json:
        click.echo(json.dumps([asdict(check) for check in checks], indent=1))
    else:
        for check in checks:
            verdict = "ok" if check.passed else "FAILED"
            what = "wrong probabilities are noticed" if check.kind == "control" else check.kind
            click.echo(f"{verdict:6} {check.method} {check.lookahead}, {what}: {check.detail}")
    failed = sum(not check.passed for check in checks)
    if failed:
        raise click.ClickException(f"{failed} of {len(checks)} checks failed")


@main.command("inspect-vocab")
@_models
@click.option(
    "--corpus",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Text like that to be generated; a short sample of ours if missing.",
)
@_json_option
def inspect_vocab_command(
    target: Path | None,
    drafter: Path | None,
    dtype: str,
    device: str,
    small_target: bool,
    corpus: Path | None,
    as_json: bool,
) -> None:
    """Report what two tokenizers share."""
    from dataclasses import asdict

    from .pairs import load_tokenizer
    from .vocab import inspect_vocab

    texts = None if corpus is None else corpus.read_text(encoding="utf-8").splitlines()
    if target is not None and drafter is not None:
        both = load_tokenizer(target), load_tokenizer(drafter)
    else:
        pair = _load(target, drafter, dtype, device, small_target)
        both = pair.target_tokenizer, pair.drafter_tokenizer
    report = inspect_vocab(*both, texts)
    click.echo(json.dumps(asdict(report), indent=1) if as_json else report.to_markdown())


@main.command()
@_models
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True)
@click.option("--name", help="What clients call the model; the target's own name if missing.")
@click.option("--method", type=click.Choice(METHODS), default="auto", show_default=True)
@click.option("--lookahead", type=_Lookahead(), default="auto", show_default=True)
@click.option("--rows", type=click.IntRange(min=1), default=8, show_default=True, help="In work.")
@click.option(
    "--window",
    type=click.FloatRange(min=0),
    default=5.0,
    show_default=True,
    help="Milliseconds that an idle server waits for a second request, to write both together.",
)
@click.option("--queue", type=click.IntRange(min=1), default=256, show_default=True)
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
    _yield_while_waiting()
    try:
        import uvicorn

        from .serving import Engine, create_app
    except ImportError as error:
        raise click.ClickException(
            f"`serve` needs the extra of that name: pip install 'hetero-sd[serve]' ({error})"
        ) from None
    pair = _load(target, drafter, dtype, device, small_target)
    from .decoder import HeteroSpeculativeDecoder

    decoder = HeteroSpeculativeDecoder(*pair.parts, method=method, lookahead=lookahead)
    engine = Engine(decoder, rows=rows, window=window / 1000, queue=queue)
    app = create_app(engine, name=name or pair.name, api_key=api_key)
    uvicorn.run(app, host=host, port=port)
