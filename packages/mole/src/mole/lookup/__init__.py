"""Lookup experts in their training form, and the reuse of repeated ids."""

from .dedup import distinct_ids
from .experts import Lookup

__all__ = ["Lookup", "distinct_ids"]
