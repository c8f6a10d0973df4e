"""Time to read a prompt: dense, lookup tables by format, experts and store, and mixtures.

No cache is filled: its layers have numbers, for each of which a layer would be compiled anew.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from fourfold_common import Results

from ..lut import LutStore, PinnedStore
from ..lut.memory import TensorStore
from .shapes import fill_randomly, host_memory, random_model, table_meta, zipf_ids

_ROUNDS = 8


class _Plain(TensorStore):
    """A store that fetches the row of every token, as the authors' code does."""

    fetch = LutStore.rows


@torch.inference_mode()
def _milliseconds(model: Any, ids: torch.Tensor) -> float:
    """Return the time of one forward pass over the prompts, the last logits included."""
    begin = time.perf_counter()
    model(ids, use_cache=False, logits_to_keep=1)
    if ids.is_cuda:
        torch.cuda.synchronize()
    return (time.perf_counter() - begin) * 1e3


@torch.inference_mode()
def _gap(model: Any, ids: torch.Tensor) -> float:
    """Return how far the last logits are from those that rows picked one by one give, relative."""
    found = model(ids, use_cache=False, logits_to_keep=1).logits.float()
    store = model.lut
    rows = torch.stack([store.table[int(i)] for i in ids.flatten().cpu()]).to(ids.device)
    model.model.lut = _Plain(store.meta, rows)
    own = torch.arange(ids.numel(), device=ids.device).view_as(ids)
    expected = model(ids, lookup_ids=own, use_cache=False, logits_to_keep=1).logits.float()
    model.model.lut = store
    return float((found - expected).abs().max() / expected.abs().max())


def measure(
    results: Results,
    say: Callable[[str], None],
    device: torch.device,
    shape: str = "410m",
    batches: Sequence[int] = (1, 8),
    length: int = 2048,
    cases: Sequence[tuple[int, str, str]] = (
        (4, "fp16", "pinned"),
        (4, "nf4", "pinned"),
        (4, "fp16", "device"),
        (4, "fp16", "pageable"),
    ),
    mixtures: bool = True,
) -> None:
    """Add the time of every case, next to the dense model's of the same rounds.

    Args:
        results: Where figures go.
        say: Prints a line.
        device: Where to run; on a GPU layers are compiled.
        shape: One of `SHAPES`.
        batches: Numbers of prompts.
        length: Tokens in a prompt; they repeat as in prose.
        cases: Experts, format and store, as `decode` has them.
        mixtures: Also time mixtures of experts, resident and offloaded.
    """
    cuda = device.type == "cuda"
    dtype = torch.bfloat16 if cuda else torch.float32
    torch._dynamo.config.recompile_limit = 64

    def compiled(model: Any) -> Any:
        for layer in model.model.layers if cuda else ():
            layer.compile(dynamic=False)
        return model.eval()

    def compare(name: str, model: Any, error: float | None = None) -> None:
        for batch in batches:
            _compare(results, say, name, model, dense, prompts[:batch], error)

    dense = compiled(random_model("dense", shape, device, dtype))
    prompts = zipf_ids((max(batches), length), dense.config.vocab_size).to(device)
    tables: dict[tuple[int, str], torch.Tensor] = {}
    for experts, fmt, kind in cases:
        meta = table_meta(shape, experts, fmt)
        if (experts, fmt) not in tables:
            tables.clear()
            tables[experts, fmt] = host_memory(meta)
            fill_randomly(tables[experts, fmt], meta, device)
        memory = tables[experts, fmt]
        model = compiled(
            random_model(
                "mole", shape, device, dtype, lookup_form="table", num_lookup_experts=experts
            )
        )
        store: Any = (
            PinnedStore(meta, memory, device)
            if kind == "pinned"
            else (_Plain if kind == "pageable" else TensorStore)(
                meta, memory.to(device) if kind == "device" else memory
            )
        )
        model.model.lut = store
        gap = _gap(model, prompts[:1, :320])  # long enough to look for repeated ids
        if not gap < 1e-5:
            raise ValueError(f"{fmt} rows from {kind} memory give other logits: {gap:.1e}.")
        compare(f"MoLE-{experts}E {fmt} {kind}", model, gap)
        store.close()
    tables.clear()
    if mixtures:
        from accelerate import cpu_offload

        compare("MoE-10E resident", compiled(random_model("moe", shape, device, dtype)))
        offloaded = random_model("moe", shape, device, dtype).eval()
        for layer in offloaded.model.layers:
            cpu_offload(layer.mlp, execution_device=device)
        compare("MoE-10E offloaded by accelerate", offloaded)


def _compare(
    results: Results,
    say: Callable[[str], None],
    name: str,
    model: Any,
    dense: Any,
    ids: torch.Tensor,
    error: float | None,
) -> None:
    """Add the time of a model, next to the dense one's in alternating rounds."""
    cuda = ids.is_cuda
    for contender in (dense, model):
        _milliseconds(contender, ids)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    rounds = [(_milliseconds(dense, ids), _milliseconds(model, ids)) for _ in range(_ROUNDS)]
    peak = torch.cuda.max_memory_allocated() / 2**20 if cuda else None
    times = torch.tensor(rounds)
    batch, length = ids.shape
    for provider, metric, unit, found, extra in (
        (f"dense beside {name}", "prefill", "ms", times[:, 0], {}),
        (name, "prefill", "ms", times[:, 1], {"peak_mib": peak, "error": error}),
        (name, "over dense", "x", times[:, 1] / times[:, 0], {}),
    ):
        low, middle, high = (float(found.quantile(q)) for q in (0.2, 0.5, 0.8))
        results.add(
            provider, metric, middle, unit, p20=low, p80=high, n=_ROUNDS, batch=batch,
            length=length, **extra,
        )  # fmt: skip
    say(
        f"{name}, {batch} x {length}: {float(times[:, 1].median()):.2f} ms, dense "
        f"{float(times[:, 0].median()):.2f} ms, ratio {middle:.3f} [{low:.3f}, {high:.3f}]; "
        f"{len(ids.unique())} distinct ids"
    )


__all__ = ["measure"]
