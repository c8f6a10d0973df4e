"""A long sequence on one device, then spread over several: the same numbers first, then the time.

Run as `python packages/adasplash/benchmarks/bench_context_parallel.py --ranks 2 --output FOLDER`,
with a GPU for every rank, or by `torchrun --nproc-per-node 2`; with `--device cpu` the processes
meet over gloo.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from adasplash import adasplash
from adasplash.context_parallel import attention, shard, unshard
from adasplash.testing import clustered_inputs, relative_error
from fourfold_common import Results

COMMAND = "python packages/adasplash/benchmarks/bench_context_parallel.py"
# Of the spread sequence to the whole one; half formats round sums over ranks anew.
ALLOWED = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def gradients(attend: Callable[..., Tensor], parts: list[Tensor], grad: Tensor) -> list[Tensor]:
    """Return the output and the gradients of q, k and v."""
    leaves = [x.detach().requires_grad_() for x in parts]
    output = attend(*leaves)
    return [output.detach(), *torch.autograd.grad(output, leaves, grad)]


def worst_error(inputs: list[Tensor], grad: Tensor) -> float:
    """Return the largest relative error of the spread sequence's output and gradients."""
    want = gradients(adasplash, inputs, grad)
    found = gradients(attention, [shard(x) for x in inputs], shard(grad))
    pairs = zip(found, want, strict=True)
    return max(relative_error(unshard(x), y.double()) for x, y in pairs)


def spent(call: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Return the median milliseconds from the start of all ranks to the end of the last."""
    times = []
    for _ in range(2 + repeats):
        wait(device)
        begun = time.perf_counter()
        call()
        wait(device)
        times.append((time.perf_counter() - begun) * 1e3)
    return median(times[2:])


def wait(device: torch.device) -> None:
    """Return when every rank, and its device, has come here."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    dist.barrier()


def peak(call: Callable[[], object], device: torch.device) -> float | None:
    """Return the MiB that a call needs on a GPU beyond what is there."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


def measure(options: argparse.Namespace, device: torch.device) -> Results:
    """Check in float32 and in the dtype of the time; then time one device, and all of them."""
    results = Results("adasplash", command=COMMAND, seed=0)
    first = dist.get_rank() == 0
    for dtype, length in ((torch.float32, options.checked), (torch.bfloat16, options.length)):
        *inputs, grad = _inputs(options, length, dtype, device)
        error = worst_error(inputs, grad)
        if first:
            print(f"{length} tokens, {dtype}: relative error {error:.1e}", flush=True)
        if not error <= ALLOWED[dtype]:  # the same on all ranks
            raise SystemExit(f"error {error} is over {ALLOWED[dtype]}: nothing is timed")
    parts, part = [shard(x) for x in inputs], shard(grad)
    alone = [adasplash, inputs, grad] if first else None
    shape = {"length": options.length, "heads": options.heads, "dim_head": options.dim,
             "gain": options.gain}  # fmt: skip
    for ranks, run in ((1, alone), (dist.get_world_size(), [attention, parts, part])):
        for metric in ("forward", "forward + backward"):
            call = _call(run, metric)
            ms = spent(call, options.repeats, device)
            results.add(
                "adasplash", metric, ms, "ms", n=options.repeats, peak_mib=peak(call, device),
                error=error, ranks=ranks, **shape,
            )  # fmt: skip
            if first:
                print(f"{ranks} ranks, {metric}: {ms:.3f} ms", flush=True)
    return results


def _inputs(
    options: argparse.Namespace, length: int, dtype: torch.dtype, device: torch.device
) -> list[Tensor]:
    """Return q, k, v and the output's gradient, the same on all ranks."""
    made = clustered_inputs(
        1, options.heads, length, options.dim, options.gain, dtype=dtype, device=device
    )
    inputs = [*made, made[2].flip(2)]
    for x in inputs:
        dist.broadcast(x, 0)
    return inputs


def _call(run: list | None, metric: str) -> Callable[[], object]:
    """Return what a rank does; one that has nothing to do waits for the others."""
    if run is None:
        return lambda: None
    attend, inputs, grad = run
    if metric == "forward":
        return torch.no_grad()(lambda: attend(*inputs))
    return lambda: gradients(attend, inputs, grad)


def work(rank: int, options: argparse.Namespace, meeting: str) -> None:
    """Do one rank's part; the first writes the results. `meeting` is where the ranks meet."""
    device = torch.device(options.device, rank) if options.device == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo", init_method=meeting,
        rank=rank, world_size=options.ranks,
        device_id=device if device.type == "cuda" else None,
    )  # fmt: skip
    results = measure(options, device)
    if rank == 0:
        results.save(options.output / "context_parallel.json")
        print(results.to_markdown())
    wait(device)  # nobody leaves while another still listens
    dist.destroy_process_group()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--ranks", type=int, help="2 if left out")
    parser.add_argument("--length", type=int, default=131072, help="tokens of the sequence")
    parser.add_argument("--checked", type=int, default=8192, help="tokens of the float32 check")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--dim", type=int, default=64, help="head size")
    parser.add_argument("--gain", type=float, default=4.0, help="strength of the blocks' topics")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    options = parser.parse_args(arguments)
    launched = "LOCAL_RANK" in os.environ  # by torchrun, on one machine
    if launched:
        options.ranks = int(os.environ["WORLD_SIZE"])
    if options.ranks is None:
        options.ranks = 2
        if options.device == "cuda" and torch.cuda.device_count() < 2:
            print("bench_context_parallel.py needs two CUDA devices: nothing was measured")
            return
    if options.device == "cuda" and torch.cuda.device_count() < options.ranks:
        raise SystemExit(
            f"--ranks {options.ranks} needs as many GPUs; found {torch.cuda.device_count()}."
        )
    if launched:
        work(int(os.environ["LOCAL_RANK"]), options, "env://")
        return
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(work, (options, f"file://{folder}/meet"), nprocs=options.ranks)


if __name__ == "__main__":
    main()
