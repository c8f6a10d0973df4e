"""Mixture of Lookup Experts language models: train as feed-forward networks, deploy as a table.

Independent implementation of Jie et al. 2025 (arXiv 2503.15798). Names are loaded on first use, so
`import mole` imports neither torch nor transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .__about__ import __version__

if TYPE_CHECKING:
    from .config import DenseConfig, MoeConfig, MoleConfig
    from .conversion import convert, fingerprint, verify
    from .decode import Decoder
    from .kernels.combine import combine
    from .lut import LutError, LutStore, open_lut
    from .modeling import DenseForCausalLM, MoeForCausalLM, MoleForCausalLM, register
    from .upcycling import upcycle
    from .upstream import from_upstream, to_upstream

_HOME = {
    "Decoder": "decode",
    "DenseConfig": "config",
    "DenseForCausalLM": "modeling",
    "LutError": "lut",
    "LutStore": "lut",
    "MoeConfig": "config",
    "MoeForCausalLM": "modeling",
    "MoleConfig": "config",
    "MoleForCausalLM": "modeling",
    "combine": "kernels.combine",
    "convert": "conversion",
    "fingerprint": "conversion",
    "from_upstream": "upstream",
    "open_lut": "lut",
    "register": "modeling",
    "to_upstream": "upstream",
    "upcycle": "upcycling",
    "verify": "conversion",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name not in _HOME:
        raise AttributeError(f"module 'mole' has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Return the public names, loaded or not."""
    return sorted(__all__)


__all__ = [
    "Decoder",
    "DenseConfig",
    "DenseForCausalLM",
    "LutError",
    "LutStore",
    "MoeConfig",
    "MoeForCausalLM",
    "MoleConfig",
    "MoleForCausalLM",
    "__version__",
    "combine",
    "convert",
    "fingerprint",
    "from_upstream",
    "open_lut",
    "register",
    "to_upstream",
    "upcycle",
    "verify",
]
