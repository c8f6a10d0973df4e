"""GPT-2 twins on books: softmax and 1.5-entmax attention, trained alike, then measured.

Run as `python packages/adasplash/benchmarks/reproduce_gpt2.py --train books.jsonl.xz
--valid books_valid.jsonl.gz --output FOLDER`; run again, it goes on where it stopped. `FOLDER` gets
`log.csv` (losses by step), `results.json` and `results.png`:

- validation loss of both, seconds per step while alpha is annealed and after;
- share of weights and of 64x64 blocks that are exactly zero in each layer, at several lengths;
- time of our attention and of torch's on the queries, keys and values of the trained model.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import time
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from tqdm.auto import tqdm
from transformers import GPT2Config, GPT2LMHeadModel

from adasplash import AlphaSchedule, adasplash, register_with_transformers, set_alpha
from adasplash.demo.run import load_tokenizer, measure_sparsity
from adasplash.demo.train import encode, read_books
from adasplash.testing import (
    attention_inputs,
    oracle_attention,
    oracle_weights,
    relative_error,
)
from fourfold_common import Results, pick_device, seed_everything, time_call

ATTENTION = {"entmax": "adasplash", "softmax": "sdpa"}
ALPHA = 1.5
BACKENDS = {
    "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION,
    "SDPA flash": SDPBackend.FLASH_ATTENTION,
    "SDPA math": SDPBackend.MATH,  # on the CPU
}
LOG = ("model", "step", "alpha", "training_loss", "validation_loss", "seconds_per_step")


def build(kind: str, options: argparse.Namespace, vocab: int, end: int) -> GPT2LMHeadModel:
    """Return a GPT-2 with random weights; the same for both kinds."""
    torch.manual_seed(options.seed)
    config = GPT2Config(
        vocab_size=vocab, n_positions=options.context, n_embd=options.width, n_layer=options.layers,
        n_head=options.heads, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False,
        bos_token_id=end, eos_token_id=end, attn_implementation=ATTENTION[kind],
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def autocast(device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def loss_of(model: GPT2LMHeadModel, ids: Tensor) -> Tensor:
    """Return the mean next-token loss of windows `[batch, context + 1]`."""
    with autocast(ids.device):
        logits = model(ids[:, :-1]).logits
    return cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())


@torch.no_grad()
def validate(model: GPT2LMHeadModel, windows: Tensor, batch: int) -> float:
    """Return the mean loss over windows, all of one length."""
    losses = [loss_of(model, part.long()).item() * len(part) for part in windows.split(batch)]
    return sum(losses) / len(windows)


def windows_of(stream: Tensor, context: int) -> Tensor:
    """Cut a stream into windows that overlap by one token, `[windows, context + 1]`."""
    if len(stream) <= context:
        raise SystemExit(f"the text is too short: {len(stream)} tokens, context {context}")
    return stream.unfold(0, context + 1, context)


class Training:
    """One model with its optimiser; `folder/KIND.pt` holds both, and the step they are at."""

    def __init__(self, kind: str, options: argparse.Namespace, vocab: int, end: int) -> None:
        self.kind, self.options, self.step = kind, options, 0
        self.device = torch.device(options.device)
        self.model = build(kind, options, vocab, end).to(self.device)
        matrices = [p for p in self.model.parameters() if p.ndim > 1]
        vectors = [p for p in self.model.parameters() if p.ndim == 1]
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
            lr=options.rate, betas=(0.9, 0.95), fused=self.device.type == "cuda",
        )  # fmt: skip
        self.annealed = torch.tensor(1.01, device=self.device)  # alpha while it moves
        if options.compile:
            for block in self.model.transformer.h:
                block.compile(dynamic=False)
        self.path = options.output / f"{kind}.pt"

    def set_alpha(self, steps: int) -> float:
        """Set alpha of the step that comes; return it, 1 for softmax."""
        if self.kind == "softmax":
            return 1.0
        alpha = AlphaSchedule(1.01, ALPHA, round(self.options.anneal * steps))(self.step)
        # A tensor may change between steps without a new compilation; 1.5 has kernels of its own.
        self.annealed.fill_(alpha)
        set_alpha(self.model, self.annealed if alpha < ALPHA else ALPHA)
        return alpha

    def train_step(self, stream: Tensor, steps: int) -> Tensor:
        """Take one step; the step alone decides which windows it sees."""
        options = self.options
        draw = torch.Generator().manual_seed(options.seed * 1_000_003 + self.step)
        last = len(stream) - options.context - 1
        offsets = torch.randint(last + 1, (options.batch, 1), generator=draw).to(self.device)
        ids = stream[offsets + torch.arange(options.context + 1, device=self.device)].long()
        warm = min(1.0, (self.step + 1) / min(100, 1 + steps // 10))
        cosine = 0.05 + 0.95 * (0.5 + 0.5 * math.cos(math.pi * self.step / steps))
        for group in self.optimizer.param_groups:
            group["lr"] = options.rate * warm * cosine
        loss = loss_of(self.model, ids)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        return loss.detach()

    def save(self) -> None:
        """Write the checkpoint, whole or not at all."""
        content = {
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        part = self.path.with_suffix(".part")
        torch.save(content, part)
        os.replace(part, self.path)

    def load(self) -> None:
        """Go on from the checkpoint, if there is one."""
        if self.path.exists():
            content = torch.load(self.path, map_location=self.device, weights_only=True)
            self.model.load_state_dict(content["model"])
            self.optimizer.load_state_dict(content["optimizer"])
            self.step = content["step"]


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def affordable_steps(
    options: argparse.Namespace, stream: Tensor, vocab: int, end: int, tries: int = 6
) -> int:
    """Return how many steps both trainings can take within `--seconds`, from a trial of both."""
    spent = 0.0
    for kind in ATTENTION:
        trial = Training(kind, options, vocab, end)
        for attempt in range(tries):
            if attempt == tries // 2:
                wait(trial.device)
                begin = time.perf_counter()
            trial.set_alpha(10_000)
            trial.train_step(stream, 10_000)
        wait(trial.device)
        spent += (time.perf_counter() - begin) / (tries - tries // 2)
    return max(1, int(options.seconds / spent))


def read_log(path: Path, kind: str, step: int) -> list[dict[str, str]]:
    """Return the rows that a training which goes on from a step keeps, and those of others."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [r for r in csv.DictReader(file) if r["model"] != kind or int(r["step"]) <= step]


