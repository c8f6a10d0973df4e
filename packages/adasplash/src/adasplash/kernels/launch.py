"""Launch a kernel without asking again which of its variants fits.

Triton looks at every argument of every launch to find the variant for its types and alignments. An
attention has six kernels of some forty arguments, and the looking takes as long as they run on a
few thousand tokens. What their variants depend on is known beforehand: constants, and what the
caller names in `kind`.

The first call of an attention compiles eight of them; `compile_ahead` does that side by side.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from typing import Any

import triton

_logger = logging.getLogger(__name__)

# Kernel, kind and constants; the compiled kernel and the constants in the order of its parameters.
_variants: dict[tuple[Hashable, ...], tuple[Any, tuple[Any, ...]]] = {}
# What is compiled ahead while launches run nothing; None where they run.
_ahead: ContextVar[list[Any] | None] = ContextVar("ahead", default=None)


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
    ahead = _ahead.get()
    if ahead is not None:
        if not interpreted(kernel):
            ahead.append(kernel.warmup(*args, grid=(programs,), **constants))
        return
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


def compile_ahead(call: Callable[[], object]) -> None:
    """Compile and load what a call would launch, side by side; its launches run nothing.

    What cannot be compiled here is left to the launch, which says why.

    Args:
        call: It must not depend on what its launches would write.
    """
    mode = getattr(triton, "AsyncCompileMode", None)
    if mode is None:  # Triton before 3.6
        return
    made: list[Any] = []
    token = _ahead.set(made)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        try:
            with mode(threads, ignore_errors=True):
                call()
        except Exception:
            _logger.debug("not compiled ahead", exc_info=True)
        finally:
            _ahead.reset(token)
        for error in threads.map(_load, made):
            if error is not None:
                _logger.debug("not loaded ahead: %s", error)


def _load(kernel: Any) -> Exception | None:
    """Load a kernel onto the device, and compile what launches it."""
    try:
        getattr(kernel.result() if hasattr(kernel, "result") else kernel, "run")  # noqa: B009
    except Exception as error:
        return error
    return None
