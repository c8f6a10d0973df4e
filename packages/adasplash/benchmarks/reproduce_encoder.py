"""A pretrained encoder fine-tuned on long texts: softmax beside entmax of alpha 1.5 and 2.

Run as `python packages/adasplash/benchmarks/reproduce_encoder.py --model FOLDER
--books books.jsonl.xz --output FOLDER`; run again, it leaves out what is done. The model is a BERT
in transformers' layout, such as all-MiniLM-L6-v2; its positions are stretched to each length.

One training serves two tasks, on passages of a fixed length: say who wrote it (classification),
and find the passage that a span of 64 tokens was cut out of (retrieval by one vector, the other
passages of the batch as negatives: the inverse cloze task of arXiv 1906.00300). One book of every
author is held out; accuracy and nDCG@10 are of passages from those. Alpha begins at 1.01 and
reaches its value after half of the steps. No attention dropout, for softmax neither.

The output folder gets `log.csv`, `results.json` and `results.png`. The JSON names the environment
of the last run, and under `earlier` those of the runs that it went on from.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import time
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import AutoModel, AutoTokenizer

from adasplash import AlphaSchedule, register_with_transformers, set_alpha
from adasplash.demo.run import measure_sparsity
from adasplash.demo.train import read_jsonl
from adasplash.testing import attention_inputs, oracle_weights
from fourfold_common import Results, pick_device, seed_everything

SAMPLED = 16  # blocks of queries that the sparsity of a long passage is counted in
LOG = ("length", "alpha", "step", "loss", "classification_loss", "retrieval_loss", "seconds")


class Book(NamedTuple):
    """A book as ids without special tokens, and the number of its author."""

    ids: Tensor
    author: int


def split(
    rows: list[dict[str, str]], tokenizer, least: int, shortest: int
) -> tuple[list[Book], list[Book]]:
    """Return the books to train on and those held out, the last title of every author.

    Only authors with `least` books of at least `shortest` tokens count.
    """
    by_author: dict[str, list[tuple[str, Tensor]]] = {}
    for row, ids in zip(rows, encode([row["text"] for row in rows], tokenizer), strict=True):
        if len(ids) >= shortest:
            by_author.setdefault(row["author"], []).append((row["title"], ids))
    usable = {name: sorted(b, key=lambda x: x[0]) for name, b in by_author.items()}
    usable = {name: books for name, books in sorted(usable.items()) if len(books) >= least}
    if len(usable) < 2:
        raise SystemExit(f"fewer than two authors have {least} books of {shortest} tokens")
    training = [Book(ids, i) for i, books in enumerate(usable.values()) for _, ids in books[:-1]]
    held = [Book(books[-1][1], i) for i, books in enumerate(usable.values())]
    return training, held


def encode(texts: list[str], tokenizer) -> list[Tensor]:
    """Return the ids of every text, without special tokens.

    No token of a BERT goes over a line feed, so lines are encoded on their own: in parallel,
    however few the texts are, and without their places in the text.
    """
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    lines = [text.split("\n") for text in texts]
    found = iter(backend.encode_batch_fast([x for own in lines for x in own],
                                           add_special_tokens=False))  # fmt: skip
    return [torch.tensor([i for _ in own for i in next(found).ids]) for own in lines]


class Passages:
    """Cuts passages of a length, and the spans that are to find them, out of books."""

    def __init__(self, tokenizer, length: int, query: int) -> None:
        self.length, self.query = length, query
        self.ends = [torch.tensor([i]) for i in (tokenizer.cls_token_id, tokenizer.sep_token_id)]

    @property
    def span(self) -> int:
        """Tokens of a passage with its query, before the query is cut out."""
        return self.length - 2 + self.query

    def cut(self, ids: Tensor, start: int, at: int) -> tuple[Tensor, Tensor]:
        """Return passage and query; the query stood `at` tokens behind the start."""
        whole = ids[start : start + self.span]
        first, last = self.ends
        query = whole[at : at + self.query]
        rest = torch.cat([whole[:at], whole[at + self.query :]])
        return torch.cat([first, rest, last]), torch.cat([first, query, last])

    def draw(self, books: list[Book], count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return passages, queries and authors, drawn at random: every author as often."""
        generator = torch.Generator().manual_seed(seed)

        def below(limit: int) -> int:
            return int(torch.randint(limit, (), generator=generator))

        authors = sorted({book.author for book in books})
        found = []
        for _ in range(count):
            author = authors[below(len(authors))]
            own = [book for book in books if book.author == author]
            book = own[below(len(own))]
            start = below(len(book.ids) - self.span + 1)
            found.append((*self.cut(book.ids, start, below(self.length - 1)), author))
        passages, queries, chosen = zip(*found, strict=True)
        return torch.stack(passages), torch.stack(queries), torch.tensor(chosen)

    def lay(self, books: list[Book], most: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return up to `most` passages side by side, as many of each book; queries from inside."""
        share = max(1, most // len(books))
        found = []
        for book in books:
            for i in range(min(share, len(book.ids) // self.span)):
                pair = self.cut(book.ids, i * self.span, self.length // 2)
                found.append((*pair, book.author))
        passages, queries, authors = zip(*found, strict=True)
        return torch.stack(passages), torch.stack(queries), torch.tensor(authors)


class Encoder(nn.Module):
    """A BERT with stretched positions, mean pooling, and a classifier on top."""

    def __init__(self, folder: Path, length: int, classes: int, alpha: float, how: str) -> None:
        super().__init__()
        self.bert = AutoModel.from_pretrained(
            folder, add_pooling_layer=False, attention_probs_dropout_prob=0.0, dtype=torch.float32,
            attn_implementation="sdpa" if alpha == 1 else "adasplash",
        )  # fmt: skip
        stretch_positions(self.bert, length, how)
        self.classifier = nn.Linear(self.bert.config.hidden_size, classes)

    def forward(self, ids: Tensor) -> Tensor:
        """Return one vector for each text."""
        return self.bert(ids).last_hidden_state.float().mean(1)


def stretch_positions(bert: nn.Module, length: int, how: str) -> None:
    """Give a BERT `length` positions: its own interpolated, or repeated ("tile")."""
    old = bert.embeddings.position_embeddings.weight.data
    if length <= len(old):
        return
    if how == "tile":
        new = old.repeat(-(-length // len(old)), 1)[:length]
    else:
        new = F.interpolate(old.T[None], size=length, mode="linear", align_corners=True)[0].T
    bert.embeddings.position_embeddings = nn.Embedding.from_pretrained(new.clone(), freeze=False)
    bert.embeddings.register_buffer("position_ids", torch.arange(length)[None], persistent=False)
    bert.embeddings.register_buffer(
        "token_type_ids", torch.zeros(1, length, dtype=torch.long), persistent=False
    )
    bert.config.max_position_embeddings = length


def ndcg_at_10(queries: Tensor, passages: Tensor) -> float:
    """Return the mean nDCG@10 where passage i is the only right one for query i."""
    scores = F.normalize(queries, dim=-1) @ F.normalize(passages, dim=-1).T
    rank = 1 + (scores > scores.diagonal()[:, None]).sum(1)
    gains = torch.where(rank <= 10, 1 / torch.log2(1.0 + rank), 0.0)
    return gains.mean().item()


def autocast(device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


@torch.no_grad()
def evaluate(
    model: Encoder, held: tuple[Tensor, Tensor, Tensor], batch: int, device: torch.device
) -> tuple[float, float]:
    """Return accuracy and nDCG@10 on held-out passages."""
    model.eval()
    passages, queries, authors = held
    with autocast(device):
        found = torch.cat([model(part.to(device)) for part in passages.split(batch)])
        asked = torch.cat([model(part.to(device)) for part in queries.split(64)])
    model.train()
    guesses = model.classifier(found).argmax(-1).cpu()
    return (guesses == authors).float().mean().item(), ndcg_at_10(asked, found)


def seconds_now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def fine_tune(
    model: Encoder, books: list[Book], passages: Passages, steps: int, batch: int, alpha: float,
    options: argparse.Namespace, name: str,
) -> tuple[list[dict[str, object]], float | None]:  # fmt: skip
    """Train in place; return the log and the peak memory in MiB of the steps at the last alpha."""
    device = torch.device(options.device)
    schedule = AlphaSchedule(1.01, alpha, steps // 2) if alpha > 1 else None
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.rate, weight_decay=0.01)
    rows: list[dict[str, object]] = []
    for step in tqdm(range(steps), desc=name, disable=options.quiet):
        if schedule is not None:
            set_alpha(model.bert, schedule(step))
        if step == steps // 2 and device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        seed = options.seed * 1_000_003 + step
        texts, queries, authors = (x.to(device) for x in passages.draw(books, batch, seed))
        factor = min(1.0, (step + 1) / (1 + steps // 10)) * (1 - step / steps)
        for group in optimizer.param_groups:
            group["lr"] = options.rate * factor
        begin = seconds_now(device)
        with autocast(device):
            found, asked = model(texts), model(queries)
        who = F.cross_entropy(model.classifier(found), authors)
        scores = F.normalize(asked, dim=-1) @ F.normalize(found, dim=-1).T / 0.05
        which = F.cross_entropy(scores, torch.arange(batch, device=device))
        optimizer.zero_grad(set_to_none=True)
        (who + which).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        seconds = seconds_now(device) - begin
        values = (passages.length, f"{schedule(step):.4f}" if schedule else "1", step + 1,
                  round((who + which).item(), 4), round(who.item(), 4), round(which.item(), 4),
                  round(seconds, 5))  # fmt: skip
        rows.append(dict(zip(LOG, values, strict=True)))
    peak = torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else None
    return rows, peak


def add_sparsity(
    results: Results, name: str, model: Encoder, ids: Tensor, alpha: float, case: dict
) -> None:
    """Add the share of exact zeros in every layer for one passage, from dense float64 weights.

    Of a long passage `SAMPLED` blocks of 64 queries are taken, evenly spread.
    """
    model.eval()
    with autocast(ids.device):
        layers = attention_inputs(model.bert, ids)
    for layer, (q, k, _) in enumerate(layers):
        if q.shape[2] > SAMPLED * 64:
            blocks = torch.linspace(0, q.shape[2] // 64 - 1, SAMPLED).round().long()
            q = q[:, :, (64 * blocks[:, None] + torch.arange(64)).flatten().to(q.device)]
        pairs = []
        for head in range(q.shape[1]):
            part = (q[:, head : head + 1], k[:, head : head + 1])
            weights = oracle_weights(*part, is_causal=False, alpha=alpha)[0]
            one = measure_sparsity(weights, is_causal=False)[0]
            pairs.append((one.zero_weights, one.empty_blocks))
        for metric, values in zip(
            ("zero weights", "empty 64x64 blocks"), zip(*pairs, strict=True), strict=True
        ):
            mean = sum(values) / len(values)
            results.add(name, metric, mean, "", n=len(values), **case, layer=layer)


def draw(results: Results, path: Path) -> None:
    """Write accuracy, nDCG, time and empty blocks over the length as one PNG."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 4, figsize=(15, 3.6), layout="constrained")
    metrics = ("accuracy", "nDCG@10", "step", "empty 64x64 blocks")
    titles = ("author, held-out books", "retrieval, held-out books", "time of a step",
              "empty 64x64 blocks, all layers")  # fmt: skip
    names = list(dict.fromkeys(case["provider"] for case in results.cases))
    for axis, metric, title in zip(axes, metrics, titles, strict=True):
        for color, name in enumerate(names):
            points: dict[int, list[float]] = {}
            for case in results.cases:
                if case["provider"] == name and case["metric"] == metric:
                    points.setdefault(case["parameters"]["length"], []).append(case["median"])
            means = {length: sum(x) / len(x) for length, x in sorted(points.items())}
            if means:
                axis.plot(list(means), list(means.values()), marker="o", label=name,
                          color=f"C{color}")  # fmt: skip
        axis.set_xscale("log", base=2)
        axis.set(xlabel="tokens", ylabel="s" if metric == "step" else metric, title=title)
        axis.legend()
    part = path.with_suffix(".part")
    figure.savefig(part, dpi=110, format="png")
    part.replace(path)
    plt.close(figure)


def measure(
    options: argparse.Namespace, tokenizer, books: list[Book], held: list[Book],
    results: Results, rows: list[dict[str, object]],
) -> None:  # fmt: skip
    """Fine-tune and measure what the results lack; store and print after every one."""
    device = torch.device(options.device)
    path, log = options.output / "results.json", options.output / "log.csv"
    classes = len(held)
    for length, steps in zip(options.lengths, options.steps, strict=True):
        passages = Passages(tokenizer, length, options.query)
        batch = max(2, options.tokens // length)
        evaluated = passages.lay(held, options.evaluated)
        for alpha in options.alphas:
            name = "softmax" if alpha == 1 else f"alpha {alpha:g}"
            case = {"length": length, "steps": steps, "batch": batch}
            if any(c["provider"] == name and c["metric"] == "accuracy"
                   and {k: c["parameters"][k] for k in case} == case
                   for c in results.cases):  # fmt: skip
                continue
            begin = time.perf_counter()
            seed_everything(options.seed)
            model = Encoder(options.model, length, classes, alpha, options.positions).to(device)
            if alpha > 1:
                set_alpha(model.bert, alpha)
            fresh = evaluate(model, evaluated, batch, device)[1]
            ready = seconds_now(device)
            print(f"{length} tokens, {name}: loaded and evaluated in {ready - begin:.1f} s",
                  flush=True)  # fmt: skip
            made, peak = fine_tune(
                model, books, passages, steps, batch, alpha, options, f"{name}, {length} tokens"
            )
            trained = seconds_now(device)
            accuracy, ndcg = evaluate(model, evaluated, batch, device)
            count = len(evaluated[0])
            results.add(name, "nDCG@10 before", fresh, "", n=count, **case)
            results.add(name, "nDCG@10", ndcg, "", n=count, **case)
            times = [float(row["seconds"]) for row in made[steps // 2 :]]
            results.add(name, "step", median(times), "s", n=len(times), peak_mib=peak, **case)
            if alpha > 1:
                early = [float(row["seconds"]) for row in made[: steps // 2]]
                if early:
                    results.add(name, "step while alpha moves", median(early), "s", n=len(early),
                                **case)  # fmt: skip
                add_sparsity(results, name, model, evaluated[0][:1].to(device), alpha, case)
            results.add(name, "accuracy", accuracy, "", n=count, classes=classes, **case)
            rows.extend(made)
            part = log.with_suffix(".part")
            with part.open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, LOG)
                writer.writeheader()
                writer.writerows(rows)
            os.replace(part, log)
            results.save(path)
            blocks = [100 * c["median"] for c in results.cases
                      if c["provider"] == name and c["metric"] == "empty 64x64 blocks"
                      and c["parameters"]["length"] == length]  # fmt: skip
            print(f"{length} tokens, {name}: accuracy {accuracy:.3f}, nDCG@10 {fresh:.3f} -> "
                  f"{ndcg:.3f} (n {count}), {1e3 * median(times):.1f} ms a step, peak MiB "
                  f"{'unknown' if peak is None else round(peak)}, empty blocks by layer "
                  f"{' '.join(f'{x:.0f}%' for x in blocks)}, trained in {trained - ready:.1f} s, "
                  f"measured in {seconds_now(device) - trained:.1f} s", flush=True)  # fmt: skip


def earlier_runs(path: Path, stored: Results) -> list[dict[str, object]]:
    """Return the environments that stored cases were measured in, and how many cases in each."""
    earlier = json.loads(path.read_text(encoding="utf-8")).get("earlier", [])
    cases = len(stored.cases) - sum(run["cases"] for run in earlier)
    return [*earlier, {"cases": cases, "environment": stored.environment}] if cases else earlier


def run(options: argparse.Namespace) -> None:
    """Fine-tune and measure every length and alpha that `results.json` does not hold yet."""
    register_with_transformers()
    device = torch.device(options.device)
    options.output.mkdir(parents=True, exist_ok=True)
    path, log = options.output / "results.json", options.output / "log.csv"
    command = f"reproduce_encoder.py, positions {options.positions}, rate {options.rate}"
    results = Results("adasplash", command=command, seed=options.seed)
    rows: list[dict[str, object]] = []
    if path.exists():
        stored = Results.load(path)
        if (stored.command, stored.seed) != (command, options.seed):
            raise SystemExit(f"{path} holds another run: {stored.command}; choose a new folder")
        results.cases = stored.cases
        results.earlier = earlier_runs(path, stored)
        with log.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    # The same books at every length: those long enough for the longest.
    shortest = max(options.lengths) - 2 + options.query
    begin = time.perf_counter()
    texts = read_jsonl(options.books)
    print(f"{len(texts)} books read in {time.perf_counter() - begin:.1f} s", flush=True)
    begin = time.perf_counter()
    books, held = split(texts, tokenizer, options.min_books, shortest)
    tokens = sum(len(book.ids) for book in books + held)
    print(f"{tokens:,} tokens made in {time.perf_counter() - begin:.1f} s", flush=True)
    print(f"{len(books)} books to train on, {len(held)} held out, one of each author, on {device}",
          flush=True)  # fmt: skip
    try:
        measure(options, tokenizer, books, held, results, rows)
    finally:  # also of a run that was stopped
        if results.cases and find_spec("matplotlib"):
            draw(results, options.output / "results.png")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="folder of a BERT")
    parser.add_argument("--books", type=Path, required=True,
                        help=".jsonl.xz or .gz with author, title and text")  # fmt: skip
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 2048, 8192])
    parser.add_argument("--alphas", type=float, nargs="+", default=[1.0, 1.5, 2.0])
    parser.add_argument("--steps", type=int, nargs="+", default=[400], help="one, or per length")
    parser.add_argument("--tokens", type=int, default=65536, help="of the passages of a step")
    parser.add_argument("--query", type=int, default=64, help="tokens of a query")
    parser.add_argument("--min-books", type=int, default=3, help="of an author")
    parser.add_argument("--evaluated", type=int, default=512, help="held-out passages, at most")
    parser.add_argument("--positions", choices=("interpolate", "tile"), default="interpolate")
    parser.add_argument("--rate", type=float, default=1e-4, help="peak learning rate")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    options = parser.parse_args(arguments)
    if len(options.steps) == 1:
        options.steps = options.steps * len(options.lengths)
    if len(options.steps) != len(options.lengths):
        parser.error("--steps must be one number, or one for each of --lengths")
    if min(options.alphas) < 1 or max(options.alphas) > 2 or min(options.steps) < 2:
        parser.error("--alphas must be from 1 to 2, --steps at least 2")
    options.device = str(pick_device(options.device)[0])
    run(options)


if __name__ == "__main__":
    main()
