"""Drafts that begin before the host has read the last round: what they are fed, and if they pay."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ._bytes import ByteEncoder, unfinished_tail
from .kernels.judge import Spelling
from .kernels.judge.reference import bucket_of
from .vocab import VocabMap

_PIECES = 4  # Drafter ids that one target token may be; longer ones are left to the host.
_LONGEST = 32  # Bytes of an id that two may become.
_WAYS = 8  # Pairs in a bucket.
_FADE = 0.95  # Weight of a round at the next one.


def foretell(mapping: VocabMap, encoder: ByteEncoder | None, sizes: tuple[int, int]) -> Spelling:
    """Return how the drafter's tokenizer most likely writes each target token behind a text.

    A text's ids may be others: only the host knows, and it looks before anything comes of a draft.

    Args:
        mapping: The vocabularies' map.
        encoder: Encoder of the drafter's tokenizer; missing where the vocabularies are one.
        sizes: Rows of the heads of target and drafter.
    """
    size, most = sizes
    if encoder is None:
        return Spelling(torch.arange(size, dtype=torch.int32)[:, None], _join_table([]))
    spelled = torch.full((size, _PIECES), -1, dtype=torch.int32)
    for token, index in mapping.special.items():
        if token < size:
            spelled[token, 0] = index
    table = enumerate(mapping.target_bytes[:size])
    known = [(i, data.decode()) for i, data in table if data and not _broken(data)]
    found = encoder.encode_each([text for _, text in known])
    fits = [
        (i, ids)
        for (i, _), ids in zip(known, found, strict=True)
        if len(ids) <= _PIECES and max(ids, default=0) < most
    ]
    if fits:
        rows = [ids + [-1] * (_PIECES - len(ids)) for _, ids in fits]
        spelled[[i for i, _ in fits]] = torch.tensor(rows, dtype=torch.int32)
    ids = {data: index for data, index in encoder.ids.items() if index < most}
    pairs = [
        (ids[data[:cut]], ids[data[cut:]], whole)
        for data, whole in ids.items()
        for cut in range(1, min(len(data), _LONGEST))
        if data[:cut] in ids and data[cut:] in ids
    ]
    return Spelling(spelled, _join_table(pairs))


def _join_table(pairs: Sequence[tuple[int, int, int]]) -> Tensor:
    """Return buckets of pairs and what each becomes; what fits into no bucket is left out."""
    buckets = 1 << (len(pairs) // (_WAYS // 2)).bit_length()
    table = torch.full((buckets, _WAYS, 3), -1, dtype=torch.int32)
    if pairs:
        entries = torch.tensor(pairs)
        bucket, order = bucket_of(entries[:, 0], entries[:, 1], buckets).sort(stable=True)
        way = torch.arange(len(bucket)) - torch.searchsorted(bucket, bucket)
        fits = way < _WAYS
        table[bucket[fits], way[fits]] = entries[order[fits]].int()
    return table


def _broken(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return True
    return bool(unfinished_tail(data))


class Foresight:
    """Whether it pays to begin a draft before it is known what it has to be fed.

    A draft whose beginning was foreseen hides the time that the host takes from one round to the
    next. One that was not is done again: what it took longer than the host did is lost.

    Args:
        clock: Seconds on some clock that only moves on.

    Attributes:
        foreseen: Rounds whose beginning was, of all that could be.
        missed: The others.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._share = 1.0
        self._host = 0.0  # Seconds that the host takes.
        self._since: float | None = None
        self.foreseen = self.missed = 0

    def read(self) -> None:
        """Take note that the host has read a round's result."""
        self._since = self._clock()

    def see(self, hit: bool) -> None:
        """Take note of whether the next round begins as was foreseen."""
        self._share = _FADE * self._share + (1 - _FADE) * hit
        self.foreseen += hit
        self.missed += not hit
        if self._since is not None:
            taken, self._since = self._clock() - self._since, None
            self._host = _FADE * self._host + (1 - _FADE) * taken if self._host else taken

    def pays(self, draft: float) -> bool:
        """Return whether a draft that takes so many seconds should begin early."""
        return (1 - self._share) * draft <= self._host
