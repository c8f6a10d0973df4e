"""alpha-entmax of rows in plain PyTorch: the CPU path, and the formulas of the derivatives.

With e = alpha - 1 the map is written around a level mu, in the unit of the scores:

    p_i = [1 + e (s_i - mu)]_+ ** (1 / e)        mu such that sum(p) == 1

(in the usual notation z = e s and tau = e mu - 1). Written so, nothing degenerates as alpha -> 1:
p_i -> exp(s_i - mu), mu -> logsumexp(s).

*Solver.* For 1 <= alpha <= 2 the function mu -> (sum p) ** e is a norm, hence convex. Newton's step
on it never passes the solution, so from the maximum of the row mu only rises:

    mu += A0 / A1 * (1 - A0 ** -e) / e        A0 = sum(p),  A1 = sum(p ** (2 - alpha))

One step is exact for equal scores, 3 to 7 reach the precision of the numbers. For alpha > 2 there
is no such bound: mu is bisected in float64.

*Derivatives*, all from p alone, with u = p ** (2 - alpha) on the support:

    dp/ds = diag(u) - u u^T / sum(u)        dp/dalpha = c - u sum(c) / sum(u)
    c = (p - u - e p ln p) / e^2 = -p (ln p)^2 phi(-e ln p),   phi(y) = (exp(y) - 1 - y) / y^2

Source: Peters, Niculae, Martins (2019), Correia, Niculae, Martins (2019); the solver and the form
of c that stays exact near alpha = 1 are our own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..newton import threshold

_MAX_STEPS = 60
_BISECTIONS = 64


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of sums and thresholds for numbers of `dtype`."""
    return torch.promote_types(dtype, torch.float32)


def forward(rows: Tensor, alpha: float | Tensor) -> tuple[Tensor, Tensor]:
    """Return the weights of every row and its tau.

    Args:
        rows: Scores `[rows, n]`, n at least 1.
        alpha: One number, or one for each row `[rows]`; at least 1.
    """
    scores = rows.to(wide(rows.dtype))
    each = alpha[:, None].to(scores.dtype) if isinstance(alpha, Tensor) else alpha
    top = scores.amax(-1, keepdim=True)
    empty = top == -torch.inf
    # Shifted to a maximum of 0; the limit keeps 0 * -inf out where alpha is 1.
    if isinstance(each, float) and each in (1.5, 2.0):  # few passes, no logarithm
        z = scores * (each - 1.0)
        tau = threshold(z, each)
        x = (z - tau[:, None]).clamp_min(0.0).masked_fill(empty, 0.0)
        return (x * x if each == 1.5 else x).to(rows.dtype), tau
    shifted = (scores - top.masked_fill(empty, 0.0)).clamp_min(-1e30)
    if bool((each > 2).any()) if isinstance(each, Tensor) else each > 2:
        shifted = shifted.double()
        level = _bisect(shifted, each)
        p = weigh(shifted - level, each)
        p = (p / p.sum(-1, keepdim=True)).to(scores.dtype)
        level = level.to(scores.dtype)
    else:
        level = _solve(shifted, each)
        p = weigh(shifted - level, each)
    tau = ((each - 1) * (top + level) - 1).masked_fill(empty, torch.inf)
    return p.masked_fill(empty, 0.0).to(rows.dtype), tau.squeeze(-1)


def backward(p: Tensor, grad: Tensor, alpha: float | Tensor) -> Tensor:
    """Return the gradient of the scores from that of the weights, differentiable in both."""
    p, grad, each = _broadcast(p, grad, alpha)
    u = _slope(p, each)
    return u * (grad - _mean(u, grad))


def backward_alpha(p: Tensor, grad: Tensor, alpha: Tensor) -> Tensor:
    """Return the gradient of alpha, one number for each row, differentiable in all arguments."""
    p, grad, each = _broadcast(p, grad, alpha)
    u = _slope(p, each)
    return ((grad - _mean(u, grad)) * _curve(p, u, each)).sum(-1)


def tangent(p: Tensor, x: Tensor, alpha: float | Tensor, moved: Tensor | None) -> Tensor:
    """Return how the weights change where the scores change by `x` and every alpha by `moved`."""
    change = backward(p, x, alpha)  # the Jacobian is symmetric
    if moved is None:
        return change
    p, _, each = _broadcast(p, x, alpha)
    u = _slope(p, each)
    curve, total = _curve(p, u, each), u.sum(-1, keepdim=True)
    curve = curve - u * curve.sum(-1, keepdim=True) / torch.where(total == 0, 1.0, total)
    return change + curve * moved[:, None]


