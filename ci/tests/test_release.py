import datetime
import subprocess
import sys

import pytest
import release

CHANGELOG = """# Changelog

## Unreleased

### Added

- A thing.

## 0.1.0 - 2026-01-01

- First.
"""


def test_the_unreleased_entries_move_under_a_dated_heading() -> None:
    dated = release.date_changelog(CHANGELOG, "0.2.0", datetime.date(2026, 2, 3))
    assert "## Unreleased\n\n## 0.2.0 - 2026-02-03\n\n### Added\n\n- A thing.\n" in dated
    assert dated.endswith("## 0.1.0 - 2026-01-01\n\n- First.\n")


def test_an_empty_or_repeated_release_is_refused() -> None:
    today = datetime.date(2026, 2, 3)
    with pytest.raises(ValueError, match="already has a heading for 0"):
        release.date_changelog(CHANGELOG, "0.1.0", today)
    with pytest.raises(ValueError, match="nothing under Unreleased"):
        release.date_changelog("## Unreleased\n\n## 0.1.0 - 2026-01-01\n", "0.2.0", today)


@pytest.mark.parametrize(
    ("version", "than", "expected"),
    [
        ("0.2.0", "0.1.9", True),
        ("0.10.0", "0.9.0", True),
        ("0.1.0", "0.1.0", False),
        ("0.0.9", "0.1.0", False),
        ("1.0", "0.1.0", False),
        ("1.0.0rc1", "0.1.0", False),
    ],
)
def test_versions_must_rise(version: str, than: str, expected: bool) -> None:
    assert release.is_newer(version, than) is expected


def test_wrong_arguments_print_the_usage() -> None:
    done = subprocess.run(
        [sys.executable, release.__file__, "nothing", "1.0.0"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("usage: release.py {common|adasplash|")
