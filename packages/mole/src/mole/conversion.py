"""Conversion of a trained model from expert form to table form, in chunks that survive a kill.

All rows of a chunk of ids are computed, written and noted in a journal with their checksum. A
conversion that was interrupted goes on after the last chunk whose bytes still match the journal.
Nothing appears under its final name before it is complete.
"""

import json
import os
import shutil
import zlib
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from .config import MoleConfig
from .lut.errors import LutError, LutFingerprintError
from .lut.files import verify_lut
from .lut.format import DATA_FILE, HEADER_BYTES, META_FILE, LutMeta, LutRows
from .lut.plan import expert_values, fingerprint, plan
from .modeling import MoleForCausalLM

_LUT_FOLDER = "lut"
_JOURNAL = "journal"
_WAITING = 3  # chunks that are being written and checked


def convert(
    model: MoleForCausalLM,
    output: str | Path,
    fmt: str = "fp16",
    chunk: int | None = None,
    resume: bool = True,
    progress: bool = True,
) -> Path:
    """Write a model in table form and return its folder.

    The folder gets the backbone as transformers saves it, and the table in `lut/`. Load it with
    `MoleForCausalLM.from_pretrained(folder)`. The experts are evaluated in float32.

    Args:
        model: A model in expert form, on any device.
        output: Folder to write; made if missing.
        fmt: Format of the table, one of `mole.lut.FORMATS`: `"fp32"`, `"fp16"`, `"bf16"`, `"int8"`,
            `"fp8"`, `"nf4"` or `"nf3"`.
        chunk: Ids to compute at a time; if None up to 1,024 that need up to 128 MiB.
        resume: Go on with an interrupted conversion of the same weights, and keep a table that is
            complete already; else start from the beginning.
        progress: Show a progress bar.

    Raises:
        TypeError: `model` is no `MoleForCausalLM`.
        ValueError: It is in table form, has no lookup experts or adapters that are not merged, its
            vocabulary was resized, `fmt` is unknown, `chunk` is below 1, or `output` holds a model
            that is not in table form.
        LutError: The experts give values that the format cannot hold.
        OSError: The disk is full or not writable.

    The file is the same, byte for byte, whether or not the conversion was interrupted, as long as
    the matrix products are: with the same machine, version of torch and number of threads.

    Source: Jie et al. 2025 (arXiv 2503.15798), section 3.3.
    """
    if not isinstance(model, MoleForCausalLM):
        raise TypeError(f"`model` must be a MoleForCausalLM; got {type(model).__name__}.")
    meta = plan(model, fmt, chunk, origin="")
    output = Path(output)
    _check_output(output)
    output.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(1) as pool:  # while the first chunks are computed and written
        origin = pool.submit(fingerprint, model)
        meta = _write_table(model, meta, origin, output, resume, progress)
    _write_backbone(model, meta, output)
    return output


def verify(
    path: str | Path, model: MoleForCausalLM | None = None, *, progress: bool = False
) -> LutMeta:
    """Return a table's description after checking its bytes and, given a model, its origin.

    Args:
        path: Folder that holds `lut.json`.
        model: The model in expert form that the table should have been made from.
        progress: Show a progress bar.

    Raises:
        LutError: The table is damaged, or was made from other weights.
        ValueError: The model is in table form.
    """
    meta = verify_lut(path, progress=progress)
    if model is not None:
        if model.config.lookup_form != "experts":
            raise ValueError("`model` must be in expert form; a table's origin is not in a table.")
        meta.check_fits(model.config)
        found = fingerprint(model)
        if found != meta.fingerprint:
            raise LutFingerprintError(
                f"The table must have the model's fingerprint {found[:16]}...; got "
                f"{meta.fingerprint[:16]}...: experts or embeddings changed after conversion. "
                "Convert the model again."
            )
    return meta


