"""A larger model with the same output: the true cost of size where no large model is at hand."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def inflate(
    model: Any,
    factor: int,
    layers: int,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Any:
    """Return a Llama with the same logits as a smaller one, up to rounding.

    Width, heads and the inner width of the MLP are multiplied and filled with zeros; further layers
    are all zero, and so add nothing to the residual stream. A norm over `factor` times as many
    numbers, most of them zero, is larger by the root of `factor`: its weight makes up for that.

    Args:
        model: A `LlamaForCausalLM`; it is not changed.
        factor: By which to multiply the width, 1 or more.
        layers: Layers of the result, at least the model's.
        dtype: Type of the result; the model's if missing.
        device: Where to make it; where the model is if missing.

    Raises:
        ValueError: The result would be smaller than the model.

    Source: own.
    """
    from transformers import LlamaForCausalLM

    old = model.config
    if factor < 1 or layers < old.num_hidden_layers:
        raise ValueError(
            f"`factor` must be 1 or more and `layers` {old.num_hidden_layers} or more; got "
            f"{factor} and {layers}."
        )
    config = copy.deepcopy(old)
    config.head_dim = getattr(old, "head_dim", None) or old.hidden_size // old.num_attention_heads
    config.hidden_size = factor * old.hidden_size
    config.intermediate_size = factor * old.intermediate_size
    config.num_attention_heads = factor * old.num_attention_heads
    config.num_key_value_heads = factor * old.num_key_value_heads
    config.num_hidden_layers = layers
    config.rms_norm_eps = old.rms_norm_eps / factor
    weight = model.model.embed_tokens.weight
    with torch.device("meta"):
        large = LlamaForCausalLM(config)
    large = large.to(dtype or weight.dtype).to_empty(device=device or weight.device)
    small: dict[str, Tensor] = dict(model.named_parameters())
    for name, target in large.named_parameters():
        target.zero_()
        if name in small:
            source = small[name]
            target[tuple(slice(0, size) for size in source.shape)] = source.to(target)
            if name.endswith("norm.weight"):
                target /= factor**0.5
    large.tie_weights()
    # Rotary tables are no parameters, and were made without storage.
    rotary = type(model.model.rotary_emb)(config=config)
    large.model.rotary_emb = rotary.to(large.model.embed_tokens.weight.device)
    large.generation_config = copy.deepcopy(model.generation_config)
    return large.eval().requires_grad_(False)
