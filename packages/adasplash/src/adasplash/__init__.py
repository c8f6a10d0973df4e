"""Exact alpha-entmax attention whose sparsity adapts to the data.

An independent implementation of AdaSplash (arXiv 2502.12082); not the project that has this name
on the public package index.
"""

from .__about__ import __version__
from .entmax import entmax15
from .integration import register_with_transformers
from .kernels.attention import adasplash

__all__ = ["__version__", "adasplash", "entmax15", "register_with_transformers"]
