"""Attention of a few concepts over many patches, and their streamed scores."""

from . import reference
from .op import add_scores, concept_attention, usable

__all__ = ["add_scores", "concept_attention", "reference", "usable"]
