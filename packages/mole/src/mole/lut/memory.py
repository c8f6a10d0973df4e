"""Stores whose rows are a tensor: over the mapped file, on a device, in page-locked host memory."""

import mmap
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from ..kernels.gather import gather
from .base import LutStore, Ticket, _repeats
from .errors import LutIdError
from .files import check_length, map_rows
from .format import DATA_FILE, HEADER_BYTES, LayerRows, LutMeta, LutRows

_PARTS = 8  # groups of layers whose rows of a long text are waited for together


class TensorStore(LutStore):
    """A store whose rows are a tensor `[vocab, row_stride]`, wherever its memory is.

    Args:
        meta: The table's description.
        table: The rows.
    """

    def __init__(self, meta: LutMeta, table: UInt8[Tensor, "vocab row_stride"]) -> None:
        super().__init__(meta)
        self.table = table

    def read(self, ids: Int[Tensor, " tokens"]) -> UInt8[Tensor, "tokens row_stride"]:
        """Return whole rows as they are on disk, on the ids' device."""
        self._check_open()
        try:
            rows = self.table.index_select(0, ids.to(self.table.device))
        except (IndexError, RuntimeError):
            if self.table.device.type == "cpu":
                self._host_ids(ids)  # names the id, at no cost while all are right
            raise
        return rows.to(ids.device)

    def close(self) -> None:
        """Let go of the memory; the store cannot be used any more."""
        super().close()
        self.table = torch.empty(0, 0, dtype=torch.uint8)


class MmapStore(TensorStore):
    """Rows read from the memory-mapped file: only pages that are used are ever in memory.

    Args:
        folder: Folder of the table.
    """

    def __init__(self, folder: str | Path) -> None:
        meta = LutMeta.load(folder)
        super().__init__(meta, map_rows(Path(folder), meta))


class DeviceStore(TensorStore):
    """All rows in the memory of one device.

    Args:
        folder: Folder of the table.
        device: The device.
    """

    def __init__(self, folder: str | Path, device: torch.device | str) -> None:
        meta = LutMeta.load(folder)
        super().__init__(meta, map_rows(Path(folder), meta).to(device, copy=True))


@dataclass(frozen=True)
class _ArrivingRows(LutRows):
    """Rows that a stream of their own brings; layers are waited for when they are taken."""

    arrived: dict[int, Any] = field(default_factory=dict)

    def layers(self, dtype: torch.dtype) -> Iterator[LayerRows]:
        for number, rows in enumerate(super().layers(dtype)):
            if number in self.arrived:
                torch.cuda.current_stream(self.codes.device).wait_event(self.arrived[number])
            yield rows


