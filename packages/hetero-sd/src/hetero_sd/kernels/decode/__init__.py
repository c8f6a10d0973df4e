"""The steps of a decoding layer."""

from .op import REFERENCE, Steps, pick_steps

__all__ = ["REFERENCE", "Steps", "pick_steps"]
