import shutil
from collections.abc import Iterator
from pathlib import Path

import check_meta
import pytest


@pytest.fixture
def tree(tmp_path: Path) -> Iterator[Path]:
    """A copy of what check_meta reads, which tests may break."""
    shutil.copy(check_meta.ROOT / "LICENSE", tmp_path)
    for package, name in check_meta.IMPORTS.items():
        source, copy = check_meta.ROOT / "packages" / package, tmp_path / "packages" / package
        folder = copy / "src" / name
        folder.mkdir(parents=True)
        for file in ("LICENSE", "CHANGELOG.md", "README.md", "CITATION.cff"):
            if (source / file).exists():
                shutil.copy(source / file, copy)
        pattern = "*.py" if package == "common" else "__about__.py"
        for file in (source / "src" / name).glob(pattern):
            shutil.copy(file, folder)
    return tmp_path


def test_this_repository_is_in_order() -> None:
    assert list(check_meta.problems(check_meta.ROOT)) == []


@pytest.mark.parametrize(
    ("file", "content", "expected"),
    [
        ("mole/src/mole/__about__.py", '__version__ = "1.0"', "mole: __about__.py holds no"),
        ("mole/LICENSE", "MIT", "mole: LICENSE differs"),
        ("mole/CHANGELOG.md", "# Changelog", "mole: CHANGELOG.md has no Unreleased"),
        ("mole/CHANGELOG.md", "## Unreleased\n", "mole: src changed since the last release"),
        ("adasplash/README.md", "# adasplash", "adasplash: the README's first screen"),
        ("common/src/fourfold_common/device.py", "\n" * 400, "it must stay under 400"),
        (
            "common/src/fourfold_common/__init__.py",
            f"__all__ = {[str(i) for i in range(9)]}",
            "common: 9 public names; at most 8",
        ),
    ],
)
def test_each_broken_rule_is_named(tree: Path, file: str, content: str, expected: str) -> None:
    assert list(check_meta.problems(tree)) == []
    (tree / "packages" / file).write_text(content)
    found = list(check_meta.problems(tree))
    assert len(found) == 1
    assert expected in found[0]


def test_a_missing_citation_is_named(tree: Path) -> None:
    (tree / "packages" / "mole" / "CITATION.cff").unlink()
    assert list(check_meta.problems(tree)) == ["mole: CITATION.cff is missing"]


def test_a_tag_must_agree_with_version_and_changelog(tree: Path) -> None:
    version = check_meta.version(tree, "common")
    tag = f"fourfold-common-v{version}"
    assert list(check_meta.tag_problems(tree, tag)) == [
        f"tag {tag}: CHANGELOG.md has no dated heading '## {version} - YYYY-MM-DD'"
    ]
    changelog = tree / "packages" / "common" / "CHANGELOG.md"
    changelog.write_text(f"{changelog.read_text()}\n## {version} - 2026-01-31\n\n- First.\n")
    assert list(check_meta.tag_problems(tree, tag)) == []
    wrong = "fourfold-common-v9.9.9"
    assert f"tag {wrong}: __about__.py says {version}" in check_meta.tag_problems(tree, wrong)


@pytest.mark.parametrize("tag", ["common-v0.1.0", "mole", "v1.0.0", "other-v1.0.0"])
def test_a_tag_of_another_form_is_refused(tag: str) -> None:
    found = list(check_meta.tag_problems(check_meta.ROOT, tag))
    assert len(found) == 1
    assert "must be DISTRIBUTION-vX.Y.Z" in found[0]
