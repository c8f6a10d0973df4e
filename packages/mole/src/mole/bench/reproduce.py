"""Repeat the paper's comparison on one GPU: dense, mixture of experts, lookup experts.

    python -m mole.bench.reproduce --data ../shared/data --output reproduction --minutes 3

All models see the same tokens in the same order. A control has lookup experts that a router cannot
choose between: its gates are uniform. With `--minutes`, the number of steps is lowered so that all
training fits into that time. What is written, again after every model: `reproduction.json`
(settings and figures), `reproduction_log.csv` and, with matplotlib, `reproduction.png`.
"""

import csv
import io
import json
import re
import time
from collections.abc import Sequence
from dataclasses import asdict
from itertools import cycle
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from fourfold_common import environment_report, pick_device, seed_everything

from ..config import DenseConfig, MoeConfig, MoleConfig
from ..conversion import convert
from ..demo.train import (
    Settings,
    Text,
    Trainer,
    backbone,
    crop_starts,
    fit_steps,
    prepare_text,
    train_model,
)
from ..evaluation import paired_difference, summarise, window_losses
from ..lut import FORMATS
from ..modeling import DenseForCausalLM, MoeForCausalLM, MoleForCausalLM
from .plots import held_out_losses, save

_NAME = re.compile(r"dense|moe-[1-9]\d*e|mole-[1-9]\d*e(-uniform)?")
_COLOURS = ("#999999", "#E69F00", "#56B4E9", "#0072B2", "#CC79A7", "#009E73", "#D55E00", "#000000")
TWINS = ("dense", "moe-10e", "mole-4e", "mole-16e", "mole-4e-uniform")


def build(name: str, settings: Settings, vocab: int) -> Any:
    """Return the model of a name as in `TWINS`, with its first weights."""
    torch.manual_seed(settings.seed)
    common = backbone(settings, vocab)
    if name == "dense":
        return DenseForCausalLM(DenseConfig(**common))
    kind, count, *control = name.split("-")
    experts = int(count[:-1])
    if kind == "moe":
        return MoeForCausalLM(MoeConfig(**common, num_experts=experts))
    model: Any = MoleForCausalLM(
        MoleConfig(**common, num_lookup_experts=experts, dedup=settings.dedup)
    )
    if control:
        for layer in model.model.layers:
            layer.lookup.router.weight.requires_grad_(False).zero_()
    return model


def table_losses(
    model: Any, text: Tensor, context: int, folder: Path, formats: Sequence[str] = tuple(FORMATS)
) -> dict[str, Any]:
    """Return loss and largest difference of a logit of the model's table, by format."""
    window = text[None, :context].long().to(model.device)
    with torch.no_grad():
        exact = model(window).logits
    base = window_losses(model, text, context)
    found: dict[str, Any] = {"experts": {"nats": base.double().mean().item()}}
    for fmt in formats:
        target = convert(model, folder / fmt, fmt, progress=False)
        table: Any = MoleForCausalLM.from_pretrained(target).to(model.device).eval()
        table.open_lut(target / "lut", "device")
        with torch.no_grad():
            gap = (table(window).logits - exact).abs().max().item()
        losses = window_losses(table, text, context)
        found[fmt] = {
            "nats": losses.double().mean().item(),
            "over_experts": paired_difference(losses, base),
            "largest_logit_difference": gap,
            "bytes_per_token": table.lut.meta.row_bytes,
            "table_bytes": table.lut.meta.file_bytes,
        }
        table.lut.close()
        (target / "lut" / "lut.safetensors").unlink()
    return found


