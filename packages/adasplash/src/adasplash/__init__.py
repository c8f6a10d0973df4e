"""Exact alpha-entmax attention whose sparsity adapts to the data.

An independent implementation of AdaSplash (arXiv 2502.12082); not the project that has this name
on the public package index.
"""

from .__about__ import __version__
from .integration import load_alpha, register_with_transformers, set_alpha
from .kernels.attention import adasplash
from .kernels.entmax import EntmaxAux, entmax, entmax15, sparsemax
from .losses import Entmax15Loss, EntmaxLoss, SparsemaxLoss, entmax_loss
from .modules import AlphaParam, AlphaSchedule, Entmax, EntmaxAttention

__all__ = [
    "AlphaParam",
    "AlphaSchedule",
    "Entmax",
    "Entmax15Loss",
    "EntmaxAttention",
    "EntmaxAux",
    "EntmaxLoss",
    "SparsemaxLoss",
    "__version__",
    "adasplash",
    "entmax",
    "entmax15",
    "entmax_loss",
    "load_alpha",
    "register_with_transformers",
    "set_alpha",
    "sparsemax",
]
