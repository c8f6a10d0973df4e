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
    from .kernels.combine import combine
    from .lut import LutError, LutStore, open_lut
    from .modeling import DenseForCausalLM, MoeForCausalLM, MoleForCausalLM, register

_HOME = {
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
    "open_lut": "lut",
    "register": "modeling",
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
    "open_lut",
    "register",
    "verify",
]
