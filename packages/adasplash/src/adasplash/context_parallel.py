"""Attention over a sequence that is spread over the ranks of a process group.

Every rank holds two stripes of the sequence, the r-th of the first half and the r-th last of the
second, so that under a causal mask all ranks have the same number of scores. A rank gathers the
keys and values of all, and computes the rows of its own two stripes against the keys up to each
one's end, so that thresholds are as exact as in one process. In the backward the gradients of keys
and values are summed over ranks and scattered.

This moves `2 heads_kv` rows a token once. All-reducing the sums of rows whose keys are spread would
move `heads` rows of queries and of float32 outputs, and wait for the network in every pass of the
solver. With the kernels, gathered keys and values live only while a layer runs: the backward
gathers them anew.

    mesh = init_device_mesh("cuda", (world_size,))
    q, k, v = (shard(x, mesh) for x in (q, k, v))      # or load only the rank's `positions`
    output = unshard(attention(q, k, v, mesh), mesh)
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh

from .kernels.attention import adasplash

Group = dist.ProcessGroup | DeviceMesh | None


def positions(length: int, group: Group = None, device: Any = None) -> Int[Tensor, " part"]:
    """Return the places in the sequence of the tokens that this rank holds, in its order.

    Args:
        length: Tokens of the whole sequence, a multiple of twice the number of ranks.
        group: The ranks: a process group, a device mesh of one dimension, or None for all.
        device: Where to put the result.

    Raises:
        ValueError: The length cannot be spread evenly.
    """
    stripe, (first, second) = _stripes(length, _resolve(group))
    inside = torch.arange(stripe, device=device)
    return torch.cat([first * stripe + inside, second * stripe + inside])


def shard(x: Tensor, group: Group = None, dim: int = 2) -> Tensor:
    """Return the part of a tensor that this rank holds.

    Args:
        x: The whole, the same on all ranks.
        group: As for `positions`.
        dim: Axis of the sequence.

    Raises:
        ValueError: The sequence cannot be spread evenly.
    """
    return x.index_select(dim, positions(x.shape[dim], group, x.device))


def unshard(x: Tensor, group: Group = None, dim: int = 2) -> Tensor:
    """Return the whole of a tensor of which every rank holds a part; differentiable.

    Args:
        x: This rank's part, as `shard` gives it.
        group: As for `positions`.
        dim: Axis of the sequence.
    """
    whole: Tensor = _Unshard.apply(x, _resolve(group), dim)
    return whole


def attention(
    q: Float[Tensor, "batch heads part dim_head"],
    k: Float[Tensor, "batch heads_kv part dim_head"],
    v: Float[Tensor, "batch heads_kv part dim_value"],
    group: Group = None,
    alpha: float | Tensor = 1.5,
    is_causal: bool = True,
    *,
    scale: float | None = None,
    key_padding_mask: Bool[Tensor, "batch part"] | None = None,
    backend: Literal["auto", "triton", "reference"] = "auto",
) -> Float[Tensor, "batch heads part dim_value"]:
    """Return this rank's rows of `adasplash(q, k, v, ...)` over the whole sequence.

    The gradient of a tensor `alpha` is that of this rank's rows: sum it over ranks, as data
    parallelism does with every parameter's.

    Args:
        q: This rank's part of the queries, as `shard` gives it.
        k: Its part of the keys.
        v: Its part of the values.
        group: As for `positions`.
        alpha: As for `adasplash`.
        is_causal: Whether a row sees no later keys.
        scale: As for `adasplash`.
        key_padding_mask: This rank's part of it, True for keys to attend to.
        backend: As for `adasplash`.

    Raises:
        TypeError: As for `adasplash`.
        ValueError: As for `adasplash`, or the parts differ in length or cannot be halved.
    """
    ranks = _resolve(group)
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise ValueError(f"`{name}` must have 4 dimensions; got shape {tuple(x.shape)}.")
        if x.shape[2] != q.shape[2]:
            raise ValueError(
                f"`{name}` must hold {q.shape[2]} tokens of the sequence as `q` does; "
                f"got {x.shape[2]}."
            )
    stripe, mine = _stripes(q.shape[2] * ranks.size(), ranks)
    keys, values = _Gathered.apply(k, v, ranks)
    if key_padding_mask is not None:
        key_padding_mask = _gather(key_padding_mask, ranks, 1)
    anew = _GatherAnew((k, v), (keys, values), ranks)
    outputs = []
    for half, place in enumerate(mine):
        end = (place + 1) * stripe if is_causal else keys.shape[2]
        with torch.autograd.graph.saved_tensors_hooks(anew.pack, anew.unpack):
            output = adasplash(
                q[:, :, half * stripe : (half + 1) * stripe],
                keys[:, :, :end],
                values[:, :, :end],
                alpha,
                is_causal,
                scale=scale,
                key_padding_mask=None if key_padding_mask is None else key_padding_mask[:, :end],
                backend=backend,
            )
        outputs.append(output)
    return torch.cat(outputs, 2)


def _resolve(group: Group) -> dist.ProcessGroup:
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise ValueError(
                f"`group` must be a device mesh of one dimension; got {group.ndim}. Name one: "
                "`mesh['context']`."
            )
        return group.get_group()
    if group is None:
        found = dist.group.WORLD
        if found is None:
            raise ValueError(
                "`group` None stands for all ranks, but `torch.distributed` has not been "
                "initialised; call `init_process_group` first."
            )
        return found
    return group


def _stripes(length: int, group: dist.ProcessGroup) -> tuple[int, tuple[int, int]]:
    """Return the tokens of a stripe, and the places of the two of this rank."""
    count = 2 * group.size()
    if length % count:
        raise ValueError(
            f"the sequence must have a multiple of {count} tokens, two stripes for each of "
            f"{group.size()} ranks; got {length}. Pad it and hide the rest by `key_padding_mask`."
        )
    return length // count, (group.rank(), count - 1 - group.rank())


def _gather(x: Tensor, group: dist.ProcessGroup, dim: int) -> Tensor:
    """Return the whole of which every rank holds a part, in the order of the sequence."""
    part = x.contiguous()
    parts = [torch.empty_like(part) for _ in range(group.size())]
    dist.all_gather(parts, part, group=group)
    halves = [p.chunk(2, dim) for p in parts]
    return torch.cat([h[0] for h in halves] + [h[1] for h in reversed(halves)], dim)


def _scatter_sum(x: Tensor, group: dist.ProcessGroup, dim: int) -> Tensor:
    """Return this rank's part of the sum over ranks, added up in float32 or wider."""
    stripes = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2 * group.size(), dim)
    pairs = zip(stripes[: group.size()], reversed(stripes[group.size() :]), strict=True)
    parts = [torch.cat(pair, dim) for pair in pairs]
    total = torch.empty_like(parts[0])
    dist.reduce_scatter(total, parts, group=group)
    return total.to(x.dtype)


