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
from .duel import ROUNDS, Duel
from .shapes import (
    fill_randomly,
    host_memory,
    random_model,
    table_meta,
    write_table,
)

_PROMPT = 8
_CACHE = 4096
_ON_DISK = ("mmap", "disk warm", "disk cold")


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
        mixtures: Also time mixtures of experts: resident as one graph; resident and offloaded in
            plain eager steps, beside lookup experts in such steps.
    """
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    dense = random_model("dense", shape, device, dtype).eval()
    vocab = dense.config.vocab_size
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(vocab, (max(batches), _PROMPT), generator=generator).to(device)
    duels = {
        batch: Duel(results, say, Decoder(dense, batch, length), prompts[:batch], steps)
        for batch in batches
    }
    if mixtures:
        resident = random_model("moe", shape, device, dtype).eval()
        for duel in duels.values():
            duel.run("MoE-10E resident", Decoder(resident, duel.batch, length))
        del resident
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
        for duel in duels.values():
            _one(duel, model, kind, length, folder)
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


def _one(duel: Duel, model: Any, kind: str, length: int, folder: Path | None) -> None:
    """Time one lookup model at one batch."""
    store: Any = model.model.lut
    file = None if folder is None else folder / DATA_FILE
    decoder = Decoder(model, duel.batch, length)
    if decoder.device.type == "cuda" and kind == "device":
        decoder = _on_device(model, duel.batch, length)
    name = f"MoLE-{store.meta.experts}E {store.meta.format} {kind}"
    parameters: dict[str, Any] = {}
    if isinstance(store, CachedStore):
        parameters["direct"] = getattr(store.store, "direct", None)
    cold = kind == "disk cold" and file is not None

    def before_round() -> None:
        if cold and file is not None:
            pages.drop(file)
            parameters["resident"] = pages.resident(file)

    if file is not None:
        before_round()
        parameters |= {
            "page_cache": "dropped" if cold else "warm",
            "resident": pages.resident(file),
        }
    step, dense = duel.run(name, decoder, before_round, kind, **parameters)
    if cold:
        _floor(duel, store, name, step, dense, before_round)


def _floor(
    duel: Duel,
    store: CachedStore,
    name: str,
    step: float,
    dense: float,
    before_round: Callable[[], None],
) -> None:
    """Add a step's time over the least it can take: the dense step's, or that of its reads alone.

    The rate is what the store gives when it is asked for as many rows at a time as a step misses,
    and nothing else runs.
    """
    missed = store.misses / (ROUNDS * duel.steps)
    count, rows = max(1, round(missed)), store.meta.vocab
    picks = torch.randperm(rows, generator=torch.Generator().manual_seed(2))[: 64 * count]
    out = list(torch.empty(count, store.meta.row_stride, dtype=torch.uint8))
    before_round()
    begin = time.perf_counter()
    for part in picks.split(count):
        store.store.read_into(part.tolist(), out[: len(part)])
    reading = (time.perf_counter() - begin) * 1e3 / len(picks)  # ms a row
    floor = max(dense, missed * reading)
    figures: dict[str, Any] = {"batch": duel.batch, "missed": round(missed, 2)}
    rate = store.meta.row_stride / reading / 1e6
    duel.results.add(name, "random rows beside nothing", rate, "GB/s", rows=count, **figures)
    duel.results.add(name, "floor", floor, "ms/token", **figures)
    duel.results.add(name, "over floor", step / floor, "x", **figures)
    duel.say(
        f"{name}, batch {duel.batch}: {missed:.2f} rows missed a step, read at {rate:.3f} GB/s: "
        f"floor {floor:.4f} ms, step {step / floor:.3f} of it"
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
