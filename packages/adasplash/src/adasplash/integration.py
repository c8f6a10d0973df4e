"""`attn_implementation="adasplash"` for transformers' models."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .kernels.decode import adasplash_decode
from .modules import AlphaParam
from .watch import watched

NAME = "adasplash"
_ALPHA = "entmax_alpha"  # attribute of a layer and of its config, and part of its weights' names
_UNKNOWN = ("s_aux", "sinks", "indices", "block_indices")  # they change which weights there are


def register_with_transformers() -> None:
    """Make `attn_implementation="adasplash"` known to transformers; safe to call again.

    Any model on transformers' attention interface can then be loaded with it. Causal and
    bidirectional attention, padding on either side, sliding windows, growing and static caches,
    packed sequences, attention dropout and softcap run in the kernels. So does every other mask,
    chunks and masks of your own included: for one new token of each sequence as a mask of its keys,
    for several as a bias, which is read as a whole.

    Raises:
        ImportError: transformers is not installed.

    Source: own.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attention_forward)
    # Without a mask function transformers makes no mask, and padding would be ignored silently.
    AttentionMaskInterface.register(NAME, make_mask)


def set_alpha(
    model: nn.Module,
    alpha: float | str | Tensor,
    where: Callable[[nn.Module], bool] | None = None,
) -> list[AlphaParam]:
    """Set alpha of the attention layers of a transformers model; 1.5 where it is never called.

    Call it in every step to follow an `AlphaSchedule`. A number for all layers is also noted in
    their configuration, so `save_pretrained` and `from_pretrained` keep it; so is that alphas are
    learned, which `load_alpha` reads.

    Args:
        model: A model, loaded with any attention implementation.
        alpha: 1 to 2; or "learned": every layer gets an `AlphaParam` with one alpha per head, which
            `model.parameters()` and `state_dict()` then hold; or a tensor that all layers share,
            above 1 up to 2: filled in place it follows a schedule without a new compilation.
        where: Which layers, by the attention module; None for all. Others keep what they have:
            `set_alpha(model, 1.0, lambda layer: layer.sliding_window is not None)` leaves the local
            layers of a ModernBERT to softmax.

    Returns:
        The parameters, in the order of the layers, empty for a number. `save_pretrained` saves
        them; `from_pretrained` does not know them: call `load_alpha(model, folder)` after it.

    Raises:
        ValueError: `alpha` is out of range, or `model` has no attention layer that is asked for.
    """
    if isinstance(alpha, str) and alpha != "learned":
        raise ValueError(f"`alpha` must be a number or 'learned'; got {alpha!r}.")
    if isinstance(alpha, float | int) and not 1 <= alpha <= 2:
        raise ValueError(f"`alpha` must be between 1 and 2; got {alpha}.")
    layers = list(_attention_layers(model))
    if not layers:
        raise ValueError(f"`model` must have attention layers of transformers; got {type(model)}.")
    chosen = [(layer, heads) for _, layer, heads in layers if where is None or where(layer)]
    if not chosen:
        raise ValueError(f"`where` must hold for an attention layer of {type(model).__name__}.")
    found = []
    for layer, heads in chosen:
        if isinstance(alpha, str):
            weight = next(layer.parameters())
            value: Any = AlphaParam(heads).to(weight.device)
            found.append(value)
        else:
            value = alpha if isinstance(alpha, Tensor) else float(alpha)
        if hasattr(layer, _ALPHA):
            delattr(layer, _ALPHA)  # a module cannot be replaced by a number
        setattr(layer, _ALPHA, value)
        config = getattr(layer, "config", None)
        if config is None or where is not None:
            continue
        if not isinstance(alpha, Tensor):
            setattr(config, _ALPHA, value if isinstance(value, float) else alpha)
        elif hasattr(config, _ALPHA):
            delattr(config, _ALPHA)  # its number may change, and nobody would note that
    return found


