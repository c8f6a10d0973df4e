"""Stores: where the rows of a lookup table are while a model runs."""

import mmap
import zlib
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from .errors import LutChecksumError, LutIdError, LutTruncatedError
from .format import DATA_FILE, HEADER_BYTES, LutMeta, LutRows


@runtime_checkable
class LutStore(Protocol):
    """What a model needs of a lookup table."""

    meta: LutMeta

    def rows(self, ids: Int[Tensor, "*tokens"]) -> LutRows:
        """Return the rows of the ids, flattened, on the ids' device."""
        ...

    def close(self) -> None:
        """Let go of files and memory; the store cannot be used any more."""
        ...


class _TensorStore:
    """A store whose rows are a tensor `[vocab, row_stride]`, wherever its memory is.

    Args:
        meta: The table's description.
        table: The rows, uint8.
    """

    def __init__(self, meta: LutMeta, table: UInt8[Tensor, "vocab row_stride"]) -> None:
        self.meta = meta
        self._table: Tensor | None = table

    def rows(self, ids: Int[Tensor, "*tokens"]) -> LutRows:
        """Return the rows of the ids, flattened, on the ids' device.

        Raises:
            LutIdError: An id is not in the table (checked where the table is in host memory).
            ValueError: The store was closed.
        """
        if self._table is None:
            raise ValueError("This lookup table was closed; open it again with `open_lut`.")
        wanted = ids.flatten().to(self._table.device)
        try:
            rows = self._table.index_select(0, wanted)
        except (IndexError, RuntimeError):
            if wanted.device.type != "cpu":
                raise
            low, high = int(wanted.min()), int(wanted.max())
            raise LutIdError(
                f"`ids` must be between 0 and {self.meta.vocab - 1}, the table's last id; "
                f"got ids from {low} to {high}."
            ) from None
        return LutRows.from_bytes(rows.to(ids.device), self.meta)

    def close(self) -> None:
        """Let go of the memory; the store cannot be used any more."""
        self._table = None


class MmapStore(_TensorStore):
    """Rows read from the memory-mapped file: only pages that are used are ever in memory.

    Args:
        folder: Folder of the table.
    """

    def __init__(self, folder: str | Path) -> None:
        meta = LutMeta.load(folder)
        super().__init__(meta, _map(Path(folder), meta))


class DeviceStore(_TensorStore):
    """All rows in the memory of one device.

    Args:
        folder: Folder of the table.
        device: The device.
    """

    def __init__(self, folder: str | Path, device: torch.device | str) -> None:
        meta = LutMeta.load(folder)
        super().__init__(meta, _map(Path(folder), meta).to(device, copy=True))


def open_lut(path: str | Path, store: str = "mmap", device: torch.device | str = "cpu") -> LutStore:
    """Return a store for the lookup table in a folder.

    The lengths of the files are checked, their contents are not: `verify_lut` does that.

    Args:
        path: Folder that holds `lut.json`.
        store: `"mmap"` reads rows from the memory-mapped file, `"device"` copies all rows to
            `device`.
        device: Device of the `"device"` store.

    Raises:
        ValueError: `store` is unknown.
        LutError: A file is missing, truncated, or of another version.
    """
    if store == "mmap":
        return MmapStore(path)
    if store == "device":
        return DeviceStore(path, device)
    raise ValueError(f"`store` must be 'mmap' or 'device'; got {store!r}.")


def verify_lut(path: str | Path) -> LutMeta:
    """Return the table's description after reading the whole file and comparing its checksums.

    Args:
        path: Folder that holds `lut.json`.

    Raises:
        LutError: A file is missing, truncated, damaged, or of another version.
    """
    folder = Path(path)
    meta = LutMeta.load(folder)
    _check_length(folder, meta)
    with open(folder / DATA_FILE, "rb") as file:
        if file.read(HEADER_BYTES) != meta.header():
            raise LutChecksumError(
                f"{folder / DATA_FILE} must start with the header that {meta.vocab} rows of "
                f"{meta.row_stride} bytes have; got another. Convert the model again."
            )
        for number, expected in enumerate(meta.crcs):
            first = number * meta.chunk
            rows = min(meta.chunk, meta.vocab - first)
            found = zlib.crc32(file.read(rows * meta.row_stride))
            if found != expected:
                raise LutChecksumError(
                    f"{folder / DATA_FILE}: ids {first} to {first + rows - 1} must have the "
                    f"checksum {expected:08x}; got {found:08x}. Convert the model again."
                )
    return meta


def _check_length(folder: Path, meta: LutMeta) -> None:
    """Raise an error if the data file is missing or has the wrong length."""
    path = folder / DATA_FILE
    length = path.stat().st_size if path.is_file() else 0
    if length != meta.file_bytes:
        raise LutTruncatedError(
            f"{path} must have {meta.file_bytes:,} bytes; got {length:,}. Convert the model again."
        )


def _map(folder: Path, meta: LutMeta) -> Tensor:
    """Return the rows as a tensor over the memory-mapped file; nothing is read yet."""
    _check_length(folder, meta)
    with open(folder / DATA_FILE, "rb") as file:
        # A private mapping: the file cannot be changed through it.
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    if hasattr(mmap, "MADV_RANDOM"):
        mapped.madvise(mmap.MADV_RANDOM)  # rows are far apart: reading ahead would be in vain
    rows = torch.frombuffer(mapped, dtype=torch.uint8, offset=HEADER_BYTES)
    return rows.view(meta.vocab, meta.row_stride)


__all__ = ["DeviceStore", "LutStore", "MmapStore", "open_lut", "verify_lut"]
