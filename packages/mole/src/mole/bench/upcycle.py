r"""Give a trained model lookup experts, train on, and compare with the model trained on without.

    python -m mole.bench.upcycle --base SmolLM2-135M-Instruct.Q4_1.gguf \
        --train DATA/text/books_large.jsonl.xz --valid DATA/text/books_valid.jsonl.gz \
        --output upcycling --minutes 10

The base is a GGUF file or a folder of transformers with a Llama-type or this package's dense model.
All arms begin with its weights and see the same tokens in the same order with the same schedule:
`continued` is the base itself, `experts` has lookup experts and trains all weights, `experts-only`
trains routers and experts alone. With `--minutes` the steps are lowered so that all training fits
into that time. What is written, as soon as figures come: `upcycling.json` (settings, losses on
held-out windows with bootstrap intervals, paired differences), `upcycling_windows.csv` (the loss of
every window, so that runs can be paired), `upcycling_log.csv` and, with matplotlib,
`upcycling.png`.
"""

import csv
import io
import json
import statistics
import tempfile
import time
from copy import deepcopy
from dataclasses import asdict, replace
from math import ceil
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor
from transformers import AutoTokenizer

from fourfold_common import environment_report, pick_device, seed_everything

from ..evaluation import paired_difference, summarise, token_bytes, window_losses
from ..training import TrainSettings, load_tokens, train
from ..upcycling import find_base, load_base, upcycle
from .plots import held_out_losses, save
from .reproduce import table_losses

ARMS = ("continued", "experts", "experts-only")
_COLOURS = {"base": "#999999", "continued": "#E69F00", "experts": "#0072B2",
            "experts-only": "#009E73"}  # fmt: skip
_TRIAL_STEPS = 11
_FIELDS = ("step", "tokens", "loss", "lr", "tokens_per_second")


def load(path: Path, tokenizer: Path | None = None) -> tuple[Any, Any]:
    """Return a model in float32 and its tokenizer, from a folder or a GGUF file."""
    folder, gguf = find_base(path)
    more = {"gguf_file": gguf} if gguf and not tokenizer else {}
    words = AutoTokenizer.from_pretrained(tokenizer or folder, **more)
    return load_base(folder, gguf).eval(), words