def load_alpha(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Read the alphas that `save_pretrained` wrote into a model that `from_pretrained` has made.

    Args:
        model: The model; its layers get an `AlphaParam` each where they have none.
        folder: The folder that was saved.

    Raises:
        ValueError: The folder does not hold an alpha for every layer; the model stays as it is.
    """
    from safetensors import safe_open

    stored: dict[str, Tensor] = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            names = [name for name in file.keys() if f".{_ALPHA}." in f".{name}"]  # noqa: SIM118
            stored |= {name: file.get_tensor(name) for name in names}
    if not stored:
        raise ValueError(f"`folder` {str(folder)!r} holds no learned alpha.")
    learned = _learned_alphas(model)
    wanted = list(learned) or [f"{name}.{_ALPHA}.raw" for name, *_ in _attention_layers(model)]
    if len(stored) == len(wanted) and not stored.keys() >= set(wanted):
        # transformers gives the weights of some models other names in files, in the same order.
        pairs = zip(sorted(wanted, key=_by_number), sorted(stored, key=_by_number), strict=True)
        stored = {name: stored[saved] for name, saved in pairs}
    missing = [name for name in wanted if name not in stored]
    if missing:
        raise ValueError(f"`folder` {str(folder)!r} holds no {missing[0]!r}.")
    if not learned:
        set_alpha(model, "learned")
    with torch.no_grad():
        for name, parameter in _learned_alphas(model).items():
            parameter.copy_(stored[name])


def _learned_alphas(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if f".{_ALPHA}." in f".{name}"}


def _by_number(name: str) -> list[tuple[int, str]]:
    """Return a key that puts layer 10 behind layer 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def _attention_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module, int]]:
    """Yield the layers that call the attention interface: name, module, number of heads."""
    for name, module in model.named_modules():
        if not hasattr(module, "is_causal"):
            continue
        config = getattr(module, "config", None)
        heads = (
            getattr(module, "num_heads", None)
            or getattr(module, "num_attention_heads", None)
            or getattr(config, "num_attention_heads", None)
        )
        if isinstance(heads, int):
            yield name, module, heads


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
    position_bias: Tensor | None = None,
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
        position_bias: Added to the scores, `[1 or batch, heads, seq_q, seq_k]`; T5's.
        **kwargs: `cu_seq_lens_q`, `cu_seq_lens_k`, `max_length_q` and `max_length_k` of sequences
            packed into one; the rest is for other implementations and ignored.

    Raises:
        NotImplementedError: The model has sinks, or chooses keys itself.
        ValueError: The model was saved with learned alphas that have not been read.
    """
    for name in _UNKNOWN:
        if kwargs.get(name) is not None:
            raise NotImplementedError(
                f"`attn_implementation='{NAME}'` does not compute `{name}`, which "
                f"{type(module).__name__} has; use another implementation."
            )
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    alpha = getattr(module, _ALPHA, None)
    if alpha is None:
        alpha = getattr(getattr(module, "config", None), _ALPHA, 1.5)
        if isinstance(alpha, str):
            raise ValueError("the model's alphas were learned; call `load_alpha(model, folder)`.")
    options: dict[str, Any] = {
        "alpha": alpha() if isinstance(alpha, AlphaParam) else alpha,
        "is_causal": bool(causal), "scale": scaling, "softcap": softcap, "dropout_p": dropout,
    }  # fmt: skip
    if sliding_window is not None:
        options["window"] = (sliding_window - 1, 0 if causal else sliding_window - 1)
    packed = attention_mask is not None and attention_mask.ndim == 1  # see `make_mask`
    bounds = attention_mask if packed else kwargs.get("cu_seq_lens_q")
    if position_bias is not None and bounds is not None:
        raise NotImplementedError("`position_bias` cannot go with packed sequences.")
    if bounds is not None and (packed or len(query) == 1):
        q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
        if not packed:
            names = {"cu_seqlens_k": "cu_seq_lens_k", "max_seqlen_q": "max_length_q",
                     "max_seqlen_k": "max_length_k"}  # fmt: skip
            given = {name: kwargs.get(theirs) for name, theirs in names.items()}
            options |= {name: x for name, x in given.items() if x is not None}
        output = watched(module, q, k, v, cu_seqlens_q=bounds, **options)
        return output.unflatten(0, query.shape[::2][:2]).contiguous(), None
    if attention_mask is not None and attention_mask.ndim == 2:
        # What lies behind the mask is not filled yet.
        width = attention_mask.shape[1]
        key, value = key[:, :, :width], value[:, :, :width]
        if attention_mask.stride() == (0, 0):
            attention_mask = None
    if query.shape[2] == 1:
        attention_mask = _of_one_query(attention_mask, key, options)
    if position_bias is not None:
        options["attn_bias"] = position_bias[..., : key.shape[2]].to(query.dtype)
    if _decodes(query, key, value, attention_mask, options):
        lengths = torch.full(query.shape[:1], key.shape[2], dtype=torch.int32, device=key.device)
        output = adasplash_decode(
            query, key, value, lengths, alpha=options["alpha"], scale=scaling,
            key_padding_mask=attention_mask,
        )  # fmt: skip
        return output.transpose(1, 2).contiguous(), None
    if isinstance(options["alpha"], float) and options["alpha"] == 1.0 and softcap is None:
        return _softmax(query, key, value, attention_mask, options), None
    if attention_mask is not None and attention_mask.ndim == 4:
        # The whole pattern is in the mask: window and causality, too.
        bias = attention_mask[..., : key.shape[2]]
        if bias.dtype == torch.bool:
            bias = torch.zeros_like(bias, dtype=query.dtype).masked_fill(~bias, -torch.inf)
        bias = bias.to(query.dtype) + options.get("attn_bias", 0.0)
        options |= {"is_causal": False, "attn_bias": bias}
        options.pop("window", None)
    else:
        options["key_padding_mask"] = attention_mask
    output = watched(module, query, key, value, **options)
    return output.transpose(1, 2).contiguous(), None


def _softmax(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: dict[str, Any]
) -> Tensor:
    """Return torch's softmax attention, `[batch, seq_q, heads, dim]`; arguments as above."""
    seq_q, seq_k = query.shape[2], key.shape[2]
    window, causal = options.get("window"), options["is_causal"] and seq_q > 1
    seen: Tensor | None
    if mask is not None and mask.ndim == 4:
        whole = mask[..., :seq_k]
        seen = whole if whole.dtype == torch.bool else whole.to(query.dtype)
    elif mask is None and window is None and (not causal or seq_q == seq_k):
        seen = None  # torch aligns its causal mask at the first key
    else:
        keys = torch.arange(seq_k, device=key.device)
        distance = keys - (torch.arange(seq_q, device=key.device) + seq_k - seq_q)[:, None]
        left, right = window or (seq_k, seq_k)
        seen = (distance >= -left) & (distance <= (0 if causal else right))
        seen = seen if mask is None else seen & mask[:, None, None]
    bias = options.get("attn_bias")
    if bias is not None:
        if seen is None and causal:
            seen = torch.ones(seq_q, seq_k, dtype=torch.bool, device=key.device).tril()
        if seen is None:
            seen = bias
        else:
            seen = bias.masked_fill(~seen, -torch.inf) if seen.dtype == torch.bool else bias + seen
    if seen is not None and query.shape[1] != key.shape[1]:
        # No fast backend of torch takes both a mask and shared keys.
        key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], 1) for x in (key, value))
    output = nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=seen, is_causal=causal and seen is None,
        scale=options["scale"], dropout_p=options["dropout_p"],
        enable_gqa=query.shape[1] != key.shape[1],
    )  # fmt: skip
    return output.transpose(1, 2).contiguous()


