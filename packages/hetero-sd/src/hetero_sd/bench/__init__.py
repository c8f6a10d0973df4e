"""Benchmark of one pair of models: every way to decode side by side, with what explains its speed.

`contenders` are the ways to decode, of which `assisted` are transformers' own with a drafter;
`costs` times single passes, `exactness` judges what was written, `run` lets them take turns and
works out the figures, `plots` draws them.
"""

from .plots import draw
from .run import Decoding, report, run_bench

__all__ = ["Decoding", "draw", "report", "run_bench"]
