"""The `mole` command."""

import logging
import sys
from pathlib import Path
from typing import Any

import click

from .__about__ import __version__
from .cli_options import DEVICE, FILE, FOLDER, FORMATS, OUTPUT, where_options
from .folders import (
    chat_prompt,
    check_new,
    copy_tokenizer,
    find_device,
    load_any,
    load_lookup,
    load_tokenizer,
    place,
    quiet,
)

_logger = logging.getLogger(__name__)

_ORIGIN = (
    "independent implementation of Mixture of Lookup Experts (arXiv 2503.15798); "
    "not the PyPI project 'mole'"
)


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
        except (ValueError, OSError) as error:
            _logger.debug("details", exc_info=True)
            message = " ".join(str(error).split())
            click.echo(f"Error: {message}", err=True)
            code = 2
        except RuntimeError as error:
            if type(error).__name__ != "OutOfMemoryError":  # torch's
                raise
            _logger.debug("details", exc_info=True)
            click.echo(
                "Error: out of GPU memory: take smaller batches or `--device cpu`.", err=True
            )
            code = 2
        sys.exit(code if isinstance(code, int) else 0)


@click.group(cls=_OneLineErrors, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="mole")
@click.option("-v", "--verbose", is_flag=True, help="Log details, with tracebacks of errors.")
def main(verbose: bool) -> None:
    """Mixture of Lookup Experts language models: train, convert, evaluate, generate, measure."""
    logging.basicConfig(
        level=logging.DEBUG if verbose else logging.WARNING,
        format="%(levelname)s %(name)s: %(message)s",
    )


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of lines.")
def env(as_json: bool) -> None:
    """Print versions, devices and where this package was loaded from."""
    import json

    from fourfold_common import environment_report

    report: dict[str, Any] = {
        "package": "mole",
        "version": __version__,
        "origin": _ORIGIN,
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
    type=OUTPUT,
    default=Path("demo-output/mole"),
    show_default=True,
    help="Folder for tables, picture and results.json.",
)
@click.option(
    "--format",
    "fmt",
    type=click.Choice(FORMATS),
    default="fp16",
    show_default=True,
    help="Format of the table that generates and is timed.",
)
@click.option("--prompt", help="Text to continue.")
@click.option(
    "--new-tokens",
    type=click.IntRange(min=1),
    default=60,
    show_default=True,
    help="Tokens to generate.",
)
@click.option("--seed", default=0, show_default=True, help="Seed of the sampled continuation.")
@click.option("--progress/--no-progress", default=True, help="Show progress bars.")
def demo(
    output: Path, fmt: str, prompt: str | None, new_tokens: int, seed: int, progress: bool
) -> None:
    """Serve the shipped model from a table, beside its twins.

    It is converted, generates text, and is compared with its expert form and the dense model.
    """
    quiet()
    import torch

    from .demo.run import PROMPT, run

    # Models this small are slowed by a second thread, badly so on a busy machine.
    torch.set_num_threads(1)
    report = run(
        output, fmt, seed, PROMPT if prompt is None else prompt, new_tokens, progress=progress
    )
    for line in report.lines:
        click.echo(line)
    click.echo()
    click.echo(report.forms.to_markdown())
    click.echo()
    click.echo(report.formats.to_markdown())
    click.echo()
    for file in report.files:
        click.echo(f"Wrote {file}")


@main.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("output", type=OUTPUT)
@click.option(
    "--format",
    "fmt",
    type=click.Choice(FORMATS),
    default="fp16",
    show_default=True,
    help="Format of the table.",
)
@click.option("--chunk", type=click.IntRange(min=1), help="Ids to compute at a time.")
@DEVICE
@click.option("--resume/--no-resume", default=True, help="Go on with an interrupted conversion.")
@click.option("--progress/--no-progress", default=True, help="Show a progress bar.")
def convert(
    model: Path,
    output: Path,
    fmt: str,
    chunk: int | None,
    device: str,
    resume: bool,
    progress: bool,
) -> None:
    """Write a model in table form.

    MODEL is a folder with a model in expert form, OUTPUT the folder to write.

    An interrupted conversion goes on where it stopped when the command is given again.
    """
    quiet()
    from .conversion import convert as convert_model
    from .lut import LutMeta

    loaded = load_lookup(model, "auto").to(find_device(device))
    convert_model(loaded, output, fmt, chunk, resume, progress)
    copy_tokenizer(model, None, output)
    meta = LutMeta.load(output / "lut")
    click.echo(
        f"Wrote {output}: {meta.vocab:,} ids, {meta.row_bytes:,} bytes read per token, "
        f"table of {meta.file_bytes / 2**20:.1f} MiB."
    )


