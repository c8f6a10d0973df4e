"""Softmax over the router's logits, weighted sum of the looked-up vectors, residual."""

from .op import combine, combine_norm, dispatch

__all__ = ["combine", "combine_norm", "dispatch"]
