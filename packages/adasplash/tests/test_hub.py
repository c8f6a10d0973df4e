"""The package as a kernel of the Hugging Face Hub loads alone, under names of its own."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from adasplash import adasplash, entmax

FOLDER = Path(__file__).parents[1] / "examples"


def _load(name, path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def script():
    yield _load("hub_build", FOLDER / "hub_kernel.py")
    del sys.modules["hub_build"]


def test_a_kernel_gives_what_the_package_gives(script, tmp_path, device):
    script.main([str(tmp_path), "--version", "3"])
    variant = tmp_path / "build" / "torch-cuda"
    metadata = json.loads((variant / "metadata.json").read_text())
    assert (metadata["name"], metadata["version"]) == ("adasplash", 3)
    assert metadata["backend"] == {"type": "cuda"}
    kernel = _load(metadata["id"], variant / "__init__.py")
    q, k, v = torch.randn(3, 1, 2, 20, 16, device=device).unbind(0)
    for backend in ("reference", "triton"):
        assert torch.equal(kernel.adasplash(q, k, v, backend=backend),
                           adasplash(q, k, v, backend=backend))  # fmt: skip
    assert torch.equal(kernel.entmax(q, 1.3), entmax(q, 1.3))
    assert Path(sys.modules[type(kernel.AlphaParam(2)).__module__].__file__).is_relative_to(variant)
    operators = getattr(torch.ops, metadata["id"])
    assert operators.attention_forward is not torch.ops.adasplash.attention_forward
    for name in [name for name in sys.modules if name.startswith(metadata["id"])]:
        del sys.modules[name]


def test_foreign_imports_are_seen(script):
    assert script.foreign("import numpy as np\nfrom .x import y\nimport torch.nn, os") == {"numpy"}
    text = script.relative("from jaxtyping import Float\n    from fourfold_common import x\n", 2)
    assert text == "from ..._shapes import Float\n    from ..._triton import x\n"


def test_the_library_loads_it(script, tmp_path):
    kernels = pytest.importorskip("kernels")
    script.build(tmp_path)
    kernel = kernels.get_local_kernel(tmp_path)
    assert kernel.sparsemax(torch.tensor([2.0, 0.0])).tolist() == [1.0, 0.0]
