"""Trains the demo's twins: one language model with 1.5-entmax attention, one with softmax.

Run as `python -m adasplash.demo.train --data FOLDER --output FOLDER`; about five minutes on one
H200. Both see the same text in the same order from the same initial weights. `assets.tar` in the
output folder is unpacked into `adasplash/demo/assets`.
"""

from __future__ import annotations

import csv
import gzip
import json
import logging
import lzma
import math
import os
import shutil
import tarfile
import time
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor
from torch.nn import functional as F

from fourfold_common import environment_report, pick_device, seed_everything

from ..integration import register_with_transformers

_logger = logging.getLogger(__name__)
CONTEXT = 512
VOCAB = 2048
ATTENTION = {"entmax": "adasplash", "softmax": "sdpa"}
_END = "<|endoftext|>"
_SNIPPET = slice(40_000, 60_000)  # characters of the first validation book that ship with the demo


def read_jsonl(path: Path) -> list[dict[str, str]]:
    """Return every line of a `.jsonl.gz` or `.jsonl.xz` file."""
    with (lzma if path.suffix == ".xz" else gzip).open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def read_books(path: Path) -> list[str]:
    """Return the text of every book of a `.jsonl.gz` or `.jsonl.xz` file."""
    return [book["text"] for book in read_jsonl(path)]


def train_tokenizer(books: list[str], folder: Path) -> Any:
    """Train a byte-level BPE tokenizer, save it in transformers' layout and return it."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    backend = ByteLevelBPETokenizer()
    backend.train_from_iterator(books, VOCAB, special_tokens=[_END], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend._tokenizer, bos_token=_END, eos_token=_END, pad_token=_END
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def encode(tokenizer: Any, books: list[str]) -> Tensor:
    """Return all books as one stream of ids, each behind an end mark."""
    encoded = tokenizer.backend_tokenizer.encode_batch(books)
    end = tokenizer.eos_token_id
    return torch.cat([torch.tensor([end, *book.ids], dtype=torch.int32) for book in encoded])


def build(kind: str, seed: int, tokenizer: Any) -> Any:
    """Return a Llama with random weights; the same for both kinds."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=5,
        num_attention_heads=6,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        attn_implementation=ATTENTION[kind],
    )
    return LlamaForCausalLM(config)


@torch.no_grad()
def validation_loss(model: Any, stream: Tensor, batch: int = 64) -> tuple[float, int]:
    """Return the mean next-token loss in nats over windows of the context, and the token count."""
    model.eval()
    device = next(model.parameters()).device
    usable = (len(stream) - 1) // CONTEXT * CONTEXT
    if usable == 0:
        raise ValueError(f"`stream` must hold over {CONTEXT} tokens; got {len(stream)}.")
    inputs = stream[:usable].view(-1, CONTEXT).long()
    labels = stream[1 : usable + 1].view(-1, CONTEXT).long()
    total = 0.0
    for ids, wanted in zip(inputs.split(batch), labels.split(batch), strict=True):
        logits = model(ids.to(device), use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1).float(), wanted.flatten().to(device))
        total += loss.item() * wanted.numel()
    return total / usable, usable


