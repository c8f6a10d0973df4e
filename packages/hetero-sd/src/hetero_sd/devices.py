"""Where a model runs: on one device, spread over several by accelerate, or in part in memory."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


def input_device(model: Any) -> torch.device:
    """Return the device that a model's inputs go to and its logits come from.

    Weights that accelerate's `device_map` has put away, in memory or on a disk, are on the device
    "meta"; the hooks of its modules then know where it runs.

    Args:
        model: A model of `transformers`.
    """
    device: torch.device = model.device
    if device.type != "meta":
        return device
    for module in model.modules():
        place = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
        if place is not None:
            return torch.device(place)
    return device


def is_spread(model: Any) -> bool:
    """Return whether accelerate runs a model's modules, on several devices or out of memory."""
    return any(hasattr(module, "_hf_hook") for module in model.modules())


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context in which kernels and graphs go to a device, as they do not by themselves."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