def _check_output(output: Path) -> None:
    """Raise an error if writing to the folder would replace a model that is no table."""
    try:
        there = json.loads((output / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    if there.get("lookup_form") != "table":
        raise ValueError(
            f"`output` must be a new folder or that of a model in table form; {output} holds a "
            f"model of type {there.get('model_type')!r} that would be lost."
        )


def _write_table(
    model: MoleForCausalLM,
    meta: LutMeta,
    origin: Future[str],
    output: Path,
    resume: bool,
    progress: bool,
) -> LutMeta:
    """Write the table into a hidden folder, then give that folder its name.

    Returns `meta` with the model's fingerprint.
    """
    final, partial, old = (
        output / name for name in (_LUT_FOLDER, f".{_LUT_FOLDER}.partial", f".{_LUT_FOLDER}.old")
    )
    if final.exists() or partial.exists():  # of which weights is what is there?
        meta = replace(meta, fingerprint=origin.result())
    if not (resume and _same_table(final, meta)):
        if not resume:
            shutil.rmtree(partial, ignore_errors=True)
        if not _same_table(partial, meta):  # else it was killed when it had all but its name
            _fill(model, meta, origin, partial, progress)
        (partial / _JOURNAL).unlink(missing_ok=True)
        shutil.rmtree(old, ignore_errors=True)
        if final.exists():
            final.rename(old)
        partial.rename(final)
    shutil.rmtree(old, ignore_errors=True)
    return replace(meta, fingerprint=origin.result())


def _fill(
    model: MoleForCausalLM, meta: LutMeta, origin: Future[str], partial: Path, progress: bool
) -> None:
    """Write what is missing of a table into its folder, the description last."""
    partial.mkdir(exist_ok=True)
    crcs: list[int] = []
    if meta.fingerprint:
        crcs = _journaled(partial, meta)
    else:  # a new folder
        (partial / DATA_FILE).write_bytes(meta.header())
    missing = meta.file_bytes - len(crcs) * meta.chunk * meta.row_stride
    free = shutil.disk_usage(partial).free
    if free < missing:
        raise OSError(
            f"the table needs {missing:,} more bytes in {partial.parent}; {free:,} are free."
        )
    _write_chunks(model, meta, origin, partial, crcs, progress)
    replace(meta, fingerprint=origin.result(), crcs=tuple(crcs)).save(partial / META_FILE)


def _same_table(folder: Path, meta: LutMeta) -> bool:
    """Return whether a complete, undamaged table of the same weights and format is there."""
    try:
        found = verify_lut(folder)
    except LutError:
        return False
    return replace(found, crcs=(), chunk=meta.chunk) == meta


def _journaled(partial: Path, meta: LutMeta) -> list[int]:
    """Return the checksums of the chunks that are written already; begin anew if none are."""
    plan = _plan_line(meta)
    journal, data = partial / _JOURNAL, partial / DATA_FILE
    crcs: list[int] = []
    try:
        header, *lines = journal.read_text(encoding="utf-8").splitlines()
        if header == plan:
            crcs = _intact(data, meta, [int(line, 16) for line in lines if len(line) == 8])
    except (OSError, ValueError):
        crcs = []
    journal.write_text("".join([plan + "\n", *(f"{crc:08x}\n" for crc in crcs)]), encoding="utf-8")
    if not crcs:
        data.write_bytes(meta.header())
    return crcs


def _plan_line(meta: LutMeta) -> str:
    """Return the first line of the journal: what is written, and of which weights."""
    return json.dumps({**asdict(meta), "crcs": None}, sort_keys=True)


def _intact(data: Path, meta: LutMeta, crcs: list[int]) -> list[int]:
    """Return the longest run of first checksums that the file's bytes match."""
    with open(data, "rb") as file:
        if file.read(HEADER_BYTES) != meta.header():
            return []
        for number, crc in enumerate(crcs):
            size = min(meta.chunk, meta.vocab - number * meta.chunk) * meta.row_stride
            if size <= 0 or zlib.crc32(file.read(size)) != crc:
                return crcs[:number]
    return crcs


@torch.no_grad()
def _write_chunks(
    model: MoleForCausalLM,
    meta: LutMeta,
    origin: Future[str],
    partial: Path,
    crcs: list[int],
    progress: bool,
) -> None:
    """Compute and write all chunks after those whose checksums are given; extend the list."""
    first = len(crcs) * meta.chunk
    bar = tqdm(
        total=meta.vocab, initial=first, desc="lookup table", unit="id", disable=not progress
    )
    with (
        open(partial / DATA_FILE, "r+b") as data,
        open(partial / _JOURNAL, "a", encoding="utf-8") as journal,
        bar,
    ):
        data.seek(HEADER_BYTES + first * meta.row_stride)
        cuda = model.device.type == "cuda"
        size = (meta.chunk, meta.row_stride)
        # What comes from a GPU lands in memory that is used again.
        landing = [
            torch.empty(size, dtype=torch.uint8, pin_memory=True) for _ in range(_WAITING * cuda)
        ]
        waiting: deque[tuple[int, Future[None], Future[int]]] = deque()
        synced: deque[Future[None]] = deque()

        def write(chunk: Any) -> None:
            data.write(chunk)
            data.flush()
            # The disk works meanwhile: the system would begin only when everything is written.
            if not synced or synced[-1].done():
                synced.append(syncer.submit(os.fsync, data.fileno()))

        def note() -> None:
            """Wait for the oldest chunk, and put its checksum into the journal."""
            count, written, checked = waiting.popleft()
            try:
                written.result()
                while synced and synced[0].done():
                    synced.popleft().result()  # the system reports a lost write only once
            except OSError:
                waiting.clear()  # what comes after a hole does not count
                raise
            if not (crcs or meta.fingerprint):
                journal.write(_plan_line(replace(meta, fingerprint=origin.result())) + "\n")
            crcs.append(checked.result())
            journal.write(f"{crcs[-1]:08x}\n")
            journal.flush()
            bar.update(count)

        # While a chunk is written and checked, the next one is computed. To write is quicker than
        # to check.
        with (
            ThreadPoolExecutor(1) as syncer,
            ThreadPoolExecutor(1) as writer,
            ThreadPoolExecutor(_WAITING) as checker,
        ):
            try:
                for start in range(first, meta.vocab, meta.chunk):
                    ids = slice(start, min(start + meta.chunk, meta.vocab))
                    rows = LutRows.encode(expert_values(model, ids), meta).to_bytes(meta)
                    if len(waiting) == _WAITING:
                        note()
                    if cuda:
                        landing.append(landing.pop(0))  # the one that was noted last
                        rows = landing[-1][: len(rows)].copy_(rows)
                    chunk: Any = rows.numpy()
                    checked = checker.submit(zlib.crc32, chunk)
                    waiting.append((ids.stop - ids.start, writer.submit(write, chunk), checked))
            finally:
                while waiting:
                    note()
        while synced:
            synced.popleft().result()
        data.truncate()
        os.fsync(data.fileno())


def _write_backbone(model: MoleForCausalLM, meta: LutMeta, output: Path) -> None:
    """Write configuration and weights of the table form, without norms and experts."""
    fields: dict[str, Any] = model.config.to_dict()
    fields |= {
        "lookup_form": "table",
        "lut": {"path": _LUT_FOLDER, "format": meta.format, "fingerprint": meta.fingerprint},
    }
    with torch.device("meta"):
        backbone = MoleForCausalLM(MoleConfig.from_dict(fields))
    names = set(backbone.state_dict())
    kept = {name: value for name, value in model.state_dict().items() if name in names}
    backbone.load_state_dict(kept, assign=True)
    backbone.tie_weights()
    backbone.generation_config = model.generation_config
    staging = output / ".backbone.partial"
    shutil.rmtree(staging, ignore_errors=True)
    backbone.save_pretrained(staging)
    # The configuration comes last: without it the folder is no model.
    for file in sorted(staging.iterdir(), key=lambda file: file.name == "config.json"):
        file.chmod(0o644)
        file.replace(output / file.name)
    staging.rmdir()


__all__ = ["convert", "fingerprint", "verify"]
