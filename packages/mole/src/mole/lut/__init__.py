"""The lookup table: its file format, its errors, and the stores that serve its rows."""

from .errors import (
    LutChecksumError,
    LutError,
    LutFingerprintError,
    LutIdError,
    LutShapeError,
    LutTruncatedError,
    LutVersionError,
)
from .format import FORMATS, LutMeta, LutRows
from .stores import (
    STORES,
    CachedStore,
    ComputeStore,
    DeviceStore,
    DiskStore,
    LutStore,
    MmapStore,
    PinnedStore,
    copy_lut,
    open_lut,
    verify_lut,
)

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