def write_log(path: Path, rows: list[dict[str, str]]) -> None:
    part = path.with_suffix(".part")
    with part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, LOG)
        writer.writeheader()
        writer.writerows(rows)
    os.replace(part, path)


def train(training: Training, stream: Tensor, valid: Tensor, steps: int) -> None:
    """Train to the last step, from where the checkpoint stands; write log and checkpoints."""
    options, path = training.options, training.options.output / "log.csv"
    training.load()
    rows = read_log(path, training.kind, training.step)
    every = max(1, steps // options.logged)
    bar = tqdm(total=steps, initial=training.step, desc=training.kind, disable=options.quiet)
    wait(training.device)
    begin, counted = time.perf_counter(), 0
    while training.step < steps:
        alpha = training.set_alpha(steps)
        loss = training.train_step(stream, steps)
        counted += 1
        bar.update()
        if training.step % every and training.step != steps:
            continue
        wait(training.device)
        seconds = (time.perf_counter() - begin) / counted
        held = validate(training.model, valid[: options.checked], options.batch)
        values = (training.kind, training.step, f"{alpha:.4f}", f"{loss.item():.4f}",
                  f"{held:.4f}", f"{seconds:.5f}")  # fmt: skip
        rows.append(dict(zip(LOG, map(str, values), strict=True)))
        bar.set_postfix(loss=f"{loss.item():.3f}", valid=f"{held:.3f}", alpha=f"{alpha:.3f}")
        if training.step % (every * options.save_every) == 0 or training.step == steps:
            training.save()
        write_log(path, rows)
        wait(training.device)
        begin, counted = time.perf_counter(), 0
    bar.close()


def heads_of(model: GPT2LMHeadModel, ids: Tensor) -> list[tuple[Tensor, ...]]:
    """Return q, k and v of every layer for one batch, as the attention gets them."""
    with autocast(ids.device):
        return attention_inputs(model, ids)


def sparsity(results: Results, model: GPT2LMHeadModel, windows: Tensor, length: int) -> None:
    """Add the share of exact zeros in every layer, from dense float64 weights of ours."""
    shares: dict[int, list[tuple[float, float]]] = {}
    for window in windows:
        for layer, (q, k, _) in enumerate(heads_of(model, window[None, :length].long())):
            for head in range(q.shape[1]):
                weights = oracle_weights(q[:, head : head + 1], k[:, head : head + 1], True)[0]
                one = measure_sparsity(weights)[0]
                shares.setdefault(layer, []).append((one.zero_weights, one.empty_blocks))
    for layer, pairs in shares.items():
        for name, values in zip(
            ("zero weights", "empty 64x64 blocks"), zip(*pairs, strict=True), strict=True
        ):
            mean = sum(values) / len(values)
            results.add("entmax", name, mean, "", n=len(values), length=length, layer=layer)


def softmax(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(backend):
        return scaled_dot_product_attention(q, k, v, is_causal=True)


def speed(results: Results, model: GPT2LMHeadModel, ids: Tensor, layers: list[int]) -> None:
    """Check our attention against float64 on real inputs, then time it beside torch's."""
    cuda = ids.device.type == "cuda"
    contenders = {"adasplash": partial(adasplash, is_causal=True)}
    for name, backend in BACKENDS.items():
        if cuda != (name == "SDPA math"):
            contenders[name] = partial(softmax, backend)
    heads = heads_of(model, ids)
    for layer in layers:
        q, k, v = (x.contiguous() for x in heads[layer])
        case = {"length": ids.shape[1], "layer": layer, "batch": len(ids)}
        grad = torch.randn_like(v)
        error = worst_error(q[:1, :2], k[:1, :2], v[:1, :2], grad[:1, :2])
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        for name, attend in contenders.items():

            def forward(attend=attend, inputs=(q, k, v)):
                with torch.no_grad():
                    attend(*inputs)

            def both(attend=attend, leaves=leaves, grad=grad):
                torch.autograd.grad(attend(*leaves), leaves, grad)

            for metric, call in (("forward", forward), ("forward + backward", both)):
                try:
                    timing = time_call(call, ids.device, warmup_ms=10, rep_ms=30)
                except RuntimeError as reason:  # this backend is not in this build of torch
                    print(f"{name} cannot run here: {str(reason).splitlines()[0]}", flush=True)
                    break
                results.add(name, metric, timing.median_ms, "ms", p20=timing.p20_ms,
                            p80=timing.p80_ms, n=timing.n, **case,
                            error=error if name == "adasplash" else None)  # fmt: skip


def worst_error(q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> float:
    """Return the largest relative error of our output and gradients against float64."""
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    output = adasplash(*leaves, is_causal=True)
    found = (output.detach(), *torch.autograd.grad(output, leaves, grad))
    want = oracle_attention(q, k, v, True, grad=grad)
    return max(relative_error(x, y) for x, y in zip(found, want, strict=True))


def measure(options: argparse.Namespace, stream_valid: Tensor, vocab: int, end: int) -> Results:
    """Return everything that is measured on the trained models."""
    results = Results("adasplash", command="reproduce_gpt2.py", seed=options.seed)
    # One text for every length: the windows begin at the same places.
    windows = windows_of(stream_valid, options.context)
    options = argparse.Namespace(**vars(options) | {"compile": False})  # many shapes, used once
    rows = read_log(options.output / "log.csv", "", 0)
    for kind in ATTENTION:
        training = Training(kind, options, vocab, end)
        training.load()
        training.set_alpha(training.step)
        size = sum(p.numel() for p in training.model.parameters())
        loss = validate(training.model, windows, options.batch)
        case = {"steps": training.step, "batch": options.batch, "context": options.context}
        results.add(kind, "validation loss", loss, "nats", n=windows[:, 1:].numel(), **case)
        results.add(kind, "parameters", size, "", **case)
        own = [row for row in rows if row["model"] == kind]
        for metric, chosen in (
            ("step while alpha moves", [r for r in own if 1 < float(r["alpha"]) < ALPHA]),
            ("step", [r for r in own if float(r["alpha"]) in (1.0, ALPHA)]),
        ):
            times = [float(row["seconds_per_step"]) for row in chosen]
            if times:  # the first of several holds the compilation: hence the median
                results.add(kind, metric, median(times), "s", n=len(times), **case)
        if kind == "entmax":
            model = training.model
    for length in options.lengths:
        sparsity(results, model, windows[: options.windows], length)
        ids = windows[: options.batch, :length].long()
        speed(results, model, ids, list(range(0, options.layers, options.timed)))
    return results


def draw(results: Results, rows: list[dict[str, str]], path: Path) -> None:
    """Write losses, empty blocks by layer, and speed against softmax as one PNG."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (losses, blocks, ratios) = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    for kind in ATTENTION:
        own = [row for row in rows if row["model"] == kind]
        losses.plot([int(r["step"]) for r in own], [float(r["validation_loss"]) for r in own],
                    label=kind)  # fmt: skip
    losses.set(xlabel="step", ylabel="validation loss (nats)", title="Same data, same steps")
    losses.legend()
    for length in sorted({c["parameters"]["length"] for c in results.cases if by_length(c)}):
        own = [c for c in results.cases if by_length(c) and c["parameters"]["length"] == length]
        empty = [c for c in own if c["metric"] == "empty 64x64 blocks"]
        layers = [c["parameters"]["layer"] for c in empty]
        blocks.plot(layers, [100 * c["median"] for c in empty], marker=".", label=f"{length:,}")
    blocks.set(
        ylim=(0, 100),
        xlabel="layer",
        ylabel="empty causal 64x64 blocks (%)",
        title="1.5-entmax, trained",
    )
    blocks.legend(title="tokens")
    for metric in ("forward", "forward + backward"):
        speeds = ratios_by_length(results, metric)
        ratios.plot(list(speeds), list(speeds.values()), marker="o", label=metric)
    ratios.axhline(1, color="grey", linewidth=0.8)
    ratios.set_xscale("log", base=2)
    ratios.set(xlabel="tokens", ylabel="times as fast as the best SDPA",
               title="On the model's own q and k")  # fmt: skip
    ratios.legend()
    part = path.with_suffix(".part")
    figure.savefig(part, dpi=110, format="png")
    part.replace(path)
    plt.close(figure)


def by_length(case: dict) -> bool:
    return "length" in case["parameters"]


def ratios_by_length(results: Results, metric: str) -> dict[int, float]:
    """Return the time of torch's fastest attention over ours, summed over the timed layers."""
    totals: dict[int, dict[str, float]] = {}
    for case in results.cases:
        if case["metric"] == metric and by_length(case):
            own = totals.setdefault(case["parameters"]["length"], {})
            own[case["provider"]] = own.get(case["provider"], 0.0) + case["median"]
    return {
        length: min(t for name, t in own.items() if name != "adasplash") / own["adasplash"]
        for length, own in sorted(totals.items())
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--train", type=Path, required=True, help=".jsonl.xz or .gz, field `text`")
    parser.add_argument("--valid", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--books", type=int, default=0, help="use only so many; 0 for all")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=8, help="windows of the context a step")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seconds", type=float, help="instead of --steps: time for both trainings")
    parser.add_argument("--anneal", type=float, default=0.5, help="share of the steps")
    parser.add_argument("--rate", type=float, default=6e-4, help="peak learning rate")
    parser.add_argument("--logged", type=int, default=20, help="validations of a training")
    parser.add_argument("--checked", type=int, default=16, help="windows of a validation")
    parser.add_argument("--save-every", type=int, default=4, help="validations per checkpoint")
    parser.add_argument("--lengths", type=int, nargs="+", help="contexts that are measured")
    parser.add_argument("--windows", type=int, default=1, help="windows for the sparsity")
    parser.add_argument("--timed", type=int, default=1, help="time every n-th layer")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    options = parser.parse_args(arguments)
    options.device = str(pick_device(options.device)[0])
    if options.compile is None:
        options.compile = options.device != "cpu"
    if options.lengths is None:
        options.lengths = [options.context >> i for i in (3, 2, 1, 0)]
    if max(options.lengths) > options.context or min(options.lengths) < 1:
        parser.error(f"--lengths must be from 1 to the context of {options.context}")
    run(options)


def run(options: argparse.Namespace) -> None:
    """Train what is not trained yet, then measure."""
    options.output.mkdir(parents=True, exist_ok=True)
    register_with_transformers()
    seed_everything(options.seed)
    torch.set_float32_matmul_precision("high")
    # Where a block cannot be compiled it runs as it is.
    torch._dynamo.config.suppress_errors = True
    tokenizer = load_tokenizer()
    texts = read_books(options.train)
    texts = texts[: options.books] if options.books else texts
    stream = encode(tokenizer, texts).to(options.device)
    valid = encode(tokenizer, read_books(options.valid)).to(options.device)
    vocab, end = len(tokenizer), tokenizer.eos_token_id
    print(f"{len(stream):,} training and {len(valid):,} validation tokens on {options.device}",
          flush=True)  # fmt: skip
    names = ("layers", "width", "heads", "context", "batch", "books", "rate", "anneal", "seed")
    settings = {name: getattr(options, name) for name in names} | {"tokens": len(stream)}
    stored = options.output / "settings.json"
    if stored.exists():
        before = json.loads(stored.read_text())
        steps = before.pop("steps")
        if before != settings:
            raise SystemExit(f"{options.output} holds another run: {before}; choose a new folder")
    else:
        timed = options.seconds is not None
        steps = affordable_steps(options, stream, vocab, end) if timed else options.steps
        stored.write_text(json.dumps(settings | {"steps": steps}, indent=1) + "\n")
    print(f"{steps} steps of {options.batch * options.context:,} tokens", flush=True)
    windows = windows_of(valid, options.context)
    for kind in ATTENTION:
        train(Training(kind, options, vocab, end), stream, windows, steps)
    results = measure(options, valid, vocab, end)
    results.save(options.output / "results.json")
    rows = read_log(options.output / "log.csv", "", 0)
    draw(results, rows, options.output / "results.png")
    for case in results.cases:
        if not by_length(case):
            print(f"{case['provider']}: {case['metric']} {case['median']:.5g} {case['unit']}")
    for length in options.lengths:
        for metric in ("zero weights", "empty 64x64 blocks"):
            shares = [c["median"] for c in results.cases
                      if c["metric"] == metric and c["parameters"]["length"] == length]  # fmt: skip
            print(f"{length} tokens, {metric} by layer:", *(f"{100 * x:.0f}%" for x in shares))
    for metric in ("forward", "forward + backward"):
        for length, ratio in ratios_by_length(results, metric).items():
            print(f"{length} tokens, {metric}: {ratio:.2f} x the speed of the best SDPA")


if __name__ == "__main__":
    main()
