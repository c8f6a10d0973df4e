"""The gather operation in plain PyTorch."""

from jaxtyping import Int, UInt8
from torch import Tensor


def gather_reference(
    table: UInt8[Tensor, "vocab stride"],
    ids: Int[Tensor, " tokens"],
    out: UInt8[Tensor, "tokens stride"],
    flag: Int[Tensor, " one"],
    first: int = 0,
    last: int | None = None,
) -> None:
    """Copy bytes `first` to `last` of the rows of `ids` into `out`.

    Ids that are not in the table give zeros and set `flag`.

    Source: own.
    """
    last = table.shape[1] if last is None else last
    ids = ids.to(table.device)
    known = (ids >= 0) & (ids < table.shape[0])
    rows = table[:, first:last].index_select(0, ids.clamp(0, table.shape[0] - 1))
    out[:, first:last] = (rows * known[:, None]).to(out.device)
    flag |= (~known).any().to(flag)


__all__ = ["gather_reference"]
