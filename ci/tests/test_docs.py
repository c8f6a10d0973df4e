"""Every Python block of the READMEs and pages runs, in an empty folder, as a reader would."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([ROOT / "README.md", *ROOT.glob("packages/*/README.md"), *ROOT.glob("docs/**/*.md")])


def _python_blocks(page: Path) -> list[str]:
    text = page.read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def _links(page: Path) -> list[str]:
    """Return where the links and pictures of a page point, without those inside code."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    text = re.sub(r"`[^`]*`", "`", text)
    return re.findall(r"\]\(([^)\s]+)\)", text)


def _anchors(page: Path) -> set[str]:
    """Return the names that a page's headings have as targets of links."""
    heads = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\s-]", "", head).strip().lower().replace(" ", "-") for head in heads}


def _dead(page: Path) -> list[str]:
    """Return the links of a page that lead to no file or heading of this repository."""
    dead = []
    for link in _links(page):
        if re.match(r"[a-z]+:", link):  # of the web: not ours to keep alive
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in _anchors(target)):
            dead.append(link)
    return dead


# Results, scripts and examples that a page names; other names may be the reader's own files.
NAMED = re.compile(
    r"`((?:[\w./-]*(?:benchmarks|examples|demo/assets|ci)/[\w./-]+|[\w-]+[-_](?:h[12]00|cpu))"
    r"\.(?:json|csv|png|py|sh|txt))`"
)


def _missing(page: Path) -> list[str]:
    """Return the files of this repository that a page names and that are nowhere to be found."""
    homes = [ROOT, page.parent]
    for package in PACKAGES:
        if package in page.parts:
            home = ROOT / "packages" / package
            source = home / "src" / package.replace("-", "_")
            homes += [home, source, home / "benchmarks", home / "benchmarks" / "results"]
    names = NAMED.findall(page.read_text(encoding="utf-8"))
    return [name for name in names if not any((home / name).exists() for home in homes)]


PACKAGES = ("adasplash", "hetero-sd", "conceptattention", "mole")
WRITTEN = [*PAGES, *ROOT.glob("*.md"), *ROOT.glob("packages/*/CHANGELOG.md")]


@pytest.mark.parametrize("page", sorted(set(WRITTEN)), ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_named_files_are_there(page: Path) -> None:
    assert _dead(page) == []
    assert _missing(page) == []


def test_dead_links_are_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# One head\n[a](#one-head) [b](#two) [c](page.md) ![d](no.png) [e](https://x.org/y)\n"
        "`benchmarks/nothing.py` `speed_h200.json` `yours.json` `[f](g.md)`\n"
    )
    assert _dead(page) == ["#two", "no.png"]
    assert _missing(page) == ["benchmarks/nothing.py", "speed_h200.json"]


PAGES_WITH_CODE = [page for page in PAGES if _python_blocks(page)]


@pytest.mark.parametrize("page", PAGES_WITH_CODE, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_blocks_run(page: Path, tmp_path: Path) -> None:
    blocks = _python_blocks(page)
    # The blocks of a page build on each other: they are one program.
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(blocks)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "package", ["common", "adasplash", "hetero-sd", "conceptattention", "mole"]
)
def test_every_readme_has_a_quickstart(package: str) -> None:
    assert _python_blocks(ROOT / "packages" / package / "README.md")


@pytest.mark.parametrize("package", ["adasplash", "hetero-sd", "conceptattention", "mole"])
def test_every_page_has_a_quickstart(package: str) -> None:
    assert _python_blocks(ROOT / "docs" / package / "index.md")


@pytest.mark.parametrize("package", ["adasplash", "hetero-sd", "conceptattention", "mole"])
def test_the_reference_has_every_public_name(package: str) -> None:
    module = importlib.import_module(package.replace("-", "_"))
    text = (ROOT / "docs" / package / "api.md").read_text(encoding="utf-8")
    shown = re.findall(r"^::: (\S+)$", text, re.MULTILINE)
    missing = {f"{module.__name__}.{name}" for name in module.__all__} - set(shown)
    assert missing == {f"{module.__name__}.__version__"}
