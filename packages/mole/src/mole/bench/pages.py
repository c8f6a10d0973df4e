"""The page cache: how much of a file is in it, and getting a file out of it."""

import ctypes
import mmap
import os
from pathlib import Path

import torch


def drop(path: str | Path) -> None:
    """Ask the system to drop the file's pages from the page cache, after writing them to disk.

    Does nothing where there is no such call; `resident` tells what came of it.
    """
    if not hasattr(os, "posix_fadvise"):
        return
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(file)


def load(path: str | Path) -> None:
    """Read the whole file, so that its pages are in the page cache as far as they fit."""
    with open(path, "rb", buffering=0) as file:
        while file.read(2**24):
            pass


def resident(path: str | Path) -> float | None:
    """Return the share of the file's pages that are in the page cache; None where unknown."""
    size = os.path.getsize(path)
    try:
        mincore = ctypes.CDLL(None, use_errno=True).mincore
    except (AttributeError, OSError, TypeError):
        return None
    with open(path, "rb") as file:
        mapped = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY)  # maps, reads nothing
    count = -(-size // mmap.PAGESIZE)
    states = (ctypes.c_ubyte * count)()
    first = ctypes.c_ubyte.from_buffer(mapped)
    try:
        begin = ctypes.c_void_p(ctypes.addressof(first))
        if mincore(begin, ctypes.c_size_t(size), states):
            return None
    finally:
        del first  # the mapping cannot be closed before
        mapped.close()
    return float(torch.frombuffer(states, dtype=torch.uint8).bitwise_and(1).sum()) / count


__all__ = ["drop", "load", "resident"]
