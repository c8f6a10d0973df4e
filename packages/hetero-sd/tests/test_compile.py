"""The kernels of judging and of products compile for a GPU, which no interpreter says; needs none.

A process of its own compiles, without the interpreter that the other tests run in.
"""

import os
import subprocess
import sys

import pytest

from fourfold_common import triton_status

_COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from hetero_sd.kernels.decode import products
from hetero_sd.kernels.judge import cut, kernel, verdict

FLOATS = "scores part norms law mass logsum share excess peaks above value".split()
TYPES = {f"{name}_ptr": "*fp32" for name in FLOATS} | {"logits_ptr": "*bf16"}
TYPES |= {f"{name}_ptr": "*i32" for name in ("place", "of", "found", "first")}
TYPES |= {name: "fp32" for name in ("temperature", "bound", "margin")}


def build(function, warps=4, **constants):
    names = function.arg_names
    constants = {name: value for name, value in constants.items() if name in names}
    types = TYPES | dict.fromkeys(constants, "constexpr")
    signature = {n: types.get(n, "*i64" if n.endswith("_ptr") else "i32") for n in names}
    source = ASTSource(function, signature, {(names.index(n),): v for n, v in constants.items()})
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
    assert made.asm["cubin"]
    print(function.__name__)


sizes = {"SLICES": 32, "BLOCK": kernel.BLOCK, "PLACES": 8}
for multiple, draws in ((0, False), (0, True), (2, True)):
    slices = {**sizes, "SLICES": 1 if multiple else 32}
    build(kernel._pick_kernel, MULTIPLE=multiple, DRAWS=draws, CUT=draws, **slices)
    build(kernel._picked_kernel, warps=1, DRAWS=draws, **sizes)
build(kernel._pack_kernel, warps=1, LONGEST=3, STEPS=4, DEPTHS=4)
build(kernel._spread_kernel, LONGEST=3, **sizes)
for draws in (False, True):
    build(verdict._line_kernel, DRAWS=draws, CUT=draws, **sizes)
build(verdict._scan_kernel, DRAWS=False, CUT=False, BLOCKWISE=False, KIND=0, **sizes)
for kind, block in ((0, False), (1, True), (1, False), (2, False)):
    build(verdict._scan_kernel, DRAWS=True, CUT=True, BLOCKWISE=block, KIND=kind, **sizes)
    build(verdict._follow_kernel, CUT=block, BLOCKWISE=block, KIND=kind, **sizes)
for block in (False, True):
    build(verdict._settled_kernel, warps=1, BLOCKWISE=block, **sizes)
build(verdict._excess_kernel, KIND=1, CUT=True, **sizes)
search = {"COUNTED": 4, "STAGES": 4, "PART": cut._PART, **sizes}
for stage, multiple in ((0, 0), (4, 2), (7, 0)):
    build(cut._narrow_kernel, STAGE=stage, MULTIPLE=multiple, **search)
for stage in (-1, 3, 7):
    build(cut._cut_kernel, STAGE=stage, EXACT=True, MULTIPLE=0, **search)
POINTERS = "x weight second third out second_out third_out gate up".split()
TYPES |= {f"{name}_ptr": "*bf16" for name in POINTERS}
for rows in (1, 16):
    block_o, block_i, warps, _ = products.CONFIGS[rows][0]
    blocks = {"BLOCK_T": rows, "BLOCK_O": block_o, "BLOCK_I": block_i}
    build(products._products_kernel, warps, COUNT=3, **blocks)
    build(products._gated_kernel, warps, **blocks)
"""


@pytest.mark.skipif(not triton_status().importable, reason="needs Triton")
def test_kernels_compile_for_an_h100(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    found = subprocess.run(
        [sys.executable, "-c", _COMPILE],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert found.returncode == 0, found.stderr[-3000:]
    assert len(found.stdout.splitlines()) == 32
