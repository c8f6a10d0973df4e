"""The gather operation: checks and choice of backend."""

from importlib import import_module
from typing import Literal

from jaxtyping import Int, UInt8
from torch import Tensor

from fourfold_common import triton_status

from .reference import gather_reference

_PROGRAMS = 64  # enough requests in flight for 50 GB/s at 2 us of latency, with room to spare


def gather(
    table: UInt8[Tensor, "vocab stride"],
    ids: Int[Tensor, " tokens"],
    out: UInt8[Tensor, "tokens stride"],
    flag: Int[Tensor, " one"],
    first: int = 0,
    last: int | None = None,
    backend: Literal["auto", "triton", "reference"] = "auto",
    programs: int = _PROGRAMS,
) -> None:
    """Copy bytes `first` to `last` of the rows of `ids` into `out`, without waiting for anything.

    Args:
        table: Rows on the ids' device, or in host memory that is pinned or registered.
        ids: Row numbers. Those that are not in the table give zeros and set `flag`.
        out: Where the rows go, on the ids' device.
        flag: One integer on the ids' device, set to 1 by an unknown id and else left alone.
        first: First byte of a row to copy, a multiple of 8.
        last: Byte after the last, a multiple of 8; the whole row if None.
        backend: `"triton"`, `"reference"` (PyTorch), or `"auto"`: Triton for ids on CUDA.
        programs: Programs that copy at a time, 4 KiB each. What runs beside is slowed by all that
            is on its way over the bus.

    Raises:
        ValueError: Shapes or offsets do not fit each other, or the backend cannot run here.

    Source: own.
    """
    stride = table.shape[1]
    last = stride if last is None else last
    if out.shape != (len(ids), stride):
        raise ValueError(f"`out` must have shape {(len(ids), stride)}; got {tuple(out.shape)}.")
    if not 0 <= first <= last <= stride or first % 8 or last % 8 or stride % 8:
        raise ValueError(
            f"`first` and `last` must be multiples of 8 from 0 to {stride}; got {first}, {last}."
        )
    if backend not in ("auto", "triton", "reference"):
        raise ValueError(f"`backend` must be 'auto', 'triton' or 'reference'; got {backend!r}.")
    if backend == "reference" or (backend == "auto" and not ids.is_cuda):
        gather_reference(table, ids, out, flag, first, last)
        return
    if not (ids.is_cuda or triton_status().interpreting):
        raise ValueError(f"`backend` 'triton' needs ids on CUDA; got {ids.device.type}.")
    import_module(".kernel", __package__)._launch(table, ids, out, flag, first, last, programs)


__all__ = ["gather"]
