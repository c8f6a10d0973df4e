"""Model shapes, random models and random tables for benchmarks."""

import mmap
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import DenseConfig, MoeConfig, MoleConfig
from ..lut import FORMATS, LutMeta
from ..lut.format import DATA_FILE, META_FILE
from ..modeling import DenseForCausalLM, MoeForCausalLM, MoleForCausalLM

# Layers, width, heads, inner width and vocabulary (Jie et al. 2025, section 4.1).
SHAPES: dict[str, dict[str, int]] = {
    "tiny": {"layers": 3, "dim": 64, "heads": 4, "inner": 128, "vocab": 500},
    "160m": {"layers": 12, "dim": 768, "heads": 12, "inner": 3072, "vocab": 50304},
    "410m": {"layers": 24, "dim": 1024, "heads": 16, "inner": 4096, "vocab": 50304},
    "1b": {"layers": 16, "dim": 2048, "heads": 8, "inner": 8192, "vocab": 50304},
}


def fields(shape: str) -> dict[str, Any]:
    """Return the configuration fields of a shape."""
    size = SHAPES[shape]
    return {
        "vocab_size": size["vocab"],
        "hidden_size": size["dim"],
        "intermediate_size": size["inner"],
        "num_hidden_layers": size["layers"],
        "num_attention_heads": size["heads"],
    }


def random_model(
    kind: str, shape: str, device: torch.device, dtype: torch.dtype, **changes: Any
) -> Any:
    """Return a model with random weights: `"dense"`, `"moe"` or `"mole"`."""
    config, model = {
        "dense": (DenseConfig, DenseForCausalLM),
        "moe": (MoeConfig, MoeForCausalLM),
        "mole": (MoleConfig, MoleForCausalLM),
    }[kind]
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            made = model(config(**(fields(shape) | changes)))
    finally:
        torch.set_default_dtype(before)
    # Rotary frequencies stay in float32 whatever the model's type.
    made.model.rotary.inv_freq = made.model.rotary.frequencies().to(device)
    return made


def table_meta(shape: str, experts: int, fmt: str) -> LutMeta:
    """Return the description of a table with all layers."""
    size = SHAPES[shape]
    return LutMeta(
        vocab=size["vocab"],
        layers=size["layers"],
        experts=experts,
        dim=size["dim"],
        format=fmt,
        chunk=size["vocab"],
        crcs=(),
        fingerprint="",
    )


def host_memory(meta: LutMeta) -> Tensor:
    """Return host memory for a table, exactly as large as it is; nothing is touched yet."""
    memory = mmap.mmap(-1, meta.vocab * meta.row_stride)
    return torch.frombuffer(memory, dtype=torch.uint8).view(meta.vocab, meta.row_stride)


def fill_randomly(table: Tensor, meta: LutMeta, device: torch.device, std: float = 0.02) -> None:
    """Fill a table with normal values, or random codes with scales of `std`.

    Every 2,048 ids have the rows of the 2,048 before: no time depends on them, and large tables
    are filled at the speed of memory.
    """
    generator = torch.Generator(device).manual_seed(0)
    first, *others = table.split(2048)
    count, codes = len(first), meta.code_bytes
    if meta.scale_bytes:
        first[:, :codes] = torch.randint(
            127, (count, codes), dtype=torch.uint8, device=device, generator=generator
        )
        scales = torch.full((count, meta.scale_bytes // 2), std, device=device)
        first[:, codes : meta.row_bytes] = scales.half().view(torch.uint8)
    else:
        dtype = FORMATS[meta.format]
        values = torch.randn(count, codes // dtype.itemsize, device=device, generator=generator)
        first[:, :codes] = (std * values).to(dtype).view(torch.uint8)
    for part in others:
        part.copy_(first[: len(part)])


def write_table(folder: Path, table: Tensor, meta: LutMeta) -> None:
    """Write a table's folder, without checksums: it is there to be read, not to be verified."""
    with open(folder / DATA_FILE, "wb") as file:
        file.write(meta.header())
        for part in table.split(4096):
            file.write(memoryview(part.numpy()).cast("B"))
        file.flush()
        os.fsync(file.fileno())
    meta.save(folder / META_FILE)


def zipf_ids(shape: tuple[int, ...], vocab: int, seed: int = 0, exponent: float = 1.2) -> Tensor:
    """Return ids whose frequencies follow a power law.

    The exponent is set so that 16,384 tokens hold about as many distinct ids as prose does: 3,500
    with a vocabulary of 50,304.
    """
    weights = torch.arange(1, vocab + 1, dtype=torch.float64).pow(-exponent)
    generator = torch.Generator().manual_seed(seed)
    total = int(torch.tensor(shape).prod())
    edges = weights.cumsum(0) / weights.sum()
    draws = torch.rand(total, generator=generator, dtype=torch.float64)
    ids = torch.searchsorted(edges, draws).clamp_max(vocab - 1)
    return torch.randperm(vocab, generator=generator)[ids].view(shape)


__all__ = [
    "SHAPES",
    "fields",
    "fill_randomly",
    "host_memory",
    "random_model",
    "table_meta",
    "write_table",
    "zipf_ids",
]
