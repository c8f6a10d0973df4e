"""The store that reads rows from the file, past the page cache."""

import mmap
import os
import warnings
import weakref
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from .base import LutStore, Ticket
from .errors import LutTruncatedError
from .files import check_length
from .format import DATA_FILE, HEADER_BYTES, LutMeta, LutRows

_PIECE = 64 * 1024  # bytes of one direct read: longer rows are read in several at a time
_DIRECT_ALIGNMENT = 4096


class DiskStore(LutStore):
    """Rows read from the file past the page cache, many at a time, each distinct id once.

    Threads read with `preadv`, which lets others run meanwhile, in pieces of 64 KiB, into aligned
    memory. Where the file system refuses direct reads, a warning says so and the page cache is
    used.

    Args:
        folder: Folder of the table.
        threads: Reads at a time.
        direct: Read past the page cache.
    """

    def __init__(self, folder: str | Path, threads: int = 32, direct: bool = True) -> None:
        super().__init__(LutMeta.load(folder))
        check_length(Path(folder), self.meta)
        path = Path(folder) / DATA_FILE
        self.direct = direct
        self._file = self._open(path) if direct else os.open(path, os.O_RDONLY)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="lut")
        self._release = weakref.finalize(self, _end, self._pool, self._file)

    def _open(self, path: Path) -> int:
        """Return a descriptor for direct reads, or a plain one with a warning."""
        try:
            file = os.open(path, os.O_RDONLY | os.O_DIRECT)
        except (AttributeError, OSError):
            file = -1
        if file >= 0:
            try:
                os.preadv(file, [mmap.mmap(-1, _DIRECT_ALIGNMENT)], 0)
                return file
            except OSError:
                os.close(file)
        self.direct = False
        warnings.warn(
            f"direct reads are not supported for {path.name} here; reading through the page cache.",
            stacklevel=4,
        )
        return os.open(path, os.O_RDONLY)

    def prefetch(self, ids: Int[Tensor, "*tokens"]) -> Ticket:
        """Begin to read the rows of the ids; returns at once."""
        distinct, inverse = torch.unique(self._host_ids(ids.flatten()), return_inverse=True)
        stride = self.meta.row_stride
        # Rows begin on 512 bytes, direct reads on 4,096: every slot has room for both ends.
        slot = (-(-stride // _DIRECT_ALIGNMENT) + 1) * _DIRECT_ALIGNMENT
        memory = mmap.mmap(-1, max(1, len(distinct)) * slot)
        futures: list[Future[None]] = []
        offsets = []
        for place, row in enumerate(distinct.tolist()):
            begin = HEADER_BYTES + row * stride
            first = begin // _DIRECT_ALIGNMENT * _DIRECT_ALIGNMENT
            offsets.append(place * slot + begin - first)
            for start in range(0, slot, _PIECE):
                view = memoryview(memory)[place * slot + start : place * slot + slot][:_PIECE]
                futures.append(self._pool.submit(self._fill, view, first + start))

        def take() -> LutRows:
            for future in futures:
                future.result()
            flat = torch.frombuffer(memory, dtype=torch.uint8)
            places = torch.tensor(offsets, dtype=torch.long)[inverse]
            rows = torch.stack([flat[o : o + stride] for o in places.tolist()])
            return LutRows.from_bytes(rows.to(ids.device), self.meta)

        if not len(distinct):
            empty = torch.empty(0, stride, dtype=torch.uint8, device=ids.device)
            return Ticket(lambda: LutRows.from_bytes(empty, self.meta))
        return Ticket(take)

    def _fill(self, view: memoryview, offset: int) -> None:
        """Fill the view from the file; what lies behind its end stays as it is."""
        left = min(len(view), self.meta.file_bytes - offset)
        done = 0
        while done < left:
            read = os.preadv(self._file, [view[done:]], offset + done)
            if read <= 0:
                raise LutTruncatedError(
                    f"{DATA_FILE} must have {self.meta.file_bytes:,} bytes; it ends at "
                    f"{offset + done:,}. Was it truncated while open? Convert the model again."
                )
            done += read

    def read(self, ids: Int[Tensor, " tokens"]) -> UInt8[Tensor, "tokens row_stride"]:
        """Return whole rows as they are on disk, on the ids' device."""
        return self.rows(ids).to_bytes(self.meta).to(ids.device)

    def rows(self, ids: Int[Tensor, "*tokens"]) -> LutRows:
        """Return the rows of the ids, flattened, on the ids' device."""
        return self.prefetch(ids).rows()

    def close(self) -> None:
        """Close the file and end the threads; the store cannot be used any more."""
        if not self.closed:
            super().close()
            self._pool.shutdown()
            self._release()


def _end(pool: ThreadPoolExecutor, file: int) -> None:
    """End threads that have nothing left to read, and close their file."""
    pool.shutdown(wait=False)
    os.close(file)


__all__ = ["DiskStore"]
