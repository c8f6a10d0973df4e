"""Print which packages a change touches, as JSON for the workflow's matrix.

Usage: python ci/changed.py BASE
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable

PACKAGES = ("adasplash", "hetero-sd", "conceptattention", "mole")


def plan(paths: Iterable[str]) -> dict[str, list[str] | bool]:
    """Return which packages to test and whether to build the documentation.

    A path below `packages/X` selects X; `docs` selects the documentation; the shared package,
    `ci`, root files and anything unknown select everything.
    """
    packages: set[str] = set()
    docs = False
    for path in paths:
        top, _, rest = path.partition("/")
        name = rest.partition("/")[0]
        if top == "packages" and name in PACKAGES:
            packages.add(name)
        elif top == "docs":
            docs = True
        else:
            packages.update(PACKAGES)
            docs = True
    return {"packages": [name for name in PACKAGES if name in packages], "docs": docs}


def main() -> None:
    """Print the plan for the difference between BASE and the checkout."""
    if len(sys.argv) != 2:
        sys.exit("usage: changed.py BASE")
    command = ["git", "diff", "--name-only", "--no-renames", f"{sys.argv[1]}...HEAD"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    # An unknown base (a new branch, a shallow clone) must not skip anything.
    paths = done.stdout.splitlines() if done.returncode == 0 else ["unknown"]
    print(json.dumps(plan(paths)))


if __name__ == "__main__":
    main()
