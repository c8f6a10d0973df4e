"""What the observer must know about each model family, one file per family."""

from .base import Adapter, Block, Call, Encoded, ImageSide, adapter_for, register_adapter
from .joint import JointAdapter, word_vectors
from .linear import Modulated, Normed

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
    "register_adapter",
    "word_vectors",
]
