"""Check versions, changelogs, licences and the limits of fourfold-common.

Usage: python ci/check_meta.py [--tag DISTRIBUTION-vX.Y.Z]
"""

from __future__ import annotations

import argparse
import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
IMPORTS = {
    "common": "fourfold_common",
    "adasplash": "adasplash",
    "hetero-sd": "hetero_sd",
    "conceptattention": "conceptattention",
    "mole": "mole",
}
_VERSION = re.compile(r'^__version__ = "(\d+\.\d+\.\d+)"$', re.MULTILINE)
_COMMON_LINES = 400
_COMMON_NAMES = 8


def distribution(package: str) -> str:
    """Return the distribution name of a package folder."""
    return "fourfold-common" if package == "common" else package


def version(root: Path, package: str) -> str | None:
    """Return the static version of a package, or None if its file holds none."""
    text = (root / "packages" / package / "src" / IMPORTS[package] / "__about__.py").read_text()
    found = _VERSION.search(text)
    return found.group(1) if found else None


def section(changelog: str, heading: str) -> str | None:
    """Return the text below the `## heading` of a changelog, or None if it is not there."""
    found = re.search(rf"^## {heading}$\n(.*?)(?=^## |\Z)", changelog, re.MULTILINE | re.DOTALL)
    return found.group(1).strip() if found else None


def problems(root: Path) -> Iterator[str]:
    """Yield one line for every rule that the tree breaks."""
    licence = (root / "LICENSE").read_bytes()
    for package in IMPORTS:
        folder = root / "packages" / package
        if version(root, package) is None:
            yield f"{package}: __about__.py holds no __version__ of the form X.Y.Z"
        if (folder / "LICENSE").read_bytes() != licence:
            yield f"{package}: LICENSE differs from the one at the root"
        unreleased = section((folder / "CHANGELOG.md").read_text(), "Unreleased")
        if unreleased is None:
            yield f"{package}: CHANGELOG.md has no Unreleased section"
        elif not unreleased and _changed_since_release(root, package):
            yield f"{package}: src changed since the last release, but Unreleased is empty"
        if package != "common" and not (folder / "CITATION.cff").exists():
            yield f"{package}: CITATION.cff is missing"
    for package in ("adasplash", "mole"):
        first_screen = (root / "packages" / package / "README.md").read_text()[:1500]
        if "independent implementation" not in first_screen.lower():
            yield f"{package}: the README's first screen must say 'independent implementation'"
    yield from _common_problems(root / "packages" / "common" / "src" / "fourfold_common")


def tag_problems(root: Path, tag: str) -> Iterator[str]:
    """Yield one line for every way in which a release tag disagrees with the tree."""
    names = {distribution(package): package for package in IMPORTS}
    name, _, tagged = tag.rpartition("-v")
    if name not in names:
        yield f"tag {tag}: must be DISTRIBUTION-vX.Y.Z with one of {', '.join(names)}"
        return
    package = names[name]
    found = version(root, package)
    if found != tagged:
        yield f"tag {tag}: __about__.py says {found}"
    changelog = (root / "packages" / package / "CHANGELOG.md").read_text()
    if section(changelog, rf"{re.escape(tagged)} - \d{{4}}-\d\d-\d\d") is None:
        yield f"tag {tag}: CHANGELOG.md has no dated heading '## {tagged} - YYYY-MM-DD'"


def _common_problems(folder: Path) -> Iterator[str]:
    lines = sum(len(path.read_text().splitlines()) for path in folder.glob("*.py"))
    if lines >= _COMMON_LINES:
        yield f"common: {lines} lines; it must stay under {_COMMON_LINES}"
    for node in ast.parse((folder / "__init__.py").read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            names = [name for name in ast.literal_eval(node.value) if name != "__version__"]
            if len(names) > _COMMON_NAMES:
                yield f"common: {len(names)} public names; at most {_COMMON_NAMES} are allowed"


def _changed_since_release(root: Path, package: str) -> bool:
    """Return whether src differs from the newest release tag; True where there is no tag."""
    git = ["git", "-C", str(root)]
    pattern = f"{distribution(package)}-v*"
    describe = [*git, "describe", "--tags", "--abbrev=0", "--match", pattern]
    tag = subprocess.run(describe, capture_output=True, text=True, check=False).stdout.strip()
    if not tag:
        return True
    source = f"packages/{package}/src"
    return subprocess.run([*git, "diff", "--quiet", tag, "--", source], check=False).returncode != 0


def main() -> None:
    """Print what is wrong and exit with status 1, or print nothing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tag", help="also check a release tag, such as mole-v1.0.1")
    tag = parser.parse_args().tag
    found = [*problems(ROOT), *(tag_problems(ROOT, tag) if tag else ())]
    for problem in found:
        print(problem, file=sys.stderr)
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
