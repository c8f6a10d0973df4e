"""What a store is: a place that the rows of a lookup table come from while a model runs.

All stores serve the same bytes. `rows` returns them when they are there; `prefetch` starts to fetch
them and returns a ticket, whose `rows` the model takes when it needs them.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace

import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from .errors import LutIdError
from .format import LutMeta, LutRows

_REPEATING = 256  # tokens among which ids repeat often enough to look for them


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

    def __repr__(self) -> str:
        """Return the store's kind, and what the table is."""
        meta = self.meta
        return f"{type(self).__name__}({meta.vocab:,} ids, {meta.row_bytes:,} bytes, {meta.format})"

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

    def fetch(self, ids: Int[Tensor, "*tokens"]) -> LutRows:
        """Return the rows of the ids as a model takes them: of a long text each distinct one once.

        Rows that are on their way are waited for by `LutRows.layers`, layer by layer.

        Raises:
            LutIdError: As `rows`.
            ValueError: As `rows`.
        """
        if not _repeats(ids):
            return self.rows(ids)
        distinct, index = torch.unique(ids, return_inverse=True)
        return replace(self.rows(distinct), index=index.flatten())

    def prefetch(self, ids: Int[Tensor, "*tokens"]) -> Ticket:
        """Begin to fetch the rows of the ids; the ticket's `rows` returns them."""
        found = self.rows(ids)
        return Ticket(lambda: found)

    def read_into(self, rows: list[int], out: list[Tensor]) -> None:
        """Write the rows of distinct ids into host memory, one tensor for each."""
        for place, found in zip(out, self.read(torch.tensor(rows)), strict=True):
            place.copy_(found)

    def close(self) -> None:
        """Let go of files and memory; the store cannot be used any more."""
        self.closed = True

    def _host_ids(self, ids: Tensor) -> Tensor:
        """Return the ids in host memory, checked."""
        self._check_open()
        ids = ids.cpu()
        if ids.numel():
            self._check_range(int(ids.min()), int(ids.max()))
        return ids

    def _check_range(self, first: int, last: int) -> None:
        """Raise an error unless the smallest and the largest id are in the table."""
        if not 0 <= first <= last < self.meta.vocab:
            raise LutIdError(
                f"`ids` must be between 0 and {self.meta.vocab - 1}, the table's last id; "
                f"got ids from {first} to {last}."
            )

    def _check_open(self) -> None:
        if self.closed:
            raise ValueError("This lookup table was closed; open it again with `open_lut`.")


def _repeats(ids: Tensor) -> bool:
    """Return whether to look for repeated ids: their number has to be known on the host."""
    if ids.numel() < _REPEATING or torch.compiler.is_compiling():
        return False
    return not (ids.is_cuda and torch.cuda.is_current_stream_capturing())


__all__ = ["LutStore", "Ticket"]
