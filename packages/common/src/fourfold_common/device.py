"""Choice of device and dtype, each with the reason for it."""

from __future__ import annotations

import torch

_DTYPES = ("float32", "float16", "bfloat16", "float64")


def pick_device(request: str = "auto") -> tuple[torch.device, str]:
    """Return the device to run on and one sentence that says why.

    Args:
        request: `"auto"`, or a name that `torch.device` accepts, such as `"cuda:1"`. Any other, or
            a device that is not there, raises a ValueError.
    """
    if request == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda"), f"found {torch.cuda.get_device_name()}"
        return torch.device("cpu"), "no CUDA device is available"
    try:
        device = torch.device(request)
    except RuntimeError:
        raise ValueError(
            f"`request` must be 'auto' or a torch device such as 'cuda:0'; got {request!r}."
        ) from None
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ValueError(f"`request` is {request!r}, but this machine has {count} CUDA device(s).")
    return device, "requested"


def pick_dtype(
    request: str = "auto", device: str | torch.device = "cpu"
) -> tuple[torch.dtype, str]:
    """Return the floating-point type to compute in and one sentence that says why.

    Args:
        request: `"auto"`, `"float32"`, `"float16"`, `"bfloat16"` or `"float64"`; else ValueError.
        device: Where the computation will run.
    """
    if request == "auto":
        if torch.device(device).type != "cuda":
            return torch.float32, "float32 is the fastest exact type on most CPUs"
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16, "this GPU computes bfloat16 natively"
        return torch.float16, "this GPU has no native bfloat16"
    if request not in _DTYPES:
        allowed = ", ".join(repr(name) for name in ("auto", *_DTYPES))
        raise ValueError(f"`request` must be one of {allowed}; got {request!r}.")
    return getattr(torch, request), "requested"
