"""Kernels are interpreted where there is no GPU; the variable must be set before any import."""

import os
from collections.abc import Iterator

import jaxtyping
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch.set_num_threads(1)


@pytest.fixture
def device() -> torch.device:
    """Where the kernels run: a GPU, or the interpreter on the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill what `torch.empty` gives with NaN, so that reading unwritten memory shows."""
    real = torch.empty

    def empty(*args: object, **kwargs: object) -> torch.Tensor:
        x = real(*args, **kwargs)
        if x.is_floating_point() and not x.is_meta:
            x.data.fill_(torch.nan)
        return x

    monkeypatch.setattr(torch, "empty", empty)


@pytest.fixture
def own_checks() -> Iterator[None]:
    """Leave the checking of arguments to the package: the type checker would refuse them first."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
