"""The paper's own package, adasplash 0.2.2, beside ours on the same tensors of one GPU.

Run as `python packages/adasplash/benchmarks/bench_upstream.py --output FOLDER`. `--upstream DIR`
is where `pip install --no-deps --target DIR adasplash==0.2.2` has put it; without it that is done
first, in a temporary folder. It shares our import name, so it runs in a process of its own.

Timed are its second version (causal) and its first (not causal), forward and with backward, at a
low block density and at 1; the first call of a shape with nothing compiled before; and the dense
map. Both call by call, host work included, and as replays of CUDA graphs where the package can be
captured. The package tries dozens of configurations of its kernels at every new length: the first
length shows how long that takes, for others they are compiled in advance, side by side; with
`--compiled` for the first, too. Outputs and gradients of both are compared with float64 first.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from _gpu import graphed, soft
from bench_attention import (
    BUDGET,
    METRICS,
    blocks_of,
    oracle_softmax,
    sampled_grad,
    share,
    worst_error,
)
from torch import Tensor
from torch.nn.attention import SDPBackend

from adasplash import adasplash, entmax15
from adasplash.kernels.entmax import reference
from adasplash.testing import clustered_inputs, oracle_attention
from fourfold_common import Results, time_call

WORKER = Path(__file__).with_name("_upstream.py")
THEIRS = "adasplash 0.2.2"


class Upstream:
    """The package in a folder, and the processes that run it."""

    def __init__(self, folder: Path, work: Path) -> None:
        self.work = work
        self.environment = {**os.environ, "PYTHONPATH": str(folder.resolve())}

    def start(
        self, jobs: list[dict], name: str, cache: str, share: str | None = None
    ) -> subprocess.Popen:
        """Start a worker on some jobs, with a folder for compiled kernels of its own."""
        path = self.work / f"{name}.json"
        path.write_text(json.dumps(jobs), encoding="utf-8")
        log = (self.work / f"{name}{'' if share is None else share.replace('/', '-')}.log").open(
            "w"
        )
        return subprocess.Popen(
            [sys.executable, str(WORKER), str(path), *([] if share is None else [share])],
            env={**self.environment, "TRITON_CACHE_DIR": str(self.work / cache)},
            stdout=log, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def lines(self, name: str) -> list[dict]:
        """Return what a worker has printed so far; its last words if that is not JSON."""
        text = (self.work / f"{name}.log").read_text(encoding="utf-8")
        found = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
        if "Traceback" in text:
            print(f"{name}: {text[-600:]}", flush=True)
        return found


class Bench:
    """Measures into one file, until the time is up."""

    def __init__(self, options: argparse.Namespace, upstream: Upstream) -> None:
        self.options, self.upstream = options, upstream
        self.begun = time.monotonic()
        self.end = self.begun + (options.budget or float("inf"))
        self.results = Results("adasplash", command="bench_upstream.py", seed=0)
        self.tensors: dict[str, list[Tensor]] = {}  # of the jobs, by their files

    def left(self) -> float | None:
        """Return the seconds that are left; None for no limit."""
        return None if self.options.budget is None else max(0.1, self.end - time.monotonic())

    def add(self, provider: str, metric: str, value: float, unit: str, **case: object) -> None:
        self.results.add(provider, metric, value, unit, **case)
        self.results.save(self.options.output / "upstream.json")
        spent = time.monotonic() - self.begun
        print(f"{spent:.0f} s: {provider}, {metric}, {case}: {value:.4g} {unit}", flush=True)

    def inputs(self, length: int, gain: float) -> list[Tensor]:
        """Return q, k and v in bfloat16 and a gradient of the output."""
        heads = max(1, self.options.tokens // length)
        q, k, v = clustered_inputs(1, heads, length, 64, gain, dtype=torch.bfloat16, device="cuda")
        return [q, k, v, sampled_grad(v)]

    def first_calls(self) -> None:
        """Time our first call of a head size, and of later lengths; nothing compiled before."""
        os.environ["TRITON_CACHE_DIR"] = str(self.upstream.work / "ours")
        for place, length in enumerate((*self.options.lengths, 777)):
            q, k, v, grad = self.inputs(length, 1.0)
            leaves = [x.requires_grad_() for x in (q, k, v)]
            torch.cuda.synchronize()
            begun = time.perf_counter()
            torch.autograd.grad(adasplash(*leaves), leaves, grad)
            torch.cuda.synchronize()
            metric = "first call" if place == 0 else "first call of a new length"
            self.add("adasplash", metric, time.perf_counter() - begun, "s", length=length)

    def jobs(self, length: int) -> list[dict]:
        """Write the tensors of a length to files and return the jobs, the second version first."""
        made = []
        for version, gain, niter in ((2, 1, 1), (2, 0, 1), (1, 1, 4), (1, 0, 4)):
            file = self.upstream.work / f"{length}-{version}-{gain}-{niter}.pt"
            self.tensors[str(file)] = self.inputs(length, gain)
            torch.save(self.tensors[str(file)], file)
            made.append({"file": str(file), "version": version, "causal": version == 2,
                         "gain": gain, "niter": niter})  # fmt: skip
        return made

    def theirs(self, length: int, cache: str, jobs: list[dict]) -> None:
        """Run the package on the jobs of a length and store what it printed."""
        name = f"run-{length}"
        worker = self.upstream.start(jobs, name, cache)
        try:
            worker.wait(self.left())
        except subprocess.TimeoutExpired:
            worker.kill()
            print(f"{THEIRS}, {length} tokens: the time is up", flush=True)
        lines = self.upstream.lines(name)
        by_file = {job["file"]: job for job in jobs}
        for job, line in zip(jobs, (x for x in lines if "graph" not in x), strict=False):
            found, tensors = torch.load(job["file"]), self.tensors[job["file"]]
            if "dense" in job:
                error = (found[0].double() - tensors[0]).abs().max().item()
                self.add(THEIRS, "dense forward", line["dense forward"], "ms", length=8192,
                         worst=error)  # fmt: skip
                continue
            case = self.case(length, job)
            error = worst_error(*tensors, found, job["causal"], oracle_attention)
            for metric, value in line.items():
                if metric == "first call":
                    if job is not jobs[0] or cache == "compiled":
                        continue
                    self.add(THEIRS, metric, value, "s", length=length)
                else:
                    self.add(THEIRS, metric, value, "ms", how="calls", error=error, **case)
        for line in lines:
            if "graph" in line:
                file, metric, value = line["graph"]
                self.add(THEIRS, metric, value, "ms", how="graph",
                         **self.case(length, by_file[file]))  # fmt: skip

    def case(self, length: int, job: dict) -> dict[str, object]:
        """Return what describes a case of attention."""
        names = ("version", "niter", "causal", "gain")
        return {"length": length, "heads": max(1, self.options.tokens // length),
                **{name: job[name] for name in names}}  # fmt: skip

    def ours(self, length: int, jobs: list[dict]) -> None:
        """Check and time our attention and cuDNN's on the jobs of a length."""
        seen: set[tuple[bool, float]] = set()
        for job in jobs:
            causal, gain = job.get("causal"), job.get("gain")
            if "dense" in job or (causal, gain) in seen:
                continue
            seen.add((causal, gain))
            *heads, grad = self.tensors[job["file"]]
            case = {"length": length, "heads": heads[0].shape[1], "causal": causal, "gain": gain}
            case["density"] = round(share(blocks_of(*heads, causal), causal), 4)
            cudnn = partial(soft, backend=SDPBackend.CUDNN_ATTENTION, is_causal=causal)
            for name, attend, oracle in (
                ("adasplash", partial(adasplash, is_causal=causal), oracle_attention),
                ("SDPA cuDNN", cudnn, oracle_softmax),
            ):
                if name == "adasplash" or gain:  # time of softmax is that of any data
                    self.contend(name, attend, oracle, heads, grad, case)

    def contend(
        self, name: str, attend: Callable[..., Tensor], oracle: Callable[..., tuple],
        heads: list[Tensor], grad: Tensor, case: dict,
    ) -> None:  # fmt: skip
        """Check and time one contender."""
        leaves = [x.clone().requires_grad_() for x in heads]
        incoming = grad.clone()

        def forward() -> Tensor:
            with torch.no_grad():
                return attend(*heads)

        def both() -> list[Tensor]:
            output = attend(*leaves)
            return [output.detach(), *torch.autograd.grad(output, leaves, incoming)]

        error = worst_error(*heads, grad, both(), case["causal"], oracle)
        if not error <= BUDGET[torch.bfloat16]:
            raise SystemExit(f"{name}, {case}: error {error:.2e}")
        incoming.normal_()  # it was zero outside the rows that were checked
        for metric, call in zip(METRICS, (forward, both), strict=True):
            for how, timed in (("calls", call), ("graph", graphed(call))):
                ms = time_call(timed, "cuda", 10).median_ms
                self.add(name, metric, ms, "ms", how=how, error=error, **case)

    def dense(self, job: dict) -> None:
        """Time our dense map and softmax beside the map of the package."""
        x = torch.randn(8192, 8192, device="cuda")
        want = reference.forward(x[:64].double(), 1.5)[0]
        error = (entmax15(x[:64]).double() - want).abs().max().item()
        assert error < 2e-6, f"entmax15: error {error}"
        for name, call in (
            ("adasplash", entmax15),
            ("torch.softmax", partial(torch.softmax, dim=-1)),
        ):
            ms = time_call(partial(call, x), "cuda").median_ms
            self.add(name, "dense forward", ms, "ms", length=8192,
                     **({"worst": error} if name == "adasplash" else {}))  # fmt: skip
        torch.save(x, job["file"])
        self.tensors[job["file"]] = [want]

    def compile(self, jobs: dict[int, list[dict]]) -> None:
        """Compile what the package would try for some lengths, while nothing is timed."""
        shares = range(self.options.workers)
        helpers = [
            self.upstream.start(its[:1], f"compile-{length}", "compiled", f"{i}/{len(shares)}")
            for length, its in jobs.items()
            for i in shares
        ]
        for helper in helpers:
            try:
                helper.wait(self.left())
            except subprocess.TimeoutExpired:
                helper.kill()

    def measure(self) -> None:
        """Measure all, lengths as they were given."""
        self.first_calls()
        dense = {"file": str(self.upstream.work / "dense.pt"), "dense": True}
        self.dense(dense)
        lengths = self.options.lengths
        jobs = {length: self.jobs(length) for length in lengths}
        for length in lengths:
            self.ours(length, jobs[length])
        cold = 0 if self.options.compiled else 1
        if cold:
            self.theirs(lengths[0], "new", [*jobs[lengths[0]], dense])
        self.compile({length: jobs[length] for length in lengths[cold:]})
        for length in lengths[cold:]:
            # The first version at a density of 1 takes seconds a call on long sequences.
            its = [
                j
                for j in jobs[length]
                if length == lengths[0] or (j["version"], j["gain"]) != (1, 0)
            ]
            self.theirs(length, "compiled", [*its, dense] if length == lengths[0] else its)


def install(folder: Path) -> Path:
    """Put the package into a folder and return that."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target"]
    subprocess.run([*command, str(folder), "adasplash==0.2.2"], check=True)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--upstream", type=Path, help="folder with adasplash 0.2.2")
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 32768],
                        help="powers of two")  # fmt: skip
    parser.add_argument("--tokens", type=int, default=262144, help="heads x length")
    parser.add_argument("--workers", type=int, default=6, help="processes that compile a length")
    parser.add_argument("--compiled", action="store_true",
                        help="compile for the first length in advance, too: saves a minute, but "
                             "does not show how long the package takes for it")  # fmt: skip
    parser.add_argument("--budget", type=float, help="stop after so many seconds")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench_upstream.py needs a CUDA device: nothing was measured")
        return
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as work:
        folder = options.upstream or install(Path(work, "package"))
        bench = Bench(options, Upstream(folder, Path(work)))
        bench.measure()
        print(bench.results.to_markdown())


if __name__ == "__main__":
    main()
