"""The store that keeps recently used rows in front of a slower one."""

import threading
from typing import Any

import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from .base import LutStore


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


__all__ = ["CachedStore"]
