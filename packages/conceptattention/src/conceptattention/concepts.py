"""Concept words: checked, encoded one by one, and found inside the prompt."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from .adapters import Adapter
from .adapters.base import Encoded

_logger = logging.getLogger(__name__)
_logger.addHandler(logging.NullHandler())

Token = Literal["auto", "first", "mean", "last"]
Words = tuple[str, ...] | tuple[tuple[str, ...], ...]
Spots = list[list[list[int]]]  # positions of tokens, for each prompt and concept
MAX_CONCEPTS = 512


def check_concepts(concepts: Sequence[str] | Sequence[Sequence[str]]) -> Words:
    """Return the concepts as tuples.

    Raises:
        TypeError: Not a sequence of strings or of sequences of strings.
        ValueError: Empty, repeated, too many, or lists of unequal length.
    """
    if isinstance(concepts, str) or not isinstance(concepts, Sequence):
        raise TypeError(f"`concepts` must be a list of words; got {concepts!r}.")
    if not concepts:
        raise ValueError("`concepts` must hold at least one word; got none.")
    if not isinstance(concepts[0], str) and isinstance(concepts[0], Sequence):
        lists = tuple(check_concepts(row) for row in concepts)  # type: ignore[arg-type]
        lengths = [len(row) for row in lists]
        if len(set(lengths)) > 1:
            raise ValueError(f"`concepts` must hold lists of one length; got lengths {lengths}.")
        return lists  # type: ignore[return-value]
    for word in concepts:
        if not isinstance(word, str):
            raise TypeError(f"`concepts` must hold strings; got {word!r}.")
        if not word.strip():
            raise ValueError(f"`concepts` must hold words; got {word!r}.")
    repeated = [word for word in dict.fromkeys(concepts) if list(concepts).count(word) > 1]
    if repeated:
        raise ValueError(f"`concepts` must differ from each other; got {repeated[0]!r} twice.")
    if len(concepts) > MAX_CONCEPTS:
        raise ValueError(f"`concepts` must hold at most {MAX_CONCEPTS} words; got {len(concepts)}.")
    if len(concepts) == 1:
        _logger.warning(
            "the map of %s alone is 1 everywhere, as maps are shares among the concepts: name the "
            "background too, or read raw scores by `with_reduce('raw')`", concepts[0],
        )  # fmt: skip
    return tuple(str(word) for word in concepts)


def per_image(concepts: Words) -> bool:
    """Return whether every image of the batch has concepts of its own."""
    return isinstance(concepts[0], tuple)


def check_embeds(embeds: Tensor | None, concepts: Words) -> Tensor | None:
    """Return a user's text vectors as (1, concepts, dim_text).

    Raises:
        ValueError: Their shape does not fit the concepts.
    """
    if embeds is None:
        return None
    count = len(concepts)
    if per_image(concepts) or embeds.ndim != 2 or len(embeds) != count:
        raise ValueError(
            f"`concept_embeds` must have shape (concepts, dim_text) with {count} concepts in "
            f"one list; got {tuple(embeds.shape)}."
        )
    return embeds[None]


def encode_concepts(adapter: Adapter, pipe: Any, concepts: Words, token: Token) -> Tensor:
    """Return the text vectors of every list of concepts, (lists, concepts, dim_text).

    Raises:
        ValueError: The pipeline's encoders or tokenizers are missing.
        TypeError: The adapter's `encode` does not return `Encoded`.
    """
    lists: Any = concepts if per_image(concepts) else (concepts,)
    words = list(dict.fromkeys(word for row in lists for word in row))
    try:
        with torch.no_grad():
            encoded = adapter.encode(pipe, words, token)
    except (AttributeError, TypeError) as error:
        raise ValueError(
            "`pipe` cannot encode concepts, as its text encoders or tokenizers are missing; "
            "pass `concept_embeds`."
        ) from error
    if not isinstance(encoded, Encoded):
        raise TypeError(
            f"`encode` of {type(adapter).__name__} must return what `word_vectors` does, an "
            f"`Encoded`; got {type(encoded).__name__}."
        )
    if encoded.unknown:
        _logger.warning("the tokenizer does not know %s", ", ".join(encoded.unknown))
    several = [w for w, n in zip(words, encoded.tokens, strict=True) if n > 1]
    if several and token == "auto":
        _logger.warning("%s: several tokens, their mean is used", ", ".join(several))
    place = {word: index for index, word in enumerate(words)}
    return torch.stack([encoded.embeds[[place[word] for word in row]] for row in lists])


def find_in_prompt(
    adapter: Adapter,
    pipe: Any,
    concepts: Words,
    prompt: str | Sequence[str] | None,
    tokens: Sequence[Sequence[int]] | None,
) -> Spots:
    """Return the positions of every concept's tokens, for each prompt.

    Args:
        adapter: Of the model family.
        pipe: The pipeline.
        concepts: The words.
        prompt: The text, or one per image, that holds them.
        tokens: Instead of `prompt`: each concept's positions.

    Raises:
        ValueError: A word is not in its prompt, or the numbers do not fit.
    """
    if (prompt is None) == (tokens is None):
        raise ValueError(
            "`space='prompt_attention'` and 'daam' need either `prompt` or `prompt_tokens`."
        )
    several = per_image(concepts)
    if tokens is not None:
        if several or len(tokens) != len(concepts) or not all(tokens):
            raise ValueError(
                f"`prompt_tokens` must hold positions for each of {len(concepts)} "
                f"concepts in one list; got {tokens!r}."
            )
        return [[list(row) for row in tokens]]
    texts: list[str] = [prompt] if isinstance(prompt, str) else list(prompt or ())
    lists: Any = concepts if several else [concepts]
    if several and len(texts) == 1:
        texts = texts * len(lists)
    if not several:
        lists = lists * len(texts)
    if not texts or len(texts) != len(lists):
        raise ValueError(
            f"`prompt` must be one text or {len(lists) or 'several'} of them; got {len(texts)}."
        )
    find = adapter.prompt_positions
    return [
        [find(pipe, text, word) for word in words] for text, words in zip(texts, lists, strict=True)
    ]


class PromptWords:
    """Where the concepts stand in the prompt.

    Args:
        spots: Positions of tokens, for each prompt and concept, as `find_in_prompt` returns them.
    """

    def __init__(self, spots: Spots) -> None:
        self.spots = spots
        self._shares: Tensor | None = None

    def shares(self, batch: int, tokens: int, device: torch.device) -> Tensor:
        """Return the matrix (batch, concepts, tokens) that averages the tokens of each word.

        Args:
            batch: Number of images.
            tokens: Number of text tokens.
            device: Where the matrix is wanted.

        Raises:
            ValueError: Prompts do not fit the batch, or a position is out of range.
        """
        if batch % len(self.spots):
            raise ValueError(
                f"`prompt` has {len(self.spots)} texts, one per image; "
                f"got a batch of {batch} images."
            )
        shape = (batch, len(self.spots[0]), tokens)
        shares = self._shares
        if shares is not None and shares.shape == shape and shares.device == device:
            return shares
        shares = torch.zeros(shape)
        for row in range(batch):
            for place, positions in enumerate(self.spots[row * len(self.spots) // batch]):
                if max(positions) >= tokens:
                    raise ValueError(
                        f"`prompt_tokens` must be below {tokens}, the number of text tokens; "
                        f"got {max(positions)}."
                    )
                shares[row, place, positions] = 1 / len(positions)
        self._shares = shares.to(device)
        return self._shares
