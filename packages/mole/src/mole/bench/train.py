"""Training speed: dense, naive lookup experts, and the two ways of reusing repeated ids."""

import gc
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from fourfold_common import Results

from ..lookup import StepBank, distinct_ids
from .shapes import random_model, zipf_ids

_PAD = 512


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def gradient_gap(shape: str, device: torch.device) -> float:
    """Return how far deduplicated gradients are from the naive ones, relative, in float32."""
    ids = zipf_ids((2, 2, 64), 300)
    found = {}
    for way in ("off", "micro", "step"):
        model = random_model(
            "mole", "tiny", device, torch.float32, dedup=way, num_lookup_experts=3
        ).train()
        batches = ids.to(device)
        with StepBank(model, batches) if way == "step" else nullcontext():
            for batch in batches:
                model(batch, labels=batch, use_cache=False).loss.backward()
        found[way] = torch.cat([p.grad.flatten() for p in model.parameters()])
    scale = found["off"].norm()
    return max(float((found[way] - found["off"]).norm() / scale) for way in ("micro", "step"))


class _Run:
    """One contender: a compiled model, its optimiser, and one optimiser step."""

    def __init__(self, way: str, shape: str, device: torch.device, experts: int) -> None:
        kind, changes = "dense", {}
        if way in ("off", "micro", "step"):
            kind, changes = "mole", {"dedup": way, "num_lookup_experts": experts}
        elif way == "moe":
            kind, changes = "moe", {"num_experts": 2 * experts + 2}
        self.way, self.device = way, device
        self.model = random_model(kind, shape, device, torch.float32, **changes).train()
        cuda = device.type == "cuda"
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=cuda)
        self.autocast = lambda: torch.autocast("cuda", torch.bfloat16) if cuda else nullcontext()
        if cuda:
            for layer in self.model.model.layers:
                layer.compile(dynamic=False)

    def step(self, batches: Sequence[Tensor], distinct: Sequence[Any]) -> Tensor:
        """Run one optimiser step; return the last loss."""
        with self.autocast():
            bank = (
                StepBank(self.model, torch.stack(tuple(batches)), multiple=4096)
                if self.way == "step"
                else nullcontext()
            )
            with bank:
                for ids, few in zip(batches, distinct, strict=True):
                    given = {"distinct": few} if self.way == "micro" else {}
                    loss = self.model(ids, labels=ids, use_cache=False, **given).loss
                    (loss / len(batches)).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)
        detached: Tensor = loss.detach()
        return detached


def measure(
    results: Results,
    say: Callable[[str], None],
    device: torch.device,
    shape: str = "410m",
    experts: int = 4,
    sequences: int = 8,
    context: int = 2048,
    cases: Sequence[tuple[str, int]] = (
        ("dense", 8), ("micro", 8), ("off", 8), ("dense", 64), ("step", 64),
    ),
    steps: int = 2,
) -> None:  # fmt: skip
    """Add tokens/s of every case: whole optimiser steps, AdamW, clipping and accumulation included.

    Args:
        results: Where figures go.
        say: Prints a line.
        device: Where to run.
        shape: One of `SHAPES`.
        experts: Lookup experts in a layer.
        sequences: Sequences in a micro-batch.
        context: Tokens in a sequence.
        cases: What to train (`"dense"`, `"moe"`, or a value of `dedup`), and micro-batches in a
            step.
        steps: Timed steps, after one that is not.
    """
    gap = gradient_gap(shape, device)
    say(f"gradients of micro and step against off, float32, relative: {gap:.1e}")
    if not gap < 1e-4:
        raise ValueError(f"deduplicated gradients are wrong: {gap:.1e} from the naive ones.")
    # Layers of all contenders run the same code, compiled in a version for each.
    torch._dynamo.config.recompile_limit = 64
    speeds: dict[tuple[str, int], float] = {}
    for way, count in cases:
        vocab = random_vocab(shape)
        ids = zipf_ids((count, sequences, context), vocab)
        few = [distinct_ids(batch, vocab, _PAD) for batch in ids]
        tokens = sequences * context
        numbers = {"ids_micro": len(ids[0].unique()), "ids_step": len(ids.unique())}
        begin = time.perf_counter()
        run = _Run(way, shape, device, experts)
        batches = list(ids.to(device))
        distinct = [(rows.to(device), inverse.to(device)) for rows, inverse in few]
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        run.step(batches, distinct)
        _synchronize(device)
        ready = time.perf_counter()
        for _ in range(steps):
            loss = run.step(batches, distinct)
        _synchronize(device)
        speed = steps * count * tokens / (time.perf_counter() - ready)
        speeds[way, count] = speed
        peak = torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else None
        name = {"off": "MoLE naive", "micro": "MoLE micro", "step": "MoLE step"}.get(way, way)
        parameters = {"micro_batches": count, "tokens_micro": tokens, **numbers}
        results.add(name, "train", speed, "tokens/s", n=steps, peak_mib=peak, **parameters)
        note = ""
        if way != "dense" and ("dense", count) in speeds:
            share = speed / speeds["dense", count]
            results.add(name, "of dense", share, "x", **parameters)
            note = f", {share:.3f} of dense"
        if way == "off" and ("micro", count) in speeds:
            gain = speeds["micro", count] / speed
            results.add("MoLE micro", "over naive", gain, "x", **parameters)
            note += f"; micro is {gain:.2f} times as fast"
        say(
            f"{name}, {count} micro-batches of {tokens}: {speed:,.0f} tokens/s{note}; "
            f"{numbers['ids_micro']} and {numbers['ids_step']} distinct ids, loss {loss:.2f}, "
            f"peak {peak or 0:,.0f} MiB, first step {ready - begin:.0f} s"
        )
        del run, batches, distinct
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def random_vocab(shape: str) -> int:
    """Return the vocabulary of a shape."""
    from .shapes import SHAPES

    return SHAPES[shape]["vocab"]


__all__ = ["gradient_gap", "measure"]
