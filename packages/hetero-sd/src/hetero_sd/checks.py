"""What models and tokenizers must be, and what is read from them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def check_choice(name: str, value: Any, allowed: Sequence[str]) -> None:
    """Raise ValueError where a setting is not one of those allowed."""
    if value not in allowed:
        listed = ", ".join(map(repr, allowed[:-1]))
        raise ValueError(f"`{name}` must be {listed} or {allowed[-1]!r}; got {value!r}.")


def check_lookahead(lookahead: Any) -> None:
    """Raise ValueError where a lookahead is neither `"auto"` nor an integer of 0 or more."""
    if lookahead == "auto":
        return
    if isinstance(lookahead, bool) or not isinstance(lookahead, int) or lookahead < 0:
        raise ValueError(
            f"`lookahead` must be 'auto' or an integer of 0 or more; got {lookahead!r}."
        )


def check_tokenizer(name: str, tokenizer: Any) -> None:
    """Raise TypeError where a tokenizer is not a fast one."""
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise TypeError(
            f"`{name}_tokenizer` must be a fast tokenizer (one with `backend_tokenizer`); "
            f"got {type(tokenizer).__name__}."
        )


def check_model(name: str, model: Any) -> None:
    """Raise where a model is none, of an unsupported kind (ValueError), or in training mode."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "get_output_embeddings"):
        raise TypeError(
            f"`{name}` must be a causal language model of transformers, loaded; got "
            f"{type(model).__name__}."
        )
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"`{name}` must be decoder-only; got {type(model).__name__}.")
    if getattr(model, "_is_stateful", False):
        raise ValueError(
            f"`{name}` must keep keys and values, which can be cropped; {type(model).__name__} "
            "keeps a running state."
        )
    if model.training:
        raise ValueError(f"`{name}` must be in evaluation mode; call `{name}.eval()` first.")


def head_size(model: Any) -> int:
    """Return the size of a model's vocabulary, padding included."""
    head = model.get_output_embeddings()
    return int(getattr(head, "out_features", None) or head.weight.shape[0])


def check_size(name: str, rows: int, table: list[bytes | None]) -> None:
    """Raise ValueError where a tokenizer has tokens that its model's vocabulary has not."""
    used = max((i for i, spelled in enumerate(table) if spelled is not None), default=-1) + 1
    if used > rows:
        raise ValueError(
            f"`{name}_tokenizer` must fit `{name}`, whose vocabulary has {rows} entries; it has "
            f"tokens up to {used - 1}."
        )


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Return the ids that end a text, first the one to propose."""
    settings = getattr(model, "generation_config", None)
    for value in (
        getattr(settings, "eos_token_id", None),
        getattr(model.config, "eos_token_id", None),
        tokenizer.eos_token_id,
    ):
        if value is not None:
            return [value] if isinstance(value, int) else list(value)
    return []
