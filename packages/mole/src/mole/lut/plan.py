"""What a model's table is to hold: its description, its origin and its values."""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from .format import FORMATS, LutMeta

_CHUNK_IDS, _CHUNK_BYTES = 1024, 128 * 2**20
_HASHERS = 8


def plan(model: Any, fmt: str, chunk: int | None = None, origin: str | None = None) -> LutMeta:
    """Return the description of the table that `convert` would write, without checksums.

    Args:
        model: A `MoleForCausalLM` in expert form.
        fmt: Format of the table.
        chunk: Ids to compute at a time; if None up to 1,024 that need up to 128 MiB.
        origin: Fingerprint of the model; computed if None.

    Raises:
        ValueError: The model or the format is none that a table can be made for.
    """
    config = model.config
    if config.lookup_form != "experts":
        raise ValueError("`model` must be in expert form; this one is in table form already.")
    if not config.lookup_layers:
        raise ValueError("`model` must have lookup experts in at least one layer; got none.")
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError("`model` must have no adapters beside its weights; merge them first.")
    if fmt not in FORMATS:
        raise ValueError(f"`fmt` must be one of {', '.join(FORMATS)}; got {fmt!r}.")
    if fmt == "nf4" and config.hidden_size % 2:
        raise ValueError(f"`fmt` 'nf4' needs an even `hidden_size`; got {config.hidden_size}.")
    if fmt == "nf3" and config.hidden_size % 8:
        raise ValueError(
            f"`fmt` 'nf3' needs a `hidden_size` that 8 divides; got {config.hidden_size}."
        )
    if chunk is not None and chunk < 1:
        raise ValueError(f"`chunk` must be at least 1; got {chunk}.")
    rows = model.model.embed_tokens.weight.shape[0]
    if rows != config.vocab_size:
        raise ValueError(
            f"`model` must have {config.vocab_size} embeddings as its `vocab_size` says; "
            f"got {rows}. Was the vocabulary resized without the configuration?"
        )
    layers, experts = len(config.lookup_layers), config.num_lookup_experts
    if chunk is None:
        fitting = _CHUNK_BYTES // (4 * layers * experts * config.hidden_size)
        chunk = max(1, min(_CHUNK_IDS, fitting))
    return LutMeta(
        vocab=rows,
        layers=layers,
        experts=experts,
        dim=config.hidden_size,
        format=fmt,
        chunk=min(chunk, rows),
        crcs=(),
        fingerprint=fingerprint(model) if origin is None else origin,
    )


def fingerprint(model: Any) -> str:
    """Return a SHA-256 of everything the table depends on: embeddings, norms and experts.

    Weights are hashed as float32, each for itself: a checkpoint has one fingerprint in whatever
    type it was loaded.

    Args:
        model: A `MoleForCausalLM` in expert form.
    """
    config = model.config
    weights = [model.model.embed_tokens.weight]
    for lookup in _lookups(model):
        weights += [lookup.norm.weight, lookup.up, lookup.down_t]
    digest = hashlib.sha256(f"{config.hidden_act} {config.rms_norm_eps}".encode())
    with ThreadPoolExecutor(_HASHERS) as pool:  # hashing lets other threads run
        for found in pool.map(_digest, weights):
            digest.update(found)
    return digest.hexdigest()


def _digest(weight: Tensor) -> bytes:
    digest = hashlib.sha256(f" {tuple(weight.shape)} ".encode())
    for part in weight.detach().split(4096):
        digest.update(part.cpu().float().contiguous().view(torch.uint8).numpy())
    return digest.digest()


def expert_values(model: Any, ids: slice | Tensor) -> Tensor:
    """Return the experts' outputs for some ids, float32 `[ids, layers, experts, dim]`.

    They are where the model is.
    """
    weight = model.model.embed_tokens.weight
    embeddings = weight[ids.to(weight.device) if isinstance(ids, Tensor) else ids].float()
    layers = [lookup.values(embeddings, wide=True) for lookup in _lookups(model)]
    return torch.stack(layers, dim=1)


def _lookups(model: Any) -> list[Any]:
    found = [layer.lookup for layer in model.model.layers]
    return [lookup for lookup in found if lookup is not None]


__all__ = ["expert_values", "fingerprint", "plan"]
