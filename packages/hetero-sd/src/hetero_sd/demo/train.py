"""Samples text from SmolLM2 and trains drafters on it, with vocabularies of their own.

Run as `python -m hetero_sd.demo.train --gguf FILE --data FOLDER --output FOLDER`; about seven
minutes on one H200. `--size 4m`, the smallest, makes the drafter that ships and the small target:
`assets.tar` in the output folder is unpacked into `hetero_sd/demo/assets`. Larger ones suit a GPU;
unpacked anywhere, they are given to the command line as `--drafter FOLDER/drafter`. `demo.distil`
teaches them further.

What the target writes is kept in `OUTPUT/texts`, and a later run goes on from there. `--texts`
takes such a folder instead, for one drafter after another or where the machine has no target; if it
is little, `--more FOLDER` adds text of a drafter trained before. `--start FOLDER` goes on with a
drafter trained before. The corpora are read too: training begins with all text and ends with the
target's own, of which a part is held out. The state that knows this part best is kept.
"""

from __future__ import annotations

import json
import logging
import math
import random
import tarfile
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor
from torch.nn import functional as F

from .._files import write_atomically
from . import smollm2
from .held_out import held_out_acceptance
from .prompts import Prompts
from .sampling import as_ids, read_texts, sample_texts, split
from .vocabularies import CONTEXT, train_drafter_tokenizer, train_target_tokenizer

_logger = logging.getLogger(__name__)
_CHECKS = 6  # Training ends where so many looks at held-out text in a row brought nothing.


@dataclass(frozen=True)
class Shape:
    """Sizes of one of our two models."""

    vocab: int
    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int


@dataclass(frozen=True)
class Size:
    """A drafter to train.

    Attributes:
        shape: Its sizes.
        rate: Its learning rate at the highest.
        ships: Whether it is the package's own, which the small target goes with.
    """

    shape: Shape
    rate: float
    ships: bool = False


# Wide and shallow: a drafter's time on a GPU goes by its layers, until its weights count.
SIZES = {
    "4m": Size(
        Shape(vocab=6144, hidden=256, inner=704, layers=3, heads=4, kv_heads=2), 3e-3, ships=True
    ),
    "20m": Size(Shape(vocab=16_384, hidden=512, inner=1408, layers=4, heads=8, kv_heads=2), 2e-3),
}
SMALL_TARGET = Shape(vocab=1024, hidden=192, inner=448, layers=4, heads=6, kv_heads=2)


