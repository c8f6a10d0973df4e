"""Attention whose weights are the alpha-entmax of the scores."""

from .diagnostics import AttentionAux
from .op import adasplash, entmax_attention

__all__ = ["AttentionAux", "adasplash", "entmax_attention"]
