"""Feed-forward blocks: dense, or experts of which a router chooses a few."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.activations import ACT2FN

from ..config import DenseConfig, MoeConfig
from .linear import ResidualLinear


class Mlp(nn.Module):
    """The dense feed-forward block, or the shared expert: `W_down act(W_up x)`."""

    def __init__(self, config: DenseConfig) -> None:
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.gate_proj = None
        if config.mlp_type == "swiglu":
            self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = ResidualLinear(config.intermediate_size, config.hidden_size, bias=False)
        self.act = ACT2FN[config.hidden_act]

    def forward(self, x: Float[Tensor, "batch seq_q dim"]) -> Float[Tensor, "batch seq_q dim"]:
        """Return the block's output."""
        up = self.up_proj(x)
        inner = self.act(up) if self.gate_proj is None else self.act(self.gate_proj(x)) * up
        output: Tensor = self.down_proj(inner)
        return output


class SparseMlp(nn.Module):
    """Top-k routed experts; the weights of the chosen are a softmax over their logits."""

    def __init__(self, config: MoeConfig) -> None:
        super().__init__()
        self.num_experts, self.top_k = config.num_experts, config.num_experts_per_tok
        inner = self.num_experts * int(config.moe_intermediate_size or 0)
        self.router = nn.Linear(config.hidden_size, self.num_experts, bias=False)
        self.up = nn.Parameter(torch.empty(inner, config.hidden_size))
        self.down_t = nn.Parameter(torch.empty(inner, config.hidden_size))
        self.act = ACT2FN[config.hidden_act]

    def forward(self, x: Float[Tensor, "batch seq_q dim"]) -> tuple[Tensor, Tensor]:
        """Return the output and the router's logits, float32 `[batch, seq_q, experts]`."""
        logits = self.router(x).float()
        top, chosen = logits.topk(self.top_k, dim=-1)
        gates = torch.softmax(top, dim=-1)
        few = x.shape[0] * x.shape[1] * self.top_k <= self.num_experts
        output = self._chosen(x, gates, chosen) if few else self._all(x, gates, chosen)
        return output, logits

    def _chosen(self, x: Tensor, gates: Tensor, chosen: Tensor) -> Tensor:
        """Run only the chosen experts: reads the fewest weights, for decoding."""
        up = self.up.view(self.num_experts, -1, x.shape[-1])[chosen]
        down = self.down_t.view(self.num_experts, -1, x.shape[-1])[chosen]
        inner = self.act((up @ x[..., None, :, None]).squeeze(-1))
        outputs = (inner[..., None, :] @ down).squeeze(-2)
        mixed: Tensor = gates.to(outputs.dtype)[..., None, :] @ outputs
        return mixed.squeeze(-2)

    def _all(self, x: Tensor, gates: Tensor, chosen: Tensor) -> Tensor:
        """Run all experts and weigh those not chosen by zero: static shapes, two products."""
        weights = torch.zeros(*x.shape[:2], self.num_experts, dtype=gates.dtype, device=x.device)
        weights = weights.scatter(-1, chosen, gates)
        inner = self.act(nn.functional.linear(x, self.up)).unflatten(-1, (self.num_experts, -1))
        inner = inner * weights.to(inner.dtype)[..., None]
        return nn.functional.linear(inner.flatten(-2), self.down_t.t())


__all__ = ["Mlp", "SparseMlp"]
