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
        linears: Their products with three weights.
        gated: Gated activation of their products with two weights.
        add_rms_norm: Residual sum and norm.
        rope_store: Rotary positions, and the write to the cache.
        attend: Attention over the cache.
    """

    name: str
    linear: Callable[[Tensor, Tensor], Tensor]
    linears: Callable[[Tensor, tuple[Tensor, ...]], list[Tensor]]
    gated: Callable[[Tensor, Tensor, Tensor], Tensor]
    add_rms_norm: Callable[..., tuple[Tensor, Tensor]]
    rope_store: Callable[..., Tensor]
    attend: Callable[..., Tensor]


REFERENCE = Steps(
    "reference",
    few_rows_linear,
    lambda x, weights: [few_rows_linear(x, weight) for weight in weights],
    lambda x, gate, up: reference.swiglu(few_rows_linear(x, gate), few_rows_linear(x, up)),
    reference.add_rms_norm,
    reference.rope_store,
    reference.attend,
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
    from . import kernel, products

    def attend(q: Tensor, keys: Tensor, values: Tensor, places: Tensor, extent: int) -> Tensor:
        if q.shape[1] > _FEW:  # A stretch of a prompt, where PyTorch is fast enough.
            return reference.attend(q, keys, values, places, extent)
        return kernel.launch_attend(q, keys, values, places)

    def fastest(what: str, usual: Route, launch: Callable[..., Any], most: int) -> Route:
        """Return what takes the fastest of the usual way and a kernel's first configurations."""

        def way(config: products.Config) -> Route:
            return lambda x, weights: launch(x, weights, config)

        def ways(rows: int) -> dict[str, Route]:
            configs = products.CONFIGS[products.padded(rows)][:most]
            return {str(config): way(config) for config in configs}

        return lambda x, weights: _fastest(what, usual, ways, x, weights)

    one = fastest(
        "product",
        lambda x, weights: functional.linear(x, weights[0]),
        lambda x, weights, config: products.launch_products(x, weights, config)[0],
        4,
    )
    several = fastest(
        "products",
        lambda x, weights: [one(x, (weight,)) for weight in weights],
        products.launch_products,
        2,
    )
    gated = fastest(
        "gated products",
        lambda x, weights: kernel.launch_swiglu(one(x, weights[:1]), one(x, weights[1:])),
        products.launch_gated,
        2,
    )
    return Steps(
        "triton",
        lambda x, weight: one(x, (weight,)),
        several,
        lambda x, gate, up: gated(x, (gate, up)),
        kernel.launch_add_rms_norm,
        kernel.launch_rope_store,
        attend,
    )


Route = Callable[[Tensor, tuple[Tensor, ...]], Any]
_routes: dict[tuple[Any, ...], Route] = {}


def _fastest(
    what: str,
    usual: Route,
    ways: Callable[[int], dict[str, Route]],
    x: Tensor,
    weights: tuple[Tensor, ...],
) -> Any:
    """Return what the fastest route makes of few rows.

    Measured when shapes are first seen, which must not be while a graph is captured.
    """
    if len(x) > _FEW or not x.is_cuda:
        return usual(x, weights)
    key = (what, x.device, x.dtype, len(x), *(weight.shape for weight in weights))
    if key not in _routes:
        if torch.cuda.is_current_stream_capturing():
            return usual(x, weights)
        usual(x, weights)  # What it is made of is measured first.
        _routes[key] = _measure(what, {"usual": usual, **ways(len(x))}, x, weights)
    return _routes[key](x, weights)


def _fault(route: Route, x: Tensor, weights: tuple[Tensor, ...], wanted: Any) -> str:
    """Return why a route cannot be taken; "" if its results are the usual ones but for rounding."""
    try:
        found = route(x, weights)
    except Exception as fault:  # Whatever a compiler may raise.
        return repr(fault)
    pairs = zip(found, wanted, strict=True) if isinstance(wanted, list) else [(found, wanted)]
    for mine, theirs in pairs:
        slack = 2.0**-4 if theirs.dtype.itemsize < 4 else 2.0**-8
        error = (mine.double() - theirs.double()).abs().amax()
        if bool(error > slack * theirs.double().abs().amax()):
            return f"they differ by {float(error):.2g}"
    return ""


def _measure(what: str, routes: dict[str, Route], x: Tensor, weights: tuple[Tensor, ...]) -> Route:
    """Return the fastest of several routes; the usual one unless another is clearly faster."""
    # As in a model: a weight that fits into no cache beside the others comes from memory.
    size = sum(weight.nbytes for weight in weights)
    cache = torch.cuda.get_device_properties(x.device).L2_cache_size
    copies = -(-2 * cache // size) if size > cache // 16 else 1
    sets = [weights]
    sets += [tuple(torch.empty_like(w) for w in weights) for _ in range(copies - 1)]
    times, count, wanted = {}, max(8, len(sets)), routes["usual"](x, weights)
    for name, route in routes.items():
        if name != "usual" and (reason := _fault(route, x, weights, wanted)):
            _logger.warning("%s by %s are left out: %s", what, name, reason)
            continue
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=torch.cuda.Stream(x.device)):
            for turn in range(count):
                route(x, sets[turn % len(sets)])
        begun, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        graph.replay()
        begun.record()
        graph.replay()
        ended.record()
        ended.synchronize()
        times[name] = begun.elapsed_time(ended) / count
    best = min(times, key=lambda name: times[name])
    if times[best] > 0.95 * times["usual"]:
        best = "usual"
    _logger.debug(
        "%s, %d rows by %s: %s (%.1f us, usually %.1f us)",
        what,
        len(x),
        [tuple(weight.shape) for weight in weights],
        best,
        1e3 * times[best],
        1e3 * times["usual"],
    )
    return routes[best]
