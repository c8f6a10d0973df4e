"""Training on local files, in one process or many."""

from .data import load_tokens
from .loop import TrainSettings, train

__all__ = ["TrainSettings", "load_tokens", "train"]
