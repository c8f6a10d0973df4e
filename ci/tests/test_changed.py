import json
import subprocess
import sys

import changed
import pytest

ALL = list(changed.PACKAGES)


@pytest.mark.parametrize(
    ("paths", "packages", "docs"),
    [
        ([], [], False),
        (["packages/mole/src/mole/config.py"], ["mole"], False),
        (["packages/mole/README.md", "packages/hetero-sd/x"], ["hetero-sd", "mole"], False),
        (["docs/mole/index.md"], [], True),
        (["packages/common/src/fourfold_common/device.py"], ALL, True),
        (["ci/build.sh"], ALL, True),
        (["Makefile"], ALL, True),
        (["packages/unknown/x.py"], ALL, True),
        ([".github/workflows/ci.yml"], ALL, True),
    ],
)
def test_plan(paths: list[str], packages: list[str], docs: bool) -> None:
    assert changed.plan(paths) == {"packages": packages, "docs": docs}


def test_an_unknown_base_runs_everything() -> None:
    done = subprocess.run(
        [sys.executable, changed.__file__, "no-such-commit"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout) == {"packages": ALL, "docs": True}


def test_the_base_is_required() -> None:
    done = subprocess.run(
        [sys.executable, changed.__file__], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr == "usage: changed.py BASE\n"