def held_out(tokens: Tensor, context: int, windows: int | None) -> Tensor:
    """Return so many windows of the text, evenly spread over it, in one row; all if None."""
    rows = tokens[: len(tokens) // context * context].view(-1, context)
    if windows is not None and windows < len(rows):
        rows = rows[torch.arange(windows) * len(rows) // windows]
    return rows.flatten()


def build(arm: str, base: Any, experts: int, inner: int | None, layers: list[int]) -> Any:
    """Return the model of an arm with the base's weights, none of them shared with it."""
    model = deepcopy(base)
    if arm == "continued":
        return model
    grown: Any = upcycle(model, experts, inner, layers, freeze_backbone=arm == "experts-only")
    grown.config.dedup = "micro"
    return grown


def steps_in(
    model: Any, tokens: Tensor, settings: TrainSettings, seconds: float, compiled: bool = False
) -> int:
    """Return how many optimiser steps of a model fit, from a short trial that changes it."""
    trial = replace(settings, steps=_TRIAL_STEPS)
    with tempfile.TemporaryDirectory() as folder:
        train(model, tokens, folder, trial, log_every=1, compiled=compiled, progress=False)
        lines = (Path(folder) / "training_log.jsonl").read_text(encoding="utf-8").splitlines()
    # The median: a step may have been compiled first.
    speed = statistics.median(json.loads(line)["tokens_per_second"] for line in lines[2:])
    return max(1, int(seconds * speed / (settings.batch * settings.context)))


def draw(path: Path, log: str, report: dict[str, Any]) -> Path | None:
    """Draw the training losses and the losses on held-out text; None without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    rows = list(csv.DictReader(io.StringIO(log)))
    for arm in dict.fromkeys(row["arm"] for row in rows):
        mine = [row for row in rows if row["arm"] == arm]
        # A line of the log is one batch's loss: shown is the mean of a few.
        losses = torch.tensor([float(row["loss"]) for row in mine])
        width = ceil(len(losses) / 20)
        smooth = [part.mean().item() for part in losses.split(width)]
        ends = [int(part[-1]["tokens"]) / 1e6
                for part in (mine[i : i + width] for i in range(0, len(mine), width))]  # fmt: skip
        left.plot(ends, smooth, color=_COLOURS[arm], label=arm, linewidth=1.2)
    left.set_xlabel("million tokens")
    left.set_ylabel("training loss, nats per token")
    left.legend(frameon=False)
    held_out_losses(right, report["models"], _COLOURS, "held-out text")
    save(figure, path)
    return path


def _write(output: Path, report: dict[str, Any], losses: dict[str, Tensor], log: str) -> None:
    """Write what there is so far, each file whole or not at all."""
    windows = zip(*(found.double().mean(1).tolist() for found in losses.values()), strict=True)
    lines = [",".join(losses), *(",".join(f"{x:.6f}" for x in row) for row in windows)]
    for name, content in (
        ("upcycling.json", json.dumps(report, indent=1) + "\n"),
        ("upcycling_windows.csv", "\n".join(lines) + "\n"),
        ("upcycling_log.csv", log),
    ):
        partial = output / f"{name}.tmp"
        partial.write_text(content, encoding="utf-8")
        partial.replace(output / name)
    draw(output / "upcycling.png", log, report)


_FILE = click.Path(path_type=Path, exists=True)


@click.command(context_settings={"show_default": True})
@click.option("--base", "path", type=_FILE, required=True, help="Model folder or GGUF file.")
@click.option("--tokenizer", type=_FILE, help="Folder of the tokenizer, if it is not the base's.")
@click.option("--name", help="What the figures call the base; its file's name by default.")
@click.option("--train", "texts", type=_FILE, multiple=True, required=True, help="Training text.")
@click.option("--valid", type=_FILE, multiple=True, required=True, help="Held-out text.")
@click.option("--output", type=click.Path(path_type=Path), required=True, help="Folder to write.")
@click.option("--arms", default=",".join(ARMS), help="What to train, in this order.")
@click.option("--experts", default=2, help="Lookup experts in a layer.")
@click.option("--inner", type=int, help="Inner width of an expert; the base's by default.")
@click.option("--every", default=2, help="Experts in every so many layers.")
@click.option("--minutes", type=float, help="Lower the steps so that all training fits in this.")
@click.option("--steps", default=1000, help="Optimiser steps of every arm.")
@click.option("--batch", default=16, help="Sequences in a step.")
@click.option("--micro-batch", default=8, help="Sequences in one forward pass.")
@click.option("--context", default=512, help="Tokens in a sequence.")
@click.option("--lr", default=2e-4, help="Peak learning rate.")
@click.option("--expert-lr", type=float, help="That of routers and experts, if it is another.")
@click.option("--base-lr", type=float, help="The base's own, beside experts, if it is another.")
@click.option("--seed", default=0, help="Seed of new weights and data order.")
@click.option("--windows", type=int, help="Held-out windows, evenly spread; all by default.")
@click.option("--formats", default="", help="Also the loss of the tables in these formats.")
@click.option("--compile/--no-compile", "compiled", default=True, help="Compile layers on CUDA.")
def main(
    path: Path,
    tokenizer: Path | None,
    name: str | None,
    texts: tuple[Path, ...],
    valid: tuple[Path, ...],
    output: Path,
    arms: str,
    experts: int,
    inner: int | None,
    every: int,
    minutes: float | None,
    base_lr: float | None,
    windows: int | None,
    formats: str,
    compiled: bool,
    **chosen: Any,
) -> None:
    """Compare a model with lookup experts with the same model without, both trained on."""
    begin = time.perf_counter()
    order = arms.split(",")
    if len(set(order)) < len(order) or not set(order) <= set(ARMS):
        raise click.ClickException(f"`--arms` must be among {', '.join(ARMS)}; got {arms!r}.")
    settings = TrainSettings(warmup=0.05, **chosen)
    where, reason = pick_device()
    compiled = compiled and where.type == "cuda"
    seed_everything(settings.seed)
    output.mkdir(parents=True, exist_ok=True)
    click.echo(f"device {where} ({reason})")
    base, words = load(path, tokenizer)
    vocab = base.config.vocab_size
    tokens = load_tokens(list(texts), vocab, words)
    text = held_out(load_tokens(list(valid), vocab, words), settings.context, windows)
    sizes = token_bytes(words)
    layers = list(range(0, base.config.num_hidden_layers, every))
    click.echo(f"{len(tokens):,} training tokens, {time.perf_counter() - begin:.0f} s")
    if minutes is not None:
        heaviest = "experts" if "experts" in order else order[0]
        trial = build(heaviest, base, experts, inner, layers)
        most = steps_in(trial, tokens, settings, minutes * 60 / len(order), compiled)
        settings = replace(settings, steps=min(settings.steps, most))
        del trial
    click.echo(f"{settings.steps} steps of {settings.batch} x {settings.context} tokens")
    losses: dict[str, Tensor] = {}
    report: dict[str, Any] = {
        "base": name or path.name,
        "training_tokens": len(tokens),
        "seen_tokens": settings.steps * settings.batch * settings.context,
        "experts": {"number": experts, "inner": inner, "layers": layers},
        "settings": asdict(settings) | {"base_lr": base_lr},
        "environment": environment_report(),
        "models": {},
        "paired_differences": {},
        "tables": {},
    }

    def measure(arm: str, model: Any, **more: Any) -> None:
        losses[arm] = window_losses(model.eval(), text, settings.context, batch=4)
        figures = asdict(summarise(losses[arm], text, sizes))
        report["models"][arm] = {"parameters": model.num_parameters(), **more,
                                 "validation": figures}  # fmt: skip
        for other in losses:
            if other != arm:
                gap = paired_difference(losses[arm], losses[other])
                report["paired_differences"][f"{arm} - {other}"] = gap
        click.echo(
            f"{arm}: {figures['nats']:.4f} nats/token [{figures['low']:.4f}, "
            f"{figures['high']:.4f}] on held-out text"
        )

    measure("base", base.to(where))
    base.cpu()
    log = io.StringIO()
    writer = csv.writer(log, lineterminator="\n")
    writer.writerow(["arm", *_FIELDS])
    for arm in order:
        torch.manual_seed(settings.seed)
        model = build(arm, base, experts, inner, layers)
        if arm != "continued" and "untrained_difference" not in report:
            untrained = window_losses(model.to(where), text[: 4 * settings.context],
                                      settings.context, batch=4)  # fmt: skip
            report["untrained_difference"] = (untrained - losses["base"][:4]).abs().max().item()
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        clock, own = time.perf_counter(), settings
        if arm == "experts" and base_lr is not None:
            own = replace(settings, lr=base_lr, expert_lr=settings.expert_lr or settings.lr)
        # Saved by `train`: a folder that `mole convert` and `mole generate` take.
        model = train(model, tokens, output / arm, own, tokenizer=words, resume=False,
                      save_every=settings.steps, log_every=1, compiled=compiled)  # fmt: skip
        seconds = round(time.perf_counter() - clock, 1)
        for line in (output / arm / "training_log.jsonl").read_text(encoding="utf-8").splitlines():
            writer.writerow([arm, *(json.loads(line)[field] for field in _FIELDS)])
        measure(arm, model, trained=trained, seconds=seconds)
        _write(output, report, losses, log.getvalue())
        if formats and arm != "continued":
            sample = text[: 128 * settings.context]
            report["tables"][arm] = table_losses(
                model, sample, settings.context, output / f"{arm}-tables", formats.split(",")
            )
            _write(output, report, losses, log.getvalue())
    for pair, gap in report["paired_differences"].items():
        click.echo(f"{pair}: {gap['nats']:+.4f} [{gap['low']:+.4f}, {gap['high']:+.4f}]")
    click.echo(f"done in {time.perf_counter() - begin:.0f} s")


if __name__ == "__main__":
    main()