class _Gathered(torch.autograd.Function):
    """Keys and values of all ranks; their gradients go back to the ranks they came from."""

    @staticmethod
    def forward(ctx: Any, k: Tensor, v: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
        ctx.group = group
        return _gather(k, group, 2), _gather(v, group, 2)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dk: Tensor, dv: Tensor) -> tuple[Tensor, Tensor, None]:
        return _scatter_sum(dk, ctx.group, 2), _scatter_sum(dv, ctx.group, 2), None


class _GatherAnew:
    """Hooks that save a rank's own keys and values in place of those it has gathered.

    The backward visits the stripes in the same order on all ranks, so their gathers meet.
    """

    def __init__(
        self, own: tuple[Tensor, Tensor], whole: tuple[Tensor, Tensor], group: dist.ProcessGroup
    ) -> None:
        self._own = tuple(x.detach() for x in own)
        self._versions = tuple(x._version for x in self._own)
        self._places = {x.untyped_storage().data_ptr(): i for i, x in enumerate(whole)}
        self._group = group
        self._packed = [0, 0]
        self._whole: list[tuple[Tensor, int] | None] = [None, None]

    def pack(self, x: Tensor) -> Any:
        which = self._places.get(x.untyped_storage().data_ptr())
        if which is None or x.ndim != 4:
            return x
        self._packed[which] += 1
        return which, x.shape[2]

    def unpack(self, saved: Any) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        which, end = saved
        if self._own[which]._version != self._versions[which]:
            raise RuntimeError("keys or values have been changed in place before the backward.")
        found = self._whole[which]
        whole, uses = (_gather(self._own[which], self._group, 2), 0) if found is None else found
        # Once every stripe has had it, it is let go.
        self._whole[which] = None if uses + 1 == self._packed[which] else (whole, uses + 1)
        return whole[:, :, :end]


class _Unshard(torch.autograd.Function):
    """The whole; every rank is given the same gradient of it, and takes its own part."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup, dim: int) -> Tensor:
        _stripes(x.shape[dim] * group.size(), group)
        ctx.group, ctx.dim = group, dim
        return _gather(x, group, dim)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return shard(grad, ctx.group, ctx.dim), None, None
