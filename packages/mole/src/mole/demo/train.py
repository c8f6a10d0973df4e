"""Train the demonstration's models: dense, mixture of experts, and mixture of lookup experts.

    python -m mole.demo.train --data ../shared/data --corpus books_large.jsonl.xz --output new

All three see the same tokens in the same order for the same number of steps. With `--minutes`, the
number of steps is lowered so that the three fit into that time together. What is written:
`tokenizer/`, `mole/`, `dense/`, `moe/` (bfloat16 weights), `snippet.txt` (held-out text for the
demonstration), `training.json` (settings and figures), `training_log.csv`, and two archives:
`assets.tar` (all but the mixture of experts) and `moe.tar`.
"""

import csv
import gzip
import io
import json
import logging
import lzma
import math
import os
import tarfile
import tempfile
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from fourfold_common import environment_report, pick_device, seed_everything

from ..config import DenseConfig, MoeConfig, MoleConfig
from ..evaluation import paired_difference, summarise, token_bytes, window_losses
from ..modeling import DenseForCausalLM, MoeForCausalLM, MoleForCausalLM

_logger = logging.getLogger(__name__)

END_OF_TEXT = "<|endoftext|>"
SNIPPET_BOOK = "Alice's Adventures in Wonderland"
SNIPPET_CHARACTERS = 40_000
WARMUP_SHARE, FINAL_LR_SHARE = 0.02, 0.1


@dataclass(frozen=True)
class Settings:
    """What decides the result, next to the data.

    Attributes:
        seed: Seed of weights and data order.
        steps: Optimiser steps of every model.
        batch: Sequences in a step.
        context: Tokens in a sequence.
        lr: Peak learning rate; linear warm-up over 2 % of the steps, then cosine to a tenth.
        weight_decay: Decay of matrices; norms are left alone.
        vocab: Size of the vocabulary.
        dim: Hidden size; the feed-forward blocks are four times as wide.
        layers: Number of layers.
        heads: Number of attention heads.
        dedup: How the lookup experts are trained, see `MoleConfig`.
    """

    seed: int = 0
    steps: int = 6000
    batch: int = 64
    context: int = 512
    lr: float = 3e-3
    weight_decay: float = 0.1
    vocab: int = 4096
    dim: int = 128
    layers: int = 4
    heads: int = 4
    dedup: str = "micro"


def read_books(path: Path) -> list[dict[str, Any]]:
    """Return the books of a `.jsonl.gz` or `.jsonl.xz` file, each with `title` and `text`."""
    opener = lzma.open if path.suffix == ".xz" else gzip.open
    with opener(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def train_tokenizer(texts: Iterator[str], vocab: int) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer trained on the texts; id 0 ends a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT)


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> Tensor:
    """Return the ids of all texts in one row, each text followed by the end-of-text id."""
    end = tokenizer.eos_token_id
    encoded = tokenizer.backend_tokenizer.encode_batch(texts)
    return torch.cat([torch.tensor([*text.ids, end], dtype=torch.int32) for text in encoded])


def backbone(settings: Settings, vocab: int) -> dict[str, Any]:
    """Return the configuration fields that all models share."""
    return {
        "vocab_size": vocab,
        "hidden_size": settings.dim,
        "intermediate_size": 4 * settings.dim,
        "num_hidden_layers": settings.layers,
        "num_attention_heads": settings.heads,
        "max_position_embeddings": settings.context,
        "tie_word_embeddings": True,
        "eos_token_id": 0,
        "bos_token_id": 0,
    }


def build_models(settings: Settings, vocab: int) -> dict[str, Any]:
    """Return the three models, in the order of their training."""
    common = backbone(settings, vocab)
    built: dict[str, Any] = {}
    for name in ("dense", "mole", "moe"):
        torch.manual_seed(settings.seed)
        if name == "dense":
            built[name] = DenseForCausalLM(DenseConfig(**common))
        elif name == "mole":
            built[name] = MoleForCausalLM(MoleConfig(**common, dedup=settings.dedup))
        else:
            built[name] = MoeForCausalLM(MoeConfig(**common))
    return built


