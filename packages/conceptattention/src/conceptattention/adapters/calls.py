"""What a pipeline gives its transformer."""

from __future__ import annotations

import inspect
from contextlib import suppress
from typing import Any

import torch
from torch import nn


class _Seen(Exception):
    """Raised before the transformer computes anything."""


def first_call(pipe: Any, **settings: Any) -> dict[str, Any]:
    """Return the arguments that a pipeline gives its transformer first, by name.

    The pipeline runs up to that call alone; the global random state stays as it was.
    """
    found: dict[str, Any] = {}

    def stop(model: nn.Module, args: Any, kwargs: Any) -> None:
        bound = inspect.signature(type(model).forward).bind(model, *args, **kwargs)
        found.update(list(bound.arguments.items())[1:])
        raise _Seen

    handle = pipe.transformer.register_forward_pre_hook(stop, with_kwargs=True, prepend=True)
    quiet = getattr(pipe, "_progress_bar_config", {})
    pipe.set_progress_bar_config(**{**quiet, "disable": True})
    try:
        with suppress(_Seen):
            pipe(
                num_inference_steps=1, output_type="latent",
                generator=torch.Generator().manual_seed(0), **settings,
            )  # fmt: skip
    finally:
        handle.remove()
        pipe.set_progress_bar_config(**quiet)
    found.pop("return_dict", None)
    return found
