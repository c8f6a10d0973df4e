"""Importing the package is cheap, and its names are where they should be."""

import importlib.util
import subprocess
import sys

import pytest

import mole


def test_import_loads_nothing_heavy():
    script = (
        "import sys, mole; "
        "print([n for n in ('torch', 'triton', 'transformers', 'matplotlib') if n in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_kernels_load_triton_only_when_used():
    script = (
        "import sys; from mole import combine; from mole.lut import open_lut; "
        "print([n for n in ('triton', 'transformers') if n in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_public_names_exist():
    assert set(mole.__all__) <= set(dir(mole))
    for name in mole.__all__:
        assert getattr(mole, name) is not None
    with pytest.raises(AttributeError, match="module 'mole' has no attribute 'nothing'"):
        _ = mole.nothing


@pytest.mark.parametrize("name", [n for n in mole.__all__ if not n.startswith("_")])
def test_no_module_hides_a_public_name(name):
    # Importing the module `mole.NAME` would put it in the place of what the package gives.
    assert importlib.util.find_spec(f"mole.{name}") is None
