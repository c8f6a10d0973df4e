import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jaxtyping
import pytest

from conceptattention.testing import tiny_flux


@pytest.fixture(scope="session")
def flux():
    return tiny_flux()


@pytest.fixture(scope="session")
def tiny():
    return tiny_flux


@pytest.fixture(scope="session")
def flux_dev():
    return tiny_flux(guidance=True)


@pytest.fixture(scope="session")
def demo_pipe():
    """The demo pipeline with fewer layers and random weights."""
    from conceptattention.demo.model import build_pipeline

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build_pipeline(
            {"num_layers": 2, "num_single_layers": 1, "num_attention_heads": 2}, {"num_layers": 1}
        )


@pytest.fixture
def unchecked():
    """Turn the type-checking hook off, to read the messages that users see."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
