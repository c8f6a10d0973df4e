"""Saliency maps for text concepts from multi-modal diffusion transformers, by observation only.

Names are loaded on first use, so `import conceptattention` imports neither diffusers nor
transformers nor triton.

Source: Helbling et al. 2025, "ConceptAttention" (arXiv 2502.04320); independent implementation.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .__about__ import __version__

if TYPE_CHECKING:
    from .adapters import Adapter, JointAdapter, register_adapter
    from .maps import ConceptMap, ConceptMaps
    from .observer import ConceptAttention
    from .presets import preset
    from .segmentation import segment

_HOME = {
    "Adapter": "adapters",
    "ConceptAttention": "observer",
    "ConceptMap": "maps",
    "ConceptMaps": "maps",
    "JointAdapter": "adapters",
    "preset": "presets",
    "register_adapter": "adapters",
    "segment": "segmentation",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name not in _HOME:
        raise AttributeError(f"module 'conceptattention' has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Return the public names, loaded or not."""
    return sorted(__all__)


__all__ = [
    "Adapter",
    "ConceptAttention",
    "ConceptMap",
    "ConceptMaps",
    "JointAdapter",
    "__version__",
    "preset",
    "register_adapter",
    "segment",
]
