"""Write this package as a kernel of the Hugging Face Hub: a folder that `kernels` loads.

Run as `python packages/adasplash/examples/hub_kernel.py FOLDER`. The folder then holds a variant
for CUDA and one for CPUs, without compiled code, as the kernels are Triton's. The library `kernels`
loads it by `get_local_kernel(FOLDER)`, and by `get_kernel` once it is uploaded. A kernel of the Hub
must be portable, so it may import nothing but torch, Triton and its own files, those by relative
paths; and unique, so its operators have a namespace of their own. Hence the sources are written
anew: imports of the common package and of jaxtyping go to two small files, and the namespace holds
a digest of the sources.

Source: the requirements of the Kernel Hub, https://huggingface.co/docs/kernels/kernel-requirements
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ROOT / "src/adasplash"
COMMON = ROOT.parent / "common/src/fourfold_common/kernels.py"
BACKENDS = ("cuda", "cpu")
LEFT_OUT = ("cli.py", "__main__.py", "testing.py", "demo/")
ALLOWED = {
    "torch",
    "triton",
    "transformers",
    "safetensors",
}  # the last two where they are called for
SHAPES = '''"""Annotations of shapes, without jaxtyping: the array's type is what remains."""


class _Shaped:
    def __class_getitem__(cls, item):
        return item[0]


class Bool(_Shaped):
    pass


class Float(_Shaped):
    pass


class Int(_Shaped):
    pass
'''
CARD = """---
library_name: kernels
license: apache-2.0
---
# adasplash

Exact alpha-entmax attention in Triton, an independent implementation of
[AdaSplash](https://arxiv.org/abs/2502.12082).

```python
from kernels import get_kernel

adasplash = get_kernel("OWNER/adasplash", version={version}, trust_remote_code=True)
output = adasplash.adasplash(q, k, v, is_causal=True)
adasplash.register_with_transformers()  # then attn_implementation="adasplash"
```
"""


def relative(text: str, depth: int) -> str:
    """Return a source whose imports from other packages of ours are relative ones.

    Args:
        text: The source of a module.
        depth: How many folders below the root it lies.
    """
    dots = "." * (depth + 1)
    text = re.sub(r"^(\s*)from fourfold_common import", rf"\1from {dots}_triton import", text,
                  flags=re.MULTILINE)  # fmt: skip
    return re.sub(r"^from jaxtyping import", f"from {dots}_shapes import", text, flags=re.MULTILINE)


def foreign(text: str) -> set[str]:
    """Return the packages that a source imports and a kernel may not."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(node.module or "")
    return {name.split(".")[0] for name in names} - ALLOWED - set(sys.stdlib_module_names)


def sources() -> dict[str, str]:
    """Return the files of the kernel by their paths, operators not yet renamed."""
    files = {"_shapes.py": SHAPES, "_triton.py": COMMON.read_text(encoding="utf-8")}
    for path in sorted(SOURCES.rglob("*.py")):
        name = path.relative_to(SOURCES).as_posix()
        if not name.startswith(LEFT_OUT):
            files[name] = relative(path.read_text(encoding="utf-8"), name.count("/"))
    for name, text in files.items():
        if found := foreign(text):
            raise ValueError(f"{name} imports {sorted(found)}, which a kernel may not")
    return files


def build(folder: Path, version: int = 1) -> str:
    """Write the kernel into a folder and return the namespace of its operators.

    Args:
        folder: Where to; files of an earlier run are replaced.
        version: Major version of the kernel on the Hub.

    Raises:
        ValueError: A source imports what a kernel may not.
    """
    files = sources()
    digest = hashlib.sha256("\0".join(x for pair in files.items() for x in pair).encode())
    unique = digest.hexdigest()[:12]
    for backend in BACKENDS:
        identity = f"_adasplash_{backend}_{unique}"
        metadata = {
            "id": identity, "name": "adasplash", "version": version, "license": "Apache-2.0",
            "python-depends": [], "backend": {"type": backend},
        }  # fmt: skip
        variant = folder / "build" / f"torch-{backend}"
        written = {"metadata.json": json.dumps(metadata, indent=1) + "\n"}
        for name, text in files.items():
            text = text.replace('"adasplash::', f'"{identity}::')
            written[name] = text.replace("torch.ops.adasplash.", f"torch.ops.{identity}.")
        for name, text in written.items():
            path = variant / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    (folder / "README.md").write_text(CARD.format(version=version), encoding="utf-8")
    (folder / "LICENSE").write_bytes((ROOT / "LICENSE").read_bytes())
    return unique


def main(arguments: list[str] | None = None) -> None:
    """Write the kernel where the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--version", type=int, default=1, help="major version on the Hub")
    options = parser.parse_args(arguments)
    unique = build(options.folder, options.version)
    print(f"{options.folder}: {', '.join(f'torch-{b}' for b in BACKENDS)}, sources {unique}")


if __name__ == "__main__":
    main()