def _curve(p: Tensor, u: Tensor, each: Any) -> Tensor:
    """Return the derivative of the weights by alpha but for what moves the threshold."""
    e = each - 1
    safe = torch.where(p > 0, p, 1.0)
    log = safe.log()
    y = -e * log  # >= 0
    near = y < 0.5
    y_near = torch.where(near, y, 0.0)
    phi = torch.zeros_like(y)
    for k in range(16, 2, -1):  # (1 + y / 3 (1 + y / 4 (...))) / 2
        phi = (1.0 + phi) * y_near / k
    phi = (1.0 + phi) / 2
    e_far = torch.where(near, 1.0, e)
    far = (p - u - e_far * p * log) / e_far**2
    return torch.where(near, -p * log**2 * phi, far)


def weigh(x: Tensor, alpha: float | Tensor) -> Tensor:
    """Return `[1 + (alpha - 1) x]_+ ** (1 / (alpha - 1))`, its limit `exp(x)` where alpha is 1."""
    if isinstance(alpha, float | int):
        if alpha == 1.5:
            return (1 + x / 2).clamp_min(0.0).square()
        if alpha == 2:
            return (1 + x).clamp_min(0.0)
    e = torch.as_tensor(alpha, dtype=x.dtype, device=x.device) - 1
    base = e * x
    inside = ~(base <= -1)  # true for NaN
    power = torch.where(inside, base, 0.0).log1p() / torch.where(e == 0, 1.0, e)
    return torch.where(inside, torch.where(e == 0, x, power).exp(), 0.0)


def _solve(x: Tensor, alpha: float | Tensor) -> Tensor:
    """Return mu of rows whose maximum is 0, by Newton's method on the norm."""
    e = torch.as_tensor(alpha, dtype=x.dtype, device=x.device) - 1
    level = torch.zeros_like(x[:, :1])
    for _ in range(_MAX_STEPS):
        p = weigh(x - level, alpha)
        total, slope = p.sum(-1, keepdim=True), _slope(p, alpha).sum(-1, keepdim=True)
        log = total.log()
        step = total / slope * torch.where(e == 0, log, -(-e * log).expm1() / _nonzero(e))
        raised = level + step
        done = ~(raised > level) | (total <= 1 + torch.finfo(x.dtype).eps)
        level = torch.where(done, level, raised) + 0 * total  # NaN spreads over its row
        if bool(done.all()):
            break
    return level


def _bisect(x: Tensor, alpha: float | Tensor) -> Tensor:
    """Return mu of float64 rows whose maximum is 0, for any alpha."""
    e = torch.as_tensor(alpha, dtype=x.dtype, device=x.device) - 1
    spread = torch.as_tensor(float(x.shape[-1]), dtype=x.dtype, device=x.device).log()
    low = torch.zeros_like(x[:, :1])
    high = low + torch.where(e == 0, spread, -(-e * spread).expm1() / _nonzero(e))
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        more = weigh(x - middle, alpha).sum(-1, keepdim=True) >= 1
        low, high = torch.where(more, middle, low), torch.where(more, high, middle)
    return low


def _slope(p: Tensor, alpha: float | Tensor) -> Tensor:
    """Return `p ** (2 - alpha)` on the support and 0 off it."""
    if isinstance(alpha, float | int):
        if alpha == 2:
            return torch.where(p > 0, 1.0, p)  # keeps NaN
        if alpha == 1.5:
            return torch.where(p > 0, p, 1.0).sqrt() * (p > 0) + 0 * p
    inside = ~(p <= 0)
    return torch.where(inside, torch.where(inside, p, 1.0) ** (2 - alpha), 0.0)


def _mean(u: Tensor, grad: Tensor) -> Tensor:
    total = u.sum(-1, keepdim=True)
    return (u * grad).sum(-1, keepdim=True) / torch.where(total == 0, 1.0, total)


def _nonzero(e: Tensor) -> Tensor:
    return torch.where(e == 0, 1.0, e)


def _broadcast(
    p: Tensor, grad: Tensor, alpha: float | Tensor
) -> tuple[Tensor, Tensor, float | Tensor]:
    dtype = wide(p.dtype)
    each = alpha[:, None].to(dtype) if isinstance(alpha, Tensor) else alpha
    return p.to(dtype), grad.to(dtype), each
