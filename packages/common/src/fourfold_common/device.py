"""Choice of device and dtype, each with the reason for it."""

from __future__ import annotations

import torch

_DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
}


def pick_device(request: str = "auto") -> tuple[torch.device, str]:
    """Return the device to run on and the reason for the choice.

    Args:
        request: `"auto"`, or any name that `torch.device` accepts, such as `"cpu"` or `"cuda:1"`.

    Returns:
        The device, and one sentence that says why.

    Raises:
        ValueError: The name is unknown, or the device is not there.

    Source: own.
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
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"`request` is {request!r}, but this machine has {torch.cuda.device_count()} CUDA "
            "device(s); use 'auto' or 'cpu'."
        )
    return device, "requested"


def pick_dtype(
    request: str = "auto", device: torch.device | str = "cpu"
) -> tuple[torch.dtype, str]:
    """Return the floating-point type to compute in and the reason for the choice.

    Args:
        request: `"auto"`, `"float32"`, `"float16"`, `"bfloat16"` or `"float64"`.
        device: Where the computation will run.

    Returns:
        The dtype, and one sentence that says why.

    Raises:
        ValueError: `request` is none of the allowed names.

    Source: own.
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
    return _DTYPES[request], "requested"
