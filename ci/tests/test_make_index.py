import hashlib
import re
from pathlib import Path

import make_index
import pytest


@pytest.fixture
def dist(tmp_path: Path) -> Path:
    folder = tmp_path / "dist"
    folder.mkdir()
    for name in ("hetero_sd-0.1.0-py3-none-any.whl", "hetero_sd-0.1.0.tar.gz", "mole-1.0.0.tar.gz"):
        (folder / name).write_bytes(name.encode())
    return folder


def test_every_file_is_listed_with_its_hash(dist: Path, tmp_path: Path) -> None:
    output = tmp_path / "index"
    make_index.write_index(dist, output)
    assert re.findall('href="(.*?)"', (output / "index.html").read_text()) == [
        "hetero-sd/",
        "mole/",
    ]
    links = re.findall('href="(.*?)"', (output / "hetero-sd" / "index.html").read_text())
    assert len(links) == 2
    for link in links:
        name, _, digest = link.partition("#sha256=")
        assert hashlib.sha256((output / "hetero-sd" / name).read_bytes()).hexdigest() == digest


def test_files_may_be_served_from_elsewhere(dist: Path, tmp_path: Path) -> None:
    output = tmp_path / "index"
    make_index.write_index(dist, output, "https://example.org/files/")
    page = (output / "mole" / "index.html").read_text()
    assert 'href="https://example.org/files/mole-1.0.0.tar.gz#sha256=' in page
    assert [path.name for path in (output / "mole").iterdir()] == ["index.html"]


def test_other_files_are_refused(dist: Path, tmp_path: Path) -> None:
    (dist / "notes.txt").write_text("x")
    with pytest.raises(ValueError, match=r"notes\.txt is neither a wheel nor an sdist"):
        make_index.write_index(dist, tmp_path / "index")
