"""Loss of a language model on held-out text, with its uncertainty."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import log
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

_RESAMPLES = 2000
_TOKENS = 8192  # in one forward pass: logits of a large vocabulary take most of the memory
_BYTE = re.compile("<0x[0-9A-F]{2}>")


@dataclass(frozen=True)
class Loss:
    """Mean loss over held-out text.

    Attributes:
        nats: Nats per token.
        low: Lower end of its 95 % bootstrap interval over windows.
        high: Upper end.
        bits_per_byte: Bits per byte of the predicted text.
        tokens: Number of predicted tokens.
    """

    nats: float
    low: float
    high: float
    bits_per_byte: float
    tokens: int


@dataclass(frozen=True)
class Cloze:
    """How well a model completes passages by their last word.

    Attributes:
        accuracy: Share of passages whose last word the model would have written.
        low: Lower end of its 95 % bootstrap interval over passages.
        high: Upper end.
        nats: Mean nats for a last word.
        passages: Number of passages.
    """

    accuracy: float
    low: float
    high: float
    nats: float
    passages: int


@torch.no_grad()
def last_word_cloze(
    model: Any,
    tokenizer: Any,
    passages: Sequence[str],
    seed: int = 0,
    *,
    progress: bool = False,
) -> Cloze:
    """Return how well a model predicts the last word of every passage, greedily.

    A word counts only if all its tokens are the likeliest. Passages that do not fit into the
    model's context lose their beginning.

    Args:
        model: A causal language model of transformers; its mode and device are kept.
        tokenizer: Its tokenizer.
        passages: Texts of at least two words.
        seed: Seed of the bootstrap.
        progress: Show a progress bar.

    Raises:
        ValueError: There is no passage, or one has fewer than two words.

    Source: the task of Paperno et al. 2016 (arXiv 1606.06031), on any text.
    """
    right, nats = [], []
    bar = tqdm(passages, desc="passages", unit="passage", disable=not progress)
    for number, passage in enumerate(bar):
        before, _, word = passage.strip().rpartition(" ")
        if not before.strip():
            raise ValueError(f"`passages` must have at least two words; number {number} has not.")
        context = tokenizer(before, add_special_tokens=False).input_ids
        target = tokenizer(" " + word, add_special_tokens=False).input_ids
        room = model.config.max_position_embeddings - len(target)
        ids = torch.tensor([context[-room:] + target], device=model.device)
        keep = len(target) + 1
        logits = model(input_ids=ids, use_cache=False, logits_to_keep=keep).logits[0, :-1].float()
        wanted = ids[0, -len(target) :]
        right.append(float((logits.argmax(-1) == wanted).all()))
        nats.append(float(torch.nn.functional.cross_entropy(logits, wanted, reduction="sum")))
    if not right:
        raise ValueError("`passages` must hold at least one passage; got none.")
    found = torch.tensor(right, dtype=torch.float64)
    low, high = _interval(found, seed)
    return Cloze(found.mean().item(), low, high, sum(nats) / len(nats), len(nats))


@torch.no_grad()
def window_losses(
    model: Any,
    tokens: Int[Tensor, " total"],
    context: int,
    batch: int | None = None,
    *,
    progress: bool = False,
) -> Float[Tensor, "windows positions"]:
    """Return the loss of every predicted token in consecutive windows, in nats, float32 on CPU.

    Windows do not overlap; the first token of each is not predicted, and a rest shorter than a
    window is dropped.

    Args:
        model: A causal language model of transformers; its mode and device are kept.
        tokens: The text's ids.
        context: Tokens in a window, at least 2.
        batch: Windows in one forward pass; if None as many as have 8,192 tokens, at least one.
        progress: Show a progress bar.

    Raises:
        ValueError: The text is shorter than one window.

    Source: own.
    """
    if context < 2 or len(tokens) < context:
        raise ValueError(
            f"`tokens` must hold at least one window of `context` >= 2 tokens; "
            f"got {len(tokens)} tokens and context {context}."
        )
    windows = tokens[: len(tokens) // context * context].view(-1, context)
    losses = []
    bar = tqdm(total=len(windows), desc="windows", unit="window", disable=not progress)
    with bar:
        for ids in windows.split(batch or max(1, _TOKENS // context)):
            ids = ids.to(model.device).long()
            logits = model(input_ids=ids, use_cache=False).logits
            for row, own in zip(logits, ids, strict=True):  # one window's in float32 at a time
                loss = torch.nn.functional.cross_entropy(
                    row[:-1].float(), own[1:], reduction="none"
                )
                losses.append(loss)
            bar.update(len(ids))
    return torch.stack(losses).cpu()


def summarise(
    losses: Float[Tensor, "windows positions"],
    tokens: Int[Tensor, " total"],
    token_bytes: Sequence[int],
    seed: int = 0,
) -> Loss:
    """Return the mean loss, its bootstrap interval over windows, and bits per byte.

    Args:
        losses: What `window_losses` returned.
        tokens: The ids it was given.
        token_bytes: Bytes of text that every id stands for.
        seed: Seed of the bootstrap.

    Source: own; percentile bootstrap (Efron 1979).
    """
    count, positions = losses.shape
    windows = tokens[: count * (positions + 1)].view(count, positions + 1)
    size = torch.tensor(token_bytes)[windows[:, 1:].long()].sum().item()
    low, high = _interval(losses.double().mean(1), seed)
    return Loss(
        nats=losses.double().mean().item(),
        low=low,
        high=high,
        bits_per_byte=losses.double().sum().item() / log(2) / size,
        tokens=losses.numel(),
    )


def token_bytes(tokenizer: Any) -> list[int]:
    """Return how many bytes of text every id stands for; special tokens stand for none.

    Args:
        tokenizer: A transformers tokenizer: byte-level, or one that spells its tokens out, with
            `\u2581` for a space and `<0xE6>` for a byte.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    byte_level = "ByteLevel" in repr(getattr(backend, "decoder", None))
    special = set(tokenizer.all_special_ids)

    def size(token: str) -> int:
        if byte_level:
            return len(token)  # in the byte-level alphabet every character is one byte
        return 1 if _BYTE.fullmatch(token) else len(token.replace("\u2581", " ").encode())

    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    return [0 if i in special else size(token) for i, token in enumerate(tokens)]


def paired_difference(
    losses: Float[Tensor, "windows positions"],
    others: Float[Tensor, "windows positions"],
    seed: int = 0,
) -> dict[str, float]:
    """Return mean and 95 % bootstrap interval of `losses - others`, window by window, in nats.

    Source: own; percentile bootstrap (Efron 1979).
    """
    gaps = (losses.double() - others.double()).mean(1)
    low, high = _interval(gaps, seed)
    return {"nats": gaps.mean().item(), "low": low, "high": high}


def _interval(means: Tensor, seed: int) -> tuple[float, float]:
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(len(means), (_RESAMPLES, len(means)), generator=generator)
    low, high = means[picks].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=means.dtype))
    return low.item(), high.item()


__all__ = [
    "Cloze",
    "Loss",
    "last_word_cloze",
    "paired_difference",
    "summarise",
    "token_bytes",
    "window_losses",
]
