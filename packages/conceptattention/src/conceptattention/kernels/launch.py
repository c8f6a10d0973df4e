"""Launch a kernel again without asking Triton which of its variants fits.

Triton looks at every argument of every launch to find the variant for its types and alignments.
A concept's step in one layer has some eight launches that take a few microseconds each, so the
looking would take longer than they run. Here one tuple says all that a variant depends on.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

SHARED = 99 * 1024  # bytes of shared memory a block, which GPUs since Ampere have

# Compiled kernel and its constants, in the order of its parameters.
_variants: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}


def cdiv(whole: int, part: int) -> int:
    """Return a division rounded up; Triton's own takes microseconds."""
    return -(-whole // part)


def power_of_2(number: int) -> int:
    """Return the least power of 2 that is not below a number."""
    return 1 << (number - 1).bit_length()


def launch(
    kernel: Any, grid: tuple[int, int], *args: Tensor | int | float, **constants: Any
) -> None:
    """Run a kernel on the current stream of the device that its first argument lies on.

    Args:
        kernel: What `triton.jit` returns; its constants are its last parameters.
        grid: Number of programs along both axes.
        args: Tensors, integers and floats, in order; every value of an integer is a variant of its
            own, so counters go in as floats.
        constants: Constants and options of the launch, by name.
    """
    device = args[0].device  # type: ignore[union-attr]
    if device.type != "cuda":  # Triton's interpreter
        kernel[grid](*args, **constants)
        return
    if device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            launch(kernel, grid, *args, **constants)
        return
    kind = [
        arg if type(arg) is int else None if type(arg) is float
        else (arg.dtype, arg.data_ptr() % 16)  # type: ignore[union-attr]
        for arg in args
    ]  # fmt: skip
    key = (kernel.fn, device.index, *kind, *constants.values())
    variant = _variants.get(key)
    if variant is None:
        compiled = kernel[grid](*args, **constants)
        names = kernel.arg_names[len(args) :]
        _variants[key] = compiled, tuple(constants[name] for name in names)
    else:
        compiled, rest = variant
        compiled[(*grid, 1)](*args, *rest)
