"""The feed-forward block of a mixture of experts for a decoding step, with shapes that stay."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


def mixture(
    x: Tensor,
    router: Tensor,
    up: Tensor,
    down_t: Tensor,
    top_k: int,
    act: Callable[[Tensor], Tensor],
) -> Tensor:
    """Return the output of the `top_k` experts that the router likes best, `[batch, dim]`.

    What is chosen stays on the device, and nothing of it is a shape: the step can be captured. A
    few tokens read the weights of their own experts alone. Many tokens want nearly all experts:
    then all are run, and those not chosen weighted by zero, which reads every weight once.

    Args:
        x: Tokens, `[batch, dim]`.
        router: Weights of the router, `[experts, dim]`.
        up: Up-projections of all experts, `[experts * inner, dim]`.
        down_t: Transposed down-projections, `[experts * inner, dim]`.
        top_k: Experts of a token.
        act: Activation.
    """
    batch, dim = x.shape
    experts = len(router)
    number = torch.arange(experts, device=x.device)
    logits = nn.functional.linear(x, router).float()
    best, picks = [], []
    for _ in range(top_k):  # a few maxima compile to less than `topk` costs
        value, pick = logits.max(-1, keepdim=True)
        logits = logits.masked_fill(number == pick, -torch.inf)
        best.append(value)
        picks.append(pick)
    gates = torch.softmax(torch.cat(best, -1), -1)  # [batch, top_k]
    chosen = torch.cat(picks, -1)
    if batch * top_k <= experts:
        # Compiled, a product and a sum read the chosen weights where they are, without a copy.
        wide = x[:, None, None].float()
        inner = act((up.view(experts, -1, dim)[chosen] * wide).sum(-1)) * gates[..., None]
        down = down_t.view(experts, -1, dim)[chosen]
        few: Tensor = (down * inner[..., None]).sum((1, 2)).to(x.dtype)
        return few
    weights = (gates[..., None] * (chosen[..., None] == number)).sum(1)  # [batch, experts]
    inner = act(nn.functional.linear(x, up)).unflatten(-1, (experts, -1))
    inner = (inner * weights[..., None]).to(x.dtype).flatten(1)
    many: Tensor = inner @ down_t
    return many


__all__ = ["mixture"]
