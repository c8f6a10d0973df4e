"""The lookup block of one layer: a router over experts that see only the token's embedding."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.activations import ACT2FN

from ..config import MoleConfig


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
        self, embeddings: Float[Tensor, "*tokens dim"]
    ) -> Float[Tensor, "*tokens experts dim"]:
        """Return every expert's output, `FFN_j(RMSNorm(e))`, for raw input embeddings `e`.

        Source: Jie et al. 2025 (arXiv 2503.15798), section 3.2.
        """
        *tokens, dim = embeddings.shape
        inner = self.act(nn.functional.linear(self.norm(embeddings), self.up))
        inner = inner.view(-1, self.num_experts, self.up.shape[0] // self.num_experts)
        down = self.down_t.view(self.num_experts, -1, dim).to(inner.dtype)
        values = torch.bmm(inner.transpose(0, 1), down)
        return values.transpose(0, 1).reshape(*tokens, self.num_experts, dim)

    def token_values(
        self, embeddings: Float[Tensor, "*tokens dim"], inverse: Int[Tensor, "batch seq_q"] | None
    ) -> Float[Tensor, "all experts dim"]:
        """Return every expert's output for every token of the batch, flattened.

        Args:
            embeddings: Embeddings of all tokens or, with `inverse`, of the distinct ids.
            inverse: For every token, which of the distinct ids is its own.

        Source: own; the gradient of a distinct id's output is the sum over its tokens.
        """
        values = self.values(embeddings)
        if inverse is None:
            return values.flatten(0, -3)
        picked: Tensor = nn.functional.embedding(inverse.flatten(), values.flatten(1))
        return picked.view(-1, *values.shape[1:])


__all__ = ["Lookup"]
