"""Write a static package index over a folder of wheels and sdists.

Usage: python ci/make_index.py DIST OUTPUT [--base-url URL]

Every link carries its file's SHA-256, so an installer refuses a file that was changed. Use the
result as the only index: a second index lets another project's `adasplash` or `mole` win.
"""

from __future__ import annotations

import argparse
import hashlib
import html
import re
import shutil
from pathlib import Path

_FILE = re.compile(r"^(?P<name>.+?)-\d[^-]*(-.*\.whl|\.tar\.gz)$")


def normalise(name: str) -> str:
    """Return a distribution name as an index spells it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def projects(files: list[Path]) -> dict[str, list[Path]]:
    """Return the files of each project, sorted by name.

    Raises:
        ValueError: A file is neither a wheel nor an sdist.
    """
    found: dict[str, list[Path]] = {}
    for path in sorted(files):
        match = _FILE.match(path.name)
        if match is None:
            raise ValueError(f"{path.name} is neither a wheel nor an sdist")
        found.setdefault(normalise(match["name"]), []).append(path)
    return found


def page(title: str, links: list[tuple[str, str]]) -> str:
    """Return an HTML page of (text, target) links."""
    rows = "\n".join(
        f'<a href="{html.escape(target)}">{html.escape(text)}</a><br>' for text, target in links
    )
    return f"<!DOCTYPE html>\n<title>{html.escape(title)}</title>\n{rows}\n"


def write_index(dist: Path, output: Path, base_url: str | None = None) -> None:
    """Write the index; copy the files below it unless they are served from `base_url`."""
    found = projects([path for path in dist.iterdir() if path.is_file()])
    output.mkdir(parents=True, exist_ok=True)
    (output / "index.html").write_text(page("Index", [(name, f"{name}/") for name in found]))
    for name, files in found.items():
        folder = output / name
        folder.mkdir(exist_ok=True)
        links = []
        for path in files:
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            if base_url is None:
                shutil.copy2(path, folder / path.name)
            target = path.name if base_url is None else f"{base_url.rstrip('/')}/{path.name}"
            links.append((path.name, f"{target}#sha256={digest}"))
        (folder / "index.html").write_text(page(name, links))


def main() -> None:
    """Write the index."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dist", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--base-url", help="where the files are served; default: beside the index")
    arguments = parser.parse_args()
    write_index(arguments.dist, arguments.output, arguments.base_url)


if __name__ == "__main__":
    main()
