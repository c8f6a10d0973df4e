"""What Triton can do here, and which tuning configurations to try."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TypeVar

Config = TypeVar("Config")


@dataclass(frozen=True)
class TritonStatus:
    """Whether Triton kernels can run in this process.

    Attributes:
        importable: Triton can be imported.
        version: Its version, or `""`.
        interpreting: Kernels run in Triton's interpreter, on CPU tensors.
        reason: Why Triton cannot be imported, or `""`.
    """

    importable: bool
    version: str
    interpreting: bool
    reason: str


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0").lower() in {"1", "true", "on", "yes"}


def triton_status() -> TritonStatus:
    """Return whether Triton is importable, its version, and whether it interprets its kernels.

    Triton is imported by this call and by nothing else in the package.

    Source: own.
    """
    try:
        triton = import_module("triton")
    except ImportError as error:
        return TritonStatus(False, "", _interpreting(), str(error))
    return TritonStatus(True, str(triton.__version__), _interpreting(), "")


def tuning_configs(configs: Sequence[Config]) -> list[Config]:
    """Return the configurations to tune over: all, or only the first where tuning is no use.

    Triton's interpreter fails with more than one configuration, and a quick check needs no tuning:
    under `TRITON_INTERPRET=1` or `FOURFOLD_FAST_TUNING=1` only the first is returned.

    Args:
        configs: At least one configuration, best guess first.

    Raises:
        ValueError: `configs` is empty.

    Source: own.
    """
    if not configs:
        raise ValueError("`configs` must hold at least one configuration; got none.")
    if _interpreting() or os.environ.get("FOURFOLD_FAST_TUNING") == "1":
        return [configs[0]]
    return list(configs)