def _of_one_query(mask: Tensor | None, key: Tensor, options: dict[str, Any]) -> Tensor | None:
    """Return the mask of the keys of a single query: the window is laid into it.

    A whole mask that all heads share is one of the keys then. Any other stays as it is.
    """
    if mask is not None and mask.ndim == 4:
        if mask.dtype != torch.bool or mask.shape[1] != 1:
            return mask
        options.pop("window", None)
        return mask[:, 0, 0, : key.shape[2]].expand(len(key), -1)
    left = options.pop("window", (key.shape[2], 0))[0]
    if left < key.shape[2] - 1:
        near = torch.arange(key.shape[2], device=key.device) >= key.shape[2] - 1 - left
        mask = near.expand(len(key), -1) if mask is None else mask & near
    return mask


def _on_gpu(x: Tensor) -> bool:
    return x.is_cuda


def _decodes(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: dict[str, Any]
) -> bool:
    """Return whether this is a new token of each sequence, without gradients, for the kernels.

    That is what `adasplash_decode` computes. On the CPU there are no programs to share the keys.
    """
    alpha = options["alpha"]
    inputs = [query, key, value, *([alpha] if isinstance(alpha, Tensor) else [])]
    learns = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    return (
        _on_gpu(query)
        and query.shape[2] == 1
        and (mask is None or mask.ndim == 2)
        and (isinstance(alpha, Tensor) or alpha > 1)
        and options["softcap"] is None
        and "attn_bias" not in options
        and not options["dropout_p"]
        and not learns
        and query.dtype == key.dtype == value.dtype
    )


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

    Where the pattern is plain (causal, bidirectional or a sliding window, of which the layer itself
    tells) that is which keys are tokens, bool `[batch, places]`: of a static cache only the places
    that are filled, with strides of 0 if all of them are tokens. For packed sequences it is where
    they begin and end in all tokens of the batch, int32 `[sequences + 1]`. Else it is the whole
    mask, bool `[batch, 1, seq_q, seq_k]`.

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
    bidirectional = mask_function is bidirectional_mask_function
    traced = torch.compiler.is_compiling()
    if plain or (sliding and usual):
        # For static caches q_offset is a tensor. To read it in every step would be to wait for it.
        known = isinstance(q_offset, int) or (q_length > 1 and not traced)
        filled = int(q_offset) + q_length - kv_offset if known and not bidirectional else kv_length
        if bidirectional or (known and 0 < filled <= kv_length):
            return _visible(attention_mask, batch_size, filled, kv_length, kv_offset,
                            q_length == 1, kwargs)  # fmt: skip
    if attention_mask is None and q_length == kv_length and not traced:
        starts = _packing(mask_function, causal_mask_function)
        if starts is not None:
            return starts
    for name in ("allow_is_causal_skip", "allow_is_bidirectional_skip"):
        kwargs[name] = False
    whole: Tensor = sdpa_mask(
        batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask,
        **kwargs,
    )  # fmt: skip
    return whole


