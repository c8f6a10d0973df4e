"""Lookup experts in their training form, and the reuse of repeated ids."""

from .bank import StepBank
from .dedup import Repeats, distinct_ids
from .experts import Lookup

__all__ = ["Lookup", "Repeats", "StepBank", "distinct_ids"]
