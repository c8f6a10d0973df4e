"""The kernels compile for an H100, with what the host code launches them with; no GPU is needed.

The interpreter takes more than the compiler does, so this runs without it, in a process of its own.
"""

import os
import subprocess
import sys

import pytest

from fourfold_common import triton_status

_COMPILE = """
import contextlib, sys
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor
import adasplash.kernels.launch as launching

TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32",
         torch.int32: "i32", torch.int64: "i64", torch.uint8: "u8", torch.int8: "i8"}
OPTIONS = ("num_warps", "num_stages", "maxnreg")
MOST = 227 * 1024  # bytes of shared memory that a program can have
seen = set()


def type_of(value):
    if isinstance(value, TensorDescriptor):
        return f"tensordesc<{TYPES[value.base.dtype]}{list(value.block_shape)}>"
    if isinstance(value, torch.Tensor):
        return "*" + TYPES[value.dtype]
    return "fp32" if isinstance(value, float) else "i32"


def compile_only(kernel, programs, kind, *arguments, **constants):
    given = dict(zip(kernel.arg_names, arguments))
    given |= {n: v for n, v in constants.items() if n in kernel.arg_names}
    fixed = {n: v for n, v in given.items() if v is None or n in constants}
    signature = {n: "constexpr" if n in fixed else type_of(v) for n, v in given.items()}
    options = {n: constants[n] for n in OPTIONS if constants.get(n) is not None}
    key = str((kernel.fn.__name__, signature, fixed, options))
    if key in seen:
        return
    seen.add(key)
    places = {n: (i,) for i, n in enumerate(kernel.arg_names)}
    aligned = {places[n]: [["tt.divisibility", 16]] for n in given if signature[n][0] == "*"}
    source = ASTSource(kernel, signature, {places[n]: v for n, v in fixed.items()}, aligned)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert made.asm["cubin"] and made.metadata.shared <= MOST, (key, made.metadata.shared)


launching.launch = compile_only
from adasplash import adasplash
from adasplash.kernels.attention import op

op._choose = lambda *_: "triton"
torch.cuda.device_of = lambda _: contextlib.nullcontext()
bounds = torch.tensor([0, 100, 256], dtype=torch.int32)
for dtype, dim, options in (
    (torch.bfloat16, 64, {}),
    (torch.bfloat16, 128, {"is_causal": False, "attn_bias": torch.zeros(256, 256)}),
    (torch.float16, 64, {"alpha": torch.full((2,), 1.4), "dropout_p": 0.1}),
    (torch.bfloat16, 64, {"cu_seqlens_q": bounds, "max_seqlen_q": 156, "alpha": 2.0}),
):
    for value in options.values():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            value.requires_grad_()
    shape = (256, 2, dim) if "cu_seqlens_q" in options else (1, 2, 256, dim)
    q, k, v = (torch.randn(shape, dtype=dtype).requires_grad_() for _ in range(3))
    adasplash(q, k, v, **options).sum().backward()
print(len(seen), "kernels")
"""


@pytest.mark.skipif(not triton_status().importable, reason="needs Triton")
def test_kernels_compile_for_an_h100(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    path = tmp_path / "compile_kernels.py"
    path.write_text(_COMPILE, encoding="utf-8")
    found = subprocess.run(
        [sys.executable, str(path)], env=environment, capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stderr[-2000:]
    count = int(found.stdout.split()[0])
    assert count >= 4 * 6  # six kernels each at least