def _looked_at(mask: Tensor, single: bool) -> bool:
    """Return whether it pays, and is possible, to wait for what a mask holds.

    Once for all layers: without a mask they are faster. One new token is decoded with it as fast.
    """
    if not _on_gpu(mask):
        return not torch.compiler.is_compiling()
    return not (single or torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing())


def _visible(
    mask: Tensor | None, batch: int, filled: int, kv_length: int, kv_offset: int, single: bool,
    options: Any,
) -> Tensor | None:  # fmt: skip
    """Return which of the first `filled` keys are tokens; None for all of all."""
    if mask is not None:
        mask = mask[:, kv_offset : kv_offset + filled].bool()
        mask = nn.functional.pad(mask, (0, filled - mask.shape[1]))
        if not _looked_at(mask, single) or not bool(mask.all()):
            return mask
    if filled == kv_length:
        return None
    return torch.ones((), dtype=torch.bool, device=options.get("device")).expand(batch, filled)


def _packing(mask_function: Any, causal: Any) -> Tensor | None:
    """Return where packed sequences begin and end, or None if that is not all of the mask.

    transformers finds them in `position_ids` and keeps the number of each token's sequence in the
    function that it lays over the causal one.
    """
    held = _held(mask_function)
    parts = held[0] if len(held) == 1 else None
    if not isinstance(parts, tuple) or len(parts) != 2:
        return None
    inner = [part for part in parts if "packed_sequence_mask_function" in part.__qualname__]
    # Later releases count the positions anew in every sequence.
    outer = [part for part in parts if part is causal or any(x is causal for x in _held(part))]
    if len(inner) != 1 or len(outer) != 1:
        return None
    (numbers,) = _held(inner[0])  # [batch, seq]
    step = numbers.diff(dim=1, prepend=numbers[:, :1] - 1) != 0  # also at every row's begin
    starts = step.flatten().nonzero().flatten()
    return nn.functional.pad(starts, (0, 1), value=numbers.numel()).to(torch.int32)


def _held(function: Any) -> list[Any]:
    """Return what a function has closed over."""
    return [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
