"""Triton kernels of the mix operation and its gradients.

    out[t]      = sum_j gates[t, j] values[inverse[t], j]
    dgates[t,j] = <grad[t], values[inverse[t], j]>
    dvalues[u,j] = sum over the tokens t of id u of gates[t, j] grad[t]        (segment sum)

Layout: row-major, unit stride in the last axis. Sums accumulate in float32. The segment sum walks
over the tokens of one id in sorted order, 16 at a time in one matrix product, so that it is
deterministic and even the most frequent id takes few steps; ids without tokens get zeros. With
ACCUMULATE it adds to a float32 buffer instead: the gradient of a whole step.
Source: own.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl


@triton.jit
@no_type_check  # a runtime type checker would hide the helpers from the interpreter
def _mix_kernel(
    gates_ptr,
    values_ptr,
    inverse_ptr,
    out_ptr,
    experts,
    dim,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program computes BLOCK_D channels of one token."""
    token = tl.program_id(0).to(tl.int64)
    row = tl.load(inverse_ptr + token).to(tl.int64)
    n = tl.arange(0, BLOCK_N)  # [BLOCK_N]
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)  # [BLOCK_D]
    mask = (n[:, None] < experts) & (d[None, :] < dim)  # [BLOCK_N, BLOCK_D]
    gates = tl.load(gates_ptr + token * experts + n, mask=n < experts, other=0.0).to(tl.float32)
    values = tl.load(
        values_ptr + (row * experts + n[:, None]) * dim + d[None, :], mask=mask, other=0.0
    )
    out = tl.sum(gates[:, None] * values.to(tl.float32), axis=0)  # [BLOCK_D]
    tl.store(out_ptr + token * dim + d, out.to(out_ptr.dtype.element_ty), mask=d < dim)


@triton.jit
@no_type_check
def _gates_grad_kernel(
    grad_ptr,
    values_ptr,
    inverse_ptr,
    out_ptr,
    experts,
    dim,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program computes the gradients of one token's gates."""
    token = tl.program_id(0).to(tl.int64)
    row = tl.load(inverse_ptr + token).to(tl.int64)
    n = tl.arange(0, BLOCK_N)  # [BLOCK_N]
    total = tl.zeros([BLOCK_N], dtype=tl.float32)
    for start in range(0, dim, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)  # [BLOCK_D]
        mask = (n[:, None] < experts) & (d[None, :] < dim)  # [BLOCK_N, BLOCK_D]
        grad = tl.load(grad_ptr + token * dim + d, mask=d < dim, other=0.0).to(tl.float32)
        values = tl.load(
            values_ptr + (row * experts + n[:, None]) * dim + d[None, :], mask=mask, other=0.0
        )
        total += tl.sum(grad[None, :] * values.to(tl.float32), axis=1)
    tl.store(out_ptr + token * experts + n, total.to(out_ptr.dtype.element_ty), mask=n < experts)


@triton.jit
@no_type_check
def _segment_sum_kernel(
    gates_ptr,
    grad_ptr,
    order_ptr,
    starts_ptr,
    out_ptr,
    experts,
    dim,
    ACCUMULATE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program computes BLOCK_D channels of one id's sum."""
    segment = tl.program_id(0).to(tl.int64)
    start = tl.load(starts_ptr + segment)
    stop = tl.load(starts_ptr + segment + 1)
    if (not ACCUMULATE) | (start < stop):
        n = tl.arange(0, BLOCK_N)  # [BLOCK_N]
        d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)  # [BLOCK_D]
        total = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
        for first in range(start, stop, BLOCK_T):
            t = first + tl.arange(0, BLOCK_T)  # [BLOCK_T]
            tokens = tl.load(order_ptr + t, mask=t < stop, other=0).to(tl.int64)
            gates = tl.load(
                gates_ptr + tokens[None, :] * experts + n[:, None],
                mask=(t[None, :] < stop) & (n[:, None] < experts),
                other=0.0,
            )  # [BLOCK_N, BLOCK_T]
            grad = tl.load(
                grad_ptr + tokens[:, None] * dim + d[None, :],
                mask=(t[:, None] < stop) & (d[None, :] < dim),
                other=0.0,
            )  # [BLOCK_T, BLOCK_D]
            total = tl.dot(gates.to(grad.dtype), grad, total, input_precision="ieee")
        mask = (n[:, None] < experts) & (d[None, :] < dim)  # [BLOCK_N, BLOCK_D]
        cells = out_ptr + (segment * experts + n[:, None]) * dim + d[None, :]
        if ACCUMULATE:
            total += tl.load(cells, mask=mask, other=0.0)
        tl.store(cells, total.to(out_ptr.dtype.element_ty), mask=mask)


def _launch_mix(gates: torch.Tensor, values: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    """Return the gated sums; all tensors are contiguous."""
    experts, dim = values.shape[1:]
    out = torch.empty((len(inverse), dim), dtype=values.dtype, device=values.device)
    block = min(1024, triton.next_power_of_2(dim))
    _mix_kernel[(len(inverse), triton.cdiv(dim, block))](
        gates,
        values,
        inverse,
        out,
        experts,
        dim,
        BLOCK_N=triton.next_power_of_2(experts),
        BLOCK_D=block,
    )
    return out


def _launch_gates_grad(
    grad: torch.Tensor, values: torch.Tensor, inverse: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Return the gradients of the gates; all tensors are contiguous."""
    experts, dim = values.shape[1:]
    out = torch.empty((len(inverse), experts), dtype=dtype, device=values.device)
    _gates_grad_kernel[(len(inverse),)](
        grad,
        values,
        inverse,
        out,
        experts,
        dim,
        BLOCK_N=triton.next_power_of_2(experts),
        BLOCK_D=min(1024, triton.next_power_of_2(dim)),
    )
    return out


def _launch_segment_sum(
    gates: torch.Tensor,
    grad: torch.Tensor,
    order: torch.Tensor,
    starts: torch.Tensor,
    out: torch.Tensor,
    bank: torch.Tensor | None,
) -> None:
    """Write the sums into `out`, or add them to `bank`; all tensors are contiguous."""
    experts, dim = gates.shape[1], grad.shape[1]
    block = min(128, max(16, triton.next_power_of_2(dim)))
    _segment_sum_kernel[(len(starts) - 1, triton.cdiv(dim, block))](
        gates,
        grad,
        order,
        starts,
        out if bank is None else bank,
        experts,
        dim,
        ACCUMULATE=bank is not None,
        BLOCK_N=max(16, triton.next_power_of_2(experts)),
        BLOCK_T=16,
        BLOCK_D=block,
    )
