"""Segmentation metrics, all read from one confusion matrix pooled over images."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


class Confusion:
    """Counts of (target, prediction) pairs of pixels, pooled over every image added.

    Args:
        classes: Number of classes, at least 2; class 0 is the background in `fg_iou`.

    Raises:
        ValueError: `classes` is below 2.
    """

    def __init__(self, classes: int) -> None:
        if classes < 2:
            raise ValueError(f"`classes` must be at least 2; got {classes}.")
        self.classes = classes
        self.counts = torch.zeros(classes, classes, dtype=torch.int64)

    def add(
        self,
        prediction: Int[Tensor, "*pixels"] | Bool[Tensor, "*pixels"],
        target: Int[Tensor, "*pixels"] | Bool[Tensor, "*pixels"],
    ) -> None:
        """Count the pixels of one or more images.

        Raises:
            ValueError: Shapes differ or a class number is out of range.
        """
        if prediction.shape != target.shape:
            raise ValueError(
                f"`prediction` must have the shape {tuple(target.shape)} of `target`; "
                f"got {tuple(prediction.shape)}."
            )
        for name, labels in (("prediction", prediction), ("target", target)):
            low, high = int(labels.min()), int(labels.max())
            if low < 0 or high >= self.classes:
                raise ValueError(
                    f"`{name}` must hold classes from 0 to {self.classes - 1}; got {low} to {high}."
                )
        pairs = target.long().flatten().cpu() * self.classes + prediction.long().flatten().cpu()
        counts = torch.bincount(pairs, minlength=self.classes**2)
        self.counts += counts.view(self.classes, self.classes)

    @property
    def accuracy(self) -> float:
        """Share of pixels that are right."""
        return float(_pooled(self.counts.double(), "accuracy"))

    @property
    def iou(self) -> Float[Tensor, " classes"]:
        """Intersection over union of each class; NaN for classes never seen nor predicted."""
        return _ious(self.counts.double()).float()

    @property
    def miou(self) -> float:
        """Mean of `iou` over the classes that occur."""
        return float(_pooled(self.counts.double(), "miou"))

    @property
    def fg_iou(self) -> float:
        """Mean of `iou` over the classes that occur, without class 0."""
        return float(_pooled(self.counts.double(), "fg_iou"))

    @property
    def miou_paper(self) -> float:
        """Acc / (2 − Acc): what the paper's code computes for one class, in place of mIoU.

        It stacks masks with their complements, after which both classes' IoU equal this number.
        """
        return float(_pooled(self.counts.double(), "miou_paper"))


def average_precision(scores: Float[Tensor, "*pixels"], target: Bool[Tensor, "*pixels"]) -> float:
    """Return the mean precision over the pixels of the target, from the highest score down.

    Pixels of equal score count together, so their order does not matter.

    Raises:
        ValueError: Shapes differ or the target is empty.
    """
    if scores.shape != target.shape:
        raise ValueError(
            f"`scores` must have the shape {tuple(target.shape)} of `target`; "
            f"got {tuple(scores.shape)}."
        )
    if not target.any():
        raise ValueError("`target` must hold at least one pixel; got none.")
    return float(average_precisions(scores.flatten()[None], target.flatten()[None])[0])


def average_precisions(
    scores: Float[Tensor, "maps pixels"], target: Bool[Tensor, "maps pixels"]
) -> Float[Tensor, " maps"]:
    """Return `average_precision` of many maps at once, in float64; NaN where a target is empty."""
    ranked, order = scores.sort(dim=1, descending=True)
    inside = target.gather(1, order).double()
    places = torch.arange(scores.shape[1], device=scores.device).expand_as(order)
    last = torch.ones_like(target)  # the last pixel of every run of equal scores
    last[:, :-1] = ranked[:, 1:] != ranked[:, :-1]
    ends = places.masked_fill(~last, scores.shape[1]).flip(1).cummin(1).values.flip(1)
    precision = inside.cumsum(1).gather(1, ends) / (ends + 1)
    return (inside * precision).sum(1) / inside.sum(1)


def ap_paper(scores: Float[Tensor, "*pixels"], target: Bool[Tensor, "*pixels"]) -> float:
    """Return the paper's AP of one image: over both classes at once, scores scaled to [0, 1].

    With s the min-max scaled map, [1 - s, s] is ranked against [not target, target].
    """
    return float(aps_paper(scores.flatten()[None], target.flatten()[None])[0])


def aps_paper(
    scores: Float[Tensor, "maps pixels"], target: Bool[Tensor, "maps pixels"]
) -> Float[Tensor, " maps"]:
    """Return `ap_paper` of many maps at once, in float64."""
    low, high = scores.amin(1, keepdim=True), scores.amax(1, keepdim=True)
    unit = (scores - low) / (high - low).clamp(min=1e-12)
    return average_precisions(torch.cat([1 - unit, unit], 1), torch.cat([~target, target], 1))


def bootstrap_interval(
    confusions: Int[Tensor, "images classes classes"],
    metric: Literal["accuracy", "miou", "fg_iou", "miou_paper"],
    *,
    samples: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """Return the 95 % interval of a pooled metric when images are drawn again with replacement.

    Draws in which the metric is not defined, as no class of it occurs, do not count.

    Args:
        confusions: One matrix of counts per image, as `Confusion.counts`.
        metric: Name of a property of `Confusion`.
        samples: Number of draws, at least 2.
        seed: Of the draws.

    Raises:
        ValueError: `samples` is below 2 or there are no images.
    """
    if samples < 2 or not len(confusions):
        raise ValueError(f"`samples` must be at least 2 and images present; got {samples}.")
    generator = torch.Generator().manual_seed(seed)
    images = len(confusions)
    draws = torch.randint(images, (samples, images), generator=generator)
    times = torch.zeros(samples, images, dtype=torch.float64)  # each image was drawn
    times.scatter_add_(1, draws, torch.ones_like(draws, dtype=torch.float64))
    pooled = (times @ confusions.flatten(1).double()).unflatten(1, confusions.shape[1:])
    values = _pooled(pooled, metric)
    low, high = values.nanquantile(values.new_tensor([0.025, 0.975])).tolist()
    return low, high


def _ious(counts: Float[Tensor, "*sets classes classes"]) -> Float[Tensor, "*sets classes"]:
    hits = counts.diagonal(dim1=-2, dim2=-1)
    return hits / (counts.sum(-1) + counts.sum(-2) - hits)


def _pooled(counts: Float[Tensor, "*sets classes classes"], metric: str) -> Float[Tensor, "*sets"]:
    """Return a metric of each pooled matrix of counts."""
    if metric in ("miou", "fg_iou"):
        return _ious(counts)[..., metric == "fg_iou" :].nanmean(-1)
    accuracy = counts.diagonal(dim1=-2, dim2=-1).sum(-1) / counts.sum((-2, -1))
    return accuracy if metric == "accuracy" else accuracy / (2 - accuracy)
