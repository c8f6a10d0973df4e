"""The store without a table: the reference of the others."""

from typing import Any

import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from .base import LutStore
from .format import LutRows
from .plan import expert_values, plan


class ComputeStore(LutStore):
    """No table at all: the experts are run for every row. The reference of the other stores.

    Args:
        model: A model in expert form.
        fmt: Format of the rows.
    """

    def __init__(self, model: Any, fmt: str = "fp32") -> None:
        super().__init__(plan(model, fmt))
        self._model = model

    def read(self, ids: Int[Tensor, " tokens"]) -> UInt8[Tensor, "tokens row_stride"]:
        """Return whole rows as conversion would write them, on the ids' device."""
        with torch.no_grad():
            values = expert_values(self._model, self._host_ids(ids))
        return LutRows.encode(values, self.meta).to_bytes(self.meta).to(ids.device)


__all__ = ["ComputeStore"]
