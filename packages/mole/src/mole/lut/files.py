"""A table's files: mapped into memory, verified, copied."""

import mmap
import os
import shutil
import zlib
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .errors import LutChecksumError, LutTruncatedError
from .format import DATA_FILE, HEADER_BYTES, META_FILE, LutMeta


def verify_lut(path: str | Path, *, progress: bool = False) -> LutMeta:
    """Return the table's description after reading the whole file and comparing its checksums.

    Args:
        path: Folder that holds `lut.json`.
        progress: Show a progress bar.

    Raises:
        LutError: A file is missing, truncated, damaged, or of another version.
    """
    folder = Path(path)
    meta = LutMeta.load(folder)
    check_length(folder, meta)
    chunks = -(-meta.vocab // meta.chunk)
    if len(meta.crcs) != chunks:
        raise LutChecksumError(
            f"{folder / META_FILE} must have a checksum for each of {chunks} chunks; got "
            f"{len(meta.crcs)}. Convert the model again."
        )
    with open(folder / DATA_FILE, "rb") as file:
        if file.read(HEADER_BYTES) != meta.header():
            raise LutChecksumError(
                f"{folder / DATA_FILE} must start with the header that {meta.vocab} rows of "
                f"{meta.row_stride} bytes have; got another. Convert the model again."
            )
        bar = tqdm(meta.crcs, desc="verifying", unit="chunk", delay=1, disable=not progress)
        for number, expected in enumerate(bar):
            first = number * meta.chunk
            rows = min(meta.chunk, meta.vocab - first)
            found = zlib.crc32(file.read(rows * meta.row_stride))
            if found != expected:
                raise LutChecksumError(
                    f"{folder / DATA_FILE}: ids {first} to {first + rows - 1} must have the "
                    f"checksum {expected:08x}; got {found:08x}. Convert the model again."
                )
    return meta


def copy_lut(source: str | Path, target: str | Path) -> None:
    """Put a table's files into another folder, as links where the file system has them.

    Links are safe: a table's files are never changed, only replaced.

    Args:
        source: Folder that holds `lut.json`.
        target: Folder to write; made if missing.
    """
    source, target = Path(source), Path(target)
    target.mkdir(parents=True, exist_ok=True)
    if target.samefile(source):
        return
    (target / META_FILE).unlink(missing_ok=True)  # the description comes last
    for name in (DATA_FILE, META_FILE):
        origin, partial = (source / name).resolve(), target / f"{name}.tmp"
        partial.unlink(missing_ok=True)
        try:
            os.link(origin, partial)
        except OSError:
            shutil.copyfile(origin, partial)
        partial.replace(target / name)


def check_length(folder: Path, meta: LutMeta) -> None:
    """Raise an error if the data file is missing or has the wrong length."""
    path = folder / DATA_FILE
    length = path.stat().st_size if path.is_file() else 0
    if length != meta.file_bytes:
        raise LutTruncatedError(
            f"{path} must have {meta.file_bytes:,} bytes; got {length:,}. Convert the model again."
        )


def map_rows(folder: Path, meta: LutMeta) -> Tensor:
    """Return the rows as a tensor over the memory-mapped file; nothing is read yet."""
    check_length(folder, meta)
    with open(folder / DATA_FILE, "rb") as file:
        # A private mapping: the file cannot be changed through it.
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    if hasattr(mmap, "MADV_RANDOM"):
        mapped.madvise(mmap.MADV_RANDOM)  # rows are far apart: reading ahead would be in vain
    rows = torch.frombuffer(mapped, dtype=torch.uint8, offset=HEADER_BYTES)
    return rows.view(meta.vocab, meta.row_stride)


__all__ = ["check_length", "copy_lut", "map_rows", "verify_lut"]
