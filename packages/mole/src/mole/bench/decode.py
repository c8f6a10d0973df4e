"""Time of a decoding step: dense, lookup tables by format, experts and store, and mixtures."""

import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from fourfold_common import Results

from ..decode import Decoder
from ..lut import CachedStore, DiskStore, LutMeta, LutStore, MmapStore, PinnedStore
from ..lut.format import DATA_FILE
from ..lut.memory import TensorStore
from . import pages
from .shapes import (
    fill_randomly,
    host_memory,
    random_model,
    table_meta,
    write_table,
    zipf_ids,
)

_PROMPT, _ROUNDS = 8, 12
_FILL = 2**16  # tokens that fill a cache before those that count
_CACHE = 4096
_ON_DISK = ("mmap", "disk warm", "disk cold")


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


def _device_bytes(decoder: Decoder, kind: str) -> int:
    """Return what weights, cache of keys and values, and rows take on the device."""
    tensors = [*decoder.model.parameters(), *decoder.model.buffers()]
    tensors += [tensor for layer in decoder.layers for tensor in layer]
    if decoder.store is not None:
        tensors.append(decoder.staging)
        tensors += [decoder.store.table] if isinstance(decoder.store, CachedStore) else []
        tensors += [decoder.store.table] if kind == "device" else []
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


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
        (4, "fp16", "device"),
        (4, "fp16", "pageable"),
        (4, "nf4", "pinned"),
        (4, "nf4", "disk warm"),
        (4, "nf4", "disk cold"),
    ),
    length: int = 1024,
    steps: int = 50,
    mixtures: bool = True,
) -> None:
    """Add the time of a step of every case, next to the dense model's of the same rounds.

    Args:
        results: Where figures go.
        say: Prints a line.
        device: Where to run.
        shape: One of `SHAPES`.
        batches: Numbers of sequences.
        cases: Experts, format and store; `"pageable"` gathers on the CPU into pageable memory and
            copies, as the authors' code does. `"mmap"` maps a file that is in the page cache. The
            other two keep 4,096 rows on the device: `"disk warm"` reads others through the page
            cache, which has the whole file, `"disk cold"` past it, and the file is not in it.
        length: Length of the static cache; steps are timed at its half.
        steps: Steps in a round.
        mixtures: Also time mixtures of experts, resident and offloaded.
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
    folders: dict[tuple[int, str], Any] = {}
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
        if kind in _ON_DISK and (experts, fmt) not in folders:
            folders[experts, fmt] = tempfile.TemporaryDirectory()
            write_table(Path(folders[experts, fmt].name), memory, meta)
        folder = Path(folders[experts, fmt].name) if kind in _ON_DISK else None
        store = model.model.lut = _store(kind, meta, memory, folder, device)
        say(f"MoLE-{experts}E {fmt} {kind}: prepared in {time.perf_counter() - begin:.1f} s")
        for batch in batches:
            _one(results, say, model, kind, batch, length, steps, baselines[batch], prompts, folder)
        store.close()
    for made in folders.values():
        made.cleanup()
    tables.clear()
    if mixtures:
        _mixtures(results, say, device, dtype, shape, batches, max(3, steps // 5))


def _store(
    kind: str, meta: LutMeta, memory: torch.Tensor, folder: Path | None, device: torch.device
) -> LutStore:
    """Return the store of a case, over the table in memory or its file."""
    if kind == "pinned":
        return PinnedStore(meta, memory, device)
    if folder is None:
        return TensorStore(meta, memory.to(device) if kind == "device" else memory)
    if kind != "disk cold":
        pages.load(folder / DATA_FILE)
    if kind == "mmap":
        return MmapStore(folder)
    return CachedStore(DiskStore(folder, direct=kind == "disk cold"), _CACHE, device)


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
    folder: Path | None,
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
    fill = _FILL if isinstance(model.lut, CachedStore) else 0
    ids = zipf_ids((fill + _ROUNDS * steps * batch,), vocab, seed=1)
    fed = ids[fill:].view(_ROUNDS, steps, batch).to(dense.device)
    if fill:
        for part in ids[:fill].split(1024):
            model.lut.read(part)
        model.lut.hits = model.lut.misses = 0
    parameters: dict[str, Any] = {"batch": batch, "length": length}
    for given in fed:
        if kind == "disk cold" and folder is not None:
            pages.drop(folder / DATA_FILE)
            parameters["resident"] = pages.resident(folder / DATA_FILE)
        times["dense"].append(_steps(dense, length // 2, given))
        times["mole"].append(_steps(decoder, length // 2, given))
    ratios = torch.tensor(times["mole"]) / torch.tensor(times["dense"])
    low, middle, high = (float(ratios.quantile(q)) for q in (0.2, 0.5, 0.8))
    meta = model.model.lut.meta
    name = f"MoLE-{meta.experts}E {meta.format} {kind}"
    if folder is not None:
        parameters["page_cache"] = "dropped" if kind == "disk cold" else "warm"
        parameters.setdefault("resident", pages.resident(folder / DATA_FILE))
    if isinstance(model.lut, CachedStore) and isinstance(model.lut.store, DiskStore):
        parameters["direct"] = model.lut.store.direct
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
    memory = (_device_bytes(decoder, kind) - _device_bytes(dense, kind)) / 2**20
    results.add(name, "device memory over dense", memory, "MiB", **parameters)
    say(
        f"{name}, batch {batch}: {torch.tensor(times['mole']).median():.4f} ms, dense "
        f"{torch.tensor(times['dense']).median():.4f} ms, ratio {middle:.3f} "
        f"[{low:.3f}, {high:.3f}], {memory:.1f} MiB over dense; "
        f"{100 * share:.1f} % of ids are the model's choice"
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

    A model's steps come one after the other, the first few of them not counted: a step right after
    one that moved weights would pay for what that one did to the allocator and the host's caches.
    """
    from accelerate import cpu_offload

    experts = 4
    meta = table_meta(shape, experts, "fp16")
    table = torch.zeros(1, meta.row_stride, dtype=torch.uint8, device=device)
    lookup = random_model(
        "mole", shape, device, dtype, lookup_form="table", num_lookup_experts=experts
    )
    fill_randomly(table, meta, device)
    lookup.model.lut = TensorStore(meta, table.expand(meta.vocab, -1))  # one row for all ids
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
        lookup_time = 0.0
        for name, model in models.items():
            times = []
            for _ in range(steps + 3):
                begin = time.perf_counter()
                model(ids, past_key_values=caches[name])
                if device.type == "cuda":
                    torch.cuda.synchronize()
                times.append((time.perf_counter() - begin) * 1e3)
            found = torch.tensor(times[3:])
            low, middle, high = (float(found.quantile(q)) for q in (0.2, 0.5, 0.8))
            figures: dict[str, Any] = {"n": steps, "batch": batch, "length": steps}
            results.add(
                f"{name}, eager", "decode", middle, "ms/token", p20=low, p80=high, **figures
            )
            say(f"{name}, eager, batch {batch}: {middle:.3f} ms [{low:.3f}, {high:.3f}]")
            if model is lookup:
                lookup_time = middle
            if name.startswith("MoE"):
                ratio = middle / lookup_time
                results.add(f"{name}, eager", "over lookup experts", ratio, "x", **figures)
                say(f"{name}, eager, batch {batch}: {ratio:.2f} times the lookup experts' step")


def _on_device(model: Any, batch: int, length: int) -> Decoder:
    """Return a decoder that gathers inside the graph from a table in device memory."""
    from ..lut import DeviceStore

    store = DeviceStore.__new__(DeviceStore)
    TensorStore.__init__(store, model.model.lut.meta, model.model.lut.table)
    model.model.lut = store
    return Decoder(model, batch, length)


__all__ = ["measure"]
