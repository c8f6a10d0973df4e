"""The linear layers of a concept's step, by the model's modules or by the kernel for few rows.

An adapter says what follows on what: `project` with a gate and a residual, `feed_forward` of
normalised and modulated rows. Where the stream allows kernels and every module is plain, one launch
does all of it in one read of the weights; else the modules are called, so that LoRA, quantisation,
offloading and other people's hooks keep working.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.concept import HeadNorm
from ..kernels.linear import MAX_NORMED, MAX_ROWS, Activation, Norm, few_row_linear

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_LAYER_NORMS = ("LayerNorm", "FP32LayerNorm")
_HEAD_NORMS: dict[str, Literal["rms", "layer"]] = {"RMSNorm": "rms", "LayerNorm": "layer"}


@dataclass(frozen=True)
class Modulated:
    """Rows that are normalised and modulated where they are used.

    Args:
        x: (batch, tokens, dim).
        norm: Applied first.
        scale: Then multiplied with 1 + scale, (batch, 1, dim).
        shift: And added, (batch, 1, dim).
    """

    x: Tensor
    norm: nn.Module
    scale: Tensor
    shift: Tensor

    @property
    def value(self) -> Tensor:
        """The rows, computed by torch."""
        norm: Any = self.norm
        if len(self.x) == 1 and _is_layer_norm(norm) and norm.weight is None:
            # Of one picture the modulation is the affine part of the norm: one launch.
            return F.layer_norm(
                self.x, self.x.shape[-1:], 1 + self.scale[0, 0], self.shift[0, 0], norm.eps
            )
        return torch.addcmul(self.shift, norm(self.x), 1 + self.scale)


@dataclass(frozen=True)
class Normed:
    """Queries or keys (batch, heads, tokens, dim_head), normalised where they are used."""

    x: Tensor
    norm: nn.Module | None

    @property
    def value(self) -> Tensor:
        """The queries or keys, computed by torch."""
        return self.x if self.norm is None else self.norm(self.x)  # type: ignore[no-any-return]

    def split(self) -> tuple[Tensor, HeadNorm | None]:
        """Return what the attention kernel takes: as much of the norm as it can do itself."""
        norm: Any = self.norm
        if norm is None:
            return self.x, None
        kind = _HEAD_NORMS.get(type(norm).__name__)
        weight = getattr(norm, "weight", None)
        if (
            kind is None
            or weight is None
            or weight.shape != self.x.shape[-1:]
            or weight.device != self.x.device
            or not untouched(norm)
        ):
            return self.value, None
        eps = torch.finfo(self.x.dtype).eps if norm.eps is None else norm.eps
        return self.x, HeadNorm(kind, weight, eps, getattr(norm, "bias", None))


class LinearLayers:
    """How an adapter calls linear layers on the concepts."""

    kernels: bool = False  # whether this pass may use them; set by the stream
    heard: Tensor | None = None  # the prompt's modulation in this layer, where concepts share it
    _activated: tuple[Tensor, Tensor] | None = None

    def project(
        self,
        module: nn.Module,
        x: Tensor | Modulated,
        *,
        gate: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        """Return a linear layer of x, times the gate, plus the residual.

        Args:
            module: The layer; of another class than `torch.nn.Linear` it is called as it is.
            x: (batch, tokens, dim), or rows that are not normalised yet.
            gate: (batch, 1, dim_out), with `residual`.
            residual: (batch, tokens, dim_out).
        """
        if self._plain(x, module):
            return _by_kernel(x, [module], gate=gate, residual=residual)[0]
        y = module(x.value if isinstance(x, Modulated) else x)
        return y if gate is None or residual is None else torch.addcmul(residual, gate, y)

    def project_each(
        self, modules: Sequence[nn.Module], x: Tensor | Modulated
    ) -> tuple[Tensor, ...]:
        """Return up to three linear layers of one x, as `project` does each."""
        if self._plain(x, *modules) and _alike(modules):
            return _by_kernel(x, modules).unbind(0)
        x = x.value if isinstance(x, Modulated) else x
        return tuple(module(x) for module in modules)

    def modulation(
        self, module: nn.Module, temb: Tensor, parts: int, first: int = 0, *, shared: bool = False
    ) -> list[Tensor]:
        """Return scales, shifts and gates, (batch, 1, dim) each, by silu and a linear layer.

        Args:
            module: The linear layer.
            temb: Conditioning of the concepts, (batch, dim).
            parts: How many it returns.
            first: The first one wanted.
            shared: Take what the layer returned for the prompt, where it was heard.
        """
        if shared and self.heard is not None:
            return list(self.heard[:, None].chunk(parts, dim=-1)[first:])
        if self._activated is None or self._activated[0] is not temb:
            self._activated = temb, F.silu(temb)[:, None]  # one for all layers of a pass
        active = self._activated[1]
        if self._plain(active, module):
            linear: Any = module
            weight, bias = linear.weight, linear.bias
            if first:
                start = len(weight) // parts * first
                weight, bias = weight[start:], None if bias is None else bias[start:]
            made = few_row_linear(active, [weight], None if bias is None else [bias])
            return list(made[0].chunk(parts - first, dim=-1))
        return list(module(active).chunk(parts, dim=-1)[first:])

    def feed_forward(self, module: nn.Module, x: Modulated, gate: Tensor) -> Tensor:
        """Return x.x + gate * module(x), of a feed-forward with two linear layers or any other."""
        ends = _ends(module) if self.kernels else None
        if ends is not None and self._plain(x, ends[0], ends[2]):
            up, act, down = ends
            late = act == "swiglu"  # its two halves meet where they are read
            inner = _by_kernel(x, [up], act_out="none" if late else act)[0]
            return _by_kernel(
                inner, [down], act_in=act if late else "none", gate=gate, residual=x.x
            )[0]
        return torch.addcmul(x.x, gate, module(x.value))

    def _plain(self, x: Tensor | Modulated, *modules: nn.Module) -> bool:
        """Return whether the kernel may stand for modules that all get x."""
        if not self.kernels:
            return False
        if isinstance(x, Modulated):
            norm: Any = x.norm
            if not (_is_layer_norm(norm) and untouched(norm)):
                return False
            if (norm.weight is None) != (norm.bias is None):
                return False
            x = x.x
            if x.shape[-1] > MAX_NORMED:
                return False
        if x.dtype not in _FLOATS or x.shape[0] * x.shape[1] > MAX_ROWS:
            return False
        return all(_is_plain(module, x) for module in modules)


def _is_plain(module: nn.Module, x: Tensor) -> bool:
    """Return whether a module is nothing but a linear layer with a dense weight like x."""
    if type(module) is not nn.Linear or not untouched(module):
        return False
    weight = module._parameters["weight"]  # without the detour of `nn.Module.__getattr__`
    return (
        type(weight) is nn.Parameter
        and weight.dtype == x.dtype
        and weight.device == x.device
        and weight.is_contiguous()
    )


def _alike(modules: Sequence[Any]) -> bool:
    """Return whether all linear layers have one shape, and all or none of them a bias."""
    first = modules[0]
    return all(
        module.out_features == first.out_features
        and (module._parameters["bias"] is None) == (first._parameters["bias"] is None)
        for module in modules
    )


def _by_kernel(
    x: Tensor | Modulated,
    modules: Sequence[Any],
    *,
    act_in: Activation = "none",
    act_out: Activation = "none",
    gate: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    norm = None
    if isinstance(x, Modulated):
        given: Any = x.norm
        norm = Norm(x.scale, x.shift, given.eps, given.weight, given.bias)
        x = x.x
    biases = [module._parameters["bias"] for module in modules]
    return few_row_linear(
        x, [module._parameters["weight"] for module in modules],
        None if biases[0] is None else biases,
        norm=norm, act_in=act_in, act_out=act_out,
        gate=gate, residual=residual,
    )  # fmt: skip


def _ends(module: Any) -> tuple[nn.Module, Activation, nn.Module] | None:
    """Return both linear layers of a plain feed-forward and the activation between them."""
    if not untouched(module):
        return None
    kind = type(module).__name__
    if kind == "Flux2FeedForward":
        return module.linear_in, "swiglu", module.linear_out
    if kind != "FeedForward" or module.training:
        return None
    first, _, last, *rest = module.net
    if not all(type(part) is nn.Dropout for part in rest):
        return None
    if type(first).__name__ != "GELU" or not untouched(first):
        return None
    return first.proj, "gelu_tanh" if first.approximate == "tanh" else "gelu", last


def untouched(module: nn.Module) -> bool:
    """Return whether calling a module runs its class's `forward` and nothing else but our taps."""
    return (
        "forward" not in module.__dict__
        and all(map(is_tap, module._forward_hooks.values()))
        and all(map(is_tap, module._forward_pre_hooks.values()))
    )


def tap(hook: Callable[..., Any]) -> Callable[..., Any]:
    """Mark a hook that only listens."""
    hook.__dict__["concept_tap"] = True
    return hook


def is_tap(hook: Callable[..., Any]) -> bool:
    """Return whether a hook is marked by `tap`."""
    return "concept_tap" in getattr(hook, "__dict__", ())


def _is_layer_norm(norm: nn.Module) -> bool:
    return type(norm).__name__ in _LAYER_NORMS and isinstance(norm, nn.LayerNorm)
