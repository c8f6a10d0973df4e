"""alpha-entmax of rows, one program per row; the mathematics are those of `reference.py`.

    p_i = [1 + e (s_i - mu)]_+ ** (1 / e)        e = alpha - 1, mu such that sum(p) == 1

Newton's method on the norm raises mu from the maximum of the row and never passes the solution; for
alpha 1.5 the bounded steps of `attention/threshold.py` need a pass less. A row of up to `HELD`
numbers stays in registers: one read and one write of memory. Longer rows are read in every pass.
Backward: `dx = u (dp - sum(u dp) / sum(u))`, u = p ** (2 - alpha).

Layout: x, p [rows, n], contiguous; tau [rows] and the level are float32.
"""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl

from fourfold_common import triton_status

from ..attention.solver import improve

HELD = 16384
_CHUNK = 8192
_MAX_STEPS = 60


@triton.jit
@no_type_check
def _log1p(y):
    """Return log(1 + y), exact for small y too."""
    u = 1.0 + y
    return tl.where(u == 1.0, y, tl.log(u) * (y / tl.where(u == 1.0, 1.0, u - 1.0)))


@triton.jit
@no_type_check
def _weigh(x, e, KIND: tl.constexpr):
    """Return the weights of shifted scores and their slopes u = p ** (2 - alpha)."""
    if KIND == 15:
        root = tl.maximum(1.0 + 0.5 * x, 0.0, propagate_nan=tl.PropagateNan.ALL)
        return root * root, root
    elif KIND == 20:
        p = tl.maximum(1.0 + x, 0.0, propagate_nan=tl.PropagateNan.ALL)
        return p, tl.where(p == 0.0, 0.0, tl.where(p == p, 1.0, p))
    else:
        outside = e * x <= -1.0
        power = tl.where(
            e == 0.0, x, _log1p(tl.where(outside, 0.0, e * x)) / tl.where(e == 0.0, 1.0, e)
        )
        p = tl.where(outside, 0.0, tl.exp(power))
        return p, tl.where(outside, 0.0, tl.exp((1.0 - e) * power))


@triton.jit
@no_type_check
def _raise(level, total, slope, e):
    """Return the next level of Newton's method on the norm (sum p) ** e."""
    log = tl.log(total)
    y = e * log
    series = log * (1.0 - y / 2.0 * (1.0 - y / 3.0 * (1.0 - y / 4.0 * (1.0 - y / 5.0))))
    step = tl.where(tl.abs(y) < 0.1, series, (1.0 - tl.exp(-y)) / tl.where(e == 0.0, 1.0, e))
    return level + total / slope * step


@triton.jit
@no_type_check
def _add(a0, a1, a2, b0, b1, b2):
    return a0 + b0, a1 + b1, a2 + b2


@triton.jit
@no_type_check
def _sums(p, u, support, INTERPRETED: tl.constexpr):
    """Return three sums over a row; on a GPU its threads meet once for all of them."""
    if INTERPRETED:
        return tl.sum(p, 0), tl.sum(u, 0), tl.sum(support, 0)
    else:
        return tl.reduce((p, u, support), 0, _add)


@triton.jit
@no_type_check
def _raw(x_ptr, start, n, BLOCK: tl.constexpr):
    """Load scores, -inf beyond the row."""
    place = start + tl.arange(0, BLOCK)
    return tl.load(x_ptr + place, mask=place < n, other=float("-inf")).to(tl.float32)


