"""The exact bytes of every token, and text encoding that never loses a byte."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

_SPACE_MARK = "▁"


@lru_cache(maxsize=1)
def _byte_alphabet() -> dict[str, int]:
    """Return the byte that each character of the byte-level alphabet stands for."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in set(printable)]
    alphabet = {chr(byte): byte for byte in printable}
    alphabet.update({chr(256 + rank): byte for rank, byte in enumerate(hidden)})
    return alphabet


def tokenizer_state(tokenizer: Any) -> dict[str, Any]:
    """Return the tokenizer's whole state as plain data.

    Raises:
        TypeError: It has no backend of the `tokenizers` library.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise TypeError(
            "`tokenizer` must be a fast tokenizer (one with `backend_tokenizer`); got "
            f"{type(tokenizer).__name__}."
        )
    state: dict[str, Any] = json.loads(backend.to_str())
    return state


def _steps(part: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Return the single steps of a decoder or normalizer, nested sequences undone."""
    if part is None:
        return []
    nested = part.get("decoders") or part.get("normalizers") or part.get("pretokenizers")
    if nested is None:
        return [part]
    return [step for inner in nested for step in _steps(inner)]


def tokenizer_kind(state: dict[str, Any]) -> str:
    """Return how token strings spell bytes.

    Returns:
        `"byte-level"` (a letter per byte), `"sentencepiece"` (`▁` is a space, `<0x41>` a byte),
        `"wordpiece"` (`##` marks a continuation) or `"plain"` (the string itself).
    """
    steps = _steps(state.get("decoder")) + _steps(state.get("pre_tokenizer"))
    names = {step["type"] for step in steps}
    if "ByteLevel" in names:
        return "byte-level"
    if "WordPiece" in names or state["model"]["type"] == "WordPiece":
        return "wordpiece"
    marked = any(
        step["type"] == "Replace" and _SPACE_MARK in json.dumps(step, ensure_ascii=False)
        for step in steps
    )
    if marked or "Metaspace" in names or "ByteFallback" in names:
        return "sentencepiece"
    return "plain"


def _spell(token: str, kind: str) -> bytes | None:
    """Return the bytes that a token string stands for; None where it stands for none."""
    if kind == "byte-level":
        alphabet = _byte_alphabet()
        if any(character not in alphabet for character in token):
            return None
        return bytes(alphabet[character] for character in token)
    if kind == "sentencepiece":
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return bytes([int(token[3:5], 16)])
        return token.replace(_SPACE_MARK, " ").encode()
    if kind == "wordpiece":
        return token[2:].encode() if token.startswith("##") else b" " + token.encode()
    return token.encode()


def token_bytes(tokenizer: Any) -> list[bytes | None]:
    """Return the exact bytes of each token id; None for special tokens and unused ids.

    Args:
        tokenizer: A fast tokenizer.

    Raises:
        TypeError: It has no backend of the `tokenizers` library.

    Source: own.
    """
    state = tokenizer_state(tokenizer)
    kind = tokenizer_kind(state)
    vocab = tokenizer.get_vocab()
    added = {entry["id"]: entry for entry in state["added_tokens"]}
    unknown = state["model"].get("unk_token")
    table: list[bytes | None] = [None] * (1 + max(vocab.values(), default=-1))
    for token, index in vocab.items():
        if index in added and added[index]["special"]:
            continue
        if index in added and kind != "sentencepiece":
            table[index] = token.encode()
        elif token != unknown:
            table[index] = _spell(token, kind) or None
    special = {i for i in tokenizer.all_special_ids if i is not None and i < len(table)}
    for index in special:
        table[index] = None
    return table


def canonical(tokenizer: Any, table: list[bytes | None]) -> dict[bytes, int]:
    """Return one id for each byte string; a byte-fallback token only where there is no other."""
    chosen: dict[bytes, int] = {}
    fallbacks = []
    for index, spelled in enumerate(table):
        if spelled is None:
            continue
        if len(spelled) == 1 and tokenizer.convert_ids_to_tokens(index) == f"<0x{spelled[0]:02X}>":
            fallbacks.append((spelled, index))
        else:
            chosen.setdefault(spelled, index)
    for spelled, index in fallbacks:
        chosen.setdefault(spelled, index)
    return chosen


def unfinished_tail(data: bytes) -> int:
    """Return how many bytes at the end may be the start of a longer UTF-8 character.

    Returns:
        0 to 3.
    """
    for back in range(1, min(3, len(data)) + 1):
        byte = data[-back]
        if byte & 0xC0 == 0x80:
            continue
        needed = 4 if byte >= 0xF0 else 3 if byte >= 0xE0 else 2 if byte >= 0xC0 else 1
        return back if needed > back else 0
    return 0


class ByteEncoder:
    """Encodes bytes, whole characters or not, with a tokenizer made for text.

    Args:
        tokenizer: A fast tokenizer.
        table: Its `token_bytes`.
    """

    # A character that joins no neighbour: what follows it is encoded as the middle of a text.
    _SENTINEL = "\n"

    def __init__(self, tokenizer: Any, table: list[bytes | None]) -> None:
        self.table = table
        self.ids = canonical(tokenizer, table)
        self._backend = tokenizer.backend_tokenizer
        self._single = {
            spelled[0]: index
            for index, spelled in reversed(list(enumerate(table)))
            if spelled is not None and len(spelled) == 1
        }
        self._prefixes_space = self.spell(self._ids("a")) == b" a"

    def spell(self, ids: list[int]) -> bytes:
        """Return the bytes of a run of tokens; special tokens have none."""
        table = self.table
        return b"".join(table[i] or b"" for i in ids if i < len(table))

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return ids

    def _encode_text(self, text: str) -> list[int]:
        if not self._prefixes_space:
            return self._ids(text)
        return self._behind(self._ids(self._SENTINEL + text), text) or self._ids(text)

    def _behind(self, ids: list[int], text: str) -> list[int]:
        """Return the ids of a text, encoded behind the sentinel; none if they cannot be told."""
        for start in range(1, min(4, len(ids)) + 1):
            if self.spell(ids[:start]).strip(b" ") == b"\n" and self.spell(ids[start:]) == (
                text.encode()
            ):
                return ids[start:]
        return []

    def encode_each(self, texts: Sequence[str]) -> list[list[int]]:
        """Return tokens for each of many texts, faster than one by one."""
        before = self._SENTINEL if self._prefixes_space else ""
        found = self._backend.encode_batch([before + t for t in texts], add_special_tokens=False)
        if not before:
            return [one.ids for one in found]
        pairs = zip(found, texts, strict=True)
        return [self._behind(one.ids, text) or self._ids(text) for one, text in pairs]

    def encode(self, data: bytes) -> list[int]:
        """Return tokens for the bytes; bytes that are no UTF-8 become byte tokens, or nothing."""
        ids: list[int] = []
        while data:
            try:
                text = data.decode()
                bad, data = b"", b""
            except UnicodeDecodeError as error:
                text = data[: error.start].decode()
                bad, data = data[error.start : error.end], data[error.end :]
            if text:
                ids += self._encode_text(text)
            ids += [self._single[byte] for byte in bad if byte in self._single]
        return ids
