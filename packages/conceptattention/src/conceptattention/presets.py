"""Settings of `ConceptAttention` under a name, by model family."""

from __future__ import annotations

from typing import Any

from .adapters import adapter_for

PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "paper": {
        "Flux.1": {"layers": "last:4"},
        "Flux.2": {
            "layers": "last:3",
            "steps": slice(0.7, -1),
            "reduce": "mean_softmax",
            "temperature": 1000.0,
        },
        "Stable Diffusion 3": {"layers": "all", "normalize": "l2"},
        "CogVideoX": {"layers": "all"},
    },
}
_COMMON: dict[str, dict[str, Any]] = {
    "paper": {"token": "first", "space": "output", "self_attention": True},
}


def preset(name: str, pipe: Any) -> dict[str, Any]:
    """Return arguments of `ConceptAttention` for a pipeline's family.

    Args:
        name: "paper": the layers, steps, reduction and word tokens that the reference
            implementation uses for Flux.1, Flux.2, Stable Diffusion 3 and CogVideoX. Where the
            reference differs from the paper's equations, such as concepts joined into one text for
            Stable Diffusion 3, the equations are kept.
        pipe: A diffusers pipeline.

    Raises:
        ValueError: The name or the family's preset is not known.

    Source: Helbling et al. 2025 (arXiv 2502.04320), section 4 and its code.
    """
    if name not in PRESETS:
        raise ValueError(f"`name` must be one of {tuple(PRESETS)}; got {name!r}.")
    family = adapter_for(pipe.transformer).family
    if family not in PRESETS[name]:
        known = ", ".join(PRESETS[name])
        raise ValueError(f"`pipe`: preset {name!r} is known for {known}; got {family}.")
    return {**_COMMON[name], **PRESETS[name][family]}
