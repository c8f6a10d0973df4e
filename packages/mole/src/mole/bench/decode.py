"""Time of a decoding step: dense, and lookup tables by format, experts and store."""

import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from fourfold_common import Results

from ..decode import Decoder
from ..lut import CachedStore, PinnedStore, open_lut
from ..lut.stores import _TensorStore
from .shapes import (
    fill_randomly,
    host_memory,
    random_model,
    table_meta,
    write_table,
    zipf_ids,
)

_PROMPT, _ROUNDS = 8, 12
_FILL = 40  # rounds that fill a cache before those that count
_CACHE = 4096


def _steps(decoder: Decoder, position: int, fed: torch.Tensor) -> float:
    """Return the time of a step, in ms, averaged over the steps that the fed ids are for."""
    decoder.position.fill_(position)
    decoder.step()
    count = len(fed)
    if decoder.device.type != "cuda":
        begin = time.perf_counter()
        for ids in fed:
            decoder.ids.copy_(ids)
            decoder.step()
        return (time.perf_counter() - begin) * 1e3 / count
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    for ids in fed:
        decoder.ids.copy_(ids)
        decoder.step()
    last.record()
    last.synchronize()
    elapsed: float = first.elapsed_time(last)
    return elapsed / count


def _check(decoder: Decoder, prompts: torch.Tensor, new_tokens: int) -> float:
    """Return the share of decoded ids that the model itself finds likeliest, or nearly so.

    A choice counts as found where its logit is within 2 % of the spread of the model's best.
    """
    found = decoder.generate(prompts, new_tokens)
    with torch.no_grad():
        logits = decoder.model(found[:, :-1], use_cache=False).logits[:, prompts.shape[1] - 1 :]
    logits = logits.float()
    picked = logits.gather(-1, found[:, prompts.shape[1] :, None]).squeeze(-1)
    gap = (logits.amax(-1) - picked) / logits.std(-1)
    return float((gap <= 0.02).float().mean())