def draw(path: Path, log: str, models: dict[str, Any]) -> Path | None:
    """Draw the training losses and the losses on held-out books; None without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    colours = dict(zip(models, cycle(_COLOURS), strict=False))
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    rows = list(csv.DictReader(io.StringIO(log)))
    for name in models:
        mine = [row for row in rows if row["model"] == name]
        left.plot(
            [int(row["tokens"]) / 1e6 for row in mine],
            [float(row["loss"]) for row in mine],
            color=colours[name], label=name, linewidth=1,
        )  # fmt: skip
    last = [float(row["loss"]) for row in rows[len(rows) // 4 :]]
    left.set_ylim(min(last) - 0.1, max(4.5, min(last) + 1.2))
    left.set_xlabel("million tokens")
    left.set_ylabel("training loss, nats per token")
    left.legend(frameon=False)
    held_out_losses(right, models, colours, "unseen books")
    save(figure, path)
    return path


def _write(output: Path, report: dict[str, Any], log: str) -> None:
    """Write what there is so far, each file whole or not at all."""
    for name, content in (
        ("reproduction.json", json.dumps(report, indent=1) + "\n"),
        ("reproduction_log.csv", log),
    ):
        partial = output / f"{name}.tmp"
        partial.write_text(content, encoding="utf-8")
        partial.replace(output / name)
    if report["models"]:
        draw(output / "reproduction.png", log, report["models"])


def _figures(losses: Tensor, text: Text, model: Any, seconds: float, tokens: int) -> dict[str, Any]:
    return {
        "parameters": model.num_parameters(),
        "seconds": round(seconds, 1),
        "tokens_per_second": round(tokens / seconds),
        "validation": asdict(summarise(losses, text.validation, text.sizes)),
    }


@click.command(context_settings={"show_default": True})
@click.option(
    "--data",
    type=click.Path(path_type=Path, exists=True),
    required=True,
    help="Folder that holds text/books_*.",
)
@click.option("--output", type=click.Path(path_type=Path), required=True, help="Folder to write.")
@click.option("--corpus", default="books_large.jsonl.xz", help="Training file in DATA/text.")
@click.option("--models", default=",".join(TWINS), help="Models to train, dense first.")
@click.option("--formats", default=",".join(FORMATS), help="Formats of the tables.")
@click.option("--minutes", type=float, help="Lower the steps so that all training fits in this.")
@click.option("--steps", default=4000, help="Optimiser steps of every model.")
@click.option("--batch", default=64, help="Sequences in a step.")
@click.option("--context", default=512, help="Tokens in a sequence.")
@click.option("--vocab", default=8192, help="Size of the vocabulary.")
@click.option("--dim", default=256, help="Hidden size.")
@click.option("--layers", default=6, help="Layers.")
@click.option("--lr", default=2e-3, help="Peak learning rate.")
@click.option("--seed", default=0, help="Seed of weights and data order.")
@click.option("--books", type=int, help="Use only the first so many books (for a trial).")
@click.option("--device", default="auto", help="auto, cpu or cuda.")
@click.option("--compile/--no-compile", "compiled", default=True, help="Compile layers on CUDA.")
def main(
    data: Path,
    output: Path,
    corpus: str,
    models: str,
    formats: str,
    minutes: float | None,
    books: int | None,
    device: str,
    compiled: bool,
    **chosen: Any,
) -> None:
    """Train dense, mixture-of-experts and lookup-expert twins and compare them."""
    begin = time.perf_counter()
    names: Sequence[str] = models.split(",")
    if names[0] != "dense" or not all(_NAME.fullmatch(name) for name in names):
        raise click.ClickException(
            "`--models` must begin with dense and go on with names such as "
            f"{', '.join(TWINS[1:])}; got {models!r}."
        )
    settings = Settings(**chosen)
    where, reason = pick_device(device)
    seed_everything(settings.seed)
    output.mkdir(parents=True, exist_ok=True)
    click.echo(f"device {where} ({reason})")
    text = prepare_text(data / "text", corpus, books, settings, output)
    tokens = text.training.to(where)
    click.echo(f"{len(tokens):,} training tokens, {time.perf_counter() - begin:.0f} s")
    torch._dynamo.config.recompile_limit = 64  # one code object serves the layers of all models
    trainers = {}
    for name in names:
        model = build(name, settings, len(text.tokenizer)).to(where)
        if compiled and where.type == "cuda":
            for layer in model.model.layers:
                layer.compile(dynamic=False)
        trainers[name] = Trainer(model, tokens, settings, compiled=False)
    settings = fit_steps(settings, trainers, minutes)
    starts = crop_starts(len(tokens), settings).to(where)
    report: dict[str, Any] = {
        "corpus": corpus,
        "training_tokens": len(tokens),
        "seen_tokens": starts.numel() * settings.context,
        "settings": asdict(settings),
        "environment": environment_report(),
        "models": {},
        "paired_differences": {},
        "tables": {},
    }
    log = io.StringIO()
    writer = csv.writer(log, lineterminator="\n")
    writer.writerow(["model", "step", "tokens", "loss", "lr", "valid_loss", "seconds"])
    losses: dict[str, Tensor] = {}
    for name, trainer in trainers.items():
        seconds = train_model(name, trainer, starts, text.validation, writer, output / name)
        kind = type(trainer.model)
        model = kind.from_pretrained(output / name, dtype=torch.float32).to(where).eval()
        losses[name] = window_losses(model, text.validation, settings.context)
        report["models"][name] = _figures(losses[name], text, model, seconds, report["seen_tokens"])
        for other in losses:
            if other != name:
                gap = paired_difference(losses[name], losses[other])
                report["paired_differences"][f"{name} - {other}"] = gap
        found = report["models"][name]["validation"]
        click.echo(
            f"{name}: {found['nats']:.4f} nats/token [{found['low']:.4f}, {found['high']:.4f}] on "
            f"unseen books, {seconds:.0f} s of training"
        )
        if isinstance(model, MoleForCausalLM) and not name.endswith("uniform"):
            sample = text.validation[: 128 * settings.context]
            report["tables"][name] = table_losses(
                model, sample, settings.context, output / f"{name}-tables", formats.split(",")
            )
            for fmt, figures in report["tables"][name].items():
                click.echo(f"  {fmt}: {figures['nats']:.4f} nats/token on 128 windows")
        _write(output, report, log.getvalue())
    for pair, gap in report["paired_differences"].items():
        click.echo(f"{pair}: {gap['nats']:+.4f} [{gap['low']:+.4f}, {gap['high']:+.4f}]")
    click.echo(f"done in {time.perf_counter() - begin:.0f} s")


if __name__ == "__main__":
    main()
