"""Lossless speculative decoding for models with different vocabularies."""

from typing import TYPE_CHECKING, Any

from .__about__ import __version__

if TYPE_CHECKING:
    from .decoder import HeteroSpeculativeDecoder
    from .generation import Generation
    from .rounds import Stats
    from .vocab import VocabMap, VocabReport, inspect_vocab, map_vocabularies

_HOMES = {
    "Generation": "generation",
    "HeteroSpeculativeDecoder": "decoder",
    "Stats": "rounds",
    "VocabMap": "vocab",
    "VocabReport": "vocab",
    "inspect_vocab": "vocab",
    "map_vocabularies": "vocab",
}
__all__ = [
    "Generation",
    "HeteroSpeculativeDecoder",
    "Stats",
    "VocabMap",
    "VocabReport",
    "__version__",
    "inspect_vocab",
    "map_vocabularies",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
