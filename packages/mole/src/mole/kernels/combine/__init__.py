"""Softmax over the router's logits, weighted sum of the looked-up vectors, residual."""

from .op import combine

__all__ = ["combine"]
