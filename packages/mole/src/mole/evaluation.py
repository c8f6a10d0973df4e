"""Loss of a language model on held-out text, with its uncertainty."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import log
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

_RESAMPLES = 2000


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


@torch.no_grad()
def window_losses(
    model: Any, tokens: Int[Tensor, " total"], context: int, batch: int = 16
) -> Float[Tensor, "windows positions"]:
    """Return the loss of every predicted token in consecutive windows, in nats, float32 on CPU.

    Windows do not overlap; the first token of each is not predicted, and a rest shorter than a
    window is dropped.

    Args:
        model: A causal language model of transformers; its mode and device are kept.
        tokens: The text's ids.
        context: Tokens in a window, at least 2.
        batch: Windows in one forward pass.

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
    for ids in windows.split(batch):
        ids = ids.to(model.device).long()
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
        )
        losses.append(loss.view(len(ids), -1).cpu())
    return torch.cat(losses)


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


__all__ = ["Loss", "paired_difference", "summarise", "window_losses"]
