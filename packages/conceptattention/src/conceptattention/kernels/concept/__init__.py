"""Attention of a few concepts over many patches, and their streamed scores."""

from . import reference
from .op import HeadNorm, add_scores, concept_attention, halved, usable

__all__ = ["HeadNorm", "add_scores", "concept_attention", "halved", "reference", "usable"]
