"""Modular pipelines: their components seen as the pipeline that encodes words and pictures."""

from __future__ import annotations

import inspect
from typing import Any

from .adapters import Adapter


def standard(pipe: Any, adapter: Adapter) -> Any:
    """Return a pipeline with `encode_prompt` over the same components.

    A modular pipeline of diffusers is made of blocks and cannot encode a text by itself. The
    family's standard pipeline over the very same modules can; it is never run. Every other pipeline
    is returned as it is.

    Args:
        pipe: The pipeline.
        adapter: Of its transformer's family.
    """
    import diffusers

    kind = getattr(diffusers, "ModularPipeline", None)
    if kind is None or not isinstance(pipe, kind) or adapter.pipeline is None:
        return pipe
    target = getattr(diffusers, adapter.pipeline)
    known = pipe.components
    names = inspect.signature(target.__init__).parameters
    parts = {
        name: known.get(name)
        for name, parameter in names.items()
        if name != "self" and (name in known or parameter.default is parameter.empty)
    }
    return target(**parts)
