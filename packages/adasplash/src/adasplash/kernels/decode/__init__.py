"""alpha-entmax attention of a few new tokens to a cache of keys and values."""

from .op import PageStats, adasplash_decode, page_stats

__all__ = ["PageStats", "adasplash_decode", "page_stats"]
