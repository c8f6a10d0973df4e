"""Drawing of proposals, and their judgement."""

from .op import Rules, pick_rules
from .reference import CERTAIN, COLUMNS, DENSE, Law

__all__ = ["CERTAIN", "COLUMNS", "DENSE", "Law", "Rules", "pick_rules"]
