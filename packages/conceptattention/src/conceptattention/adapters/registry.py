"""The registry of model families."""

from __future__ import annotations

from torch import nn

from .base import Adapter
from .chroma import ChromaAdapter
from .cogvideox import CogVideoXAdapter
from .cogview4 import CogView4Adapter
from .flux import FluxAdapter
from .flux2 import Flux2Adapter
from .flux_like import BriaAdapter, LongCatAdapter, OvisAdapter
from .hunyuan import HunyuanImageAdapter, HunyuanVideoAdapter
from .joint import JointAdapter
from .qwen import QwenImageAdapter
from .sd3 import SD3Adapter
from .zimage import ZImageAdapter

_ADAPTERS: list[Adapter | type[Adapter]] = []
_CROSS_ATTENTION = (
    "Allegro", "Cosmos", "HunyuanDiT", "LTX", "Latte", "PixArt", "Sana", "SkyReels", "UNet", "Wan"
)  # fmt: skip


def register_adapter(adapter: Adapter | type[Adapter]) -> None:
    """Make a model family known; the newest registration is asked first.

    Args:
        adapter: A subclass of `Adapter` or an instance of one.

    Raises:
        TypeError: It is neither, or does not define all that an adapter has to.
    """
    kind = adapter if isinstance(adapter, type) else type(adapter)
    if not issubclass(kind, Adapter):
        raise TypeError(f"`adapter` must be a subclass or an instance of Adapter; got {adapter!r}.")
    names = ("family", "model_class") if issubclass(kind, JointAdapter) else ("family",)
    missing = [name for name in names if not hasattr(kind, name)]
    missing += sorted(getattr(kind, "__abstractmethods__", ()))
    if missing:
        raise TypeError(f"`adapter` {kind.__name__} must define {', '.join(missing)}.")
    _ADAPTERS.insert(0, adapter)


def known_adapters() -> list[Adapter]:
    """Return every adapter, in the order in which they are asked."""
    return [
        *(adapter() if isinstance(adapter, type) else adapter for adapter in _ADAPTERS),
        FluxAdapter(), Flux2Adapter(), SD3Adapter(), CogVideoXAdapter(),
        QwenImageAdapter(), ChromaAdapter(), HunyuanVideoAdapter(), HunyuanImageAdapter(),
        LongCatAdapter(), OvisAdapter(), BriaAdapter(), CogView4Adapter(), ZImageAdapter(),
    ]  # fmt: skip


def adapter_for(model: object) -> Adapter:
    """Return the adapter of a transformer.

    Raises:
        ValueError: No registered family matches, or text only enters by cross-attention.
    """
    known = known_adapters()
    for adapter in known:
        if isinstance(model, nn.Module) and adapter.matches(model):
            return adapter
    if model is None:
        raise ValueError("`pipe` must be a diffusers pipeline with a transformer; it has none.")
    name = type(model).__name__
    if name.startswith(_CROSS_ATTENTION):
        raise ValueError(
            f"`pipe` has a denoiser of class {name}, in which text enters by cross-attention and "
            "has no residual stream; ConceptAttention needs joint attention of text and image."
        )
    families = ", ".join(dict.fromkeys(adapter.family for adapter in known))
    raise ValueError(
        f"`pipe` has a transformer of class {name}, which no adapter knows; "
        f"known families: {families}. Add one with `register_adapter`."
    )
