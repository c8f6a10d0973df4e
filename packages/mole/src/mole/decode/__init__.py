"""Fast decoding of a batch of prompts."""

from .decoder import Decoder

__all__ = ["Decoder"]
