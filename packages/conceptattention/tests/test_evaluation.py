import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from conceptattention.evaluation import (
    Confusion,
    ap_paper,
    average_precision,
    bootstrap_interval,
)


def test_a_case_worked_by_hand():
    # Targets: four pixels of class 0, three of class 1, one of class 2.
    target = torch.tensor([[0, 0, 0, 0], [1, 1, 1, 2]])
    guess = torch.tensor([[0, 0, 0, 1], [1, 1, 0, 0]])
    confusion = Confusion(4)
    confusion.add(guess, target)
    assert confusion.counts.tolist() == [[3, 1, 0, 0], [1, 2, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    assert confusion.accuracy == pytest.approx(5 / 8)
    # Class 0: 3 of 3 + 1 + 2; class 1: 2 of 4; class 2: none of 1; class 3 never occurs.
    assert confusion.iou[:3].tolist() == pytest.approx([3 / 6, 2 / 4, 0.0])
    assert math.isnan(confusion.iou[3])
    assert confusion.miou == pytest.approx(1 / 3)
    assert confusion.fg_iou == pytest.approx(0.25)


def test_images_are_pooled_not_averaged():
    confusion = Confusion(2)
    confusion.add(torch.tensor([1, 1]), torch.tensor([1, 1]))
    confusion.add(torch.tensor([0, 0, 0, 0]), torch.tensor([1, 1, 0, 0]))
    assert confusion.fg_iou == pytest.approx(2 / 4)
    assert confusion.iou[0] == pytest.approx(2 / 4)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=40))
def test_the_papers_miou_is_a_function_of_accuracy(pixels):
    guess, target = (torch.tensor(side) for side in zip(*pixels, strict=True))
    confusion = Confusion(2)
    confusion.add(guess, target)
    # Stack every mask with its complement, as the paper's code does, and score two classes.
    stacked = Confusion(2)
    stacked.add(torch.stack([~guess, guess]), torch.stack([~target, target]))
    assert stacked.iou[0] == pytest.approx(confusion.miou_paper)
    assert stacked.iou[1] == pytest.approx(confusion.miou_paper)


@pytest.mark.usefixtures("unchecked")
def test_errors():
    confusion = Confusion(2)
    with pytest.raises(ValueError, match=r"must have the shape \(3,\) of `target`; got \(2,\)"):
        confusion.add(torch.tensor([0, 1]), torch.tensor([0, 1, 1]))
    with pytest.raises(ValueError, match="`prediction` must hold classes from 0 to 1; got 0 to 2"):
        confusion.add(torch.tensor([0, 2]), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="`target` must hold classes from 0 to 1; got -1 to 0"):
        confusion.add(torch.tensor([0, 1]), torch.tensor([-1, 0]))
    with pytest.raises(ValueError, match="`classes` must be at least 2; got 1"):
        Confusion(1)


def test_average_precision_by_hand():
    scores = torch.tensor([0.9, 0.8, 0.7, 0.6])
    target = torch.tensor([True, False, True, False])
    assert average_precision(scores, target) == pytest.approx((1 + 2 / 3) / 2)
    # All scores equal: precision is the share of the target.
    assert average_precision(torch.ones(4), target) == pytest.approx(0.5)
    assert average_precision(scores, scores > 0.65) == 1.0


def test_ap_of_the_paper_by_hand():
    scores, target = torch.tensor([4.0, 2.0, 0.0]), torch.tensor([True, False, False])
    # Ranked: s of the first and 1 - s of the last (both 1), then 0.5 twice, one of each right.
    assert ap_paper(scores, target) == pytest.approx((2 * 1 + 1 * 3 / 4) / 3)


def test_bootstrap_interval_holds_the_pooled_value():
    generator = torch.Generator().manual_seed(0)
    counts = torch.randint(1, 50, (40, 2, 2), generator=generator)
    pooled = Confusion(2)
    pooled.counts = counts.sum(0)
    for metric in ("accuracy", "miou", "fg_iou", "miou_paper"):
        low, high = bootstrap_interval(counts, metric, samples=300)
        assert low < getattr(pooled, metric) < high
    same = counts[:1].expand(30, 2, 2)
    low, high = bootstrap_interval(same, "accuracy", samples=20)
    assert low == pytest.approx(high)


def test_draws_without_a_class_do_not_count():
    counts = torch.zeros(3, 2, 2, dtype=torch.int64)
    counts[0] = torch.tensor([[4, 1], [1, 2]])  # the only picture with class 1
    counts[1:, 0, 0] = 5
    pooled = Confusion(2)
    pooled.counts = counts.sum(0)
    # Drawn once, twice or three times, that picture alone decides; without it nothing is defined.
    assert pooled.fg_iou == 0.5
    assert bootstrap_interval(counts, "fg_iou", samples=100) == (0.5, 0.5)


@pytest.mark.usefixtures("unchecked")
def test_errors_of_the_new_metrics():
    with pytest.raises(ValueError, match="`target` must hold at least one pixel"):
        average_precision(torch.ones(3), torch.zeros(3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"`scores` must have the shape \(3,\)"):
        average_precision(torch.ones(2), torch.ones(3, dtype=torch.bool))
    with pytest.raises(ValueError, match="`samples` must be at least 2"):
        bootstrap_interval(torch.ones(3, 2, 2, dtype=torch.int64), "miou", samples=1)
