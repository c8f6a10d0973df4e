"""A record of the software and hardware that a figure was measured with."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

_OURS = ("fourfold-common", "adasplash", "hetero-sd", "conceptattention", "mole")
_THEIRS = ("torch", "triton", "transformers", "diffusers", "accelerate", "numpy")


def environment_report() -> dict[str, Any]:
    """Return versions, devices and the commit as a plain dictionary; no host or user names."""
    commit = _first_line("git", "rev-parse", "HEAD")
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_name(),
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "packages": {name: v for name in (*_OURS, *_THEIRS) if (v := _version(name))},
        "cuda": torch.version.cuda,
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "driver": _first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "commit": commit,
        "dirty": bool(_first_line("git", "status", "--porcelain")) if commit else None,
    }


def _version(name: str) -> str | None:
    """Return the version of a package that is loaded, else of one that is installed."""
    loaded = getattr(sys.modules.get(name.replace("-", "_")), "__version__", None)
    if loaded is not None:
        return str(loaded)
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or "unknown")


def _first_line(*command: str) -> str | None:
    """Return the first line that a command prints, or None if it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip().partition("\n")[0]
