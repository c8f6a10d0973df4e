"""Lookup experts evaluated once for a whole optimiser step."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .dedup import Repeats


class StepBank:
    """The experts' outputs for all ids of an optimiser step, and the gradients they collect.

    Weights do not change within a step, so the union of the ids of all its batches is evaluated
    once. Every batch's backward pass adds to the gradient of the values; `backward` then runs
    through the experts once. Exact up to the order of summation. Use:

        with StepBank(model, ids_of_all_batches) as bank:  # backward on leaving
            for batch in batches:
                model(**batch).loss.backward()

    Args:
        model: A `MoleForCausalLM` in expert form with `dedup="step"`.
        ids: Ids of all batches of the step, in any shape and order.
        chunk: Ids to run through the experts at a time.
        multiple: Pad the distinct ids to a multiple of this: few shapes to compile.

    Source: own.
    """

    def __init__(
        self, model: Any, ids: Int[Tensor, "*tokens"], chunk: int = 8192, multiple: int = 1024
    ) -> None:
        self.model, self.chunk = model, chunk
        weight = model.get_input_embeddings().weight
        found = torch.unique(ids).to(weight.device)
        self.ids = torch.nn.functional.pad(found, (0, -len(found) % multiple))
        self.position = torch.zeros(len(weight), dtype=torch.long, device=weight.device)
        self.position[found] = torch.arange(len(found), device=weight.device)
        self.lookups = [layer.lookup for layer in model.model.layers]
        self.values: list[Tensor | None] = []
        self.grads: list[Tensor | None] = []

    @torch.no_grad()
    def __enter__(self) -> "StepBank":
        """Evaluate the experts and hand their outputs to the model."""
        weight = self.model.get_input_embeddings().weight
        for lookup in self.lookups:
            if lookup is None:
                self.values.append(None)
                self.grads.append(None)
                continue
            parts = [lookup.values(weight[part]) for part in self.ids.split(self.chunk)]
            values = torch.cat(parts)
            wide = torch.promote_types(values.dtype, torch.float32)
            self.values.append(values.requires_grad_())
            self.grads.append(torch.zeros_like(values, dtype=wide))
        # Autocast keeps casts of weights, in older versions also those made without gradient.
        torch.clear_autocast_cache()
        self.model.model.bank = self
        return self

    def __exit__(self, kind: Any, *rest: Any) -> None:
        """Run the backward pass through the experts, unless an error ended the step."""
        self.model.model.bank = None
        if kind is None:
            self.backward()
        self.values, self.grads = [], []

    def repeats(self, ids: Int[Tensor, "batch seq_q"]) -> Repeats:
        """Return which of the bank's values is each token's."""
        return Repeats.of(self.position[ids], len(self.ids))

    def layer(self, index: int) -> tuple[Float[Tensor, "distinct experts dim"], Tensor] | None:
        """Return values and gradient buffer of a layer, None for a layer without experts."""
        values, grads = self.values[index], self.grads[index]
        return None if values is None or grads is None else (values, grads)

    def backward(self) -> None:
        """Add the gradients of embeddings, norms and experts, chunk by chunk."""
        weight = self.model.get_input_embeddings().weight
        for number, part in enumerate(self.ids.split(self.chunk)):
            rows = weight.detach()[part].requires_grad_()
            span = slice(number * self.chunk, number * self.chunk + len(part))
            for lookup, grads in zip(self.lookups, self.grads, strict=True):
                if lookup is not None and grads is not None:
                    values = lookup.values(rows)
                    values.backward(grads[span].to(values.dtype))
            if weight.requires_grad and rows.grad is not None:
                if weight.grad is None:
                    weight.grad = torch.zeros_like(weight)
                weight.grad.index_add_(0, part, rows.grad.to(weight.dtype))


__all__ = ["StepBank"]
