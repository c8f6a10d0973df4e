r"""Trains a drafter on the target's whole law of the next token, not only on the token it drew.

Run as `python -m hetero_sd.demo.distil --gguf FILE --texts FOLDER --output FOLDER` after
`demo.sampling`, with `--start FOLDER` to go on with a drafter of `demo.train`, or `--layers N` to
begin with as many layers of the target, behind a vocabulary of its own.

Where a token of the target and one of the drafter end at the same byte, both laws are of what
comes next, and TLI accepts $\sum_t \min(p(t), q'(t))$ over the shared tokens. There the loss is
the cross-entropy of the drafter's law $q'$ with the target's, both over the shared tokens;
everywhere it is, with a smaller weight, that of the text itself. One law says as much as many drawn
tokens, so that little text is not learnt by heart.
"""

from __future__ import annotations

import json
import logging
import math
import random
import time
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch
from torch import Tensor
from torch.nn import functional as F

from ..vocab import map_vocabularies
from . import smollm2
from .held_out import held_out_acceptance
from .sampling import as_ids, marked, read_texts, split
from .train import load_drafter, save_assets
from .vocabularies import CONTEXT, train_drafter_tokenizer

_logger = logging.getLogger(__name__)
_OUT = -1e4  # Added to the logits of tokens that are not shared: their probability is 0.
_TEXT = 0.3  # Weight of the text's own tokens beside the laws.


class Rows(NamedTuple):
    """Texts as tokens of both sides, filled up with zeros.

    Attributes:
        target: Target ids. Shape `(texts, length)`.
        drafter: Drafter ids. Shape `(texts, length)`.
        target_counts: Target ids of each text. Shape `(texts,)`.
        drafter_counts: Drafter ids of each text. Shape `(texts,)`.
    """

    target: Tensor
    drafter: Tensor
    target_counts: Tensor
    drafter_counts: Tensor

    def at(self, places: Tensor, device: torch.device) -> Rows:
        """Return some of the texts, on a device."""
        return Rows(*(part[places].to(device, torch.long) for part in self))


def _padded(lines: list[list[int]], width: int) -> tuple[Tensor, Tensor]:
    counts = torch.tensor([min(len(line), width) for line in lines])
    ids = torch.zeros(len(lines), min(width, int(counts.max())), dtype=torch.int32)
    for row, line in enumerate(lines):
        ids[row, : counts[row]] = torch.tensor(line[:width], dtype=torch.int32)
    return ids, counts


def as_rows(target_tokenizer: Any, drafter_tokenizer: Any, texts: list[str]) -> Rows:
    """Return texts as tokens of both sides, cut to the context of the demo's models.

    Args:
        target_tokenizer: The target's tokenizer.
        drafter_tokenizer: The drafter's tokenizer.
        texts: Texts with `<s>` and `</s>` for the marks of turns.
    """
    ours = target_tokenizer.backend_tokenizer.encode_batch_fast([marked(text) for text in texts])
    theirs = drafter_tokenizer.backend_tokenizer.encode_batch_fast(texts)
    target, target_counts = _padded([e.ids for e in ours], CONTEXT)
    drafter, drafter_counts = _padded([e.ids for e in theirs], CONTEXT)
    return Rows(target, drafter, target_counts, drafter_counts)


def _sizes(table: list[bytes | None], rows: int, device: torch.device) -> Tensor:
    """Return the bytes of each token; special ones count 1, as the mark of the other side does."""
    sizes = [1 if spelled is None else len(spelled) for spelled in table[:rows]]
    return torch.tensor(sizes + [1] * (rows - len(sizes)), device=device)