@main.command()
@click.argument("table", type=click.Path(path_type=Path))
@click.option(
    "--model",
    type=click.Path(path_type=Path),
    help="Model in expert form that the table should have been made from.",
)
@click.option("--progress/--no-progress", default=True, help="Show a progress bar.")
def verify(table: Path, model: Path | None, progress: bool) -> None:
    """Check every byte of a table.

    TABLE is the folder of a model in table form, or of its `lut`.
    """
    quiet()
    from .conversion import verify as verify_table

    folder = table / "lut" if (table / "lut").is_dir() else table
    loaded = None if model is None else load_lookup(model, "auto")
    meta = verify_table(folder, loaded, progress=progress)
    click.echo(
        f"{folder} is intact: {len(meta.crcs)} checksums, format {meta.format}, "
        f"fingerprint {meta.fingerprint[:16]}..."
    )


@main.command()
@click.argument("prompt")
@click.option(
    "--model",
    type=click.Path(path_type=Path),
    help="Folder of a model and its tokenizer; the shipped one if left out.",
)
@click.option(
    "--new-tokens",
    type=click.IntRange(min=1),
    default=100,
    show_default=True,
    help="Tokens to generate at most.",
)
@click.option(
    "--temperature",
    type=click.FloatRange(min=0.0),
    default=0.8,
    show_default=True,
    help="0 takes the likeliest token every time.",
)
@click.option(
    "--top-k",
    type=click.IntRange(min=0),
    default=50,
    show_default=True,
    help="Draw from that many likeliest tokens; 0 for all.",
)
@click.option(
    "--top-p",
    type=click.FloatRange(0, 1, min_open=True),
    default=1.0,
    show_default=True,
    help="Draw from the likeliest tokens that have this share together.",
)
@click.option("--chat", is_flag=True, help="Put PROMPT into the tokenizer's chat template.")
@click.option("--seed", default=0, show_default=True, help="Seed of the sampling.")
@where_options
def generate(
    prompt: str,
    model: Path | None,
    new_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    chat: bool,
    seed: int,
    dtype: str,
    **where: Any,
) -> None:
    """Continue PROMPT with a model in either form; on a terminal the text comes as it is made."""
    if not prompt:
        raise ValueError("`PROMPT` must hold at least one character; got an empty text.")
    quiet()
    import torch
    from transformers import TextStreamer

    from fourfold_common import seed_everything

    from .demo import ASSETS

    loaded = place(load_lookup(ASSETS / "mole" if model is None else model, dtype), **where)
    tokenizer = load_tokenizer(ASSETS / "tokenizer" if model is None else model)
    if chat:
        prompt = chat_prompt(tokenizer, prompt)
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=not chat).input_ids
    ids = ids.to(loaded.device)
    limit = loaded.config.max_position_embeddings
    if ids.shape[1] + new_tokens > limit:
        raise ValueError(
            f"`PROMPT` and `--new-tokens` must fit into {limit} tokens together; "
            f"got {ids.shape[1]} + {new_tokens}."
        )
    seed_everything(seed)
    end = loaded.config.eos_token_id
    sampling = {"do_sample": True, "temperature": temperature, "top_k": top_k, "top_p": top_p}
    live = sys.stdout.isatty()
    streamer = TextStreamer(tokenizer, skip_prompt=chat, skip_special_tokens=True) if live else None
    with torch.inference_mode():
        found = loaded.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            pad_token_id=end[0] if isinstance(end, list) else end,
            streamer=streamer,
            **(sampling if temperature else {"do_sample": False}),
        )
    if streamer is None:
        made = found[0, ids.shape[1] if chat else 0 :]
        click.echo(tokenizer.decode(made, skip_special_tokens=True))


