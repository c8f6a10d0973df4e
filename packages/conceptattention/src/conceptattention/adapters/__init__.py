"""What the observer must know about each model family, one file per family."""

from .base import Adapter, Block, Call, Encoded, ImageSide, adapter_for, register_adapter

__all__ = ["Adapter", "Block", "Call", "Encoded", "ImageSide", "adapter_for", "register_adapter"]
