"""`attn_implementation="adasplash"` for transformers' models."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .kernels.attention import adasplash
from .modules import AlphaParam

NAME = "adasplash"
_ALPHA = "entmax_alpha"  # attribute of an attention layer, and part of its weights' names

_logger = logging.getLogger(__name__)


def register_with_transformers() -> None:
    """Make `attn_implementation="adasplash"` known to transformers; safe to call again.

    Any model on transformers' attention interface can then be loaded with it. Causal and
    bidirectional attention, padding on either side, sliding windows and a growing cache run in the
    kernels, and so do packed sequences with `cu_seq_lens_q`. Every other mask (static caches,
    packed `position_ids` without a cache, chunks, masks of your own), attention dropout and softcap
    are exact too, but run in plain PyTorch, more slowly.

    Raises:
        ImportError: transformers is not installed.

    Source: own.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attention_forward)
    # Without a mask function transformers makes no mask, and padding would be ignored silently.
    AttentionMaskInterface.register(NAME, make_mask)


def set_alpha(model: nn.Module, alpha: float | str | Tensor) -> list[AlphaParam]:
    """Set alpha of every attention layer of a transformers model; 1.5 where it is never called.

    Call it in every step to follow an `AlphaSchedule`.

    Args:
        model: A model, loaded with any attention implementation.
        alpha: 1 to 2; or "learned": every layer gets an `AlphaParam` with one alpha per head, which
            `model.parameters()` and `state_dict()` then hold; or a tensor that all layers share,
            above 1 up to 2: filled in place it follows a schedule without a new compilation.

    Returns:
        The parameters, in the order of the layers, empty for a number. `save_pretrained` saves
        them; `from_pretrained` does not know them: call `set_alpha(model, "learned")`, then
        `load_alpha(model, folder)`.

    Raises:
        ValueError: `alpha` is out of range, or `model` has no attention layer.
    """
    if isinstance(alpha, str) and alpha != "learned":
        raise ValueError(f"`alpha` must be a number or 'learned'; got {alpha!r}.")
    if isinstance(alpha, float | int) and not 1 <= alpha <= 2:
        raise ValueError(f"`alpha` must be between 1 and 2; got {alpha}.")
    layers = list(_attention_layers(model))
    if not layers:
        raise ValueError(f"`model` must have attention layers of transformers; got {type(model)}.")
    found = []
    for layer, heads in layers:
        if isinstance(alpha, str):
            weight = next(layer.parameters())
            value: Any = AlphaParam(heads).to(weight.device)
            found.append(value)
        else:
            value = alpha if isinstance(alpha, Tensor) else float(alpha)
        if hasattr(layer, _ALPHA):
            delattr(layer, _ALPHA)  # a module cannot be replaced by a number
        setattr(layer, _ALPHA, value)
    return found


