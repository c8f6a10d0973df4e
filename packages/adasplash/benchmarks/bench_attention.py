"""Our attention beside softmax attention on one GPU, from 1K to 128K tokens and over densities.

Run as `python packages/adasplash/benchmarks/bench_attention.py --output FOLDER`. Errors come first:
of every dtype at several shapes, then in every case those of the last queries, all against float64.
Cases come in the order of importance until `--budget` seconds are spent: times of the kernels (CUDA
graphs, so that no host work is timed) and memory, after what the host needs for a call. `FOLDER`
gets `attention.json`, written after every case; run again, it goes on where it stopped.
`attention.png` shows the speed over the density of blocks.
"""

from __future__ import annotations

import argparse
import time
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from _gpu import graphed, soft
from torch import Tensor
from torch.nn.attention import SDPBackend

from adasplash import adasplash
from adasplash.kernels.attention.forward import weighted_sum
from adasplash.kernels.attention.screen import screen
from adasplash.kernels.attention.threshold import threshold
from adasplash.kernels.attention.tiles import pose
from adasplash.testing import clustered_inputs, oracle_attention, random_inputs, relative_error
from fourfold_common import Results, time_call

BUDGET = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}
TOKENS = 2**18  # of all heads together
LENGTHS = (8192, 32768, 2048, 131072, 1024, 4096, 16384, 65536)
GAINS = (4.0, 1.0, 0.0, 2.0, 8.0, 0.5)
PEERS = {
    "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION,
    "SDPA flash": SDPBackend.FLASH_ATTENTION,
    "SDPA efficient": SDPBackend.EFFICIENT_ATTENTION,
}
METRICS = "forward", "forward + backward"


def cases() -> list[dict[str, Any]]:
    """Return the grid, the most important first."""
    grid = [
        {"length": length, "dim_head": dim, "causal": causal, "gain": gain}
        for causal, dim, gain, length in product((True, False), (64, 128), GAINS, LENGTHS)
    ]

    def rank(case: dict[str, Any]) -> int:
        rare = (not case["causal"]) + (case["dim_head"] > 64)
        return rare + GAINS.index(case["gain"]) // 3 + LENGTHS.index(case["length"]) // 2

    return sorted(grid, key=rank)


def check(results: Results) -> None:
    """Compare output and gradients with float64 for every dtype and several shapes."""
    shapes = (
        (2, 4, 2, 257, 257, 64),
        (1, 2, 1, 100, 333, 128),
        (1, 2, 2, 130, 130, 32),
        (1, 1, 1, 1, 77, 80),
        (1, 1, 1, 200, 200, 256),
    )
    for dtype, shape, causal in product(BUDGET, shapes, (True, False)):
        q, k, v = random_inputs(*shape, dtype=dtype, device="cuda")
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        output = adasplash(*leaves, is_causal=causal, backend="triton")
        grad = torch.randn_like(output)
        output.backward(grad)
        want = oracle_attention(q, k, v, causal, grad=grad)
        found = (output.detach(), *(leaf.grad for leaf in leaves))
        error = max(relative_error(x, y) for x, y in zip(found, want, strict=True))
        name = str(dtype).removeprefix("torch.")
        results.add("adasplash", "worst relative error", error, "", dtype=name, shape=str(shape),
                    causal=causal)  # fmt: skip
        if not error <= BUDGET[dtype]:
            raise SystemExit(f"{name} {shape} causal={causal}: the error is {error:.1e}")


