"""Write the figures of the README and the pages from the stored results.

Run as `python packages/adasplash/benchmarks/pages.py`, after results have been put into
`benchmarks/results`. A table of `tables.py` stands between `<!-- table: NAME -->` and
`<!-- end -->`; what is between them is replaced. Figures in sentences are those of `sentences.py`.
A test compares the pages with what this gives.
"""

from __future__ import annotations

import re

from sentences import said
from tables import ROOT, TABLES

PAGES = [
    ROOT / "docs/adasplash/index.md",
    ROOT / "packages/adasplash/README.md",
    ROOT / "packages/adasplash/benchmarks/README.md",
]
MARKED = re.compile(r"(<!-- table: (.+?) -->\n\n).*?(\n\n<!-- end -->)", re.DOTALL)


def filled(text: str) -> str:
    """Return a page with its tables and figures written anew."""
    return said(MARKED.sub(lambda found: found[1] + TABLES[found[2]]() + found[3], text))


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")
