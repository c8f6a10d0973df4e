"""The steps of a decoding layer: which code computes them on a device."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from fourfold_common import triton_status

from ...linear import few_rows_linear
from . import reference

_logger = logging.getLogger(__name__)
_FEW = 16  # Tokens of a row that the kernels are made for.


class Steps(NamedTuple):
    """The steps of a decoding layer; see `reference`.

    Attributes:
        name: `"triton"` or `"reference"`.
        linear: Product of a few rows with a weight.
        add_rms_norm: Residual sum and norm.
        rope_store: Rotary positions, and the write to the cache.
        attend: Attention over the cache.
        swiglu: Gated activation.
    """

    name: str
    linear: Callable[[Tensor, Tensor], Tensor]
    add_rms_norm: Callable[..., tuple[Tensor, Tensor]]
    rope_store: Callable[..., Tensor]
    attend: Callable[..., Tensor]
    swiglu: Callable[[Tensor, Tensor], Tensor]


REFERENCE = Steps(
    "reference",
    few_rows_linear,
    reference.add_rms_norm,
    reference.rope_store,
    reference.attend,
    reference.swiglu,
)


def pick_steps(device: torch.device, dtype: torch.dtype, backend: str = "auto") -> Steps:
    """Return the steps for a device and type.

    Args:
        device: Where the model is.
        dtype: Type of its weights.
        backend: `"triton"`, `"reference"`, or `"auto"`: Triton for CUDA devices where it can run.

    Raises:
        ValueError: The backend is unknown, or cannot run here.
    """
    if backend == "reference":
        return REFERENCE
    if backend not in ("auto", "triton"):
        raise ValueError(f"`backend` must be 'auto', 'triton' or 'reference'; got {backend!r}.")
    status = triton_status()
    if not status.importable:
        reason = f"Triton is missing: {status.reason}"
    elif dtype not in (torch.float32, torch.float16, torch.bfloat16):
        reason = f"its kernels do not compute in {dtype}"
    elif device.type != "cuda" and not (status.interpreting and backend == "triton"):
        reason = f"its kernels need a CUDA device, not {device.type}"
    else:
        return _triton_steps()
    if backend == "triton":
        raise ValueError(f"`backend` 'triton' cannot run: {reason}.")
    _logger.debug("PyTorch computes the layers: %s", reason)
    return REFERENCE


@cache
def _triton_steps() -> Steps:
    from . import kernel

    def attend(q: Tensor, keys: Tensor, values: Tensor, places: Tensor, extent: int) -> Tensor:
        if q.shape[1] > _FEW:  # A stretch of a prompt, where PyTorch is fast enough.
            return reference.attend(q, keys, values, places, extent)
        return kernel.launch_attend(q, keys, values, places)

    return Steps(
        "triton",
        _fastest_linear,
        kernel.launch_add_rms_norm,
        kernel.launch_rope_store,
        attend,
        kernel.launch_swiglu,
    )


_routes: dict[tuple[Any, ...], Callable[[Tensor, Tensor], Tensor]] = {}


def _fastest_linear(x: Tensor, weight: Tensor) -> Tensor:
    """Return `x @ weight.T`, by the route that is fastest for this many rows and this weight.

    Measured when a shape is first seen, which must not be while a graph is captured.
    """
    if len(x) > _FEW or not x.is_cuda:
        return functional.linear(x, weight)
    key = (x.device, x.dtype, len(x), *weight.shape)
    if key not in _routes:
        if torch.cuda.is_current_stream_capturing():
            return functional.linear(x, weight)
        _routes[key] = _measure(x, weight)
    return _routes[key](x, weight)


def _library_linear(x: Tensor, weight: Tensor) -> Tensor:
    return functional.linear(x, weight)


def _measure(x: Tensor, weight: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    from . import kernel

    def route(config: tuple[int, int, int, int]) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda x, weight: kernel.launch_few_linear(x, weight, config)

    routes: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"library": _library_linear}
    for config in kernel.FEW_LINEAR_CONFIGS[len(x) if len(x) <= 2 else 16]:
        routes[str(config)] = route(config)
    # As in a model: a weight that fits into no cache beside the others comes from memory.
    size, cache = weight.nbytes, torch.cuda.get_device_properties(x.device).L2_cache_size
    copies = -(-2 * cache // size) if size > cache // 16 else 1
    weights = [weight, *(torch.empty_like(weight) for _ in range(copies - 1))]
    times, count = {}, max(8, len(weights))
    for name, product in routes.items():
        graph = torch.cuda.CUDAGraph()
        product(x, weight)
        torch.cuda.synchronize(x.device)
        with torch.cuda.graph(graph, stream=torch.cuda.Stream(x.device)):
            for turn in range(count):
                product(x, weights[turn % len(weights)])
        begun, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        graph.replay()
        begun.record()
        graph.replay()
        ended.record()
        ended.synchronize()
        times[name] = begun.elapsed_time(ended) / count
    best = min(times, key=lambda name: times[name])
    if times[best] > 0.95 * times["library"]:
        best = "library"
    _logger.debug(
        "%d rows of %d by %s: %s (%.1f us, library %.1f us)",
        len(x),
        x.shape[1],
        tuple(weight.shape),
        best,
        1e3 * times[best],
        1e3 * times["library"],
    )
    return routes[best]
