"""A record of the software and hardware that a figure was measured with."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from typing import Any

import torch

_PACKAGES = (
    "fourfold-common",
    "adasplash",
    "hetero-sd",
    "conceptattention",
    "mole",
    "torch",
    "triton",
    "transformers",
    "diffusers",
    "accelerate",
    "numpy",
)


def environment_report() -> dict[str, Any]:
    """Return versions, devices and the commit as a plain dictionary; no host or user names.

    Source: own.
    """
    report: dict[str, Any] = {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_name(),
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "packages": _versions(),
        "cuda": torch.version.cuda,
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "driver": _run("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "commit": _run("git", "rev-parse", "HEAD"),
    }
    report["dirty"] = bool(_run("git", "status", "--porcelain")) if report["commit"] else None
    return report


def _versions() -> dict[str, str]:
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"


def _run(*command: str) -> str | None:
    """Return the first line that a command prints, `""` for no output, None if it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip().partition("\n")[0]
