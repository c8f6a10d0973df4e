import time

import pytest
import torch

from fourfold_common import time_call


def test_percentiles_are_ordered_and_bounded_below_by_the_work() -> None:
    timing = time_call(lambda: time.sleep(0.002), warmup_ms=0, rep_ms=10)
    assert 2.0 <= timing.p20_ms <= timing.median_ms <= timing.p80_ms
    assert timing.n >= 3


def test_a_call_longer_than_the_budget_is_still_timed_three_times() -> None:
    calls: list[int] = []
    timing = time_call(lambda: (calls.append(1), time.sleep(0.003)), warmup_ms=0, rep_ms=0.001)
    assert timing.n == 3
    assert len(calls) == 4  # one warm-up


@pytest.mark.parametrize(("warmup", "rep"), [(-1, 1), (1, 0), (1, -5)])
def test_senseless_budgets_are_refused(warmup: float, rep: float) -> None:
    with pytest.raises(ValueError, match=rf"got warmup_ms={warmup}, rep_ms={rep}"):
        time_call(lambda: None, warmup_ms=warmup, rep_ms=rep)


@pytest.mark.gpu
def test_a_gpu_call_is_timed_on_the_gpu() -> None:
    x = torch.randn(4096, 4096, device="cuda")
    timing = time_call(lambda: x @ x, device="cuda")
    # 137 GFLOP in float32 cannot run faster than 1 PFLOP/s.
    assert timing.median_ms > 0.137
