"""The stores by name."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .base import LutStore
from .cached import CachedStore
from .disk import DiskStore
from .memory import DeviceStore, MmapStore, PinnedStore

_STORES: dict[str, Callable[[Any, Any], LutStore]] = {
    "mmap": lambda path, device: MmapStore(path),
    "device": DeviceStore,
    "pinned": PinnedStore.open,
    "disk": lambda path, device: DiskStore(path),
}
STORES = tuple(_STORES)


def open_lut(
    path: str | Path,
    store: str = "mmap",
    device: torch.device | str = "cpu",
    cache: int = 0,
) -> LutStore:
    """Return a store for the lookup table in a folder.

    The lengths of the files are checked, their contents are not: `verify_lut` does that.

    Args:
        path: Folder that holds `lut.json`.
        store: `"mmap"` reads rows from the memory-mapped file, `"disk"` reads them past the page
            cache, `"pinned"` keeps all in host memory that the GPU reads itself, `"device"` copies
            all to `device`.
        device: Device that will use the rows.
        cache: Rows to keep on `device` in front of the store; 0 for none.

    Raises:
        ValueError: `store` is unknown.
        LutError: A file is missing, truncated, or of another version.
        OSError: Host memory cannot be page-locked.
    """
    if store not in _STORES:
        raise ValueError(f"`store` must be one of {', '.join(map(repr, STORES))}; got {store!r}.")
    opened = _STORES[store](path, device)
    return CachedStore(opened, cache, device) if cache else opened


__all__ = ["STORES", "open_lut"]
