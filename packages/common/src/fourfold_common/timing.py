"""Median run time of a function, on CPU or CUDA."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import torch


class Timing(NamedTuple):
    """Median, 20th and 80th percentile of `n` run times, in milliseconds."""

    median_ms: float
    p20_ms: float
    p80_ms: float
    n: int


def time_call(
    fn: Callable[[], object],
    device: torch.device | str = "cpu",
    warmup_ms: int | float = 25,
    rep_ms: int | float = 100,
) -> Timing:
    """Return the run time of `fn`: on CUDA by events with a cold L2 cache, on the CPU by clock.

    Args:
        fn: The function to time; its result is dropped.
        device: Where `fn` runs.
        warmup_ms: Time to spend on untimed runs, in ms; below 0 raises a ValueError.
        rep_ms: Time to spend on timed runs, in ms; 0 or below raises a ValueError.
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
        samples = _time_on_cpu(fn, warmup_ms, rep_ms)
    quantiles = torch.tensor([0.5, 0.2, 0.8], dtype=torch.float64)
    median, p20, p80 = torch.tensor(samples, dtype=torch.float64).quantile(quantiles).tolist()
    return Timing(median, p20, p80, len(samples))


def _time_on_cpu(
    fn: Callable[[], object], warmup_ms: int | float, rep_ms: int | float
) -> list[float]:
    fn()
    end = time.perf_counter() + warmup_ms / 1e3
    while time.perf_counter() < end:
        fn()
    end = time.perf_counter() + rep_ms / 1e3
    samples = [_run_ms(fn) for _ in range(3)]
    while time.perf_counter() < end:
        samples.append(_run_ms(fn))
    return samples


def _run_ms(fn: Callable[[], object]) -> float:
    start = time.perf_counter()
    fn()
    return (time.perf_counter() - start) * 1e3
