"""The store that keeps recently used rows in front of a slower one."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from .base import LutStore

_STAGED = 64  # rows that are read at a time
Find = Callable[[list[int], list[Tensor]], tuple[list[int], list[int]]]


class CachedStore(LutStore):
    """A number of recently used rows in memory, in front of a slower store.

    Which row has to go is decided by CLOCK: a hand walks round and takes the first row that was not
    used since its last visit.

    Args:
        store: Where missing rows come from.
        capacity: Rows to keep.
        device: Memory to keep them in.

    Attributes:
        table: The rows that are kept, one in each slot.
        hits: Distinct ids of all requests whose rows were there.
        misses: Those whose rows were not.
    """

    def __init__(self, store: LutStore, capacity: int, device: torch.device | str = "cpu") -> None:
        super().__init__(store.meta)
        if capacity < 1:
            raise ValueError(f"`capacity` must be at least 1; got {capacity}.")
        self.store, self.capacity = store, min(capacity, store.meta.vocab)
        size = (self.capacity, store.meta.row_stride)
        self.table = torch.empty(size, dtype=torch.uint8, device=device)
        self._slot: dict[int, int] = {}
        self._owner: list[int | None] = [None] * self.capacity
        self._used = bytearray(self.capacity)
        self._hand = 0
        self.hits = self.misses = 0
        # Missing rows pass through host memory; on a GPU it is free again when they were sent.
        cuda = self.table.is_cuda
        size = (_STAGED, store.meta.row_stride)
        self._staging = list(torch.empty(size, dtype=torch.uint8, pin_memory=cuda))
        self._sent = torch.cuda.Event() if cuda else None
        self._lock = threading.Lock()
        self._done: Any = None  # on a GPU, what the last reader's stream has to reach

    def __repr__(self) -> str:
        """Return what is kept of which store."""
        return f"CachedStore({self.capacity:,} rows of {self.store!r})"

    @contextmanager
    def lease(self) -> Iterator[Find]:
        """Have the slots for oneself; the function that is given finds those of rows in `table`.

        It takes ids, and rows of host memory, one for each. Rows that are not there yet are read
        into that memory; whoever leases copies them into their slots, on a GPU as work of the
        current stream that is queued before the context ends. It returns every id's slot, and its
        place in the memory, -1 if its row is in the slot already. It queues nothing on a stream:
        work that waits for the rows may be queued before they are found.

        Raises:
            ValueError: The store was closed; or, of the function, there are more distinct ids than
                slots.
        """
        self._check_open()
        missing: list[int] = []

        def find(wanted: list[int], landing: list[Tensor]) -> tuple[list[int], list[int]]:
            if done is not None:
                done.synchronize()  # what others put into slots is there
            slot, used = self._slot, self._used
            slots: list[Any] = list(map(slot.get, wanted))
            distinct = dict.fromkeys(wanted)
            if len(distinct) > self.capacity:
                raise ValueError(
                    f"`wanted` must have at most {self.capacity} distinct ids, the cache's slots; "
                    f"got {len(distinct)}."
                )
            for place in slots:
                if place is not None:
                    used[place] = 1
            fresh = [row for row in distinct if row not in slot] if None in slots else []
            self.hits += len(distinct) - len(fresh)
            self.misses += len(fresh)
            if not fresh:
                return slots, [-1] * len(wanted)
            self.store.read_into(fresh, landing[: len(fresh)])
            held = {place for place in slots if place is not None}
            for row in fresh:
                held.add(self._claim(row, held))
            missing.extend(fresh)
            landed = {row: place for place, row in enumerate(fresh)}
            return [slot[row] for row in wanted], [landed.get(row, -1) for row in wanted]

        with self._lock:
            # Not waited for here, before the caller has queued his own work.
            done = self._done
            try:
                yield find
            except BaseException:
                for row in missing:  # they may never get into their slots
                    self._owner[self._slot.pop(row)] = None
                raise
            finally:
                if self.table.is_cuda:
                    self._done = torch.cuda.current_stream(self.table.device).record_event()

    def read(self, ids: Int[Tensor, " tokens"]) -> UInt8[Tensor, "tokens row_stride"]:
        """Return whole rows as they are on disk, on the ids' device."""
        distinct, inverse = torch.unique(self._host_ids(ids), return_inverse=True)
        with self._in_turn():
            parts = []
            for part in distinct.split(self.capacity):
                rows = part.tolist()
                self._admit(rows)
                slots = torch.tensor([self._slot[row] for row in rows], dtype=torch.long)
                parts.append(self.table.index_select(0, slots.to(self.table.device)))
            found = torch.cat(parts) if len(parts) > 1 else parts[0]
        return found.index_select(0, inverse.to(found.device)).to(ids.device)

    @contextmanager
    def _in_turn(self) -> Iterator[None]:
        """Let one thread at a time have the slots; on a GPU, one stream's work after another's."""
        with self._lock:
            stream = None
            if self.table.is_cuda:
                stream = torch.cuda.current_stream(self.table.device)
                if self._done is not None:
                    stream.wait_event(self._done)
            try:
                yield
            finally:
                if stream is not None:
                    self._done = stream.record_event()

    def _admit(self, wanted: list[int]) -> None:
        """Bring the rows of distinct ids, no more than there are slots, into slots of their own."""
        missing = [row for row in wanted if row not in self._slot]
        self.hits += len(wanted) - len(missing)
        self.misses += len(missing)
        held = {self._slot[row] for row in wanted if row in self._slot}
        for slot in held:
            self._used[slot] = 1
        if not missing:
            return
        for begin in range(0, len(missing), _STAGED):
            rows = missing[begin : begin + _STAGED]
            if self._sent is not None:
                self._sent.synchronize()
            fresh = self._staging[: len(rows)]
            self.store.read_into(rows, fresh)
            for row, bytes_ in zip(rows, fresh, strict=True):
                slot = self._claim(row, held)
                held.add(slot)
                self.table[slot].copy_(bytes_, non_blocking=True)
            if self._sent is not None:
                self._sent.record(torch.cuda.current_stream(self.table.device))

    def _claim(self, row: int, held: set[int]) -> int:
        """Give a row the slot of one that was not used of late, none of those held."""
        while self._used[self._hand] or self._hand in held:
            if self._hand not in held:
                self._used[self._hand] = 0
            self._hand = (self._hand + 1) % self.capacity
        slot, old = self._hand, self._owner[self._hand]
        if old is not None:
            del self._slot[old]
        self._owner[slot], self._slot[row] = row, slot
        self._hand = (slot + 1) % self.capacity
        return slot

    def close(self) -> None:
        """Close the store behind the cache, too."""
        super().close()
        self.store.close()


__all__ = ["CachedStore"]
