import subprocess
import sys
from typing import Any

import pytest

from fourfold_common import triton_status, tuning_configs


def test_status_reports_the_installed_triton() -> None:
    triton = pytest.importorskip("triton")
    status = triton_status()
    assert status.importable
    assert status.version == triton.__version__
    assert status.reason == ""


@pytest.mark.parametrize(("value", "expected"), [("1", True), ("0", False), ("", False)])
def test_status_follows_the_interpreter_variable(
    monkeypatch: pytest.MonkeyPatch, value: str, expected: bool
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", value)
    assert triton_status().interpreting is expected


def test_status_says_why_triton_cannot_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    status = triton_status()
    assert not status.importable
    assert "triton" in status.reason


def test_all_configurations_are_tuned_over_normally(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delenv("FOURFOLD_FAST_TUNING", raising=False)
    assert tuning_configs((3, 1, 2)) == [3, 1, 2]


@pytest.mark.parametrize("variable", ["TRITON_INTERPRET", "FOURFOLD_FAST_TUNING"])
def test_only_the_first_configuration_where_tuning_is_no_use(
    monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv(variable, "1")
    assert tuning_configs((3, 1, 2)) == [3]


def test_no_configuration_is_refused() -> None:
    with pytest.raises(ValueError, match="`configs` must hold at least one"):
        tuning_configs([])


def test_importing_the_package_loads_no_heavy_library() -> None:
    code = (
        "import sys, fourfold_common;"
        "print([m for m in ('triton', 'transformers', 'diffusers', 'accelerate') "
        "if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_import_errors_other_than_missing_triton_are_not_hidden(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(name: str, *args: Any) -> Any:
        raise RuntimeError("broken installation")

    monkeypatch.setattr("fourfold_common.kernels.import_module", broken)
    with pytest.raises(RuntimeError, match="broken installation"):
        triton_status()
