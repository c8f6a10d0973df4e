"""alpha-entmax over one dimension of a tensor."""

from .op import EntmaxAux, entmax, entmax15, sparsemax

__all__ = ["EntmaxAux", "entmax", "entmax15", "sparsemax"]