def load_alpha(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Read the alphas that `save_pretrained` wrote into a model prepared by `set_alpha`.

    Args:
        model: The model, after `set_alpha(model, "learned")`.
        folder: The folder that was saved.

    Raises:
        ValueError: The folder does not hold an alpha for every layer.
    """
    from safetensors import safe_open

    wanted = {name: p for name, p in model.named_parameters() if f".{_ALPHA}." in f".{name}"}
    if not wanted:
        raise ValueError('`model` has no learned alpha; call `set_alpha(model, "learned")` first.')
    for path in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in set(file.keys()) & set(wanted):
                with torch.no_grad():
                    wanted.pop(name).copy_(file.get_tensor(name))
    if wanted:
        raise ValueError(f"`folder` {str(folder)!r} holds no {sorted(wanted)[0]!r}.")


def _attention_layers(model: nn.Module) -> Iterator[tuple[nn.Module, int]]:
    """Yield the layers that call the attention interface, and their numbers of heads."""
    for module in model.modules():
        if not hasattr(module, "is_causal"):
            continue
        config = getattr(module, "config", None)
        heads = (
            getattr(module, "num_heads", None)
            or getattr(module, "num_attention_heads", None)
            or getattr(config, "num_attention_heads", None)
        )
        if isinstance(heads, int):
            yield module, heads


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
        attention_mask: What `make_mask` returned: True for keys that are tokens,
            `[batch, seq_k]`; or the whole mask `[batch, 1 or heads, seq_q, seq_k]`, bool or added
            to the scores.
        dropout: Probability of dropping a weight.
        scaling: Factor of the scores.
        is_causal: Whether a row sees only the keys up to its own position.
        sliding_window: A row sees so many keys up to its own position, that included; on either
            side where attention is not causal.
        softcap: Bound of the scores.
        **kwargs: `cu_seq_lens_q` and `cu_seq_lens_k` of sequences packed into one; the rest is for
            other implementations and ignored.
    """
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    alpha = getattr(module, _ALPHA, 1.5)
    options: dict[str, Any] = {
        "alpha": alpha() if isinstance(alpha, AlphaParam) else alpha,
        "is_causal": causal, "scale": scaling, "softcap": softcap, "dropout_p": dropout,
    }  # fmt: skip
    if sliding_window is not None:
        options["window"] = (sliding_window - 1, 0 if causal else sliding_window - 1)
    bounds = kwargs.get("cu_seq_lens_q")
    if bounds is not None and len(query) == 1:
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        output = adasplash(
            q, k, v, cu_seqlens_q=bounds, cu_seqlens_k=kwargs.get("cu_seq_lens_k"), **options
        )
        return output[None].contiguous(), None
    if attention_mask is not None and attention_mask.ndim == 4:
        # The whole pattern is in the mask: window and causality, too.
        bias = attention_mask[..., : key.shape[2]]
        if bias.dtype == torch.bool:
            bias = torch.zeros_like(bias, dtype=query.dtype).masked_fill(~bias, -torch.inf)
        options |= {"is_causal": False, "attn_bias": bias.to(query.dtype)}
        options.pop("window", None)
    else:
        options["key_padding_mask"] = attention_mask
    return adasplash(query, key, value, **options).transpose(1, 2).contiguous(), None


def make_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Any = None,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """Return what `attention_forward` has to know about the mask, None for no padding.

    That is which keys are tokens, bool `[batch, seq_k]`, where the pattern is plain: causal,
    bidirectional or a sliding window, of which the layer itself tells. Else it is the whole mask,
    bool `[batch, 1, seq_q, seq_k]`.

    Args:
        batch_size: Number of sequences.
        q_length: Number of queries.
        kv_length: Number of keys, those of the cache included.
        q_offset: Position of the first query.
        kv_offset: Position of the first key.
        mask_function: Pattern of the mask.
        attention_mask: 1 or True for tokens, `[batch, seq_k]`.
        **kwargs: What transformers' own mask functions take.
    """
    from transformers.masking_utils import (
        bidirectional_mask_function,
        causal_mask_function,
        sdpa_mask,
    )

    # transformers forbids skipping the mask where anything was laid over the usual pattern.
    usual = kwargs.get("allow_is_causal_skip") or kwargs.get("allow_is_bidirectional_skip")
    window = kwargs.get("local_size")
    config = kwargs.get("config")
    sliding = window is not None and getattr(config, "sliding_window", None) == window
    plain = mask_function in (None, causal_mask_function, bidirectional_mask_function)
    # Only with a growing cache does the last key belong to the last query.
    # (transformers passes q_offset as a tensor when compiling; the lengths stay integers.)
    bidirectional = mask_function is bidirectional_mask_function
    grows = bidirectional or kv_length + kv_offset == int(q_offset) + q_length
    if grows and (plain or (sliding and usual)):
        if attention_mask is None:
            return None
        mask = attention_mask[:, -kv_length:].bool()
        return None if bool(mask.all()) else mask
    _logger.debug("this mask is not in the kernels: attention runs in plain PyTorch")
    for name in ("allow_is_causal_skip", "allow_is_bidirectional_skip"):
        kwargs[name] = False
    whole: Tensor = sdpa_mask(
        batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask,
        **kwargs,
    )  # fmt: skip
    return whole
