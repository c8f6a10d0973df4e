"""Times the package adasplash 0.2.2, which shares our import name, in a process of its own.

Called by `bench_ops.py` with that package in PYTHONPATH and a file of q, k and v; prints JSON.
"""

import json
import sys
import time
from importlib.metadata import version

import torch
from triton.testing import do_bench

assert version("adasplash") == "0.2.2", version("adasplash")
import adasplash  # noqa: E402 -- after the check

q, k, v = torch.load(sys.argv[1])
leaves = [x.requires_grad_() for x in (q, k, v)]
grad = torch.randn_like(v)
begun = time.perf_counter()
adasplash.adasplash_v2(*leaves).backward(grad)
torch.cuda.synchronize()
found = {"first call with tuning": time.perf_counter() - begun}
with torch.no_grad():
    found["forward"] = do_bench(lambda: adasplash.adasplash_v2(q, k, v), return_mode="median")
found["forward + backward"] = do_bench(
    lambda: adasplash.adasplash_v2(*leaves).backward(grad), return_mode="median"
)
x = torch.randn(8192, 8192, device="cuda")
found["dense forward 8192 x 8192"] = do_bench(
    lambda: adasplash.triton_entmax15(x), return_mode="median"
)
print(json.dumps(found))
