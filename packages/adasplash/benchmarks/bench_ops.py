"""The dense map and first calls on one GPU beside their peers: errors first, then time.

Run as `python packages/adasplash/benchmarks/bench_ops.py --output FOLDER`.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from statistics import median

import torch
from torch.nn.functional import scaled_dot_product_attention

from adasplash import adasplash, entmax15
from adasplash.kernels.entmax import reference
from adasplash.testing import clustered_inputs
from fourfold_common import Results, time_call


def first_calls(results: Results) -> None:
    """Time the first call of a head size, and of later lengths; nothing has been compiled yet."""
    os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp()  # also on disk
    for dim, lengths in ((64, (1024, 2048, 777)), (128, (1024, 3000))):
        for place, length in enumerate(lengths):
            q, k, v = clustered_inputs(1, 4, length, dim, 1.0, dtype=torch.bfloat16, device="cuda")
            leaves = [x.requires_grad_() for x in (q, k, v)]
            torch.cuda.synchronize()
            begun = time.perf_counter()
            adasplash(*leaves, is_causal=True).sum().backward()
            torch.cuda.synchronize()
            spent = time.perf_counter() - begun
            name = "first call" if place == 0 else "first call of a new length"
            results.add("adasplash", name, spent, "s", dim_head=dim, length=length)
            print(f"{name}, head size {dim}, {length} tokens: {spent:.3f} s", flush=True)


def dense(results: Results) -> None:
    """Time the map over rows of several lengths, float32, forward and backward."""
    for n in (512, 2048, 8192, 32768):
        x = 2 * torch.randn(2**26 // n, n, device="cuda")
        want = reference.forward(x[:64].double(), 1.5)[0]
        error = (entmax15(x[:64]).double() - want).abs().max().item()
        assert error < 2e-6, f"entmax15 over {n}: error {error}"
        grad = torch.randn_like(x)
        leaf = x.clone().requires_grad_()
        contenders = {"adasplash": entmax15, "torch.softmax": partial(torch.softmax, dim=-1)}
        if find_spec("entmax"):  # the package of the method's first authors, if it is installed
            contenders["entmax package"] = import_module("entmax").entmax15
        for name, function in contenders.items():
            back = partial(torch.autograd.grad, function(leaf), leaf, grad, retain_graph=True)
            for metric, tensors, call in (
                ("dense forward", 2, partial(function, x)),
                ("dense backward", 3, back),
            ):
                timing = time_call(call, "cuda")
                speed = round(tensors * x.numel() * 4 / timing.median_ms / 1e9, 2)
                results.add(name, metric, timing.median_ms, "ms", p20=timing.p20_ms,
                            p80=timing.p80_ms, n=timing.n, rows=len(x), length=n, worst=error,
                            terabytes_per_second=speed)  # fmt: skip
                print(f"{name} {metric}, rows of {n}: {timing.median_ms:.3f} ms, {speed} TB/s",
                      flush=True)  # fmt: skip


def host(results: Results) -> None:
    """Time what a call costs the host: small tensors, nothing waits for the device."""
    q, k, v = clustered_inputs(1, 4, 256, 64, 1.0, dtype=torch.bfloat16, device="cuda")
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    for name, attend in (("adasplash", adasplash), ("SDPA", scaled_dot_product_attention)):

        def both(attend=attend):
            torch.autograd.grad(attend(*leaves, is_causal=True), leaves, v)

        for metric, call in (
            ("host, forward", partial(attend, q, k, v, is_causal=True)),
            ("host, forward + backward", both),
        ):
            spent = []
            for _ in range(60):
                torch.cuda.synchronize()
                begun = time.perf_counter()
                call()
                spent.append(1e3 * (time.perf_counter() - begun))
            results.add(name, metric, median(spent[10:]), "ms", n=50)
            print(f"{name}, {metric}: {median(spent[10:]):.3f} ms", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--parts", nargs="+", default=["first", "host", "dense"],
                        choices=["first", "host", "dense"])  # fmt: skip
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench_ops.py needs a CUDA device: nothing was measured")
        return
    torch.manual_seed(0)
    results = Results("adasplash", command="bench_ops.py", seed=0)
    for name, part in (("first", first_calls), ("host", host), ("dense", dense)):
        if name in options.parts:
            part(results)
            results.save(options.output / "ops.json")
    print(results.to_markdown())


if __name__ == "__main__":
    main()