class Trainer:
    """Trains one model on random crops of one row of tokens.

    Args:
        model: The model.
        tokens: All training tokens, on the model's device.
        settings: What decides the result.
        compiled: Compile the model first.
    """

    def __init__(self, model: Any, tokens: Tensor, settings: Settings, compiled: bool) -> None:
        self.model, self.tokens, self.settings = model, tokens, settings
        self.forward = torch.compile(model) if compiled else model
        self.offsets = torch.arange(settings.context, device=tokens.device)
        self.autocast = torch.autocast("cuda", torch.bfloat16) if tokens.is_cuda else nullcontext()

    def optimizer(self) -> torch.optim.Optimizer:
        """Return a fresh AdamW with the paper's betas."""
        decayed = [p for p in self.model.parameters() if p.dim() > 1]
        others = [p for p in self.model.parameters() if p.dim() <= 1]
        groups = [
            {"params": decayed, "weight_decay": self.settings.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(
            groups, lr=0.0, betas=(0.9, 0.95), eps=1e-8, fused=self.tokens.is_cuda
        )

    def step(self, optimizer: torch.optim.Optimizer, starts: Tensor, lr: float) -> Tensor:
        """Run one optimiser step on the crops that begin at `starts`; return the loss."""
        for group in optimizer.param_groups:
            group["lr"] = lr
        ids = self.tokens[starts[:, None] + self.offsets].long()
        with self.autocast:
            loss = self.forward(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        detached: Tensor = loss.detach()
        return detached

    def seconds_per_step(self, warmup: int = 5, timed: int = 20) -> float:
        """Return how long a step takes; the weights are put back afterwards."""
        saved = {name: value.clone() for name, value in self.model.state_dict().items()}
        optimizer = self.optimizer()
        starts = torch.zeros(self.settings.batch, dtype=torch.long, device=self.tokens.device)
        self.model.train()
        for _ in range(warmup):
            self.step(optimizer, starts, 1e-4)
        _synchronize(self.tokens)
        begin = time.perf_counter()
        for _ in range(timed):
            self.step(optimizer, starts, 1e-4)
        _synchronize(self.tokens)
        self.model.load_state_dict(saved)
        return (time.perf_counter() - begin) / timed


def crop_starts(total: int, settings: Settings) -> Tensor:
    """Return where the crops of every step begin, `[steps, batch]`: the order of the data."""
    generator = torch.Generator().manual_seed(settings.seed)
    high = total - settings.context + 1
    return torch.randint(high, (settings.steps, settings.batch), generator=generator)


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Return the rate of a step: linear warm-up, then cosine to a tenth of the peak."""
    warmup = max(1, round(WARMUP_SHARE * steps))
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return peak * (FINAL_LR_SHARE + (1 - FINAL_LR_SHARE) * (1 + math.cos(math.pi * done)) / 2)


def _synchronize(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize()


def _write(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    partial = path.with_name(path.name + ".tmp")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def _save(model: Any, folder: Path) -> None:
    """Save the weights in bfloat16 without touching the model that is being trained."""
    rounded = {
        name: value.to(torch.bfloat16)
        for name, value in model.state_dict().items()
        if name != "lm_head.weight"  # tied to the embeddings
    }
    model.save_pretrained(folder, state_dict=rounded)
    for file in folder.iterdir():
        file.chmod(0o644)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["dtype"] = "bfloat16"
    _write(folder / "config.json", json.dumps(config, indent=1) + "\n")


def _pack(path: Path, root: Path, names: list[str]) -> None:
    partial = path.with_name(path.name + ".tmp")
    with tarfile.open(partial, "w") as archive:
        for name in names:
            if (root / name).exists():
                archive.add(root / name, arcname=name)
    os.replace(partial, path)


@dataclass(frozen=True)
class Text:
    """The text of a training run.

    Attributes:
        tokenizer: Trained on the training books.
        sizes: Bytes that every id stands for.
        training: Ids of all training books, in one row.
        validation: Ids of all validation books.
        excerpt: Ids of the beginning of one validation book, which is shipped.
    """

    tokenizer: PreTrainedTokenizerFast
    sizes: list[int]
    training: Tensor
    validation: Tensor
    excerpt: Tensor


def prepare_text(
    folder: Path, corpus: str, books: int | None, settings: Settings, output: Path
) -> Text:
    """Return the text as ids; write the tokenizer and the shipped excerpt."""
    training = read_books(folder / corpus)[:books]
    validation = read_books(folder / "books_valid.jsonl.gz")
    tokenizer = train_tokenizer((book["text"] for book in training), settings.vocab)
    tokenizer.model_max_length = settings.context
    tokenizer.save_pretrained(output / "tokenizer")
    shown = next(book["text"] for book in validation if book["title"] == SNIPPET_BOOK)
    snippet = shown[:SNIPPET_CHARACTERS].rpartition("\n\n")[0] + "\n"
    _write(output / "snippet.txt", snippet)
    return Text(
        tokenizer=tokenizer,
        sizes=token_bytes(tokenizer),
        training=encode(tokenizer, [book["text"] for book in training]),
        validation=encode(tokenizer, [book["text"] for book in validation]),
        excerpt=encode(tokenizer, [snippet]),
    )


def _check_kernel(device: torch.device) -> dict[str, Any]:
    """Return how far the Triton kernel is from float64 on a CUDA device."""
    from ..testing import check_combine

    cases = check_combine(device)
    worst = max(cases, key=lambda case: case["error"])
    click.echo(f"kernel against float64: {len(cases)} cases, worst {json.dumps(worst)}")
    return {"kernel_cases": len(cases), "kernel_worst": worst}


def _check_forms(folder: Path, ids: Tensor, device: torch.device) -> dict[str, float]:
    """Return the largest difference of logits, table form to expert form, for every format."""
    from ..conversion import convert
    from ..lut import FORMATS

    expert: Any = MoleForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()
    ids, gaps = ids.to(device), {}
    with tempfile.TemporaryDirectory() as tables, torch.inference_mode():
        exact = expert(ids).logits
        for fmt in FORMATS:
            target = convert(expert, Path(tables) / fmt, fmt, progress=False)
            table: Any = MoleForCausalLM.from_pretrained(target).to(device).eval()
            for store in ("mmap", "device"):
                table.open_lut(target / "lut", store)
                gaps[f"{fmt}, {store}"] = (table(ids).logits - exact).abs().max().item()
            table.lut.close()
    click.echo(f"table form against expert form, largest logit {exact.abs().max().item():.1f}:")
    for name, gap in gaps.items():
        click.echo(f"  {name}: {gap:.1e}")
    return gaps


@click.command(context_settings={"show_default": True})
@click.option(
    "--data",
    type=click.Path(path_type=Path, exists=True),
    required=True,
    help="Folder that holds text/books_*.",
)
@click.option("--output", type=click.Path(path_type=Path), required=True, help="Folder to write.")
@click.option("--corpus", default="books_train.jsonl.gz", help="Training file in DATA/text.")
@click.option("--minutes", type=float, help="Lower the steps so that all training fits in this.")
@click.option("--steps", default=Settings.steps, help="Optimiser steps of every model.")
@click.option("--batch", default=Settings.batch, help="Sequences in a step.")
@click.option("--context", default=Settings.context, help="Tokens in a sequence.")
@click.option("--vocab", default=Settings.vocab, help="Size of the vocabulary.")
@click.option("--dim", default=Settings.dim, help="Hidden size.")
@click.option("--layers", default=Settings.layers, help="Layers.")
@click.option("--lr", default=Settings.lr, help="Peak learning rate.")
@click.option(
    "--dedup",
    type=click.Choice(["off", "micro"]),
    default=Settings.dedup,
    help="Run the lookup experts on every token, or once on every distinct id.",
)
@click.option("--seed", default=Settings.seed, help="Seed of weights and data order.")
@click.option("--books", type=int, help="Use only the first so many books (for a trial).")
@click.option("--device", default="auto", help="auto, cpu or cuda.")
@click.option("--compile/--no-compile", "compiled", default=True, help="Compile on CUDA.")
def main(
    data: Path,
    output: Path,
    corpus: str,
    minutes: float | None,
    books: int | None,
    device: str,
    compiled: bool,
    **chosen: Any,
) -> None:
    """Train the three models of the demonstration and write its assets."""
    begin = time.perf_counter()
    settings = Settings(**chosen)
    where, reason = pick_device(device)
    seed_everything(settings.seed)
    output.mkdir(parents=True, exist_ok=True)
    click.echo(f"device {where} ({reason})")
    text = prepare_text(data / "text", corpus, books, settings, output)
    click.echo(
        f"{len(text.training):,} training and {len(text.validation):,} validation tokens, "
        f"vocabulary {len(text.tokenizer)}, {time.perf_counter() - begin:.0f} s"
    )
    built = build_models(settings, len(text.tokenizer))
    tokens = text.training.to(where)
    cuda = where.type == "cuda"
    checks: dict[str, Any] = _check_kernel(where) if cuda else {}
    trainers_ = {
        name: Trainer(model.to(where), tokens, settings, compiled and cuda)
        for name, model in built.items()
    }
    settings = fit_steps(settings, trainers_, minutes)
    starts = crop_starts(len(tokens), settings).to(where)
    report: dict[str, Any] = {
        "corpus": corpus,
        "training_tokens": len(tokens),
        "settings": asdict(settings),
        "environment": environment_report(),
        "checks": checks,
        "models": {},
        "versus_dense": {},
    }
    log = io.StringIO()
    writer = csv.writer(log, lineterminator="\n")
    writer.writerow(["model", "step", "tokens", "loss", "lr", "valid_loss", "seconds"])
    losses: dict[str, Tensor] = {}
    for name, trainer in trainers_.items():
        click.echo(f"training {name}")
        folder = output / name
        seconds = train_model(name, trainer, starts, text.validation, writer, folder)
        model = type(built[name]).from_pretrained(folder, dtype=torch.float32).to(where).eval()
        losses[name] = window_losses(model, text.validation, settings.context)
        excerpt = window_losses(model, text.excerpt, settings.context)
        report["models"][name] = {
            "parameters": model.num_parameters(),
            "seconds": round(seconds, 1),
            "tokens_per_second": round(starts.numel() * settings.context / seconds),
            "validation": asdict(summarise(losses[name], text.validation, text.sizes)),
            "snippet": asdict(summarise(excerpt, text.excerpt, text.sizes)),
        }
        if name != "dense":
            report["versus_dense"][name] = paired_difference(losses[name], losses["dense"])
        _write_report(output, log, report)
        figures = report["models"][name]["validation"]
        click.echo(
            f"{name}: validation {figures['nats']:.4f} nats/token "
            f"[{figures['low']:.4f}, {figures['high']:.4f}], "
            f"{figures['bits_per_byte']:.4f} bits/byte, {seconds:.0f} s"
        )
    if cuda:
        window = text.excerpt[None, : settings.context].long()
        checks["forms"] = _check_forms(output / "mole", window, where)
        _write_report(output, log, report)
    click.echo(f"done in {time.perf_counter() - begin:.0f} s: {output.name}")


def _write_report(output: Path, log: io.StringIO, report: dict[str, Any]) -> None:
    """Write log, report and the two archives of what there is so far."""
    _write(output / "training_log.csv", log.getvalue())
    _write(output / "training.json", json.dumps(report, indent=1) + "\n")
    shared = ["tokenizer", "snippet.txt", "training.json", "training_log.csv"]
    _pack(output / "assets.tar", output, [*shared, "mole", "dense"])
    _pack(output / "moe.tar", output, ["moe"])


def fit_steps(settings: Settings, trainers_: dict[str, Trainer], minutes: float | None) -> Settings:
    """Return the settings with as many steps as fit into the minutes, for all models together."""
    total = 0.0
    for name, trainer in trainers_.items():
        clock = time.perf_counter()
        seconds = trainer.seconds_per_step(*(() if minutes else (1, 2)))
        total += seconds
        click.echo(
            f"{name}: {trainer.model.num_parameters():,} parameters, "
            f"{1000 * seconds:.2f} ms/step, "
            f"{settings.batch * settings.context / seconds:,.0f} tokens/s "
            f"(with compilation {time.perf_counter() - clock:.0f} s)"
        )
    if minutes is None:
        return settings
    steps = max(1, min(settings.steps, int(60 * minutes / total)))
    click.echo(f"{steps} steps fit into {minutes} minutes of training")
    return replace(settings, steps=steps)


def train_model(
    name: str, trainer: Trainer, starts: Tensor, valid: Tensor, writer: Any, folder: Path
) -> float:
    """Train one model to the end and return the seconds it took, evaluations apart.

    Four times on the way the model is saved and its loss on a part of the validation text noted.
    """
    settings, steps = trainer.settings, len(starts)
    optimizer = trainer.optimizer()
    sample = valid[: 64 * settings.context]
    every = max(1, steps // 60)
    checkpoint = 15 * every
    spent, begin = 0.0, time.perf_counter()
    trainer.model.train()
    for step, crops in enumerate(starts):
        lr = learning_rate(step, steps, settings.lr)
        loss = trainer.step(optimizer, crops, lr)
        last = step + 1 == steps
        if (step + 1) % every and not last:
            continue
        value = loss.item()
        if not math.isfinite(value):
            raise click.ClickException(f"the loss of {name} is {value} at step {step + 1}")
        now = spent + time.perf_counter() - begin
        found = ""
        if (step + 1) % checkpoint == 0 or last:
            spent = now
            trainer.model.eval()
            with torch.compiler.set_stance("force_eager"):  # other shapes: not worth compiling
                valid_loss = window_losses(trainer.model, sample, settings.context).mean().item()
            found = f"{valid_loss:.4f}"
            _save(trainer.model, folder)
            trainer.model.train()
            begin = time.perf_counter()
        done = (step + 1) * settings.batch * settings.context
        writer.writerow([name, step + 1, done, f"{value:.4f}", f"{lr:.3g}", found, f"{now:.1f}"])
        if found or (step + 1) % (6 * every) == 0:
            click.echo(
                f"  {name} step {step + 1}/{steps} loss {value:.4f} "
                f"{f'valid {found} ' if found else ''}{done / now:,.0f} tokens/s"
            )
    return spent


if __name__ == "__main__":
    main()
