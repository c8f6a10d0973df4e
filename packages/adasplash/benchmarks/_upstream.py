"""Runs the package adasplash 0.2.2, which shares our import name, in a process of its own.

Called by `bench_upstream.py` with that package in PYTHONPATH and a file of jobs: for each a file of
q, k, v and the gradient of the output, the version of its attention and whether it is causal. Times
go to standard output, a line of JSON for each job, output and gradients into the job's file. With a
share `i/n` behind the jobs, kernels are only compiled: every n-th of the configurations that it
would try.
"""

import json
import sys
import time
from importlib.metadata import version

import torch
from triton.runtime.autotuner import Autotuner, OutOfResources
from triton.testing import do_bench

assert version("adasplash") == "0.2.2", version("adasplash")
import adasplash  # noqa: E402 -- after the check

KIND, STEPS = ("forward", "forward + backward"), 10
with open(sys.argv[1], encoding="utf-8") as file:
    jobs = json.load(file)
if len(sys.argv) > 2:
    share, shares = map(int, sys.argv[2].split("/"))
    prune, run = Autotuner.prune_configs, Autotuner.run

    def some(self, values):
        configs = prune(self, values)
        return configs[share::shares] or configs[-1:]

    def try_one(self, *arguments, **options):
        try:
            return run(self, *arguments, **options)
        except OutOfResources:  # none of the share fits this device: the smallest does
            self.configs = self.configs[-1:]
            return run(self, *arguments, **options)

    Autotuner.prune_configs, Autotuner.run = some, try_one
    Autotuner.do_bench = property(
        lambda self: lambda call, quantiles: (call(), [1.0] * 3)[1], lambda self, value: None
    )


def attend(job, q, k, v):
    """Attention of a version; the second is causal alone."""
    if job["version"] == 1:
        return adasplash.adasplash_v1(q, k, v, is_causal=job["causal"], niter=job["niter"])
    assert job["causal"]
    return adasplash.adasplash_v2(q, k, v)


def graphed(call):
    """Return the replay of a call's CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


calls = []
for job in jobs:
    if "dense" in job:
        x = torch.load(job["file"])
        found = {"dense forward": do_bench(lambda x=x: adasplash.triton_entmax15(x),
                                           return_mode="median")}  # fmt: skip
        torch.save([adasplash.triton_entmax15(x)[:64]], job["file"])
        print(json.dumps(found), flush=True)
        continue
    q, k, v, grad = torch.load(job["file"])
    leaves = [tensor.requires_grad_() for tensor in (q, k, v)]
    begun = time.perf_counter()
    output = attend(job, *leaves)
    made = torch.autograd.grad(output, leaves, grad)
    torch.cuda.synchronize()
    found = {"first call": time.perf_counter() - begun}
    if len(sys.argv) > 2:
        continue
    torch.save([output.detach(), *made], job["file"])
    del output, made
    grad = torch.randn_like(v)

    def both(job=job, leaves=leaves, grad=grad):
        torch.autograd.grad(attend(job, *leaves), leaves, grad)

    def forward(job=job, inputs=(q, k, v)):
        with torch.no_grad():
            attend(job, *inputs)

    calls.append((job, forward, both))
    for name, call in zip(KIND, (forward, both), strict=True):
        found[name] = do_bench(call, STEPS, 10 * STEPS, return_mode="median")
    print(json.dumps(found), flush=True)

# Last, as a capture that fails leaves nothing to go on with; version 1 waits for the device.
if len(sys.argv) == 2:
    for job, *both in calls:
        if job["version"] == 2:
            for name, call in zip(KIND, both, strict=True):
                ms = do_bench(graphed(call), STEPS, 10 * STEPS, return_mode="median")
                print(json.dumps({"graph": [job["file"], name, ms]}), flush=True)
