import getpass
import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fourfold_common import environment, environment_report


def test_report_names_what_runs_here_and_is_plain_data() -> None:
    report = environment_report()
    assert report["packages"]["torch"] == torch.__version__
    assert report["packages"]["fourfold-common"]
    assert report["python"] == platform.python_version()
    assert json.loads(json.dumps(report)) == report


def test_report_holds_neither_host_nor_user() -> None:
    values = json.dumps(environment_report()).lower()
    assert platform.node().lower() not in values or len(platform.node()) < 4
    assert f'"{getpass.getuser().lower()}"' not in values


def test_outside_a_repository_commit_and_dirty_are_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(str(tmp_path))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    report = environment_report()
    assert report["commit"] is None
    assert report["dirty"] is None


def test_a_changed_file_makes_the_checkout_dirty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(str(tmp_path))
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@example.org"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "first"], check=True)
    report = environment_report()
    assert len(report["commit"]) == 40
    assert report["dirty"] is False
    with open("new.txt", "w", encoding="utf-8") as file:
        file.write("x")
    assert environment_report()["dirty"] is True


def test_a_missing_command_gives_none() -> None:
    assert environment._first_line("no-such-command-anywhere") is None
    assert environment._first_line(sys.executable, "-c", "raise SystemExit(1)") is None
