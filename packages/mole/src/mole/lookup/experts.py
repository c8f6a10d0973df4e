"""The lookup block of one layer: a router over experts that see only the token's embedding."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.activations import ACT2FN

from ..config import MoleConfig
from ..kernels.mix import mix
from .dedup import Repeats


class Lookup(nn.Module):
    """Router and, in the training form, the lookup experts of one layer.

    The experts' weights are two matrices: one product computes all inner activations, one batched
    product all outputs. The table form has the router only.

    Args:
        config: The model's configuration.
    """

    def __init__(self, config: MoleConfig) -> None:
        super().__init__()
        self.num_experts = config.num_lookup_experts
        self.router = nn.Linear(config.hidden_size, self.num_experts, bias=False)
        if config.lookup_form == "experts":
            inner = self.num_experts * int(config.lookup_intermediate_size or 0)
            self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
            self.up = nn.Parameter(torch.empty(inner, config.hidden_size))
            self.down_t = nn.Parameter(torch.empty(inner, config.hidden_size))
            self.act = ACT2FN[config.hidden_act]

    def values(
        self, embeddings: Float[Tensor, "*tokens dim"], wide: bool = False
    ) -> Float[Tensor, "*tokens experts dim"]:
        """Return every expert's output, `FFN_j(RMSNorm(e))`, for raw input embeddings `e`.

        Args:
            embeddings: Rows of the embedding matrix.
            wide: Compute in float32, whatever the weights are in; for float32 embeddings.

        Source: Jie et al. 2025 (arXiv 2503.15798), section 3.2.
        """
        *tokens, dim = embeddings.shape
        weights = self.norm.weight, self.up, self.down_t
        norm, up, down_t = (weight.float() for weight in weights) if wide else weights
        normed = nn.functional.rms_norm(embeddings, (dim,), norm, self.norm.eps)
        inner = self.act(nn.functional.linear(normed, up))
        inner = inner.view(-1, self.num_experts, up.shape[0] // self.num_experts)
        down = down_t.view(self.num_experts, -1, dim).to(inner.dtype)
        values = torch.bmm(inner.transpose(0, 1), down)
        return values.transpose(0, 1).reshape(*tokens, self.num_experts, dim)

    def mixed(
        self,
        logits: Float[Tensor, "tokens experts"],
        residual: Float[Tensor, "tokens dim"],
        values: Float[Tensor, "distinct experts dim"],
        repeats: Repeats,
        bank: Float[Tensor, "distinct experts dim"] | None = None,
    ) -> Float[Tensor, "tokens dim"]:
        """Return `residual` plus the gated sum of the values of every token's id.

        Args:
            logits: The router's logits.
            residual: What the sum is added to.
            values: Every expert's output for every distinct id.
            repeats: Which of them is each token's.
            bank: Buffer that takes the gradient of `values`, see `StepBank`.

        Source: own; the gradient of a distinct id's output is the sum over its tokens.
        """
        wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
        gates = torch.softmax(logits, dim=-1, dtype=wide).to(values.dtype)
        return residual + mix(gates, values, *repeats, bank)


__all__ = ["Lookup"]
