"""Eight small tools that the four packages share: devices, seeds, Triton, timing, results."""

from .__about__ import __version__
from .device import pick_device, pick_dtype
from .environment import environment_report
from .kernels import triton_status, tuning_configs
from .results import Results
from .seeding import seed_everything
from .timing import time_call

__all__ = [
    "Results",
    "__version__",
    "environment_report",
    "pick_device",
    "pick_dtype",
    "seed_everything",
    "time_call",
    "triton_status",
    "tuning_configs",
]