def last_rows_error(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> float:
    """Return the worst relative error of the last 64 queries of one head: output, dq, dk, dv."""
    q, k, v = (x[:1, :1] for x in (q[:, :, -64:], k, v))
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    output = adasplash(*leaves, is_causal=causal)
    grad = torch.randn_like(output)
    found = (output.detach(), *torch.autograd.grad(output, leaves, grad))
    want = oracle_attention(q, k, v, causal, grad=grad)
    return max(relative_error(x, y) for x, y in zip(found, want, strict=True))


def stages(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[dict[str, Any], float, float]:
    """Return the steps of the forward as calls, and the shares of listed and active blocks."""
    problem = pose(q, k, v, None, None, q.shape[-1] ** -0.5, causal, None)
    candidates = screen(problem)
    tau = threshold(problem, candidates)
    active = weighted_sum(problem, candidates, tau)[1]
    blocks = active.shape[-1]
    whole = active[..., 0].numel() * ((blocks + 1) / 2 if causal else blocks)
    calls = {
        "screen": partial(screen, problem),
        "threshold": partial(threshold, problem, candidates),
        "output": partial(weighted_sum, problem, candidates, tau),
    }
    return calls, candidates.length.sum().item() / whole, active.sum().item() / whole


def measure(results: Results, case: dict[str, Any]) -> None:
    """Add the figures of one case."""
    length, causal = case["length"], case["causal"]
    heads = max(1, TOKENS // length)
    q, k, v = clustered_inputs(
        1, heads, length, case["dim_head"], case["gain"], dtype=torch.bfloat16, device="cuda"
    )  # fmt: skip
    error = last_rows_error(q, k, v, causal)
    if not error <= BUDGET[torch.bfloat16]:
        raise SystemExit(f"{case}: the error is {error:.1e}")
    contenders: dict[str, Any] = {"adasplash": partial(adasplash, is_causal=causal)}
    if not any(  # softmax does not depend on the data: once is enough
        c["provider"] in PEERS and same_softmax(c["parameters"], case) for c in results.cases
    ):
        contenders |= {name: partial(soft, backend=backend, is_causal=causal)
                       for name, backend in PEERS.items()}  # fmt: skip
    steps, listed, density = stages(q, k, v, causal)
    case = case | {"heads": heads, "density": round(density, 4), "listed": round(listed, 4)}
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    grad = torch.randn_like(v)

    def add(name: str, metric: str, call: Any, **more: Any) -> None:
        timing = time_call(graphed(call), "cuda", warmup_ms=10, rep_ms=40)
        results.add(name, metric, timing.median_ms, "ms", p20=timing.p20_ms, p80=timing.p80_ms,
                    n=timing.n, **case, **more)  # fmt: skip

    for name, attend in contenders.items():

        def forward(attend=attend):
            with torch.no_grad():
                return attend(q, k, v)

        def both(attend=attend):
            return torch.autograd.grad(attend(*leaves), leaves, grad)

        own = {"error": error} if name == "adasplash" else {}
        for metric, call in zip(METRICS, (forward, both), strict=True):
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            try:
                call()
                peak = (torch.cuda.max_memory_allocated() - before) / 2**20
                add(name, metric, call, peak_mib=round(peak, 1), **own)
            except RuntimeError as reason:
                print(f"{name} cannot run {case}: {str(reason).splitlines()[0]}", flush=True)
                break
    for name, call in steps.items():
        add("adasplash", name, call)


def same_softmax(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Return whether two cases cost softmax the same."""
    return all(one.get(name) == other[name] for name in ("length", "dim_head", "causal"))


def host(results: Results) -> None:
    """Time what the host does in a call, on 128 tokens: the device is always done first."""
    q, k, v = random_inputs(1, 2, 2, 128, 128, 64, dtype=torch.bfloat16, device="cuda")
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    grad = torch.randn_like(q)
    for name, attend in (
        ("adasplash", partial(adasplash, is_causal=True)),
        ("SDPA cuDNN", partial(soft, backend=PEERS["SDPA cuDNN"], is_causal=True)),
    ):
        for metric in METRICS:
            for count in (20, 200):  # the first compiles
                torch.cuda.synchronize()
                begun = time.perf_counter()
                for _ in range(count):
                    if metric == "forward":
                        attend(q, k, v)
                    else:
                        torch.autograd.grad(attend(*leaves), leaves, grad)
                torch.cuda.synchronize()
                spent = (time.perf_counter() - begun) / count
            results.add(name, f"host, {metric}", spent * 1e3, "ms", length=128)


def speeds(results: Results) -> list[dict[str, Any]]:
    """Return, for every case and metric, how many times as fast as the fastest softmax we are."""
    rows = []
    for case in results.cases:
        if case["provider"] != "adasplash" or case["metric"] not in METRICS:
            continue
        peers = [c["median"] for c in results.cases
                 if c["provider"] in PEERS and c["metric"] == case["metric"]
                 and same_softmax(c["parameters"], case["parameters"])]  # fmt: skip
        if peers:
            figures = {"metric": case["metric"], "ms": case["median"], "softmax_ms": min(peers)}
            rows.append(case["parameters"] | figures | {"speed": min(peers) / case["median"]})
    return rows


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Write the speed over the density of blocks, a panel for each head size and metric."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    rows = [row for row in rows if row["causal"]]
    dims = sorted({row["dim_head"] for row in rows})
    lengths = sorted({row["length"] for row in rows})
    colours = dict(zip(lengths, plt.colormaps["viridis"].resampled(len(lengths)).colors,
                       strict=True))  # fmt: skip
    figure, axes = plt.subplots(len(dims), 2, figsize=(10, 3.6 * len(dims)), squeeze=False,
                                sharex=True, layout="constrained")  # fmt: skip
    for (i, dim), (j, metric) in product(enumerate(dims), enumerate(METRICS)):
        axis = axes[i][j]
        for length in lengths:
            points = sorted((row["density"], row["speed"]) for row in rows
                            if (row["dim_head"], row["metric"], row["length"])
                            == (dim, metric, length))  # fmt: skip
            if points:
                axis.plot(*zip(*points, strict=True), marker="o", markersize=4,
                          color=colours[length], label=f"{length:,}")  # fmt: skip
        axis.axhline(1, color="grey", linewidth=0.8)
        axis.set(xscale="log", yscale="log", title=f"{metric}, head size {dim}")
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[-1]:
        axis.set_xlabel("share of causal 64x64 blocks that hold weight")
    for axis in axes[:, 0]:
        axis.set_ylabel("times as fast as the best softmax")
    axes[0][0].legend(title="tokens", frameon=False, fontsize="small")
    part = path.with_suffix(".part")
    figure.savefig(part, dpi=110, format="png")
    part.replace(path)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--budget", type=float, default=1200, help="seconds for the cases")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    path = arguments.output / "attention.json"
    if path.exists():
        results = Results.load(path)
    else:
        results = Results("adasplash", command="bench_attention.py", seed=0)
        check(results)
        host(results)
        results.save(path)
    end = time.perf_counter() + arguments.budget
    for case in cases():
        if any(case.items() <= done["parameters"].items() for done in results.cases):
            continue
        if time.perf_counter() > end:
            print("the time is over; run again to go on", flush=True)
            break
        measure(results, case)
        results.save(path)
        draw(speeds(results), path.with_suffix(".png"))
        for row in speeds(results)[-2:]:
            print({n: round(x, 4) if isinstance(x, float) else x for n, x in row.items()},
                  flush=True)  # fmt: skip
    print(results.to_markdown())


if __name__ == "__main__":
    main()
