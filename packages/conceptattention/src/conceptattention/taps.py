"""Taps: hooks on an unmodified transformer that hear what its layers compute and touch nothing."""

from __future__ import annotations

import inspect
import logging
import weakref
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn
from torch.compiler import disable

from .adapters import Adapter, Block, Call
from .adapters.linear import tap

_logger = logging.getLogger(__name__)
_logger.addHandler(logging.NullHandler())
Asked = Callable[[Block], dict[str, Any]]
_attached: weakref.WeakSet[nn.Module] = weakref.WeakSet()


@runtime_checkable
class Listener(Protocol):
    """What the taps report to, in the order of a forward pass."""

    @property
    def listening(self) -> bool:
        """Whether this forward pass is to be recorded, and the listener itself computes nothing."""

    def begin(self, call: Call) -> None:
        """Hear that a forward pass begins."""

    def start(self, inputs: Tensor, text: Tensor) -> None:
        """Hear what went into and came out of the projection of the prompt."""

    def layer(
        self, block: Block, taps: Mapping[str, Tensor] | None, arguments: Mapping[str, Any]
    ) -> None:
        """Hear one layer: its taps, None where one stayed silent, and its attention's arguments."""

    def end(self) -> None:
        """Hear that the forward pass ended, by itself or by an exception."""


class Taps:
    """The hooks on one transformer.

    Args:
        model: The transformer.
        adapter: Of its family.
        blocks: The layers to hear.
        further: What else the adapter is asked for in some layers, by number.
        listener: What is told.
    """

    def __init__(
        self,
        model: nn.Module,
        adapter: Adapter,
        blocks: Sequence[Block],
        further: Mapping[int, Collection[Asked]],
        listener: Listener,
    ) -> None:
        self.model, self.adapter, self.blocks = model, adapter, blocks
        self.further, self.listener = further, listener
        self._signature = inspect.signature(type(model).forward)
        self._on_model: list[Any] = []
        self._on_modules: list[Any] = []
        self._tapped: list[tuple[nn.Module, ...]] = []
        self._expected: dict[int, int] = {}  # taps of a layer
        self._heard: dict[int, dict[str, Tensor]] = defaultdict(dict)

    def check(self) -> None:
        """Check that hooks can be attached and will be heard.

        Raises:
            RuntimeError: The model is compiled, parallelised or observed already.
        """
        assert_ready(self.model)
        if self.model in _attached:
            raise RuntimeError(
                "`pipe` is observed by another ConceptAttention; leave that context first."
            )

    def attach(self) -> None:
        """Add the hooks, all or none.

        Raises:
            RuntimeError: As in `check`.
        """
        self.check()
        _attached.add(self.model)
        try:
            self._on_model = [
                self.model.register_forward_pre_hook(self._before_model, with_kwargs=True),
                self.model.register_forward_hook(self._after_model, always_call=True),
            ]
            self._tap_modules()
        except BaseException:
            self.detach()
            raise

    def detach(self) -> None:
        """Remove every hook."""
        for handle in (*self._on_model, *self._on_modules):
            handle.remove()
        self._on_model, self._on_modules, self._tapped = [], [], []
        self._heard.clear()
        _attached.discard(self.model)

    def _tap_modules(self) -> None:
        """Add the hooks on the model's parts in place of those that are there.

        They stay out of compiled graphs: traced, each layer and step would compile anew.
        """
        for handle in self._on_modules:
            handle.remove()
        self._on_modules = [
            self.adapter.seed(self.model).register_forward_hook(disable(self._on_seed))
        ]
        for block in self.blocks:
            wanted = self._wanted(block)
            self._expected[block.index] = len(wanted)
            for name, (module, side) in wanted.items():
                self._on_modules.append(self._tap(block.index, name, module, side))
            self._on_modules.append(
                block.attention.register_forward_hook(
                    disable(self._on_attention(block)), with_kwargs=True
                )
            )
        self._tapped = self._modules()

    def _modules(self) -> list[tuple[nn.Module, ...]]:
        """Return the modules that should be tapped, as the model is now."""
        found: list[tuple[nn.Module, ...]] = [(self.adapter.seed(self.model),)]
        for block in self.blocks:
            found.append(tuple(module for module, _ in self._wanted(block).values()))
        return found

    def _wanted(self, block: Block) -> dict[str, Any]:
        taps: dict[str, Any] = self.adapter.taps(block)
        for ask in self.further.get(block.index, ()):
            taps = taps | ask(block)
        return taps

    def _tap(self, index: int, name: str, module: nn.Module, side: str) -> Any:
        def record_output(module: nn.Module, args: Any, output: Tensor) -> None:
            if self.listener.listening:
                self._heard[index][name] = output

        def record_input(module: nn.Module, args: Any) -> None:
            if self.listener.listening:
                self._heard[index][name] = args[0]

        if side == "input":
            return module.register_forward_pre_hook(tap(disable(record_input)))
        return module.register_forward_hook(tap(disable(record_output)))

    def _before_model(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        self._heard.clear()
        assert_ready(model)
        if self._modules() != self._tapped:  # LoRA, fusing or a new text projection
            _logger.debug("the model's projections changed; attaching again")
            self._tap_modules()
        bound = self._signature.bind_partial(model, *args, **kwargs)
        config: Any = model.config
        self.listener.begin(Call(bound.arguments, config))

    def _on_seed(self, module: nn.Module, args: Any, output: Tensor) -> None:
        if self.listener.listening:
            self.listener.start(args[0], output)

    def _on_attention(self, block: Block) -> Any:
        def report(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if self.listener.listening:
                heard = self._heard.pop(block.index, {})
                complete = len(heard) == self._expected[block.index]
                self.listener.layer(block, heard if complete else None, kwargs)

        return report

    def _after_model(self, model: nn.Module, args: Any, output: Any) -> None:
        self._heard.clear()
        self.listener.end()


def assert_ready(model: nn.Module) -> None:
    """Check that hooks on the transformer will be heard.

    Raises:
        RuntimeError: It was compiled before it was observed, or is spread over devices.
    """
    # Inside the context compiling is fine: nothing to look for in every pass.
    if model not in _attached and _is_compiled(model):
        raise RuntimeError(
            "`pipe.transformer` was compiled before it was observed, so its hooks stay silent; "
            "enter the ConceptAttention context first and compile inside it."
        )
    if getattr(model, "_parallel_config", None) is not None:
        raise RuntimeError(
            "`pipe.transformer` runs with context or tensor parallelism, which is not supported; "
            "observe a transformer on one device."
        )


def _is_compiled(model: nn.Module) -> bool:
    return type(model).__name__ == "OptimizedModule" or any(
        module._compiled_call_impl is not None for module in model.modules()
    )
