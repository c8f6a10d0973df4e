"""Scores of concepts against image tokens, and their running means."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

Normalize = Literal["l2", "cosine", "linear"]
Temperature = float | Literal["auto"]


def concept_scores(
    concepts: Float[Tensor, "batch concepts dim"],
    patches: Float[Tensor, "batch patches dim"],
    normalize: Normalize | None = None,
) -> Float[Tensor, "batch concepts patches"]:
    """Return float32 dot products of every concept with every image token.

    Args:
        concepts: Concept vectors.
        patches: Image vectors.
        normalize: None for raw products; "l2" gives concept vectors length 1; "cosine" both sides;
            "linear" maps every feature of the concepts to shares that add up to 1.

    Source: Helbling et al. 2025, equation of the output-space map; "linear" is the evaluation
        code's normalisation.
    """
    concepts, patches = normalized(concepts, normalize), patches.float()
    if normalize == "cosine":
        patches = torch.nn.functional.normalize(patches, dim=-1)
    return concepts @ patches.mT


def heat_map(
    queries: Float[Tensor, "batch heads patches dim"],
    keys: Float[Tensor, "batch heads tokens dim"],
) -> Float[Tensor, "batch tokens patches"]:
    """Return how much image tokens attend to each token of the text, on average over heads.

    Args:
        queries: Of the image tokens.
        keys: Of the text tokens, which share the attention of every image token.

    Source: Tang et al. 2023 (arXiv 2210.04885), for joint attention: its text columns alone.
    """
    total = queries.new_zeros(len(queries), queries.shape[2], keys.shape[2], dtype=torch.float32)
    for head in range(queries.shape[1]):
        logits = queries[:, head] @ keys[:, head].mT
        total += (logits.float() / queries.shape[-1] ** 0.5).softmax(-1)
    return total.mT / queries.shape[1]


def normalized(
    concepts: Float[Tensor, "batch concepts dim"], normalize: Normalize | None
) -> Float[Tensor, "batch concepts dim"]:
    """Return float32 concept vectors, normalised as `concept_scores` does."""
    concepts = concepts.float()
    if normalize in ("l2", "cosine"):
        concepts = torch.nn.functional.normalize(concepts, dim=-1)
    if normalize == "linear":
        shifted = concepts - concepts.amin(dim=1, keepdim=True)
        total = shifted.sum(dim=1, keepdim=True)
        concepts = shifted / total.clamp(min=torch.finfo(torch.float32).tiny)
    return concepts


def spread(scores: Float[Tensor, "*shape"], temperature: Temperature) -> Tensor | float:
    """Return the divisor of scores before a softmax; "auto" is each image's standard deviation."""
    if temperature != "auto":
        return temperature
    sizes = tuple(range(1, scores.ndim))
    return scores.std(dim=sizes, keepdim=True, unbiased=False).clamp(min=1e-12)


def check_temperature(temperature: Temperature) -> None:
    """Check a temperature.

    Raises:
        ValueError: It is neither above 0 nor "auto".
    """
    if temperature == "auto":
        return
    if isinstance(temperature, str) or not temperature > 0:
        raise ValueError(f"`temperature` must be above 0 or 'auto'; got {temperature!r}.")


class RunningMean:
    """Float32 means of raw scores and of their softmax over concepts, without synchronising."""

    def __init__(self) -> None:
        self.raw: Tensor | None = None
        self.soft: Tensor | None = None
        self.count = 0

    def add(
        self, scores: Float[Tensor, "batch concepts patches"], temperature: Temperature
    ) -> None:
        """Count one layer at one step."""
        soft = (scores / spread(scores, temperature)).softmax(dim=1)
        self.count += 1
        if self.raw is None or self.soft is None:
            self.raw, self.soft = scores.clone(), soft
        else:
            self.raw += (scores - self.raw) / self.count
            self.soft += (soft - self.soft) / self.count

    def add_vectors(
        self,
        concepts: Float[Tensor, "batch concepts dim"],
        patches: Float[Tensor, "batch patches dim"],
        normalize: Normalize | None,
        temperature: Temperature,
        scale: float = 1.0,
        *,
        triton: bool = False,
    ) -> None:
        """Count one layer at one step from its vectors; scores are `scale` times their product."""
        from .kernels.concept import add_scores, reference

        if temperature == "auto":
            self.add(scale * concept_scores(concepts, patches, normalize), temperature)
            return
        if self.raw is None or self.soft is None:
            shape = (len(concepts), concepts.shape[1], patches.shape[1])
            self.raw, self.soft = (
                torch.zeros(shape, device=concepts.device, dtype=torch.float32) for _ in range(2)
            )
        self.count += 1
        add = add_scores if triton else reference.add_scores
        if normalize is not None:
            concepts = normalized(concepts, normalize)
        add(
            concepts, patches, self.raw, self.soft,
            self.count, temperature, scale, normalize == "cosine",
        )  # fmt: skip