@main.command()
@click.argument("data", nargs=-1, required=True, type=FILE)
@click.option("--output", type=OUTPUT, required=True, help="Folder to write.")
@click.option("--model", type=FOLDER, help="Folder of a model to train further.")
@click.option("--config", type=click.Path(exists=True), help="config.json of a new model.")
@click.option("--tokenizer", type=FOLDER, help="Folder; else the model's.")
@click.option("--steps", default=1000, show_default=True, help="Optimiser steps.")
@click.option("--batch", default=64, show_default=True, help="Sequences in a step, in all.")
@click.option("--micro-batch", default=8, show_default=True, help="Sequences in a forward pass.")
@click.option("--context", default=512, show_default=True, help="Tokens in a sequence.")
@click.option("--lr", default=6e-4, show_default=True, help="Peak learning rate.")
@click.option("--expert-lr", type=float, help="That of routers and experts, if it is another.")
@click.option("--warmup", default=0.01, show_default=True, help="Share of the steps that warm up.")
@click.option("--weight-decay", default=0.1, show_default=True, help="Decay of matrices.")
@click.option("--clip", default=1.0, show_default=True, help="Largest norm of the gradient.")
@click.option("--seed", default=0, show_default=True, help="Seed of weights and data order.")
@click.option(
    "--dedup",
    type=click.Choice(["off", "micro", "step"]),
    help="Run lookup experts on every token, or once per id of a batch or step.",
)
@click.option("--experts-only", is_flag=True, help="Leave all but routers and experts as it is.")
@click.option("--save-every", default=500, show_default=True, help="Steps between checkpoints.")
@click.option("--stop-after", type=int, help="Stop with a checkpoint after this step.")
@click.option("--resume/--no-resume", default=True, help="Go on from OUTPUT's checkpoint.")
@click.option("--compile/--no-compile", "compiled", default=False, help="Compile the layers.")
@click.option("--shard", "sharded", is_flag=True, help="Split the weights over processes (FSDP2).")
@click.option("--progress/--no-progress", default=True, help="Show a progress bar.")
def train(
    data: tuple[Path, ...],
    output: Path,
    model: Path | None,
    config: str | None,
    tokenizer: Path | None,
    dedup: str | None,
    experts_only: bool,
    save_every: int,
    stop_after: int | None,
    resume: bool,
    compiled: bool,
    sharded: bool,
    progress: bool,
    **chosen: Any,
) -> None:
    """Train a model on text, or on ids in .npy files.

    DATA are files: text, .jsonl with a field `text` in every line (both also .gz, .xz), or .npy.

    Runs in one process, or in many under `accelerate launch -m mole train ...`.
    """
    if (model is None) == (config is None):
        raise ValueError("Exactly one of `--model` and `--config` must be given.")
    quiet()
    import torch
    from accelerate import PartialState
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from .config import plain_errors
    from .modeling import register
    from .training import TrainSettings, load_tokens
    from .training import train as run

    register()
    torch.manual_seed(chosen["seed"])
    with plain_errors():
        if model is not None:
            trained = load_any(model)
        else:
            trained = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(config))
    if dedup is not None:
        if not hasattr(trained.config, "dedup"):
            raise ValueError(
                "`--dedup` needs a model with lookup experts; got one of type "
                f"{trained.config.model_type!r}."
            )
        trained.config.dedup = dedup
    if experts_only:
        if getattr(trained.config, "lookup_form", None) != "experts":
            raise ValueError(
                "`--experts-only` needs a model with lookup experts; upcycle it first."
            )
        for name, parameter in trained.named_parameters():
            parameter.requires_grad_(".lookup." in name)
    words = None
    if tokenizer is not None or (model is not None and any(model.glob("tokenizer*"))):
        words = AutoTokenizer.from_pretrained(tokenizer or model)
    shown = progress and PartialState().is_main_process
    tokens = load_tokens(list(data), trained.config.vocab_size, words, progress=shown)
    run(
        trained,
        tokens,
        output,
        TrainSettings(**chosen),
        tokenizer=words,
        resume=resume,
        save_every=save_every,
        stop_after=stop_after,
        compiled=compiled,
        sharded=sharded,
        progress=progress,
    )
    if not PartialState().is_main_process:
        return
    if stop_after is not None and stop_after < chosen["steps"]:
        click.echo(f"Stopped after step {stop_after}: {output} holds a checkpoint to go on from.")
    else:
        click.echo(f"Wrote {output} ({len(tokens):,} tokens of text).")


