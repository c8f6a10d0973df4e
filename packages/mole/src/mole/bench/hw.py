"""What the machine's memory and disk give: the limits of every store."""

import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from fourfold_common import Results, time_call

from ..kernels.gather import gather
from ..lut import DiskStore
from .shapes import fill_randomly, host_memory, table_meta

_MIB = 2**20


def measure(
    results: Results,
    say: Callable[[str], None],
    device: torch.device,
    shape: str = "160m",
    folder: str | None = None,
    megabytes: int = 256,
) -> None:
    """Add bandwidths: writing and reading a file, random direct reads by depth, rows over the bus.

    Args:
        results: Where figures go.
        say: Prints a line.
        device: Where to run.
        shape: One of `SHAPES`; its 4-expert fp16 rows are gathered.
        folder: Where the file is written; the folder for temporary files if None.
        megabytes: Length of the file, in MiB.
    """
    with tempfile.TemporaryDirectory(dir=folder) as place:
        _disk(results, say, Path(place), megabytes)
    if device.type == "cuda":
        _bus(results, say, device, shape)


def _disk(results: Results, say: Callable[[str], None], folder: Path, megabytes: int) -> None:
    """Write a table of random bytes, then read its rows past the page cache."""
    meta = table_meta("160m", 4, "nf4")
    rows = max(1, megabytes * _MIB // meta.row_stride)
    meta = replace(meta, vocab=rows)
    path = folder / "lut.safetensors"
    block = os.urandom(8 * _MIB)
    begin = time.perf_counter()
    with open(path, "wb") as file:
        file.write(meta.header())
        left = rows * meta.row_stride
        while left:
            left -= file.write(block[:left])
        os.fsync(file.fileno())
    seconds = time.perf_counter() - begin
    written = meta.file_bytes / seconds / 1e9
    results.add("disk", "sequential write", written, "GB/s", mebibytes=megabytes)
    say(f"sequential write with fsync: {written:.2f} GB/s")
    meta.save(folder / "lut.json")
    for depth in (1, 4, 16, 64):
        store = DiskStore(folder, threads=depth)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(store._file, 0, 0, os.POSIX_FADV_DONTNEED)
        ids = torch.randperm(rows, generator=torch.Generator().manual_seed(depth))[:512]
        begin = time.perf_counter()
        for part in ids.split(4 * depth):
            store.read(part)
        seconds = time.perf_counter() - begin
        speed = len(ids) * meta.row_bytes / seconds / 1e9
        results.add(
            "disk", "random rows", speed, "GB/s", depth=depth, row_bytes=meta.row_bytes,
            direct=store.direct, page_cache="dropped",
        )  # fmt: skip
        say(f"random rows of {meta.row_bytes:,} bytes, depth {depth}: {speed:.3f} GB/s")
        store.close()


def _bus(results: Results, say: Callable[[str], None], device: torch.device, shape: str) -> None:
    """Read rows from pinned memory with the copy engine and with the gather kernel."""
    meta = table_meta(shape, 4, "fp16")
    meta = replace(meta, vocab=4096)
    table = host_memory(meta)
    fill_randomly(table, meta, device)
    pinned = table.pin_memory()
    flag = torch.zeros(1, dtype=torch.int32, device=device)
    for tokens in (1, 32, 512):
        ids = torch.randint(4096, (tokens,), device=device)
        out = torch.empty(tokens, meta.row_stride, dtype=torch.uint8, device=device)
        gather(pinned, ids, out, flag)
        if not torch.equal(out.cpu(), table[ids.cpu()]):
            raise ValueError("rows gathered over the bus are not those of the table.")
        for name, call in (
            ("gather kernel", lambda: gather(pinned, ids, out, flag)),  # noqa: B023
            ("copy engine", lambda: out.copy_(pinned[: len(ids)], non_blocking=True)),  # noqa: B023
        ):
            found = time_call(call, device)
            speed = out.numel() / found.median_ms / 1e6
            results.add(name, "host to device", speed, "GB/s", n=found.n, rows=tokens)
            say(f"{name}, {tokens} rows of {meta.row_stride:,} bytes: {speed:.1f} GB/s")


__all__ = ["measure"]
