"""Release one package: version, changelog date, commit and tag; the push is left to a person.

Usage: python ci/release.py PACKAGE VERSION
"""

from __future__ import annotations

import datetime
import re
import subprocess
import sys
from pathlib import Path

import check_meta

ROOT = check_meta.ROOT


def date_changelog(changelog: str, version: str, today: datetime.date) -> str:
    """Return the changelog with its Unreleased entries under a dated heading.

    Raises:
        ValueError: There is nothing to release, or the version has a heading already.
    """
    if not check_meta.section(changelog, "Unreleased"):
        raise ValueError("CHANGELOG.md has nothing under Unreleased")
    if re.search(rf"^## {re.escape(version)}\b", changelog, re.MULTILINE):
        raise ValueError(f"CHANGELOG.md already has a heading for {version}")
    return changelog.replace("## Unreleased\n", f"## Unreleased\n\n## {version} - {today}\n", 1)


def is_newer(version: str, than: str | None) -> bool:
    """Return whether X.Y.Z is a version and higher than another."""
    if not re.fullmatch(r"\d+\.\d+\.\d+", version):
        return False
    return than is None or _key(version) > _key(than)


def _key(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def main() -> None:
    """Release, or say in one line why not."""
    if len(sys.argv) != 3 or sys.argv[1] not in check_meta.IMPORTS:
        sys.exit(f"usage: release.py {{{'|'.join(check_meta.IMPORTS)}}} X.Y.Z")
    package, version = sys.argv[1:]
    tag = f"{check_meta.distribution(package)}-v{version}"
    current = check_meta.version(ROOT, package)
    if _git("status", "--porcelain"):
        sys.exit("the checkout has uncommitted changes")
    first = not _git("tag", "--list", f"{check_meta.distribution(package)}-v*")
    if not (is_newer(version, current) or (first and version == current)):
        sys.exit(f"VERSION must be X.Y.Z above {current}; got {version}")
    folder = ROOT / "packages" / package
    subprocess.run(["make", "test", f"PKG={package}"], cwd=ROOT, check=True)
    changelog = folder / "CHANGELOG.md"
    try:
        dated = date_changelog(changelog.read_text(), version, datetime.date.today())
    except ValueError as error:
        sys.exit(str(error))
    if version != current:
        hatch = [Path(sys.executable).with_name("hatch"), "version", version]
        subprocess.run(hatch, cwd=folder, check=True)
    changelog.write_text(dated)
    subprocess.run(
        [sys.executable, __file__.replace("release", "check_meta"), "--tag", tag], check=True
    )
    _git("commit", "-am", f"{package}: release {version}")
    _git("tag", "-a", tag, "-m", f"{check_meta.distribution(package)} {version}")
    print(f"released; now run: git push origin HEAD {tag}")


if __name__ == "__main__":
    main()
