import os
import subprocess
import sys
from pathlib import Path

import pytest
from pip._internal.models.index import PyPI

SCRIPT = Path(__file__).resolve().parents[1] / "publish.sh"


def _publish(package: str, url: str | None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHON": sys.executable}
    environment.pop("PUBLISH_URL", None)
    if url is not None:
        environment["PUBLISH_URL"] = url
    return subprocess.run(
        ["bash", str(SCRIPT), package], env=environment, capture_output=True, text=True, check=False
    )


def test_there_is_no_default_index() -> None:
    done = _publish("hetero-sd", None)
    assert done.returncode == 2
    assert "there is no default" in done.stderr


@pytest.mark.parametrize("package", ["adasplash", "mole"])
@pytest.mark.parametrize("prefix", ["", "upload.", "test."])
def test_names_of_others_never_go_to_the_public_index(package: str, prefix: str) -> None:
    done = _publish(package, f"https://{prefix}{PyPI.netloc}/legacy/")
    assert done.returncode == 2
    assert f"the name {package} belongs to another project" in done.stderr


def test_a_host_outside_the_allow_list_is_refused() -> None:
    done = _publish("hetero-sd", "https://packages.example.org/upload")
    assert done.returncode == 2
    assert "host 'packages.example.org' of PUBLISH_URL is not in" in done.stderr