# ------------------------------------------------------------------------------- models
def build(shape: Shape, tokenizer: Any) -> Any:
    """Return a Llama of this shape with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=max(len(tokenizer), 8),
            hidden_size=shape.hidden,
            intermediate_size=shape.inner,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def _stream(tokenizer: Any, texts: list[str]) -> Tensor:
    """Return all texts as one stream of ids."""
    parts = []
    for start in range(0, len(texts), 20_000):
        encoded = tokenizer.backend_tokenizer.encode_batch_fast(texts[start : start + 20_000])
        parts.append(torch.tensor([i for e in encoded for i in e.ids], dtype=torch.int32))
    return torch.cat(parts)


def fit(
    model: Any,
    stream: Tensor,
    *,
    name: str,
    seconds: float,
    batch: int,
    rate: float,
    log: list[dict[str, Any]],
    save: Any,
    seed: int,
    more: Tensor | None = None,
    held: Tensor | None = None,
) -> int:
    """Train on random windows of the stream until the time is over; return the tokens seen.

    The learning rate falls with the time used, so a slower machine makes fewer steps of the same
    schedule.

    Args:
        model: The model.
        stream: Ids of the text to learn.
        name: What the log calls the model.
        seconds: Time to train.
        batch: Windows a step.
        rate: Learning rate at the highest.
        log: Where to note losses.
        save: Called now and then.
        seed: Seed of the windows.
        more: Ids of other text. At first windows are taken from all text alike; by three quarters
            of the time the share of this one has fallen to nothing.
        held: Ids of text like the stream's, which says when to stop: the state that knows it best
            is kept, and training ends once it is known worse and worse.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device).train()
    other = len(more) if more is not None else 0
    stream = (torch.cat([more, stream]) if more is not None else stream).to(device)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.97), fused=device.type == "cuda")
    generator = torch.Generator(device).manual_seed(seed)
    window = min(CONTEXT, len(stream) - other - 2)
    places = torch.arange(window + 1, device=device)

    def loss_of(ids: Tensor) -> Tensor:
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())

    def held_loss() -> float:
        assert held is not None
        size = min(window + 1, len(held))
        rows = held[: len(held) // size * size].view(-1, size)
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, cuda):
            parts = [loss_of(part.to(device).long()).item() for part in rows[:256].split(32)]
        return sum(parts) / len(parts)

    cuda = device.type == "cuda"
    best: tuple[float, dict[str, Tensor]] | None = None
    since = 0
    step_loss = torch.compile(loss_of) if cuda else loss_of
    steps, used, saved, started = 0, 0.0, 0.0, time.perf_counter()
    running = torch.zeros((), device=device)
    while used < 1.0:
        warm = min(1.0, (steps + 1) / 100)
        for group in optimizer.param_groups:
            group["lr"] = rate * warm * (0.5 + 0.5 * math.cos(math.pi * used))
        spot = torch.rand(2, batch, 1, generator=generator, device=device)
        offsets = other + (spot[0] * (len(stream) - other - window)).long()
        if other:
            early = spot[1] < other / len(stream) * (1.0 - used / 0.75)
            offsets = torch.where(early, (spot[0] * (other - window)).long(), offsets)
        ids = stream[offsets + places].long()
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=cuda):
            loss = step_loss(ids)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        running = torch.lerp(running, loss.detach(), 1.0 if steps == 0 else 0.05)
        steps += 1
        if steps == 3:  # Compilation does not count as training time, but is bounded by it.
            value = running.item()
            if time.perf_counter() - started < 60:
                started = time.perf_counter()
        if steps % 50 == 0 or device.type == "cpu":
            value = running.item()
            elapsed = time.perf_counter() - started
            used = min(1.0, elapsed / seconds)
            rate_now = (steps - 3) * batch * window / max(elapsed, 1e-9)
            log.append(
                {"model": name, "step": steps, "loss": round(value, 4), "used": round(used, 4)}
            )
            if steps % 200 == 0 or used >= 1.0 or steps == 50:
                _logger.info(
                    "%s step %d loss %.4f %.2f M tok/s", name, steps, value, rate_now / 1e6
                )
            if held is not None and (steps % 200 == 0 or used >= 1.0):
                loss_held = held_loss()
                log[-1]["held"] = round(loss_held, 4)
                _logger.info("%s held out %.4f", name, loss_held)
                since += 1
                if best is None or loss_held < best[0]:
                    best = loss_held, {k: v.clone() for k, v in model.state_dict().items()}
                    since = 0
                elif since == _CHECKS:
                    _logger.info("%s learns its text by heart: stopped", name)
                    break
            if elapsed - saved > 60:
                saved = elapsed
                save()
    if best is not None:
        model.load_state_dict(best[1])
    return steps * batch * window


# ------------------------------------------------------------------------------- storing
def save_assets(
    output: Path,
    models: dict[str, tuple[Any, Any]],
    record: dict[str, Any],
    log: list[dict[str, Any]],
    sample: list[str],
) -> None:
    """Write `assets.tar`: each model in bfloat16 with its tokenizer, the record and the log."""
    from transformers import LlamaForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for name, (model, tokenizer) in models.items():
            state = {k: v.to(torch.bfloat16).cpu() for k, v in model.state_dict().items()}
            copy = LlamaForCausalLM(model.config).to(torch.bfloat16)
            copy.load_state_dict(state)
            copy.save_pretrained(root / name)
            tokenizer.save_pretrained(root / name)
        (root / "training.json").write_text(json.dumps(record, indent=1) + "\n")
        names = (
            "model",
            "step",
            "loss",
            "used",
            *(["held"] if any("held" in e for e in log) else []),
        )
        header = ",".join(names) + "\n"
        lines = [",".join(str(e.get(n, "")) for n in names) + "\n" for e in log]
        (root / "training_log.csv").write_text(header + "".join(lines))
        (root / "sample.txt").write_text("\n=====\n".join(sample), encoding="utf-8")

        def anonymous(entry: tarfile.TarInfo) -> tarfile.TarInfo:
            entry.mode, entry.uid, entry.gid, entry.uname, entry.gname = 0o644, 0, 0, "", ""
            return entry

        def pack(name: str) -> None:
            with tarfile.open(name, "w") as tar:
                for file in sorted(path for path in root.rglob("*") if path.is_file()):
                    tar.add(file, arcname=str(file.relative_to(root)), filter=anonymous)

        write_atomically(output / "assets.tar", pack)


