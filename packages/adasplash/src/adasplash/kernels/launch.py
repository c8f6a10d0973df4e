"""Launch a kernel without asking again which of its variants fits.

Triton looks at every argument of every launch to find the variant for its types and alignments. An
attention has six kernels of some forty arguments, and the looking takes as long as they run on a
few thousand tokens. What their variants depend on is known beforehand: constants, and what the
caller names in `kind`.

What is not there yet is compiled at the first call, which waits for it. The kernels of one call are
compiled side by side: most of that is done outside of Python.
"""

from __future__ import annotations

import threading
from collections.abc import Hashable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import triton

# Kernel, kind and constants; the compiled kernel and the constants in the order of its parameters.
_variants: dict[tuple[Hashable, ...], tuple[Any, tuple[Any, ...]]] = {}


class _Waiting(threading.local):
    """Launches that wait for others to be known, so that all are compiled together."""

    launches: list[tuple[bool, tuple[Any, ...], dict[str, Any]]] | None = None


_waiting = _Waiting()


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
    if _waiting.launches is not None and (_waiting.launches or variant is None):
        _waiting.launches.append((variant is None, (kernel, programs, kind, *args), constants))
        return
    if variant is None:
        compiled = kernel[(programs,)](*args, **constants)
        names = kernel.arg_names[len(args) :]
        _variants[key] = compiled, tuple(constants[name] for name in names)
    else:
        compiled, rest = variant
        compiled[(programs, 1, 1)](*args, *rest)


class SideBySide:
    """Launch what is launched inside in order, at the end if some of it must be compiled first.

    What else is put on the stream inside may run before them: it can only prepare memory.
    """

    _outer = False

    def __enter__(self) -> None:
        """Let launches wait from the first that is not compiled yet on."""
        self._outer = _waiting.launches is not None or not hasattr(triton, "AsyncCompileMode")
        if not self._outer:
            _waiting.launches = []

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        """Compile and launch what waits."""
        if self._outer:
            return
        waiting, _waiting.launches = _waiting.launches, None
        if waiting and error is None:
            _launch_together(waiting)


def _launch_together(waiting: list[tuple[bool, tuple[Any, ...], dict[str, Any]]]) -> None:
    missing = [(arguments, constants) for new, arguments, constants in waiting if new]
    if len(missing) > 1:
        with ThreadPoolExecutor(len(missing)) as pool, triton.AsyncCompileMode(pool):
            for (kernel, programs, _kind, *args), constants in missing:
                kernel.warmup(*args, grid=(programs,), **constants)
    for _new, arguments, constants in waiting:
        launch(*arguments, **constants)
