"""SLRS for drafters that spell: each of their tokens is a byte or a character."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .acceptance import accepts, residual
from .chance import Chance
from .drafting import Situation
from .drafts import Certain, Draft
from .texts import Text
from .vocab import VocabMap

_LONGEST = 24  # Symbols of a target token that can be spelled.


class Spellings:
    """The tree of target tokens, spelled in a drafter's symbols.

    No symbol may begin another, so that every token has one spelling.

    Args:
        symbols: Bytes of each symbol.
        tokens: Bytes of each target token; None for those that cannot be spelled.

    Attributes:
        token: Target id at each node; −1 where none ends.
        children: For each node, the node that each symbol leads to.

    Raises:
        ValueError: A symbol begins another.
    """

    def __init__(self, symbols: Sequence[bytes], tokens: Sequence[bytes | None]) -> None:
        places = {spelled: place for place, spelled in enumerate(symbols)}
        lengths = sorted({len(spelled) for spelled in symbols})
        for spelled in symbols:
            for length in lengths:
                if length < len(spelled) and spelled[:length] in places:
                    raise ValueError(
                        "`method='slrs-plain'` needs a drafter whose tokens are bytes or "
                        f"characters; its token {spelled!r} begins with another, "
                        f"{spelled[:length]!r}. Use `method='slrs'`."
                    )
        self.token = [-1]
        self.children: list[dict[int, int]] = [{}]
        self._of_token: dict[int, list[int]] = {}
        for token, data in enumerate(tokens):
            path = None if data is None else self._parse(data, places, lengths)
            if path:
                self._insert(token, path)

    @staticmethod
    def _parse(data: bytes, places: dict[bytes, int], lengths: list[int]) -> list[int]:
        path: list[int] = []
        while data and len(path) < _LONGEST:
            found = next((places[data[:n]] for n in lengths if data[:n] in places), None)
            if found is None:
                return []
            path.append(found)
            data = data[next(n for n in lengths if data[:n] in places) :]
        return [] if data else path

    def _insert(self, token: int, path: list[int]) -> None:
        node = 0
        for symbol in path:
            if symbol not in self.children[node]:
                self.children[node][symbol] = len(self.token)
                self.token.append(-1)
                self.children.append({})
            node = self.children[node][symbol]
        if self.token[node] < 0:  # Of tokens with the same bytes, the first.
            self.token[node] = token
            self._of_token[token] = path

    def add(self, token: int, symbol: int) -> None:
        """Let a symbol that stands for no bytes spell a token, such as the end."""
        if token not in self._of_token and symbol not in self.children[0]:
            self._insert(token, [symbol])

    def spell(self, token: int) -> list[int]:
        """Return the symbols of a target token; none if it cannot be spelled."""
        return self._of_token.get(token, [])

    def stay(self, node: int, law: Tensor) -> float:
        """Return the probability that the symbol after a node does not go on from it."""
        going = list(self.children[node])
        return max(0.0, 1.0 - float(law[going].sum())) if going else 1.0

    def others(self, node: int, law: Tensor) -> Tensor:
        """Return the law of a symbol that is known not to go on from a node."""
        law = law.clone()
        law[list(self.children[node])] = 0.0
        return law / law.sum()


@dataclass
class _Word:
    """The law of one proposal: how it was drawn, for any token that might have been.

    Attributes:
        first: Law of its first symbol.
        held: Ids in the drafter's cache before that symbol.
    """

    first: Tensor
    held: int


@dataclass
class Spelled:
    """Target tokens that a drafter spelled.

    Each is the longest token on the path of the drafter's symbols, which ends where the next symbol
    leads out of the tree. Where that happens at no token's end, the draft is stuck: then a proposal
    that the target can never make was drawn.

    Attributes:
        tokens: Target ids.
        words: The law of each, and of what the draft got stuck at.
        chances: The probability with which each was drawn.
        stuck: Whether it did.
        weigh: Returns the probability of any token by the law of a word.
    """

    tokens: list[int]
    words: list[_Word]
    chances: list[float]
    stuck: bool
    weigh: Callable[[_Word, int], float]

    def judge(self, p: Tensor, chance: Chance) -> tuple[int, Tensor]:
        """See `Draft`."""
        coins = chance.coins(len(self.tokens), p).tolist()
        for place, (token, share) in enumerate(zip(self.tokens, self.chances, strict=True)):
            if place == len(p) - 1:
                return place, p[place]
            if not accepts(coins[place], float(p[place, token]), share):
                return place, self._replace(p[place], place, chance)
        place = len(self.tokens)
        if self.stuck and place < len(p):
            return place, self._replace(p[place], place, chance)
        return place, p[place]

    def _replace(self, p: Tensor, place: int, chance: Chance) -> Tensor:
        return residual(p, lambda token: self.weigh(self.words[place], token), chance)


class SpelledTokens:
    """SLRS by the plain rule: the drafter spells until a target token is complete.

    Args:
        text: The tokenizers.
        mapping: The vocabularies' map.
        drafter_size: Rows of the drafter's head.
        device: Device of the drafter.

    Raises:
        ValueError: The drafter's tokens are neither bytes nor characters.

    Source: SLRS, Timor et al. 2025, algorithm 5; the stopping rule is our own.
    """

    def __init__(
        self, text: Text, mapping: VocabMap, drafter_size: int, device: torch.device
    ) -> None:
        self._eos = set(text.target_eos)
        table = mapping.drafter_bytes[:drafter_size]
        first: dict[bytes, int] = {}
        for index, spelled in enumerate(table):
            if spelled is not None:
                first.setdefault(spelled, index)
        self.ids = list(first.values())
        self.tree = Spellings(list(first), mapping.target_bytes)
        end = next((i for i in text.drafter_eos if i < drafter_size and i not in self.ids), None)
        if end is not None and text.target_eos:
            self.ids.append(end)
            self.tree.add(text.target_eos[0], len(self.ids) - 1)
        self._columns = torch.tensor(self.ids, device=device)

    def draft(self, now: Situation) -> tuple[list[Draft], int]:
        """See `Method`."""
        rooms = [min(room, now.lookahead) for room in now.rooms]
        feeds = now.memory.missing([room * _LONGEST for room in rooms])
        spellers = [
            _Speller(self, now, row, rooms[row]) if feed else None for row, feed in enumerate(feeds)
        ]
        drafted = 0
        while any(feeds):
            laws = self._laws(now, now.memory.feed(feeds))
            lengths = now.memory.lengths
            feeds = [[] for _ in feeds]
            for row, law in enumerate(laws):
                speller = spellers[row]
                if law is not None and speller is not None:
                    drafted += 1
                    symbol = speller.step(law[0], lengths[row])
                    feeds[row] = [] if symbol is None else [self.ids[symbol]]
        drafts: list[Draft] = [s.draft() if s is not None else Certain() for s in spellers]
        return drafts, drafted

    def _laws(self, now: Situation, said: list[Tensor]) -> list[Tensor | None]:
        laws: list[Tensor | None] = []
        for logits in said:
            if not len(logits):
                laws.append(None)
                continue
            logits = logits[:, self._columns]
            if now.processors.greedy:
                law = torch.zeros_like(logits)
                law[torch.arange(len(law)), logits.argmax(dim=1)] = 1.0
            else:
                law = now.processors.scores_only(logits).softmax(dim=1)
            laws.append(law)
        return laws

    def weigh(self, now: Situation, row: int, word: _Word, token: int) -> float:
        """Return the probability that a word would have been a token."""
        path = self.tree.spell(token)
        share = float(word.first[path[0]]) if path else 0.0
        if share == 0.0:
            return 0.0
        node = 0
        for symbol in path:
            node = self.tree.children[node][symbol]
        known = path if self.tree.children[node] else path[:-1]
        if not known:
            return share
        now.memory.crop([word.held if r == row else n for r, n in enumerate(now.memory.lengths)])
        feeds: list[list[int]] = [[] for _ in now.memory.lengths]
        feeds[row] = [self.ids[symbol] for symbol in known]
        said = now.memory.feed(feeds, keep=[len(feed) for feed in feeds])
        law = self._laws(now, said)[row]
        assert law is not None
        for place, symbol in enumerate(path[1:]):
            share *= float(law[place, symbol])
        return share * (self.tree.stay(node, law[-1]) if self.tree.children[node] else 1.0)


class _Speller:
    """One row's walk down the tree."""

    def __init__(self, method: SpelledTokens, now: Situation, row: int, room: int) -> None:
        self._method, self._now, self._row, self._room = method, now, row, room
        self._node, self._share = 0, 1.0
        self._tokens: list[int] = []
        self._words: list[_Word] = []
        self._chances: list[float] = []
        self._stuck = False

    def step(self, law: Tensor, held: int) -> int | None:
        """Draw a symbol from its law, go on from it, and return it; None at the draft's end.

        Args:
            law: Law of the next symbol.
            held: Ids in the drafter's cache.
        """
        tree = self._method.tree
        if self._node == 0:
            self._words.append(_Word(law, held))
        (symbol,) = self._now.chance.draw(law[None])
        if symbol not in tree.children[self._node]:
            if self._node == 0 or tree.token[self._node] < 0:
                self._stuck = True
                return None
            self._complete(self._share * tree.stay(self._node, law))
            if self._ended():
                return None
            # The symbol begins the next token, and is known not to go on from the last one.
            law = tree.others(self._node, law)
            self._node, self._share = 0, 1.0
            self._words.append(_Word(law, held))
            if symbol not in tree.children[0]:
                self._stuck = True
                return None
        self._share *= float(law[symbol])
        self._node = tree.children[self._node][symbol]
        if not tree.children[self._node]:
            self._complete(self._share)
            self._node, self._share = 0, 1.0
            if self._ended():
                return None
        return symbol

    def _complete(self, share: float) -> None:
        self._tokens.append(self._method.tree.token[self._node])
        self._chances.append(share)

    def _ended(self) -> bool:
        return len(self._tokens) == self._room or self._tokens[-1] in self._method._eos

    def draft(self) -> Draft:
        """Return the draft."""
        if self._now.processors.greedy:
            return Certain(self._tokens)

        def weigh(word: _Word, token: int) -> float:
            return self._method.weigh(self._now, self._row, word, token)

        return Spelled(self._tokens, self._words, self._chances, self._stuck, weigh)
