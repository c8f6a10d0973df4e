"""The demonstration: small trained models, the script that trained them, and the main job."""

from pathlib import Path

ASSETS = Path(__file__).parent / "assets"
"""Folder of the shipped models `mole` (expert form) and `dense`, and of their `tokenizer`."""

__all__ = ["ASSETS"]
