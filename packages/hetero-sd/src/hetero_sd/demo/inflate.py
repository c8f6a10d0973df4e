"""A larger model with the same output: the true cost of size where no large model is at hand."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor

_ASPECT = 128  # Width by layers, as in models of 3 to 13 B parameters.


def shape_for(model: Any, parameters: int | float) -> tuple[int, int]:
    """Return the factor and the layers that make a model about so large, in the usual proportions.

    Args:
        model: A `LlamaForCausalLM`.
        parameters: How many parameters the result is to have, at least the model's.

    Raises:
        ValueError: The model is no Llama, or it has more parameters than that.
    """
    if type(model).__name__ != "LlamaForCausalLM":
        raise ValueError(f"only a `LlamaForCausalLM` can be inflated; got {type(model).__name__}.")
    small = sum(p.numel() for p in model.parameters())
    if parameters < small:
        raise ValueError(f"the model has {small:,} parameters, more than {parameters:,.0f}.")
    body = model.model
    layer = sum(p.numel() for p in body.layers[0].parameters() if p.ndim > 1)
    table = body.embed_tokens.weight.numel() * (1 if model.config.tie_word_embeddings else 2)
    shapes = []
    for factor in range(1, int((parameters / layer) ** 0.5) + 2):
        layers = max(round((parameters - factor * table) / (factor**2 * layer)), len(body.layers))
        total = factor * table + layers * factor**2 * layer
        aspect = factor * model.config.hidden_size / layers / _ASPECT
        off = max(abs(math.log(total / parameters)), 0.1)  # A tenth is near enough.
        shapes.append((off, abs(math.log(aspect)), factor, layers))
    return min(shapes)[2:]


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
