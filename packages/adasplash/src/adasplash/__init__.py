"""Exact alpha-entmax attention whose sparsity adapts to the data.

An independent implementation of AdaSplash (arXiv 2502.12082); not the project that has this name
on the public package index.
"""

from .__about__ import __version__
from .compat import (
    adasplash2,
    adasplash_no_block_mask,
    adasplash_v1,
    adasplash_v2,
    triton_entmax,
    triton_entmax15,
    triton_entmax_v1,
    triton_entmax_v2,
    triton_sparsemax,
)
from .integration import load_alpha, register_with_transformers, set_alpha
from .kernels.attention import AttentionAux, adasplash, entmax_attention
from .kernels.decode import PageStats, adasplash_decode, page_stats
from .kernels.entmax import EntmaxAux, entmax, entmax15, sparsemax
from .losses import Entmax15Loss, EntmaxLoss, SparsemaxLoss, entmax_loss
from .modules import AlphaParam, AlphaSchedule, Entmax, EntmaxAttention
from .watch import watch_sparsity

__all__ = [
    "AlphaParam",
    "AlphaSchedule",
    "AttentionAux",
    "Entmax",
    "Entmax15Loss",
    "EntmaxAttention",
    "EntmaxAux",
    "EntmaxLoss",
    "PageStats",
    "SparsemaxLoss",
    "__version__",
    "adasplash",
    "adasplash2",
    "adasplash_decode",
    "adasplash_no_block_mask",
    "adasplash_v1",
    "adasplash_v2",
    "entmax",
    "entmax15",
    "entmax_attention",
    "entmax_loss",
    "load_alpha",
    "page_stats",
    "register_with_transformers",
    "set_alpha",
    "sparsemax",
    "triton_entmax",
    "triton_entmax15",
    "triton_entmax_v1",
    "triton_entmax_v2",
    "triton_sparsemax",
    "watch_sparsity",
]
