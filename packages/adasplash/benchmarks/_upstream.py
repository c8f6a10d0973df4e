"""Times the package adasplash 0.2.2, which shares our import name, in a process of its own.

Called by our benchmarks with that package in PYTHONPATH and files of q, k, v and perhaps a gradient
of the output; prints a line of JSON for each and leaves output and gradients in place of them.
"""

import json
import sys
import time
from importlib.metadata import version

import torch
from triton.testing import do_bench

assert version("adasplash") == "0.2.2", version("adasplash")
import adasplash  # noqa: E402 -- after the check

x = torch.randn(8192, 8192, device="cuda")
dense = do_bench(lambda: adasplash.triton_entmax15(x), return_mode="median")
for file in sys.argv[1:]:
    q, k, v, *rest = torch.load(file)
    leaves = [tensor.requires_grad_() for tensor in (q, k, v)]
    grad = rest[0] if rest else torch.randn_like(v)
    begun = time.perf_counter()
    output = adasplash.adasplash_v2(*leaves)
    made = torch.autograd.grad(output, leaves, grad)
    torch.cuda.synchronize()
    found = {"first call with tuning": time.perf_counter() - begun}
    torch.save([output.detach(), *made], file)
    grad = torch.randn_like(v)

    def both(leaves=leaves, grad=grad):
        torch.autograd.grad(adasplash.adasplash_v2(*leaves), leaves, grad)

    def forward(inputs=(q, k, v)):
        with torch.no_grad():
            adasplash.adasplash_v2(*inputs)

    found["forward"] = do_bench(forward, return_mode="median")
    found["forward + backward"] = do_bench(both, return_mode="median")
    found["dense forward 8192 x 8192"] = dense
    print(json.dumps(found), flush=True)