def measure(
    results: Results,
    say: Callable[[str], None],
    device: torch.device,
    shape: str = "410m",
    batches: Sequence[int] = (1, 32),
    cases: Sequence[tuple[int, str, str]] = (
        (4, "fp16", "pinned"),
        (4, "nf4", "pinned"),
        (4, "fp16", "device"),
        (4, "fp16", "pageable"),
    ),
    length: int = 1024,
    steps: int = 50,
) -> None:
    """Add the time of a step of every case, next to the dense model's of the same rounds.

    Args:
        results: Where figures go.
        say: Prints a line.
        device: Where to run.
        shape: One of `SHAPES`.
        batches: Numbers of sequences.
        cases: Experts, format and store; `"pageable"` gathers on the CPU into pageable memory and
            copies, as the authors' code does; `"mmap"` reads a file that is in the page cache,
            `"cached"` keeps 4,096 rows on the device and reads others past the page cache.
        length: Length of the static cache; steps are timed at its half.
        steps: Steps in a round.
    """
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    dense = random_model("dense", shape, device, dtype).eval()
    baselines = {batch: Decoder(dense, batch, length) for batch in batches}
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(
        dense.config.vocab_size, (max(batches), _PROMPT), generator=generator
    ).to(device)
    for batch, decoder in baselines.items():
        share = _check(decoder, prompts[:batch], 24)
        say(f"dense, batch {batch}: {100 * share:.1f} % of decoded ids are the model's choice")
    tables: dict[tuple[int, str], Any] = {}
    for experts, fmt, kind in cases:
        begin = time.perf_counter()
        meta = table_meta(shape, experts, fmt)
        if (experts, fmt) not in tables:
            tables.clear()
            memory = host_memory(meta)
            fill_randomly(memory, meta, device)
            tables[experts, fmt] = memory
        memory = tables[experts, fmt]
        model = random_model(
            "mole", shape, device, dtype, lookup_form="table", num_lookup_experts=experts
        ).eval()
        store: Any
        folder = tempfile.TemporaryDirectory()
        if kind in ("mmap", "cached"):
            write_table(Path(folder.name), memory, meta)
            store = open_lut(
                folder.name,
                "mmap" if kind == "mmap" else "disk",
                device,
                cache=0 if kind == "mmap" else _CACHE,
            )
        elif kind == "pinned":
            store = PinnedStore(meta, memory, device)
        else:
            store = _TensorStore(meta, memory.to(device) if kind == "device" else memory)
        model.model.lut = store
        say(f"MoLE-{experts}E {fmt} {kind}: prepared in {time.perf_counter() - begin:.1f} s")
        for batch in batches:
            _one(results, say, model, kind, batch, length, steps, baselines[batch], prompts)
        store.close()
        folder.cleanup()
    tables.clear()
    _mixtures(results, say, device, dtype, shape, batches, max(3, steps // 5))


def _one(
    results: Results,
    say: Callable[[str], None],
    model: Any,
    kind: str,
    batch: int,
    length: int,
    steps: int,
    dense: Decoder,
    prompts: torch.Tensor,
) -> None:
    """Time one model and batch against the dense decoder, in alternating rounds."""
    cuda = dense.device.type == "cuda"
    decoder = Decoder(model, batch, length)
    if cuda and kind == "device":
        decoder = _on_device(model, batch, length)
    share = _check(decoder, prompts[:batch], 24)
    times: dict[str, list[float]] = {"dense": [], "mole": []}
    vocab = model.config.vocab_size
    # Ids that repeat as in prose; what a random model writes repeats itself too soon.
    fed = zipf_ids((_ROUNDS + _FILL, steps, batch), vocab, seed=1).to(dense.device)
    if isinstance(model.lut, CachedStore):
        for ids in fed[:_FILL]:
            _steps(decoder, length // 2, ids)
        model.lut.hits = model.lut.misses = 0
    for ids in fed[_FILL:]:
        times["dense"].append(_steps(dense, length // 2, ids))
        times["mole"].append(_steps(decoder, length // 2, ids))
    ratios = torch.tensor(times["mole"]) / torch.tensor(times["dense"])
    low, middle, high = (float(ratios.quantile(q)) for q in (0.2, 0.5, 0.8))
    meta = model.model.lut.meta
    name = f"MoLE-{meta.experts}E {meta.format} {kind}"
    parameters: dict[str, Any] = {"batch": batch, "length": length}
    if kind in ("mmap", "cached"):
        parameters["page_cache"] = "warm" if kind == "mmap" else "passed by"
    if isinstance(model.lut, CachedStore):
        parameters["hit_rate"] = round(model.lut.hits / (model.lut.hits + model.lut.misses), 3)
    for provider, key in (("dense", "dense"), (name, "mole")):
        found = torch.tensor(times[key])
        results.add(
            provider if key == "mole" else f"dense beside {name}",
            "decode",
            float(found.median()),
            "ms/token",
            p20=float(found.quantile(0.2)),
            p80=float(found.quantile(0.8)),
            n=_ROUNDS * steps,
            error=1 - share if key == "mole" else None,
            **parameters,
        )
    results.add(name, "over dense", middle, "x", p20=low, p80=high, n=_ROUNDS, **parameters)
    say(
        f"{name}, batch {batch}: {torch.tensor(times['mole']).median():.4f} ms, dense "
        f"{torch.tensor(times['dense']).median():.4f} ms, ratio {middle:.3f} "
        f"[{low:.3f}, {high:.3f}]; {100 * share:.1f} % of ids are the model's choice"
    )


@torch.inference_mode()
def _mixtures(
    results: Results,
    say: Callable[[str], None],
    device: torch.device,
    dtype: torch.dtype,
    shape: str,
    batches: Sequence[int],
    steps: int,
) -> None:
    """Add plain eager steps: dense, lookup experts, mixture of experts resident and offloaded.

    Models take turns step by step, after a few steps that are not counted.
    """
    from accelerate import cpu_offload

    experts = 4
    meta = table_meta(shape, experts, "fp16")
    table = torch.zeros(1, meta.row_stride, dtype=torch.uint8, device=device)
    lookup = random_model(
        "mole", shape, device, dtype, lookup_form="table", num_lookup_experts=experts
    )
    fill_randomly(table, meta, device)
    lookup.model.lut = _TensorStore(meta, table.expand(meta.vocab, -1))  # one row for all ids
    models = {
        "dense": random_model("dense", shape, device, dtype),
        "MoLE-4E fp16 device": lookup,
        "MoE-10E resident": random_model("moe", shape, device, dtype),
        "MoE-10E offloaded by accelerate": random_model("moe", shape, device, dtype),
    }
    for layer in models["MoE-10E offloaded by accelerate"].model.layers:
        cpu_offload(layer.mlp, execution_device=device)
    for batch in batches:
        ids = torch.ones(batch, 1, dtype=torch.long, device=device)
        caches = {
            name: model.eval()(ids, use_cache=True).past_key_values
            for name, model in models.items()
        }
        times: dict[str, list[float]] = {name: [] for name in models}
        for _ in range(steps + 3):
            for name, model in models.items():
                begin = time.perf_counter()
                model(ids, past_key_values=caches[name])
                if device.type == "cuda":
                    torch.cuda.synchronize()
                times[name].append((time.perf_counter() - begin) * 1e3)
        for name, found in times.items():
            cuts = torch.tensor(found[3:])
            low, middle, high = (float(cuts.quantile(q)) for q in (0.2, 0.5, 0.8))
            results.add(
                f"{name}, eager", "decode", middle, "ms/token", p20=low, p80=high, n=steps,
                batch=batch, length=steps,
            )  # fmt: skip
            say(f"{name}, eager, batch {batch}: {middle:.3f} ms [{low:.3f}, {high:.3f}]")


def _on_device(model: Any, batch: int, length: int) -> Decoder:
    """Return a decoder that gathers inside the graph from a table in device memory."""
    from ..lut import DeviceStore

    store = DeviceStore.__new__(DeviceStore)
    _TensorStore.__init__(store, model.model.lut.meta, model.model.lut.table)
    model.model.lut = store
    return Decoder(model, batch, length)


__all__ = ["measure"]
