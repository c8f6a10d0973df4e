"""Stores: where the rows of a lookup table are while a model runs.

All stores serve the same bytes. `rows` returns them when they are there; `prefetch` starts to fetch
them and returns a ticket, whose `rows` the model takes when it needs them.
"""

import mmap
import os
import shutil
import threading
import warnings
import weakref
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from ..kernels.gather import gather
from .errors import LutChecksumError, LutIdError, LutTruncatedError
from .format import DATA_FILE, HEADER_BYTES, META_FILE, LutMeta, LutRows

_PIECE = 64 * 1024  # bytes of one direct read: longer rows are read in several at a time
_DIRECT_ALIGNMENT = 4096


class Ticket:
    """Rows that are on their way.

    Args:
        take: Waits for the rows, if need be, and returns them.
    """

    def __init__(self, take: Callable[[], LutRows]) -> None:
        self._take = take

    def rows(self) -> LutRows:
        """Return the rows; whoever uses them runs after they have arrived."""
        return self._take()


class LutStore(ABC):
    """What a model needs of a lookup table. A store that cannot overlap implements `read` alone.

    Any number of threads may ask for rows at a time.

    Args:
        meta: The table's description.
    """

    def __init__(self, meta: LutMeta) -> None:
        self.meta = meta
        self.closed = False

    @abstractmethod
    def read(self, ids: Int[Tensor, " tokens"]) -> UInt8[Tensor, "tokens row_stride"]:
        """Return whole rows as they are on disk, on the ids' device."""

    def rows(self, ids: Int[Tensor, "*tokens"]) -> LutRows:
        """Return the rows of the ids, flattened, on the ids' device.

        Raises:
            LutIdError: An id is not in the table (checked where that needs no waiting).
            ValueError: The store was closed.
        """
        return LutRows.from_bytes(self.read(ids.flatten()), self.meta)

    def prefetch(self, ids: Int[Tensor, "*tokens"]) -> Ticket:
        """Begin to fetch the rows of the ids; the ticket's `rows` returns them."""
        found = self.rows(ids)
        return Ticket(lambda: found)

    def close(self) -> None:
        """Let go of files and memory; the store cannot be used any more."""
        self.closed = True

    def _host_ids(self, ids: Tensor) -> Tensor:
        """Return the ids in host memory, checked."""
        self._check_open()
        ids = ids.cpu()
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < self.meta.vocab:
            raise LutIdError(
                f"`ids` must be between 0 and {self.meta.vocab - 1}, the table's last id; "
                f"got ids from {int(ids.min())} to {int(ids.max())}."
            )
        return ids

    def _check_open(self) -> None:
        if self.closed:
            raise ValueError("This lookup table was closed; open it again with `open_lut`.")


class _TensorStore(LutStore):
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


class PinnedStore(_TensorStore):
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
        _check_length(Path(folder), meta)
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
        _check_length(Path(folder), self.meta)
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


class ComputeStore(LutStore):
    """No table at all: the experts are run for every row. The reference of the other stores.

    Args:
        model: A model in expert form.
        fmt: Format of the rows.
    """

    def __init__(self, model: Any, fmt: str = "fp32") -> None:
        from ..conversion import plan  # conversion needs stores to verify

        super().__init__(plan(model, fmt))
        self._model = model

    def read(self, ids: Int[Tensor, " tokens"]) -> UInt8[Tensor, "tokens row_stride"]:
        """Return whole rows as conversion would write them, on the ids' device."""
        from ..conversion import expert_values

        with torch.no_grad():
            values = expert_values(self._model, self._host_ids(ids))
        return LutRows.encode(values, self.meta).to_bytes(self.meta).to(ids.device)


class CachedStore(LutStore):
    """A number of recently used rows in memory, in front of a slower store.

    Which row has to go is decided by CLOCK: a hand walks round and takes the first row that was not
    used since its last visit.

    Args:
        store: Where missing rows come from.
        capacity: Rows to keep.
        device: Memory to keep them in.
    """

    def __init__(self, store: LutStore, capacity: int, device: torch.device | str = "cpu") -> None:
        super().__init__(store.meta)
        if capacity < 1:
            raise ValueError(f"`capacity` must be at least 1; got {capacity}.")
        self.store, self.capacity = store, min(capacity, store.meta.vocab)
        self._rows = torch.empty(
            self.capacity, store.meta.row_stride, dtype=torch.uint8, device=device
        )
        self._slot: dict[int, int] = {}
        self._owner: list[int | None] = [None] * self.capacity
        self._used = bytearray(self.capacity)
        self._hand = 0
        self.hits = self.misses = 0
        self._lock = threading.Lock()
        self._done: Any = None  # on a GPU, what the last reader's stream has to reach

    def read(self, ids: Int[Tensor, " tokens"]) -> UInt8[Tensor, "tokens row_stride"]:
        """Return whole rows as they are on disk, on the ids' device."""
        distinct, inverse = torch.unique(self._host_ids(ids), return_inverse=True)
        with self._lock:
            stream = None
            if self._rows.is_cuda:
                stream = torch.cuda.current_stream(self._rows.device)
                if self._done is not None:
                    stream.wait_event(self._done)
            found = self._fetch(distinct.tolist())
            if stream is not None:
                self._done = stream.record_event()
        return found[inverse.to(found.device)].to(ids.device)

    def _fetch(self, wanted: list[int]) -> UInt8[Tensor, "distinct row_stride"]:
        """Return the rows of distinct ids; keep those that were missing."""
        missing = [row for row in wanted if row not in self._slot]
        self.hits += len(wanted) - len(missing)
        self.misses += len(missing)
        found = self._rows.new_empty(len(wanted), self.meta.row_stride)
        cached = [place for place, row in enumerate(wanted) if row in self._slot]
        if cached:
            slots = [self._slot[wanted[place]] for place in cached]
            for slot in slots:
                self._used[slot] = 1
            found[cached] = self._rows[slots]
        if missing:
            fresh = self.store.read(torch.tensor(missing)).to(found.device)
            found[[place for place, row in enumerate(wanted) if row not in self._slot]] = fresh
            for row in missing[: self.capacity]:
                self._claim(row)
            # The hand may have come round: a row may have lost its slot to a later one.
            kept = [place for place, row in enumerate(missing) if row in self._slot]
            self._rows[[self._slot[missing[place]] for place in kept]] = fresh[kept]
        return found

    def _claim(self, row: int) -> None:
        """Give a row the slot of one that was not used of late."""
        while self._used[self._hand]:
            self._used[self._hand] = 0
            self._hand = (self._hand + 1) % self.capacity
        slot, old = self._hand, self._owner[self._hand]
        if old is not None:
            del self._slot[old]
        self._owner[slot], self._slot[row] = row, slot
        self._hand = (slot + 1) % self.capacity

    def close(self) -> None:
        """Close the store behind the cache, too."""
        super().close()
        self.store.close()


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


__all__ = [
    "STORES",
    "CachedStore",
    "ComputeStore",
    "DeviceStore",
    "DiskStore",
    "LutStore",
    "MmapStore",
    "PinnedStore",
    "Ticket",
    "copy_lut",
    "open_lut",
    "verify_lut",
]
