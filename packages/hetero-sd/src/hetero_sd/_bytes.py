"""The exact bytes of every token, and text encoding that never loses a byte."""

from __future__ import annotations

import json
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
        if index in added:
            table[index] = None if added[index]["special"] else token.encode()
        elif token != unknown:
            table[index] = _spell(token, kind) or None
    special = {i for i in tokenizer.all_special_ids if i is not None and i < len(table)}
    for index in special:
        table[index] = None
    return table


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
