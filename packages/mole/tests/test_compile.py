"""The kernels of decoding compile for a GPU, which no interpreter says; needs none.

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
from mole.kernels.admit import kernel as rows
from mole.kernels.combine import kernel, norm

VALUES = {"float": "*fp16", "int8": "*i8", "fp8": "*u8", "nf4": "*u8", "nf3": "*u8"}
TYPES = {"index_ptr": "*i64", "scales_ptr": "*fp16", "codebook_ptr": "*fp32", "eps": "fp32"}


def build(function, form, constants, warps):
    names = function.arg_names
    types = TYPES | {"values_ptr": VALUES[form]} | dict.fromkeys(constants, "constexpr")
    signature = {n: types.get(n, "*bf16" if n.endswith("_ptr") else "i32") for n in names}
    source = ASTSource(function, signature, {(names.index(n),): v for n, v in constants.items()})
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
    assert made.asm["cubin"]
    print(function.__name__, form)


for form, block_size in (
    ("float", 1024), ("int8", 1024), ("fp8", 1024), ("nf4", 1024), ("nf4", 64), ("nf3", 1024),
):
    block = 512 if form == "nf4" else 1024
    for indexed in (False, True) if form == "float" else (True,):
        sizes = {"INDEXED": indexed, "FORMAT": form, "BLOCK_N": 4, "BLOCK_D": 512}
        build(kernel._combine_kernel.fn, form, sizes, 4)
    warps = norm._warps(block, form)
    sizes = {"DIM": 1024, "BLOCK_SIZE": block_size, "FORMAT": form, "BLOCK_D": block}
    if form not in ("float", "nf4"):
        build(norm._codes_norm_kernel, form, sizes | {"BLOCK_N": 4}, warps)
        continue
    for experts in (4, 40) if form == "float" else (4,):
        sizes |= {"EXPERTS": experts, "STRIDE_VN": 1024, "STRIDE_SN": 1, "AHEAD": min(experts, 16)}
        build(norm._norm_kernel, form, sizes, warps)
WORDS = dict.fromkeys(("table_ptr", "slots_ptr", "landing_ptr", "landed_ptr", "out_ptr",
                       "told_ptr", "known_ptr"), "*i64")
TYPES |= {**WORDS, "ready_ptr": "*i32", "turn_ptr": "*i32"}
build(rows._admit_kernel, "float", {"BLOCK": rows._BLOCK}, 8)
build(rows._hold_kernel, "float", {"BLOCK": 64}, 1)
"""


@pytest.mark.skipif(not triton_status().importable, reason="needs Triton")
def test_kernels_compile_for_an_h100_in_every_format(tmp_path):
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
    assert len(found.stdout.splitlines()) == 16
