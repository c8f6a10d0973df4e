"""The text of one row as it grows, cut where a client wants it to stop."""

from __future__ import annotations

from collections.abc import Callable, Sequence


class Transcript:
    """Turns growing tokens into pieces of text.

    A piece is handed out only when nothing that follows can change it: characters are whole, and
    what may be the beginning of a stop string is held back.

    Args:
        decode: Returns the text of tokens, in whole characters unless its second argument, that
            the row has ended, is true.
        ends: Tokens that end a text.
        limit: Most tokens, 1 or more.
        stops: Strings that end the text; they are no part of it.

    Attributes:
        count: Tokens taken.
        finish: `"stop"` at an end token or a stop string, `"length"` at the limit, else None.
    """

    def __init__(
        self,
        decode: Callable[[list[int], bool], str],
        ends: frozenset[int],
        limit: int,
        stops: Sequence[str] = (),
    ) -> None:
        self._decode = decode
        self._ends = ends
        self._limit = limit
        self._stops = tuple(stops)
        self._shown = ""
        self.count = 0
        self.finish: str | None = None

    def update(self, tokens: Sequence[int], ended: bool) -> str:
        """Return the text that is new.

        Args:
            tokens: All tokens of the row so far, at least as many as at the last call.
            ended: Whether no more will come.
        """
        if self.finish is not None:
            return ""
        known = self.count
        taken = list(tokens[: self._limit])
        self.count = len(taken)
        if taken and taken[-1] in self._ends:
            self.finish = "stop"
        elif ended or self.count == self._limit:
            self.finish = "length"
        text = self._decode(taken, self.finish is not None)
        cut = self._cut(text)
        if cut is not None:
            text, self.finish = text[:cut], "stop"
            # The round may have gone on behind the stop string.
            while self.count > known + 1 and self._holds_stop(taken[: self.count - 1]):
                self.count -= 1
        elif self.finish is None:
            text = text[: len(text) - self._held(text)]
        if not text.startswith(self._shown):  # a tokenizer that rewrites what it has written
            return ""
        new = text[len(self._shown) :]
        self._shown = text
        return new

    def _cut(self, text: str) -> int | None:
        found = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        return min(found, default=None)

    def _holds_stop(self, tokens: list[int]) -> bool:
        return self._cut(self._decode(tokens, True)) is not None

    def _held(self, text: str) -> int:
        """Return how many characters at the end may be the beginning of a stop string."""
        longest = max(map(len, self._stops), default=1) - 1
        for size in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-size:]) for stop in self._stops):
                return size
        return 0
