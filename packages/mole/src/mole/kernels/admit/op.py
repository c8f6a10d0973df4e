"""The admit and hold operations: checks and choice of backend."""

from importlib import import_module
from typing import Literal

from jaxtyping import Int32, Int64, UInt8
from torch import Tensor

from fourfold_common import triton_status

from .reference import admit_reference


def admit(
    table: UInt8[Tensor, "slots stride"],
    slots: Int64[Tensor, " tokens"],
    landing: UInt8[Tensor, "places stride"],
    landed: Int64[Tensor, " tokens"],
    out: UInt8[Tensor, "tokens stride"],
    first: int = 0,
    last: int | None = None,
    backend: Literal["auto", "triton", "reference"] = "auto",
) -> None:
    """Copy bytes `first` to `last` of every token's row into `out`, and new rows into `table`.

    Args:
        table: Rows that are kept, on the device of `out`.
        slots: A token's place in `table`; below 0 where its row is not to be kept. On the device.
        landing: Rows that are new, in pinned host memory.
        landed: A token's place in `landing`; below 0 where its row is in `table` already. On the
            device.
        out: Where the rows go.
        first: First byte of a row to copy, a multiple of 8.
        last: Byte after the last, a multiple of 8; the whole row if None.
        backend: `"triton"`, `"reference"` (PyTorch), or `"auto"`: Triton on CUDA.

    Raises:
        ValueError: Shapes or offsets do not fit each other, or the backend cannot run here.

    Source: own.
    """
    stride = table.shape[1]
    last = stride if last is None else last
    if out.shape != (len(slots), stride) or landing.shape[1] != stride:
        raise ValueError(
            f"`out` must have shape {(len(slots), stride)} and `landing` rows of {stride} bytes; "
            f"got {tuple(out.shape)} and {landing.shape[1]}."
        )
    if not 0 <= first <= last <= stride or first % 8 or last % 8 or stride % 8:
        raise ValueError(
            f"`first` and `last` must be multiples of 8 from 0 to {stride}; got {first}, {last}."
        )
    if backend not in ("auto", "triton", "reference"):
        raise ValueError(f"`backend` must be 'auto', 'triton' or 'reference'; got {backend!r}.")
    if backend == "reference" or (backend == "auto" and not out.is_cuda):
        admit_reference(table, slots, landing, landed, out, first, last)
        return
    if not (out.is_cuda or triton_status().interpreting):
        raise ValueError(f"`backend` 'triton' needs `out` on CUDA; got {out.device.type}.")
    kernel = import_module(".kernel", __package__)
    kernel._launch(table, slots, landing, landed, out, first, last)


def hold(
    ready: Int32[Tensor, " one"],
    turn: Int32[Tensor, " one"],
    told: Int64[Tensor, "two tokens"],
    known: Int64[Tensor, "two tokens"],
) -> None:
    """Let the current stream wait until `ready` is above `turn`; add one to `turn`, copy `told`.

    Whoever launches this must raise `ready` later, whatever happens: the stream waits forever else.

    Args:
        ready: A counter in pinned host memory.
        turn: A counter on the device.
        told: What the host writes before it raises `ready`, in pinned host memory.
        known: Where that goes, on the device.

    Source: own.
    """
    import_module(".kernel", __package__)._launch_hold(ready, turn, told, known)


__all__ = ["admit", "hold"]