class PinnedStore(TensorStore):
    """All rows in host memory that the GPU reads itself, on a stream of its own, by id.

    Nothing waits for the host: the ids stay on the device, and a kernel picks the rows over the
    bus. Unknown ids give zeros and are reported by `check`. Without a GPU rows are copied.

    Args:
        meta: The table's description.
        table: The rows in host memory; they are page-locked where they lie, without a copy.
        device: The GPU that will read them.
    """

    def __init__(
        self,
        meta: LutMeta,
        table: UInt8[Tensor, "vocab row_stride"],
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(meta, table)
        self.device = torch.device(device)
        self._unlock: Callable[[], Any] | None = None
        self._locking = threading.Lock()
        if self.device.type == "cuda":
            self.lock(self.device)

    def lock(self, device: torch.device) -> None:
        """Page-lock the rows for a GPU, unless they are already.

        Happens by itself, also for a model that was moved to the GPU after its table was opened.

        Raises:
            ValueError: The rows are locked for another GPU, or the store was closed.
            OSError: Host memory cannot be page-locked.
        """
        self._check_open()
        if device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        with self._locking:
            if self._unlock is None:
                self._register(device)
        if device != self.device:
            raise ValueError(f"`ids` must be on {self.device}, the store's; got {device}.")

    def _register(self, device: torch.device) -> None:
        address, size = self.table.data_ptr(), self.table.numel()
        failed = torch.cuda.cudart().cudaHostRegister(address, size, 0)
        if int(failed):
            raise OSError(
                f"{size:,} bytes cannot be page-locked (CUDA error {int(failed)}); raise the "
                "limit on locked memory (`ulimit -l`), or use the store 'mmap' or 'disk'."
            )
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.flag = torch.zeros(1, dtype=torch.int32, device=device)
        # Memory must not go back to the system while it is locked, so the store's end unlocks it.
        unlock = weakref.finalize(self, _unlock, device, address, self.table)
        unlock.atexit = False  # the process's end unlocks all
        self._unlock = unlock

    @classmethod
    def open(cls, folder: str | Path, device: torch.device | str) -> "PinnedStore":
        """Read a table's file into memory and page-lock it."""
        meta = LutMeta.load(folder)
        check_length(Path(folder), meta)
        # Anonymous memory of exactly this size: a pinned allocator would round up.
        memory = mmap.mmap(-1, meta.vocab * meta.row_stride)
        with open(Path(folder) / DATA_FILE, "rb", buffering=0) as file:
            file.seek(HEADER_BYTES)
            view, done = memoryview(memory), 0
            while done < len(view):
                done += file.readinto(view[done : done + 2**30]) or len(view)
        table = torch.frombuffer(memory, dtype=torch.uint8).view(meta.vocab, meta.row_stride)
        return cls(meta, table, device)

    def rows(self, ids: Int[Tensor, "*tokens"]) -> LutRows:
        """Return the rows of the ids, flattened, on the ids' device, without waiting."""
        return self.prefetch(ids).rows() if ids.is_cuda else super().rows(ids)

    def prefetch(self, ids: Int[Tensor, "*tokens"]) -> Ticket:
        """Begin to fetch the rows of the ids on a stream of its own."""
        if not ids.is_cuda:
            return super().prefetch(ids)
        self.lock(ids.device)
        current = torch.cuda.current_stream(ids.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            flat = ids.flatten()
            out = torch.empty(len(flat), self.meta.row_stride, dtype=torch.uint8, device=ids.device)
            gather(self.table, flat, out, self.flag)
        arrived = self.stream.record_event()
        ids.record_stream(self.stream)

        def take() -> LutRows:
            stream = torch.cuda.current_stream(out.device)
            stream.wait_event(arrived)
            out.record_stream(stream)
            return LutRows.from_bytes(out, self.meta)

        return Ticket(take)

    def fetch(self, ids: Int[Tensor, "*tokens"]) -> LutRows:
        """Return the rows of the ids; those of a long text arrive while a model's layers run."""
        if not (ids.is_cuda and _repeats(ids)):
            return super().fetch(ids)
        self.lock(ids.device)
        distinct, index = torch.unique(ids, return_inverse=True)
        current = torch.cuda.current_stream(ids.device)
        self.stream.wait_stream(current)
        group = -(-self.meta.layers // _PARTS)
        events: dict[int, Any] = {}
        with torch.cuda.stream(self.stream):
            size = (len(distinct), self.meta.row_stride)
            out = torch.empty(size, dtype=torch.uint8, device=ids.device)
            for first, parts in self.meta.spans((1, *[group] * _PARTS)):
                for part in parts:
                    gather(self.table, distinct, out, self.flag, *part)
                events[first] = self.stream.record_event()
        distinct.record_stream(self.stream)
        out.record_stream(current)
        rows = LutRows.from_bytes(out, self.meta)
        return _ArrivingRows(rows.codes, rows.scales, rows.bits, index.flatten(), events)

    def check(self) -> None:
        """Raise an error if an unknown id was asked for so far; waits for the device.

        Raises:
            LutIdError: An id was not in the table; its row was zeros.
        """
        if self._unlock is not None and self.flag.item():
            self.flag.zero_()
            raise LutIdError(
                f"`ids` must be between 0 and {self.meta.vocab - 1}, the table's last id; some "
                "were not, and zeros were used for their rows."
            )

    def close(self) -> None:
        """Unlock and let go of the memory; the store cannot be used any more."""
        if self._unlock is not None:
            self._unlock()
            self._unlock = None
        super().close()


def _unlock(device: torch.device, address: int, table: Tensor) -> None:
    """Unlock the memory of a table, which is kept until then."""
    torch.cuda.synchronize(device)
    torch.cuda.cudart().cudaHostUnregister(address)


__all__ = ["DeviceStore", "MmapStore", "PinnedStore", "TensorStore"]