# -------------------------------------------------------------------------------- text
@torch.no_grad()
def write_like(folder: Path, beginnings: list[str], *, seconds: float, rows: int) -> list[str]:
    """Return texts that a drafter trained before writes at temperature 1, from given beginnings.

    Args:
        folder: Folder of the drafter, as `save_pretrained` writes it.
        beginnings: Texts whose first words the drafter goes on from.
        seconds: Time to write, at least one batch.
        rows: Texts a batch.
    """
    cuda = torch.cuda.is_available()
    model, tokenizer = load_drafter(folder)
    model = model.eval().to("cuda", torch.bfloat16) if cuda else model.eval()
    draw, begun = random.Random(0), time.perf_counter()
    texts: list[str] = []
    known = [e.ids for e in tokenizer.backend_tokenizer.encode_batch_fast(beginnings)]
    while not texts or time.perf_counter() - begun < seconds:
        length = draw.choice((24, 48, 96))
        usable = [ids[:length] for ids in known if len(ids) >= length] or [known[0]]
        ids = torch.tensor(draw.choices(usable, k=rows), device=model.device)
        made = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=CONTEXT - length - 32,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            eos_token_id=[],
        )
        texts += tokenizer.backend_tokenizer.decode_batch(made.tolist(), skip_special_tokens=False)
        _logger.info("%d texts of the earlier drafter", len(texts))
    return texts


def _load_target(gguf: Path | None, data: Path) -> tuple[Any, Any]:
    """Return the target, or one of its shape with random weights, and its tokenizer."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if gguf is not None:
        target, tokenizer = smollm2.load(gguf, dtype)
        return target.to(device), tokenizer
    from transformers import AutoTokenizer, LlamaForCausalLM

    target = LlamaForCausalLM(smollm2.config()).to(device, dtype).eval()
    return target, AutoTokenizer.from_pretrained(data / "tokenizers" / "smollm2")


def load_drafter(folder: Path) -> tuple[Any, Any]:
    """Return a drafter trained before, with weights of float32, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).float()
    return model, AutoTokenizer.from_pretrained(folder, local_files_only=True)


