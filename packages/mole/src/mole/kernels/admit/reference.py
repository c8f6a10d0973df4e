"""The admit operation in plain PyTorch."""

from jaxtyping import Int, UInt8
from torch import Tensor


def admit_reference(
    table: UInt8[Tensor, "slots stride"],
    slots: Int[Tensor, " tokens"],
    landing: UInt8[Tensor, "places stride"],
    landed: Int[Tensor, " tokens"],
    out: UInt8[Tensor, "tokens stride"],
    first: int = 0,
    last: int | None = None,
) -> None:
    """Copy bytes `first` to `last` of every token's row into `out`, and new rows into `table`.

    Source: own.
    """
    part = slice(first, table.shape[1] if last is None else last)
    slots, landed = slots.to(table.device), landed.to(table.device)
    new = landed >= 0
    fresh = landing[:, part].to(table.device)[landed.clamp_min(0)]
    rows = table[:, part][slots.clamp_min(0)].where(~new[:, None], fresh)
    out[:, part] = rows
    stays = new & (slots >= 0)
    table[slots[stays], part] = rows[stays]


__all__ = ["admit_reference"]
