"""What the observer must know about each model family, one file per family."""

from .base import Adapter, Block, Call, Encoded, ImageSide
from .joint import JointAdapter, word_vectors
from .linear import Modulated, Normed
from .registry import adapter_for, known_adapters, register_adapter

__all__ = [
    "Adapter",
    "Block",
    "Call",
    "Encoded",
    "ImageSide",
    "JointAdapter",
    "Modulated",
    "Normed",
    "adapter_for",
    "known_adapters",
    "register_adapter",
    "word_vectors",
]
