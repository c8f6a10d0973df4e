"""Launch a kernel without asking again which of its variants fits.

Triton looks at every argument of every launch to find the variant for its types and alignments. An
attention has six kernels of some forty arguments, and the looking takes as long as they run on a
few thousand tokens. What their variants depend on is known beforehand: constants, and what the
caller names in `kind`.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import triton

# Kernel, kind and constants; the compiled kernel and the constants in the order of its parameters.
_variants: dict[tuple[Hashable, ...], tuple[Any, tuple[Any, ...]]] = {}


def interpreted(kernel: Any) -> bool:
    """Return whether a kernel runs in Triton's interpreter."""
    return not isinstance(kernel, triton.JITFunction)


def launch(
    kernel: Any, programs: int, kind: tuple[Hashable, ...], *args: Any, **constants: Any
) -> None:
    """Run `programs` programs of a kernel on the current device and stream.

    Args:
        kernel: What `triton.jit` returns; its constants are its last parameters.
        programs: How many.
        kind: All that Triton would compile anew for, beside the constants: the device, dtypes,
            integers that are specialised, whether pointers are aligned.
        args: The other arguments, in order.
        constants: Constants and options of the launch, by name.
    """
    if interpreted(kernel):
        kernel[(programs,)](*args, **constants)
        return
    key = (kernel.fn, kind, *constants.values())
    variant = _variants.get(key)
    if variant is None:
        compiled = kernel[(programs,)](*args, **constants)
        names = kernel.arg_names[len(args) :]
        _variants[key] = compiled, tuple(constants[name] for name in names)
    else:
        compiled, rest = variant
        compiled[(programs, 1, 1)](*args, *rest)