class Teacher:
    """The target's laws in places of the drafter.

    Args:
        target: The target, a `LlamaForCausalLM`.
        target_tokenizer: Its tokenizer.
        drafter_tokenizer: The drafter's tokenizer.
        size: Rows of the drafter's head.
    """

    def __init__(
        self, target: Any, target_tokenizer: Any, drafter_tokenizer: Any, size: int
    ) -> None:
        self._body = target.model
        weight = target.lm_head.weight.detach()
        device = weight.device
        mapping = map_vocabularies(
            target_tokenizer,
            drafter_tokenizer,
            target_eos=[target_tokenizer.eos_token_id],
            drafter_eos=[drafter_tokenizer.eos_token_id],
            target_size=weight.shape[0],
            drafter_size=size,
        )
        columns = torch.zeros(size, dtype=torch.long)
        self.mask = torch.full((size,), _OUT, device=device)
        # Of several spellings of a token, the last stands for it: the first ones are byte tokens.
        pairs = zip(mapping.to_target.tolist(), mapping.keep.tolist(), strict=True)
        for other, own in dict(pairs).items():
            columns[own] = other
            self.mask[own] = 0.0
        self._head = weight[columns.to(device)]
        self._target_sizes = _sizes(mapping.target_bytes, weight.shape[0], device)
        self._drafter_sizes = _sizes(mapping.drafter_bytes, size, device)

    @torch.no_grad()
    def __call__(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """Return logits by drafter id, and where they hold.

        Args:
            rows: Texts on the target's device.

        Returns:
            The target's logits of the token after each drafter token, shape `(texts, length,
            size)`, and whether a target token ends there too, shape `(texts, length)`.
        """
        ends = self._target_sizes[rows.target].cumsum(1)
        steps = torch.arange(max(rows.target.shape[1], rows.drafter.shape[1]), device=ends.device)
        inside = steps[: ends.shape[1]] < rows.target_counts[:, None]
        ends = torch.where(inside, ends, torch.iinfo(ends.dtype).max)
        own = self._drafter_sizes[rows.drafter].cumsum(1)
        places = torch.searchsorted(ends, own).clamp_(max=ends.shape[1] - 1)
        here = steps[: own.shape[1]] < rows.drafter_counts[:, None]
        common = here & (ends.gather(1, places) == own)
        states = self._body(input_ids=rows.target, use_cache=False).last_hidden_state
        states = states.gather(1, places[..., None].expand(-1, -1, states.shape[-1]))
        return F.linear(states, self._head), common


def _agreement(logits: Tensor, laws: Tensor, common: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean cross-entropy of both laws, and what TLI accepts of a proposal."""
    p = (laws.float() + mask).softmax(-1)
    log_q = (logits.float() + mask).log_softmax(-1)
    count = common.sum().clamp(min=1)
    apart = -(p * log_q).sum(-1)
    same = torch.minimum(p, log_q.exp()).sum(-1)
    return (apart * common).sum() / count, (same * common).sum() / count


def _loss(model: Any, rows: Rows, laws: Tensor, common: Tensor, mask: Tensor) -> Tensor:
    """Return the loss of a batch."""
    logits = model(input_ids=rows.drafter, use_cache=False).logits
    apart, _ = _agreement(logits, laws, common, mask)
    steps = torch.arange(1, rows.drafter.shape[1], device=logits.device)
    wanted = torch.where(steps < rows.drafter_counts[:, None], rows.drafter[:, 1:], -100)
    text = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), wanted.flatten())
    return apart + _TEXT * text


@torch.no_grad()
def accepted(model: Any, teacher: Teacher, rows: Rows, batch: int) -> float:
    """Return the share of proposals at temperature 1 that TLI would accept, of shared tokens.

    Args:
        model: The drafter.
        teacher: The target.
        rows: Texts, as many as are to be judged.
        batch: Texts a pass.
    """
    device, total, seen = teacher.mask.device, 0.0, 0
    for places in torch.arange(len(rows.target)).split(batch):
        part = rows.at(places, device)
        laws, common = teacher(part)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits = model(input_ids=part.drafter, use_cache=False).logits
        share = _agreement(logits, laws, common, teacher.mask)[1]
        total, seen = total + float(share) * len(places), seen + len(places)
    return total / seen


def distil(
    model: Any,
    teacher: Teacher,
    rows: Rows,
    held: Rows,
    *,
    seconds: float,
    batch: int,
    rate: float,
    seed: int,
    log: list[dict[str, Any]],
) -> int:
    """Train until the time is over; return the tokens seen. The best state on `held` is kept.

    Args:
        model: The drafter, with weights of float32.
        teacher: The target.
        rows: Texts to learn.
        held: Texts to judge by.
        seconds: Time to train, over which the learning rate falls.
        batch: Texts a step.
        rate: Learning rate at the highest.
        seed: Seed of the order of texts.
        log: Where to note losses.
    """
    device = teacher.mask.device
    cuda = device.type == "cuda"
    model.to(device).train()
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.97), fused=cuda)
    loss_of = torch.compile(_loss) if cuda else _loss
    generator = torch.Generator().manual_seed(seed)
    best: tuple[float, dict[str, Tensor]] | None = None
    steps, tokens, used, started = 0, 0, 0.0, time.perf_counter()
    running, order = 0.0, torch.empty(0, dtype=torch.long)
    while used < 1.0:
        if len(order) < batch:
            order = torch.randperm(len(rows.target), generator=generator)
        part, order = rows.at(order[:batch], device), order[batch:]
        for group in optimizer.param_groups:
            warm = min(1.0, (steps + 1) / 50)
            group["lr"] = rate * warm * (0.5 + 0.5 * math.cos(math.pi * used))
        laws, common = teacher(part)
        with torch.autocast(device.type, torch.bfloat16, enabled=cuda):
            loss = loss_of(model, part, laws, common, teacher.mask)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        steps += 1
        tokens += batch * rows.drafter.shape[1]
        if steps % 10 == 0 or not cuda:
            running = loss.item()
            used = min(1.0, (time.perf_counter() - started) / seconds)
        if steps % 200 == 0 or used >= 1.0:
            share = accepted(model.eval(), teacher, held, batch)
            model.train()
            entry = {"step": steps, "loss": round(running, 4), "used": round(used, 4)}
            log.append({"model": "drafter", **entry, "held": round(share, 4)})
            speed = tokens / (time.perf_counter() - started) / 1e6
            _logger.info(
                "step %d loss %.3f accepts %.4f %.2f M tok/s", steps, running, share, speed
            )
            if best is None or share > best[0]:
                best = share, {k: v.clone() for k, v in model.state_dict().items()}
    assert best is not None
    model.load_state_dict(best[1])
    model.eval()
    return tokens


@torch.no_grad()
def pruned(target: Any, target_tokenizer: Any, drafter_tokenizer: Any, layers: int) -> Any:
    """Return a drafter that begins with some of the target's layers, evenly spaced.

    A token that the target has too keeps its embedding; another one has the mean of the tokens that
    the target spells it with.

    Args:
        target: The target, a `LlamaForCausalLM` whose head is its embedding.
        target_tokenizer: Its tokenizer.
        drafter_tokenizer: The drafter's tokenizer.
        layers: Layers to take, 2 or more.

    Raises:
        ValueError: The target has fewer layers, or `layers` is below 2.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    old = target.config
    if not 2 <= layers <= old.num_hidden_layers:
        raise ValueError(f"`layers` must be 2 to {old.num_hidden_layers}; got {layers}.")
    size = max(len(drafter_tokenizer), 8)
    fields = old.to_dict()
    fields |= {name: getattr(drafter_tokenizer, name) for name in _ENDS}
    fields |= {
        "vocab_size": size,
        "num_hidden_layers": layers,
        "max_position_embeddings": CONTEXT,
        "tie_word_embeddings": True,
        "dtype": "float32",
    }
    model = LlamaForCausalLM(LlamaConfig(**fields)).float()
    chosen = [round(i * (old.num_hidden_layers - 1) / (layers - 1)) for i in range(layers)]
    for own, place in zip(model.model.layers, chosen, strict=True):
        own.load_state_dict(target.model.layers[place].state_dict())
    model.model.norm.load_state_dict(target.model.norm.state_dict())
    table = target.model.embed_tokens.weight.float().cpu()
    mapping = map_vocabularies(
        target_tokenizer,
        drafter_tokenizer,
        target_eos=[target_tokenizer.eos_token_id],
        drafter_eos=[drafter_tokenizer.eos_token_id],
        target_size=len(table),
    )
    known = dict(zip(mapping.keep.tolist(), mapping.to_target.tolist(), strict=True))
    middle = table.mean(0)
    weight = model.model.embed_tokens.weight
    for index in range(size):
        spelled = mapping.drafter_bytes[index] if index < len(mapping.drafter_bytes) else None
        text = (spelled or b"").decode("utf-8", "ignore")
        pieces = target_tokenizer(text, add_special_tokens=False).input_ids if text else []
        pieces = [known[index]] if index in known else pieces
        weight[index] = table[pieces].mean(0) if pieces else middle
    return model


_ENDS = ("bos_token_id", "eos_token_id", "pad_token_id")


@click.command()
@click.option(
    "--gguf",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    required=True,
    help="SmolLM2's GGUF file.",
)
@click.option(
    "--texts",
    multiple=True,
    required=True,
    type=click.Path(exists=True, path_type=Path),
    help="What SmolLM2 wrote, by `hetero_sd.demo.sampling`; may be repeated.",
)
@click.option(
    "--start",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="A drafter trained before, to go on with.",
)
@click.option("--layers", type=int, help="Begin with so many of SmolLM2's layers instead.")
@click.option("--vocab", default=16_384, show_default=True, help="Tokens, with --layers.")
@click.option("--output", type=click.Path(file_okay=False, path_type=Path), required=True)
@click.option("--minutes", default=3.0, show_default=True, help="Time to train.")
@click.option("--batch", default=64, show_default=True, help="Texts a step.")
@click.option("--rate", default=1e-3, show_default=True, help="Learning rate at the highest.")
@click.option("--limit", type=click.IntRange(8), help="Most texts to take.")
@click.option("--seed", default=0, show_default=True)
def main(
    gguf: Path,
    texts: tuple[Path, ...],
    start: Path | None,
    layers: int | None,
    vocab: int,
    output: Path,
    minutes: float,
    batch: int,
    rate: float,
    limit: int | None,
    seed: int,
) -> None:
    """Train a drafter on SmolLM2's laws over text that it wrote."""
    if (start is None) == (layers is None):
        raise click.UsageError("give one of `--start` and `--layers`")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    from fourfold_common import seed_everything

    seed_everything(seed)
    torch.set_float32_matmul_precision("high")
    began = time.perf_counter()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    target, tokenizer = smollm2.load(gguf, dtype)  # Not cast later, as its rotary table would be.
    ours, held = split(read_texts(texts)[:limit], seed)
    if start is not None:
        drafter, own = load_drafter(start)
    else:
        assert layers is not None
        some = random.Random(seed).sample(ours, min(len(ours), 20_000))
        own = train_drafter_tokenizer(
            [text.replace("</s>", "\n").replace("<s>", "\n") for text in some], vocab
        )
        drafter = pruned(target, tokenizer, own, layers)
    target.to(device)
    teacher = Teacher(target, tokenizer, own, drafter.config.vocab_size)
    rows, judged = (as_rows(tokenizer, own, part) for part in (ours, held[:256]))
    count = sum(p.numel() for p in drafter.parameters())
    _logger.info("%d texts, %.1f M parameters", len(ours), count / 1e6)
    log: list[dict[str, Any]] = []
    options: dict[str, Any] = {"batch": batch, "rate": rate, "seed": seed, "log": log}
    seen = distil(drafter, teacher, rows, judged, seconds=60 * minutes, **options)
    record: dict[str, Any] = {
        "source": smollm2.NAME,
        "seed": seed,
        "minutes": minutes,
        "batch": batch,
        "rate": rate,
        "sampled_rows": len(ours),
        "sampled_tokens": int(rows.target_counts.sum()),
        "layers_of_target": layers,
        "parameters": {"drafter": count},
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "distilled_tokens": seen,
    }
    if start is not None and (start.parent / "training.json").is_file():
        record["start"] = json.loads((start.parent / "training.json").read_text())
    models = {"drafter": (drafter, own)}
    output.mkdir(parents=True, exist_ok=True)
    save_assets(output, models, record, log, held[:8])
    judge = [as_ids(tokenizer, text) for text in held[:200]]
    record["held_out_acceptance"] = held_out_acceptance(target, tokenizer, drafter, own, judge)
    record["seconds"] = round(time.perf_counter() - began, 1)
    save_assets(output, models, record, log, held[:8])
    _logger.info("acceptance %s", record["held_out_acceptance"])


if __name__ == "__main__":
    main()
