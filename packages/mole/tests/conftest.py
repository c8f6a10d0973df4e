"""Fixtures of the package's tests; kernels are interpreted where there is no GPU."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before any kernel is imported
os.environ["HF_HUB_OFFLINE"] = "1"

import jaxtyping
import pytest
from transformers.utils import logging as transformers_logging

from mole import DenseConfig, MoeConfig, MoleConfig, MoleForCausalLM, convert
from mole.lut import FORMATS

transformers_logging.disable_progress_bar()

SMALL = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,  # large, so that every part of the model shows in the logits
}


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Models this small are slowed by a second thread, badly so on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def our_checks_only():
    """Let bad arguments through to the package's own checks: the suite's type checker is off."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def make_config():
    """Make a small configuration: `make_config("mole", num_lookup_experts=3)`."""
    kinds = {"dense": DenseConfig, "moe": MoeConfig, "mole": MoleConfig}

    def make(kind="mole", **changes):
        return kinds[kind](**(SMALL | changes))

    return make


@pytest.fixture
def make_mole(make_config):
    """Make a small lookup model in expert form, with norms that are not all ones."""

    def make(seed=0, **changes):
        torch.manual_seed(seed)
        model = MoleForCausalLM(make_config("mole", **changes)).eval()
        with torch.no_grad():
            for module in model.modules():
                if isinstance(module, torch.nn.RMSNorm):
                    module.weight.uniform_(0.5, 1.5)
        return model

    return make


@pytest.fixture
def tokens():
    return torch.randint(1, 60, (2, 11), generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=FORMATS)
def table(request, make_mole, tmp_path):
    """A converted model's table, in the folder of the model."""
    convert(
        make_mole(lookup_layers=[0, 2]), tmp_path / "model", request.param, chunk=7, progress=False
    )
    return tmp_path / "model" / "lut"


@pytest.fixture
def fp16(make_mole, tmp_path):
    """The same in fp16 alone."""
    convert(make_mole(), tmp_path / "model", chunk=7, progress=False)
    return tmp_path / "model" / "lut"
