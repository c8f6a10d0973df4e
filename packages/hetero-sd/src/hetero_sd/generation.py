"""What a generation returns, and the texts of its tokens while they come."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ._bytes import unfinished_tail
from .requests import Prepared
from .rounds import Rounds, Row, Stats


@dataclass(frozen=True)
class Generation:
    """What `HeteroSpeculativeDecoder.generate` returns.

    Attributes:
        sequences: Prompts and new tokens as `generate` of transformers returns them, shape
            `(rows, length)`: prompts padded on the left, rows that ended early on the right.
        tokens: The new tokens of each row, the end token included.
        texts: Their text, without special tokens.
        stats: What it took.
    """

    sequences: Tensor
    tokens: list[list[int]]
    texts: list[str]
    stats: Stats

    @property
    def new_tokens(self) -> list[int]:
        """The new tokens, where there is one row."""
        return self.tokens[self._only()]

    @property
    def text(self) -> str:
        """Their text, where there is one row."""
        return self.texts[self._only()]

    def _only(self) -> int:
        if len(self.texts) != 1:
            raise ValueError(
                f"there are {len(self.texts)} rows; use `tokens` and `texts` for all of them."
            )
        return 0


@torch.no_grad()
def run_all(rounds: Rounds, prepared: Prepared, streamer: Any, table: list[bytes | None]) -> None:
    """Run all rounds, handing whole characters to the streamer.

    Args:
        rounds: What is to be run.
        prepared: The request, whose prompt a streamer gets first.
        streamer: As for `generate` of transformers; nobody listens if missing.
        table: Bytes of the target's tokens.

    Raises:
        ValueError: There is a streamer, and more than one row.
    """
    if streamer is None:
        for _ in rounds.run():
            pass
        return
    if len(rounds.rows) != 1:
        raise ValueError(f"`streamer` takes one row at a time; got {len(rounds.rows)}.")
    (row,) = rounds.rows
    streamer.put(prepared.input_ids.cpu())
    shown = 0
    for _ in rounds.run():
        whole = whole_tokens(table, row.new, row.ended)
        if whole > shown:
            streamer.put(torch.tensor(row.new[shown:whole]))
            shown = whole
    streamer.end()


def whole_tokens(table: list[bytes | None], tokens: list[int], ended: bool) -> int:
    """Return how many tokens from the first on make whole characters; all of them at the end.

    Args:
        table: Bytes of the target's tokens.
        tokens: New tokens of a row.
        ended: Whether no more will come.
    """
    if ended:
        return len(tokens)
    for count in range(len(tokens), max(len(tokens) - 4, 0), -1):
        last = tokens[max(count - 4, 0) : count]
        data = b"".join(table[i] or b"\n" for i in last if i < len(table))
        if not unfinished_tail(data):
            return count
    return max(len(tokens) - 4, 0)


def sequences_of(prepared: Prepared, rows: list[Row]) -> Tensor:
    """Return prompts and new tokens, padded as `generate` of transformers does."""
    width = max(len(row.new) for row in rows)
    pad = getattr(prepared.config, "_pad_token_tensor", None)
    fill = int(pad) if pad is not None else 0
    new = [row.new + [fill] * (width - len(row.new)) for row in rows]
    ids = prepared.input_ids
    return torch.cat([ids, torch.tensor(new, dtype=ids.dtype, device=ids.device)], dim=1)
