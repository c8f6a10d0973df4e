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
