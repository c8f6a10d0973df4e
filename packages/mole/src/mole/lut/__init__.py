"""The lookup table: its file format, its errors, and the stores that serve its rows."""

from .base import LutStore
from .cached import CachedStore
from .compute import ComputeStore
from .disk import DiskStore
from .errors import (
    LutChecksumError,
    LutError,
    LutFingerprintError,
    LutIdError,
    LutShapeError,
    LutTruncatedError,
    LutVersionError,
)
from .files import copy_lut, verify_lut
from .format import FORMATS, LutMeta, LutRows
from .memory import DeviceStore, MmapStore, PinnedStore
from .stores import STORES, open_lut

__all__ = [
    "FORMATS",
    "STORES",
    "CachedStore",
    "ComputeStore",
    "DeviceStore",
    "DiskStore",
    "LutChecksumError",
    "LutError",
    "LutFingerprintError",
    "LutIdError",
    "LutMeta",
    "LutRows",
    "LutShapeError",
    "LutStore",
    "LutTruncatedError",
    "LutVersionError",
    "MmapStore",
    "PinnedStore",
    "copy_lut",
    "open_lut",
    "verify_lut",
]
