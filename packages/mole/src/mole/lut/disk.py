"""The store that reads rows from the file, past the page cache."""

import mmap
import os
import warnings
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from .aio import AsyncReads
from .base import LutStore, Ticket
from .errors import LutTruncatedError
from .files import check_length
from .format import DATA_FILE, HEADER_BYTES, LutMeta, LutRows

_PIECE = 64 * 1024  # bytes of one direct read: longer rows are read in several at a time
_DIRECT_ALIGNMENT = 4096
_SPARE_BYTES = 2**25  # memory that is kept for the next rows


class _Frame(NamedTuple):
    """Memory for one direct read."""

    memory: memoryview
    address: int


class DiskStore(LutStore):
    """Rows read from the file past the page cache, many at a time, each distinct id once.

    Whoever waits for rows has the system read them side by side (`AsyncReads`). Where it does not,
    and for `prefetch`, threads read with `preadv`, in pieces of 64 KiB. Where the file system
    refuses direct reads, a warning says so and the page cache is used.

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
        # Memory for a direct read of a row wherever it begins.
        self._frame = (-(-self.meta.row_stride // _DIRECT_ALIGNMENT) + 1) * _DIRECT_ALIGNMENT
        self._spare: list[_Frame] = []
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="lut")
        self._aio: AsyncReads | None = None
        if self.direct:
            with suppress(OSError):  # not everywhere; threads read then
                self._aio = AsyncReads(self._file, threads)
        self._release = weakref.finalize(self, _end, self._pool, self._file, self._aio)

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
        take = self._read(ids.flatten(), waiting=False)
        return Ticket(lambda: LutRows.from_bytes(take(), self.meta))

    def read(self, ids: Int[Tensor, " tokens"]) -> UInt8[Tensor, "tokens row_stride"]:
        """Return whole rows as they are on disk, on the ids' device."""
        return self._read(ids, waiting=True)()

    def read_into(self, rows: list[int], out: list[Tensor]) -> None:
        """Write the rows of distinct ids into host memory, one tensor for each."""
        self._check_open()
        self._check_range(min(rows), max(rows))
        self._begin(rows, out, waiting=True)()

    def rows(self, ids: Int[Tensor, "*tokens"]) -> LutRows:
        """Return the rows of the ids, flattened, on the ids' device."""
        return LutRows.from_bytes(self.read(ids.flatten()), self.meta)

    def _read(self, ids: Tensor, waiting: bool) -> Callable[[], Tensor]:
        """Begin to read whole rows; the function that is returned waits for them."""
        rows = self._host_ids(ids).tolist()
        place = {row: number for number, row in enumerate(dict.fromkeys(rows))}
        out = torch.empty(len(place), self.meta.row_stride, dtype=torch.uint8)
        wait = self._begin(list(place), list(out), waiting)

        def take() -> Tensor:
            wait()
            found = out
            if len(place) < len(rows):
                found = out.index_select(0, torch.tensor([place[row] for row in rows]))
            return found.to(ids.device)

        return take

    def _begin(self, rows: list[int], out: list[Tensor], waiting: bool) -> Callable[[], None]:
        """Begin to read rows into memory; the function that is returned waits for them.

        A caller who waits anyway has direct reads done at once, and what the page cache has; of
        other reads he does the last piece himself: one alone needs no other thread.
        """
        stride = self.meta.row_stride
        frames = self._frames(len(rows)) if self.direct else []
        copies: list[tuple[memoryview, memoryview]] = []
        pieces: list[tuple[memoryview, int]] = []
        reads: list[tuple[int, int, int]] = []  # the same, as the system takes them
        for number, (row, place) in enumerate(zip(rows, out, strict=True)):
            first = HEADER_BYTES + row * stride
            if self.direct:
                # Rows begin on 512 bytes, direct reads on 4,096.
                extra = first % _DIRECT_ALIGNMENT
                size = -(-(extra + stride) // _DIRECT_ALIGNMENT) * _DIRECT_ALIGNMENT
                frame, first = frames[number], first - extra
                view = frame.memory[:size]
                copies.append((_bytes(place), view[extra : extra + stride]))
                reads.append((frame.address, size, first))
            else:
                view = _bytes(place)
                if self._fill_now(view, first):
                    continue
            for start in range(0, len(view), _PIECE):
                pieces.append((view[start : start + _PIECE], first + start))
        aio = self._aio if waiting and len(reads) > 1 else None
        if aio is not None and aio.lock.acquire(blocking=False):
            try:
                got = aio.read(reads)
            finally:
                aio.lock.release()
            whole = (
                count >= min(size, self.meta.file_bytes - offset)
                for count, (_, size, offset) in zip(got, reads, strict=True)
            )
            if all(whole):
                pieces = []
        own = pieces.pop() if waiting and pieces else None
        futures = [self._pool.submit(self._fill, *piece) for piece in pieces]

        def wait() -> None:
            if own is not None:
                self._fill(*own)
            for future in futures:
                future.result()
            for target, found in copies:
                target[:] = found
            if waiting and (len(self._spare) + len(frames)) * self._frame <= _SPARE_BYTES:
                self._spare.extend(frames)  # a ticket's rows may be asked for once more

        return wait

    def _frames(self, count: int) -> list["_Frame"]:
        """Return aligned memory for rows, as far as possible what the system has given already."""
        frames: list[_Frame] = []
        with suppress(IndexError):
            while len(frames) < count:
                frames.append(self._spare.pop())
        if fresh := (count - len(frames)) * self._frame:
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS  # its pages are the quickest to get
            block = memoryview(mmap.mmap(-1, fresh, flags=flags))
            address = torch.frombuffer(block, dtype=torch.uint8).data_ptr()
            frames += [
                _Frame(block[begin : begin + self._frame], address + begin)
                for begin in range(0, fresh, self._frame)
            ]
        return frames

    def _fill_now(self, view: memoryview, offset: int) -> bool:
        """Fill the view if the page cache has all of it; return whether it had."""
        left = min(len(view), self.meta.file_bytes - offset)
        try:
            return os.preadv(self._file, [view], offset, os.RWF_NOWAIT) >= left
        except (AttributeError, OSError):
            return False

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

    def close(self) -> None:
        """Close the file and end the threads; the store cannot be used any more."""
        if not self.closed:
            super().close()
            self._pool.shutdown()
            self._release()


def _bytes(place: Tensor) -> memoryview:
    """Return a tensor in host memory as bytes that can be written."""
    array: Any = place.numpy()
    return memoryview(array)


def _end(pool: ThreadPoolExecutor, file: int, aio: AsyncReads | None) -> None:
    """End threads that have nothing left to read, and close their file."""
    pool.shutdown(wait=False)
    if aio is not None:
        aio.close()
    os.close(file)


__all__ = ["DiskStore"]