# ------------------------------------------------------------------------------- command
@click.command()
@click.option(
    "--gguf",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="SmolLM2's GGUF file: it writes the texts if there are none, and judges the drafter.",
)
@click.option(
    "--texts",
    multiple=True,
    type=click.Path(exists=True, path_type=Path),
    help="What SmolLM2 wrote before, by `hetero_sd.demo.sampling`; may be repeated.",
)
@click.option(
    "--more",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="With --texts: a drafter trained before, whose text is added.",
)
@click.option(
    "--start",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="A drafter trained before, to go on with; it keeps its vocabulary and size.",
)
@click.option("--random-target", is_flag=True, help="Pilot: a target of the same shape, untrained.")
@click.option(
    "--size",
    type=click.Choice(tuple(SIZES)),
    default="4m",
    show_default=True,
    help="Parameters of the drafter.",
)
@click.option("--data", type=click.Path(file_okay=False, path_type=Path), required=True)
@click.option("--output", type=click.Path(file_okay=False, path_type=Path), required=True)
@click.option("--minutes", type=float, default=7.0, help="Time in all, about.")
@click.option("--rows", type=int, default=4096, help="Rows sampled at once.")
@click.option("--length", type=int, default=448, help="Tokens a sampled row.")
@click.option("--batch", type=int, default=256, help="Windows a training step.")
@click.option("--seed", type=int, default=0)
def main(
    gguf: Path | None,
    texts: tuple[Path, ...],
    more: Path | None,
    start: Path | None,
    random_target: bool,
    size: str,
    data: Path,
    output: Path,
    minutes: float,
    rows: int,
    length: int,
    batch: int,
    seed: int,
) -> None:
    """Sample text from SmolLM2 and train a drafter on it, with the smallest the small target."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    started = time.perf_counter()
    if not (gguf or texts or random_target) or (gguf and random_target):
        raise click.UsageError(
            "give `--gguf` or `--random-target`, or `--texts`, with one or alone"
        )
    if more and not texts:
        raise click.UsageError("`--more` goes with `--texts`")
    from transformers.utils import logging as transformers_logging

    from fourfold_common import seed_everything

    transformers_logging.disable_progress_bar()
    seed_everything(seed)
    torch.set_float32_matmul_precision("high")
    total = 60 * minutes
    prompts = Prompts(data, seed)
    target = _load_target(gguf, data) if gguf or random_target else None
    if target is not None and not texts:
        texts = (output / "texts",)
        batches: dict[str, Any] = {"rows": rows, "length": length, "seed": seed}
        sample_texts(*target, prompts, texts[0], seconds=0.42 * total, **batches)
        torch.cuda.empty_cache()
    ours, held = split(read_texts(texts), seed)
    other = prompts.corpora()
    if more is not None:
        other += write_like(more, ours, seconds=0.15 * total, rows=min(rows, 2048))
    written = sum(map(len, ours))
    seconds = time.perf_counter() - started
    _logger.info("%d texts, %.1f M characters, %.0f s", len(ours), written / 1e6, seconds)

    draw = random.Random(seed)
    some = draw.sample(ours, min(len(ours), 20_000))
    unmarked = [text.replace("</s>", "\n").replace("<s>", "\n") for text in some]
    chosen = SIZES[size]
    if start is None:
        drafter_tokenizer = train_drafter_tokenizer(unmarked, chosen.shape.vocab)
        drafter = build(chosen.shape, drafter_tokenizer)
    else:
        drafter, drafter_tokenizer = load_drafter(start)
    models = {"drafter": (drafter, drafter_tokenizer)}
    lines = {"drafter": ours, "more": other, "held": held}
    streams = {name: _stream(drafter_tokenizer, part) for name, part in lines.items()}
    both = chosen.ships and start is None
    if both:
        small_tokenizer = train_target_tokenizer(unmarked[:5_000], SMALL_TARGET.vocab)
        models["target"] = build(SMALL_TARGET, small_tokenizer), small_tokenizer
        streams["target"] = _stream(small_tokenizer, some)
    for name, stream in streams.items():
        _logger.info("%s: %.2f M tokens to read", name, len(stream) / 1e6)
    record: dict[str, Any] = {
        "source": "random weights" if random_target else smollm2.NAME,
        "seed": seed,
        "minutes": minutes,
        "sampled_rows": len(ours),
        "sampled_characters": written,
        "stream_tokens": {name: len(stream) for name, stream in streams.items()},
        "parameters": {n: sum(p.numel() for p in m.parameters()) for n, (m, _) in models.items()},
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }
    if start is not None and (start.parent / "training.json").is_file():
        record["start"] = json.loads((start.parent / "training.json").read_text())
    log: list[dict[str, Any]] = []
    sample = draw.sample(ours, min(60, len(ours)))

    def save() -> None:
        save_assets(output, models, record, log, sample)

    # What is left: a tenth for the small target, some for the evaluation, the rest for the drafter.
    spare = total - (time.perf_counter() - started) - 0.05 * total
    common: dict[str, Any] = {"batch": batch, "log": log, "save": save, "seed": seed}
    seen = {}
    if both:
        seen["target"] = fit(
            models["target"][0],
            streams["target"],
            name="target",
            seconds=max(0.14 * spare, 2.0),
            rate=3e-3,
            **common,
        )
        save()
    seen["drafter"] = fit(
        drafter,
        streams["drafter"],
        name="drafter",
        seconds=max((0.8 if both else 0.94) * spare, 2.0),
        rate=chosen.rate if start is None else chosen.rate / 2,
        more=streams["more"],
        held=streams["held"],
        **common,
    )
    record["trained_tokens"] = seen
    for model, _ in models.values():
        model.eval()
    save()
    try:
        if target is not None:
            some_held = [as_ids(target[1], text) for text in held[:256]]
            record["held_out_acceptance"] = held_out_acceptance(
                *target, drafter, drafter_tokenizer, some_held
            )
            _logger.info("acceptance %s", record["held_out_acceptance"])
    finally:
        record["seconds"] = round(time.perf_counter() - started, 1)
        save()
    _logger.info("done after %.0f s", record["seconds"])


if __name__ == "__main__":
    main()