@triton.jit
@no_type_check
def _load(x_ptr, start, n, top, BLOCK: tl.constexpr):
    """Load scores shifted by the maximum; beyond the row, and for -inf, a number far below."""
    return tl.maximum(_raw(x_ptr, start, n, BLOCK) - top, -1e30, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
@no_type_check
def _forward_kernel(
    x_ptr, alpha_ptr, p_ptr, tau_ptr, n, alpha, max_steps,
    KIND: tl.constexpr, SINGLE: tl.constexpr, BLOCK: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Write the weights and tau of one row.

    KIND: 15 and 20 for alpha 1.5 and 2, 0 for `alpha` itself, 1 where every row has its own.
    """
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * n
    p_ptr += row * n
    if KIND == 1:
        alpha = tl.load(alpha_ptr + row)
    e = alpha - 1.0

    x = _raw(x_ptr, 0, n, BLOCK)
    top = tl.max(x, 0)
    if not SINGLE:
        for start in range(BLOCK, n, BLOCK):
            top = tl.maximum(top, tl.max(_raw(x_ptr, start, n, BLOCK), 0))
    empty = top == float("-inf")
    shift = tl.where(empty, 0.0, top)
    x = tl.maximum(x - shift, -1e30, propagate_nan=tl.PropagateNan.ALL)

    level, total = 0.0, 0.0
    lower, upper = 0.0, 1.0  # of half the level, where alpha is 1.5
    steps, running = 0, 1
    while (steps < max_steps) & (running > 0):
        p, u = _weigh(x - level, e, KIND)
        total, slope, support = _sums(p, u, (u > 0.0).to(tl.float32), INTERPRETED)
        if not SINGLE:
            for start in range(BLOCK, n, BLOCK):
                p, u = _weigh(_load(x_ptr, start, n, shift, BLOCK) - level, e, KIND)
                more, steeper, wider = _sums(p, u, (u > 0.0).to(tl.float32), INTERPRETED)
                total, slope, support = total + more, slope + steeper, support + wider
        if KIND == 15:  # `_improve` works on half the scores
            t, lower, upper, done = improve(
                0.5 * level, total, slope, support, 2.0, lower, upper, 2e-7, 0.0, True
            )
            level = 2.0 * t
        else:
            raised = _raise(level, total, slope, e)
            done = (raised > level) == 0  # true for NaN
            done = done | (total <= 1.0000002)
            level = tl.where(done, level, raised)
        running = tl.where(done, 0, 1)
        steps += 1
    level += 0.0 * tl.where(empty, 0.0, total)  # a NaN spreads over its row
    for start in range(0, n, BLOCK):
        if not SINGLE:
            x = _load(x_ptr, start, n, shift, BLOCK)
        p = tl.where(empty, 0.0, _weigh(x - level, e, KIND)[0])
        place = start + tl.arange(0, BLOCK)
        tl.store(p_ptr + place, p.to(p_ptr.dtype.element_ty), mask=place < n)
    tl.store(tau_ptr + row, tl.where(empty, float("inf"), e * (top + level) - 1.0))


@triton.jit
@no_type_check
def _slope(p, alpha, KIND: tl.constexpr):
    """Return p ** (2 - alpha) on the support, 0 off it; NaN stays."""
    if KIND == 15:
        u = tl.sqrt(tl.where(p == 0.0, 1.0, p))
    elif KIND == 20:
        u = tl.where(p == p, 1.0, p)
    else:
        u = tl.exp((2.0 - alpha) * tl.log(tl.where(p == 0.0, 1.0, p)))
    return tl.where(p == 0.0, 0.0, u)


@triton.jit
@no_type_check
def _backward_kernel(
    p_ptr, grad_ptr, alpha_ptr, dx_ptr, n, alpha,
    KIND: tl.constexpr, SINGLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the gradient of the scores of one row."""
    row = tl.program_id(0).to(tl.int64)
    p_ptr += row * n
    grad_ptr += row * n
    dx_ptr += row * n
    if KIND == 1:
        alpha = tl.load(alpha_ptr + row)
    place = tl.arange(0, BLOCK)
    p = tl.load(p_ptr + place, mask=place < n, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + place, mask=place < n, other=0.0).to(tl.float32)
    u = _slope(p, alpha, KIND)
    total, weighted = tl.sum(u, 0), tl.sum(u * grad, 0)
    if not SINGLE:
        for start in range(BLOCK, n, BLOCK):
            place = start + tl.arange(0, BLOCK)
            p = tl.load(p_ptr + place, mask=place < n, other=0.0).to(tl.float32)
            grad = tl.load(grad_ptr + place, mask=place < n, other=0.0).to(tl.float32)
            u = _slope(p, alpha, KIND)
            total += tl.sum(u, 0)
            weighted += tl.sum(u * grad, 0)
    mean = weighted / tl.where(total == 0.0, 1.0, total)
    for start in range(0, n, BLOCK):
        place = start + tl.arange(0, BLOCK)
        if not SINGLE:
            p = tl.load(p_ptr + place, mask=place < n, other=0.0).to(tl.float32)
            grad = tl.load(grad_ptr + place, mask=place < n, other=0.0).to(tl.float32)
            u = _slope(p, alpha, KIND)
        dx = u * (grad - mean)
        tl.store(dx_ptr + place, dx.to(dx_ptr.dtype.element_ty), mask=place < n)


def launch_forward(
    rows: torch.Tensor, each: torch.Tensor | None, alpha: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the weights and tau of contiguous rows; `each` holds an alpha per row, or is None."""
    p = torch.empty_like(rows)
    tau = torch.empty(len(rows), dtype=torch.float32, device=rows.device)
    _forward_kernel[(len(rows),)](
        rows, tau if each is None else each, p, tau, rows.shape[1], alpha, _MAX_STEPS,
        INTERPRETED=triton_status().interpreting,
        **_options(rows.shape[1], each, alpha, forward=True),
    )  # fmt: skip
    return p, tau


def launch_backward(
    p: torch.Tensor, grad: torch.Tensor, each: torch.Tensor | None, alpha: float
) -> torch.Tensor:
    """Return the gradient of the scores."""
    dx = torch.empty_like(p)
    _backward_kernel[(len(p),)](
        p, grad, p if each is None else each, dx, p.shape[1], alpha,
        **_options(p.shape[1], each, alpha),
    )  # fmt: skip
    return dx


def _options(
    n: int, each: torch.Tensor | None, alpha: float, forward: bool = False
) -> dict[str, int | bool]:
    block = triton.next_power_of_2(max(n, 16)) if n <= HELD else _CHUNK
    kind = 1 if each is not None else {1.5: 15, 2.0: 20}.get(alpha, 0)
    # The forward pass meets over the row in every step: few warps wait least, as measured on an
    # H200 for alpha 1.5.
    share = 4096 if forward and kind == 15 and n <= HELD else 1024
    return {
        "KIND": kind,
        "SINGLE": n <= HELD,
        "BLOCK": block,
        "num_warps": min(16, max(1, block // share)),
    }
