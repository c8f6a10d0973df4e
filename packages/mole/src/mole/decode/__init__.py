"""Fast decoding of a batch of prompts of equal length."""

from .decoder import Decoder

__all__ = ["Decoder"]
