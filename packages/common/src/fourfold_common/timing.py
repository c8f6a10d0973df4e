"""Median run time of a function, on CPU or CUDA."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Timing:
    """Run times of one function.

    Attributes:
        median_ms: Median, in milliseconds.
        p20_ms: 20th percentile, in milliseconds.
        p80_ms: 80th percentile, in milliseconds.
        n: Number of timed runs.
    """

    median_ms: float
    p20_ms: float
    p80_ms: float
    n: int


def time_call(
    fn: Callable[[], object],
    device: torch.device | str = "cpu",
    warmup_ms: float = 25.0,
    rep_ms: float = 100.0,
) -> Timing:
    """Return the median, 20th and 80th percentile run time of `fn`.

    On CUDA each run is timed by events with a cold L2 cache (`triton.testing.do_bench`); on the
    CPU by `time.perf_counter`. At least three runs are timed.

    Args:
        fn: The function to time; its result is dropped.
        device: Where `fn` runs.
        warmup_ms: Time to spend on untimed runs, in ms.
        rep_ms: Time to spend on timed runs, in ms.

    Raises:
        ValueError: `warmup_ms` is negative or `rep_ms` is not positive.

    Source: own.
    """
    if warmup_ms < 0 or rep_ms <= 0:
        raise ValueError(
            "`warmup_ms` must be at least 0 and `rep_ms` above 0; "
            f"got warmup_ms={warmup_ms}, rep_ms={rep_ms}."
        )
    if torch.device(device).type == "cuda":
        from triton.testing import do_bench

        samples = do_bench(fn, warmup=warmup_ms, rep=rep_ms, return_mode="all")
    else:
        samples = _time_cpu(fn, warmup_ms, rep_ms)
    quantiles = torch.tensor([0.5, 0.2, 0.8], dtype=torch.float64)
    median, p20, p80 = torch.tensor(samples, dtype=torch.float64).quantile(quantiles).tolist()
    return Timing(median, p20, p80, len(samples))


def _time_cpu(fn: Callable[[], object], warmup_ms: float, rep_ms: float) -> list[float]:
    start = time.perf_counter()
    fn()
    while (time.perf_counter() - start) * 1e3 < warmup_ms:
        fn()
    samples: list[float] = []
    while len(samples) < 3 or sum(samples) < rep_ms:
        start = time.perf_counter()
        fn()
        samples.append((time.perf_counter() - start) * 1e3)
    return samples
