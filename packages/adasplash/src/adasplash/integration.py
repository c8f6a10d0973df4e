"""`attn_implementation="adasplash"` for transformers' models."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .kernels.attention import adasplash

NAME = "adasplash"


def register_with_transformers() -> None:
    """Make `attn_implementation="adasplash"` known to transformers; safe to call again.

    Any model on transformers' attention interface with plain causal or bidirectional attention can
    then be loaded with it. Padding on either side, training and `generate` with a growing cache
    work, and so do attention dropout and softcap, though not in the kernels: they run in plain
    PyTorch, more slowly. Sliding windows, packed sequences and static caches are refused.

    Raises:
        ImportError: transformers is not installed.

    Source: own.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attention_forward)
    # Without a mask function transformers makes no mask, and padding would be ignored silently.
    AttentionMaskInterface.register(NAME, padding_mask)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Return the attention output `[batch, seq_q, heads, dim]` and no weights.

    Args:
        module: The attention layer; its `is_causal` counts where the argument is None.
        query: `[batch, heads, seq_q, dim]`.
        key: `[batch, heads_kv, seq_k, dim]`, not expanded.
        value: As `key`.
        attention_mask: What `padding_mask` returned.
        dropout: Probability of dropping a weight.
        scaling: Factor of the scores.
        is_causal: Whether a row sees only the keys up to its own position.
        sliding_window: Must be None.
        softcap: Bound of the scores.
        **kwargs: What other implementations want; ignored.

    Raises:
        ValueError: A sliding window is asked for.
    """
    if sliding_window is not None:
        raise ValueError(
            f"`sliding_window` must be None with attn_implementation={NAME!r}; got "
            f"{sliding_window}."
        )
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    output = adasplash(
        query,
        key,
        value,
        is_causal=causal,
        scale=scaling,
        softcap=softcap,
        dropout_p=dropout,
        key_padding_mask=attention_mask,
    )
    return output.transpose(1, 2).contiguous(), None


def padding_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Any = None,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """Return which keys are tokens, bool `[batch, seq_k]`, or None without padding.

    Args:
        batch_size: Number of sequences.
        q_length: Number of queries.
        kv_length: Number of keys, those of the cache included.
        q_offset: Position of the first query.
        kv_offset: Position of the first key.
        mask_function: Pattern of the mask: causal or bidirectional.
        attention_mask: 1 or True for tokens, `[batch, seq_k]`.
        **kwargs: What other implementations want; ignored.

    Raises:
        ValueError: The pattern is another, or the cache holds unused places.
    """
    from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

    if mask_function not in (None, causal_mask_function, bidirectional_mask_function):
        raise ValueError(
            f"`attn_implementation` {NAME!r} computes plain causal and bidirectional attention; "
            "got a model or an input with another mask (sliding window, chunks, packed sequences)."
        )
    # transformers passes q_offset as a tensor when compiling; the lengths stay integers.
    if mask_function is causal_mask_function and kv_length + kv_offset > int(q_offset) + q_length:
        raise ValueError(
            f"`attn_implementation` {NAME!r} needs a cache that grows with the text "
            "(DynamicCache); got a cache with unused places (static cache)."
        )
    if attention_mask is None:
        return None
    mask = attention_mask[:, -kv_length:].bool()
    return None if bool(mask.all()) else mask