@main.command("eval")
@click.argument("model", type=FOLDER)
@click.argument("data", nargs=-1, required=True, type=FILE)
@click.option(
    "--task",
    type=click.Choice(["perplexity", "cloze"]),
    default="perplexity",
    show_default=True,
    help="Loss on consecutive windows, or the last word of every text.",
)
@click.option(
    "--context",
    type=click.IntRange(min=2),
    help="Tokens in a window; as many as the model is meant for if left out.",
)
@click.option("--progress/--no-progress", default=True, help="Show a progress bar.")
@where_options
def evaluate(
    model: Path,
    data: tuple[Path, ...],
    task: str,
    context: int | None,
    progress: bool,
    dtype: str,
    **where: Any,
) -> None:
    """Measure the loss of a model on text.

    MODEL is the folder of a model in any form, DATA are files: text, .jsonl (both also .gz, .xz),
    or ids in .npy.
    """
    quiet()
    import json
    from dataclasses import asdict

    from .evaluation import last_word_cloze, summarise, token_bytes, window_losses
    from .modeling import register
    from .training.data import load_tokens, texts

    register()
    loaded = place(load_any(model, dtype), **where)
    words = load_tokenizer(model)
    if task == "cloze":
        passages = [text for path in data for text in texts(path)]
        figures = asdict(last_word_cloze(loaded, words, passages, progress=progress))
    else:
        longest = loaded.config.max_position_embeddings
        if context is not None and context > longest:
            raise ValueError(f"`--context` must be at most {longest}, the model's; got {context}.")
        tokens = load_tokens(list(data), loaded.config.vocab_size, words, progress=progress)
        losses = window_losses(
            loaded, tokens, min(context or longest, len(tokens)), progress=progress
        )
        summary = summarise(losses, tokens, token_bytes(words))
        figures = asdict(summary) | {"perplexity": losses.double().mean().exp().item()}
    click.echo(json.dumps(figures, indent=1))


@main.command()
@click.argument("base", type=click.Path(path_type=Path, exists=True))
@click.argument("output", type=OUTPUT)
@click.option("--gguf", help="Name of a GGUF file in the folder BASE (needs the package gguf).")
@click.option("--experts", default=4, show_default=True, help="Lookup experts in a layer.")
@click.option("--inner", type=click.IntRange(min=1), help="Inner width of an expert.")
@click.option("--layers", help="Layers that get experts, such as 0,2,4; all if left out.")
@click.option("--seed", default=0, show_default=True, help="Seed of the experts' weights.")
def upcycle(
    base: Path,
    output: Path,
    gguf: str | None,
    experts: int,
    inner: int | None,
    layers: str | None,
    seed: int,
) -> None:
    """Add lookup experts to a dense model.

    BASE is the folder of a dense or Llama-type model, or a GGUF file; OUTPUT is the folder to
    write. The logits stay as they are until the experts are trained.
    """
    check_new(output)
    quiet()
    import torch

    from .upcycling import find_base, load_base
    from .upcycling import upcycle as run

    torch.manual_seed(seed)
    try:
        chosen = None if layers is None else [int(part) for part in layers.split(",")]
    except ValueError:
        raise ValueError(
            f"`--layers` must be numbers with commas between; got {layers!r}."
        ) from None
    try:
        model = run(load_base(base, gguf), experts, inner, chosen)
    except TypeError as error:
        raise ValueError(str(error)) from None
    model.save_pretrained(output)
    copy_tokenizer(*find_base(base, gguf), output)
    click.echo(f"Wrote {output}: {model.num_parameters():,} parameters; train it further.")


@main.command()
@click.argument(
    "topic",
    type=click.Choice(["hw", "decode", "prefill", "convert", "train", "quant", "cache"]),
)
@click.option(
    "--output",
    type=OUTPUT,
    default=Path("demo-output/mole-bench"),
    show_default=True,
    help="Folder for TOPIC.json and TOPIC.png.",
)
@click.option(
    "--shape",
    type=click.Choice(["tiny", "160m", "410m", "1b"]),
    help="Size of random models; `convert` takes the shipped model if it is left out.",
)
@click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda.")
def bench(topic: str, output: Path, shape: str | None, device: str) -> None:
    """Measure a topic, all contenders in one run.

    Results are checked before anything is timed.

    `decode`, `prefill`, `train` and `hw` take random weights of a shape (410m, for `hw` 160m, if it
    is left out; `tiny` is for trying them out), `quant` and `cache` the shipped model.
    """
    quiet()
    from fourfold_common import Results

    from .bench import draw, run

    if shape and topic in ("quant", "cache"):
        raise ValueError(f"`--shape` does not go with {topic!r}, which takes the shipped model.")
    options = {"shape": shape} if shape else {}
    path = run(topic, output, click.echo, device, **options)
    click.echo(Results.load(path).to_markdown())
    click.echo(f"Wrote {path}")
    picture = draw(path)
    click.echo("No plot: matplotlib is missing." if picture is None else f"Wrote {picture}")


__all__ = ["main"]
