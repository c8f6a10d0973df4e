"""Drawing of proposals, and their judgement."""

from .op import Rules, pick_rules
from .reference import CERTAIN, COLUMNS, DENSE, Cut, Law, Line, Spelling, Warp

__all__ = [
    "CERTAIN",
    "COLUMNS",
    "DENSE",
    "Cut",
    "Law",
    "Line",
    "Rules",
    "Spelling",
    "Warp",
    "pick_rules",
]
