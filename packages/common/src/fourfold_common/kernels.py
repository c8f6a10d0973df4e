"""What Triton can do here, and which tuning configurations to try."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib import import_module
from typing import NamedTuple, TypeVar

_Config = TypeVar("_Config")


class TritonStatus(NamedTuple):
    """Whether Triton kernels can run in this process, or the reason why not."""

    importable: bool
    version: str
    interpreting: bool
    reason: str


def triton_status() -> TritonStatus:
    """Return whether Triton is importable, its version, and whether it interprets its kernels."""
    try:
        triton = import_module("triton")
    except ImportError as error:
        return TritonStatus(False, "", _interpreting(), str(error))
    return TritonStatus(True, str(triton.__version__), _interpreting(), "")


def tuning_configs(configs: Sequence[_Config]) -> list[_Config]:
    """Return the configurations to tune over: all, or only the first where tuning is no use.

    Triton's interpreter fails with more than one, and a quick check needs no tuning: under
    `TRITON_INTERPRET=1` or `FOURFOLD_FAST_TUNING=1` only the first is returned.

    Args:
        configs: Best guess first; none at all raises a ValueError.
    """
    if not configs:
        raise ValueError("`configs` must hold at least one configuration; got none.")
    if _interpreting() or os.environ.get("FOURFOLD_FAST_TUNING") == "1":
        return [configs[0]]
    return list(configs)


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0").lower() in {"1", "true", "on", "yes"}
