"""Softmax over the router's logits, weighted sum of the looked-up vectors, residual."""

from .op import combine, dispatch

__all__ = ["combine", "dispatch"]
