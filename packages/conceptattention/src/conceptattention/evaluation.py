"""Segmentation metrics, all read from one confusion matrix pooled over images."""

from __future__ import annotations

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
        return float(self.counts.diag().sum() / self.counts.sum())

    @property
    def iou(self) -> Float[Tensor, " classes"]:
        """Intersection over union of each class; NaN for classes never seen nor predicted."""
        counts = self.counts.double()
        hits = counts.diag()
        return (hits / (counts.sum(0) + counts.sum(1) - hits)).float()

    @property
    def miou(self) -> float:
        """Mean of `iou` over the classes that occur."""
        return float(self.iou.nanmean())

    @property
    def fg_iou(self) -> float:
        """Mean of `iou` over the classes that occur, without class 0."""
        return float(self.iou[1:].nanmean())

    @property
    def miou_paper(self) -> float:
        """Acc / (2 − Acc): what the paper's code computes for one class, in place of mIoU.

        It stacks masks with their complements, after which both classes' IoU equal this number.
        """
        return self.accuracy / (2 - self.accuracy)