def train(
    kind: str,
    model: Any,
    stream: Tensor,
    valid: Tensor,
    *,
    steps: int,
    batch: int,
    rate: float,
    seed: int,
    log: Any,
) -> float:
    """Train in place; return the seconds per step after the first ten."""
    device = next(model.parameters()).device
    stream = stream.to(device)
    order = torch.Generator().manual_seed(seed)
    places = torch.arange(CONTEXT + 1, device=device)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95))
    started, timed_from = time.perf_counter(), 0
    model.train()
    for step in range(steps):
        if step == 10:
            _wait(device)
            started, timed_from = time.perf_counter(), step
        warm_up = min(1.0, (step + 1) / 100)
        factor = warm_up * (0.05 + 0.95 * (0.5 + 0.5 * math.cos(math.pi * step / steps)))
        for group in optimizer.param_groups:
            group["lr"] = rate * factor
        offsets = torch.randint(len(stream) - CONTEXT - 1, (batch, 1), generator=order)
        ids = stream[offsets.to(device) + places].long()
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits = model(ids[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % max(1, steps // 40) == 0 or step + 1 == steps:
            spent = (time.perf_counter() - started) / max(1, step + 1 - timed_from)
            speed = batch * CONTEXT / spent
            held = validation_loss(model, valid[: 100 * CONTEXT + 1])[0]
            model.train()
            log.writerow([kind, step + 1, f"{loss.item():.4f}", f"{held:.4f}"])
            _logger.info(
                "%s step %d/%d loss %.3f valid %.3f %.0f tokens/s",
                kind, step + 1, steps, loss.item(), held, speed,
            )  # fmt: skip
    _wait(device)
    return (time.perf_counter() - started) / max(1, steps - timed_from)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _pack(folder: Path, path: Path) -> None:
    """Write a folder as a tar file without owners, whole or not at all."""
    part = path.with_suffix(".part")
    with tarfile.open(part, "w") as tar:
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                entry = tar.gettarinfo(file, arcname=str(file.relative_to(folder)))
                entry.uid = entry.gid = 0
                entry.uname = entry.gname = ""
                with file.open("rb") as content:
                    tar.addfile(entry, content)
    os.replace(part, path)


@click.command()
@click.option(
    "--data", type=click.Path(exists=True, file_okay=False, path_type=Path), required=True
)
@click.option("--corpus", default="books_large.jsonl.xz", show_default=True, help="In DATA/text.")
@click.option("--output", type=click.Path(file_okay=False, path_type=Path), required=True)
@click.option("--steps", default=4000, show_default=True, help="Optimiser steps of each twin.")
@click.option("--batch", default=64, show_default=True, help="Windows of 512 tokens a step.")
@click.option("--rate", default=2e-3, show_default=True, help="Peak learning rate.")
@click.option("--books", default=0, help="Use only so many books; 0 for all.")
@click.option("--seed", default=0, show_default=True)
def main(
    data: Path,
    corpus: str,
    output: Path,
    steps: int,
    batch: int,
    rate: float,
    books: int,
    seed: int,
) -> None:
    """Train the twins on the books of DATA and write assets.tar into OUTPUT."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    register_with_transformers()
    seed_everything(seed)
    device, reason = pick_device()
    _logger.info("running on %s: %s", device, reason)
    assets = output / "assets"
    shutil.rmtree(assets, ignore_errors=True)
    (assets / "tokenizer").mkdir(parents=True)
    texts = read_books(data / "text" / corpus)
    held_out = read_books(data / "text" / "books_valid.jsonl.gz")
    texts = texts[:books] if books else texts
    tokenizer = train_tokenizer(texts, assets / "tokenizer")
    stream, valid = encode(tokenizer, texts), encode(tokenizer, held_out)
    (assets / "snippet.txt").write_text(held_out[0][_SNIPPET], encoding="utf-8")
    _logger.info("%d training and %d validation tokens", len(stream), len(valid))
    record: dict[str, Any] = {
        "corpus": corpus,
        "seed": seed,
        "steps": steps,
        "batch": batch,
        "context": CONTEXT,
        "peak_rate": rate,
        "training_tokens": len(stream),
        "environment": environment_report(),
        "models": {},
    }
    with (assets / "training_log.csv").open("w", newline="", encoding="utf-8") as file:
        log = csv.writer(file)
        log.writerow(["model", "step", "training_loss", "validation_loss"])
        for kind in ATTENTION:
            model = build(kind, seed, tokenizer).to(device)
            per_step = train(
                kind, model, stream, valid, steps=steps, batch=batch, rate=rate, seed=seed, log=log
            )
            model.to(torch.bfloat16).save_pretrained(assets / kind)
            loss, count = validation_loss(model.float(), valid)
            record["models"][kind] = {
                "parameters": sum(p.numel() for p in model.parameters()),
                "validation_loss_nats": loss,
                "validation_tokens": count,
                "seconds_per_step": per_step,
            }
            _logger.info("%s: validation loss %.4f nats over %d tokens", kind, loss, count)
            (assets / "training.json").write_text(json.dumps(record, indent=1) + "\n")
            file.flush()
            _pack(assets, output / "assets.tar")


if __name__ == "__main__":
    main()
