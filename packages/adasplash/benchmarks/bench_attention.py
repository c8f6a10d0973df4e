"""Our attention beside softmax attention and the paper's package on one GPU: errors, time, memory.

Run as `python packages/adasplash/benchmarks/bench_attention.py --output FOLDER`. With `--upstream
DIR`, where `pip install --no-deps --target DIR adasplash==0.2.2` has put the paper's own package,
that is timed on the same tensors in a process of its own; it tunes itself for a minute or more at
every new length. `--budget SECONDS` stops in time; the cases that matter most come first. Every
figure is stored at once in `attention_grid.json`; run again, the script leaves out what is there.

On a GPU replays of CUDA graphs are timed, so that no host work counts, from a cold L2 cache; the
paper's package is timed call by call. A case is checked, then timed: output and gradients of
sampled rows are compared with float64. As the gradient that comes in is zero in all other rows, all
of dK and dV is compared.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from itertools import pairwise, product
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from adasplash import adasplash
from adasplash.testing import (
    clustered_inputs,
    oracle_attention,
    oracle_weights,
    random_inputs,
    relative_error,
)
from fourfold_common import Results, pick_device, time_call

COMMAND = "bench_attention.py"
WORKER = Path(__file__).with_name("_upstream.py")
BUDGET = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}
LENGTHS = (8192, 32768, 2048, 131072, 1024, 4096, 16384, 65536)  # the most important first
GAINS = (4.0, 1.0, 0.0, 0.5, 0.3, 0.15)  # of a block's topic: the higher, the emptier
BACKENDS = {
    "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION,
    "SDPA flash": SDPBackend.FLASH_ATTENTION,
    "SDPA efficient": SDPBackend.EFFICIENT_ATTENTION,
}
ROWS = 16  # a run of rows that is compared with float64
Attend = Callable[..., Tensor]


class Grid(NamedTuple):
    """One shape: what all contenders of a table's block have in common."""

    dim_head: int
    length: int
    causal: bool


def check(results: Results, dtypes: list[str], dims: list[int]) -> bool:
    """Compare output and gradients with float64 for every dtype and several shapes."""
    good = True
    for dtype in (getattr(torch, name) for name in dtypes):
        for shape in (
            (2, 4, 2, 257, 257, 64),
            (1, 2, 1, 100, 333, 128),
            (1, 2, 2, 130, 130, 32),
            (1, 1, 1, 1, 77, 80),
            (1, 1, 1, 200, 200, 256),
        ):
            if dims and shape[-1] not in dims:
                continue
            for causal in (True, False):
                q, k, v = random_inputs(*shape, dtype=dtype, device="cuda")
                leaves = [x.clone().requires_grad_() for x in (q, k, v)]
                output = adasplash(*leaves, is_causal=causal, backend="triton")
                grad = torch.randn_like(output)
                output.backward(grad)
                want = oracle_attention(q, k, v, causal, grad=grad)
                found = (output, *(leaf.grad for leaf in leaves))
                error = max(relative_error(x, y) for x, y in zip(found, want, strict=True))
                good &= error <= BUDGET[dtype]
                name = str(dtype).removeprefix("torch.")
                results.add("adasplash", "worst relative error", error, "", dtype=name,
                            shape=str(shape), causal=causal)  # fmt: skip
                print(f"{name} {shape} causal={causal} error {error:.2e}", flush=True)
    return good


def softmax(backend: SDPBackend, causal: bool, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(backend):
        return scaled_dot_product_attention(q, k, v, is_causal=causal)


def runs_of(length: int) -> list[slice]:
    """Return four runs of rows, spread over the sequence, or all rows of a short one."""
    if length <= 4 * ROWS:
        return [slice(0, length)]
    starts = (round(i * (length - ROWS) / 3) for i in range(4))
    return [slice(start, start + ROWS) for start in starts]


def oracle_softmax(q: Tensor, k: Tensor, v: Tensor, causal: bool, grad: Tensor) -> tuple:
    """Return output and gradients of softmax attention in float64."""
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    scores = leaves[0] @ leaves[1].mT * q.shape[-1] ** -0.5
    if causal:
        hidden = torch.ones_like(scores, dtype=torch.bool).triu(k.shape[2] - q.shape[2] + 1)
        scores = scores.masked_fill(hidden, -torch.inf)
    output = scores.softmax(-1) @ leaves[2]
    return output.detach(), *torch.autograd.grad(output, leaves, grad.double())


def sampled_grad(v: Tensor) -> Tensor:
    """Return a gradient of the output that is zero outside the sampled rows of the first head."""
    grad = torch.zeros_like(v)
    for rows in runs_of(v.shape[2]):
        grad[:1, :1, rows] = torch.randn_like(v[:1, :1, rows])
    return grad


def worst_error(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, found: list, causal: bool,
                oracle: Callable[..., tuple]) -> float:  # fmt: skip
    """Return the largest relative error of output, dQ, dK and dV in the sampled rows."""
    q, k, v, grad, output, dq, dk, dv = (x[:1, :1] for x in (q, k, v, grad, *found))
    outs, dqs = [], []
    want_dk, want_dv = (torch.zeros_like(x, dtype=torch.float64) for x in (k, v))
    for rows in runs_of(q.shape[2]):
        end = rows.stop if causal else k.shape[2]
        one = oracle(q[:, :, rows], k[:, :, :end], v[:, :, :end], causal, grad=grad[:, :, rows])
        outs.append((output[:, :, rows], one[0]))
        dqs.append((dq[:, :, rows], one[1]))
        want_dk[:, :, :end] += one[2]
        want_dv[:, :, :end] += one[3]
    pairs = [tuple(torch.cat(x, 2) for x in zip(*both, strict=True)) for both in (outs, dqs)]
    errors = [relative_error(*pair) for pair in (*pairs, (dk, want_dk), (dv, want_dv))]
    return max(errors) if all(e == e for e in errors) else float("nan")


def density_of(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> float:
    """Return the share of the blocks that causality leaves which hold any weight."""
    if q.is_cuda:
        op = torch.ops.adasplash.attention_forward
        active = op(q, k, v, None, None, q.shape[-1] ** -0.5, causal, -1, -1)[2]
    else:
        weights = torch.nn.functional.pad(
            oracle_weights(q, k, causal), (0, -k.shape[2] % 64, 0, -q.shape[2] % 64)
        )
        active = (weights.unflatten(-1, (-1, 64)).unflatten(-3, (-1, 64)) > 0).any(-1).any(-2)
    rows, blocks = active.shape[-2:]
    ends = -(-(torch.arange(rows) + 1) * blocks // rows)  # the tile of the diagonal belongs to it
    whole = int(ends.sum()) if causal else rows * blocks
    return int(active.count_nonzero()) / (whole * active.shape[0] * active.shape[1])


def peak_of(call: Callable[[], object], device: torch.device) -> float | None:
    """Return the MiB that a call needs at most beyond what was there before it."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


class Bench:
    """Measures case after case into one file, until the time is up."""

    def __init__(self, options: argparse.Namespace, device: torch.device) -> None:
        self.options, self.device = options, device
        self.end = time.monotonic() + options.budget if options.budget else float("inf")
        self.path = options.output / f"{options.name}_grid.json"
        self.results = Results("adasplash", command=COMMAND, seed=0)
        self.failed: list[str] = []
        if self.path.exists():
            stored = Results.load(self.path)
            if stored.environment["gpus"] != self.results.environment["gpus"]:
                raise SystemExit(f"{self.path} is of another machine; choose a new folder")
            self.results.cases = stored.cases

    def left(self) -> float:
        return self.end - time.monotonic()

    def has(self, provider: str, case: dict[str, object]) -> bool:
        return any(
            c["provider"] == provider and case.items() <= c["parameters"].items()
            for c in self.results.cases
        )

    def inputs(self, grid: Grid, gain: float) -> tuple[Tensor, Tensor, Tensor]:
        """Return q, k and v in bfloat16: fewer heads the longer they are, at least one."""
        heads = max(1, self.options.tokens // grid.length)
        batch = 2 if heads % 2 == 0 else 1
        return clustered_inputs(batch, heads // batch, grid.length, grid.dim_head, gain,
                                dtype=torch.bfloat16, device=self.device)  # fmt: skip

    def contend(self, name: str, attend: Attend, grid: Grid, gain: float) -> None:
        """Check and time one contender on one input, unless that is stored."""
        case = {**grid._asdict(), "gain": gain}
        if self.has(name, case) or self.left() < 3:
            return
        q, k, v = self.inputs(grid, gain)
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        grad = sampled_grad(v)

        def forward() -> Tensor:
            with torch.no_grad():
                return attend(q, k, v)

        def both() -> tuple[Tensor, ...]:
            output = attend(*leaves)
            return output.detach(), *torch.autograd.grad(output, leaves, grad)

        ours = name == "adasplash"
        try:
            found = both()
        except RuntimeError as reason:
            print(f"{name}, {case} cannot run: {str(reason).splitlines()[0]}", flush=True)
            return
        oracle = oracle_attention if ours else oracle_softmax
        error = worst_error(q, k, v, grad, found, grid.causal, oracle)
        del found
        if not error <= BUDGET[q.dtype]:
            self.failed.append(f"{name}, {case}: error {error:.2e}")
            print(self.failed[-1], flush=True)
            return
        grad.normal_()
        if ours:
            case["density"] = round(density_of(q, k, v, grid.causal), 4)
        case |= {"batch": q.shape[0], "heads": q.shape[1]}
        shown = []
        for metric, call in (("forward", forward), ("forward + backward", both)):
            peak = peak_of(call, self.device)
            if self.device.type == "cuda":
                from _gpu import graphed

                call = graphed(call)
            timing = time_call(call, self.device, 10, self.options.rep)
            self.results.add(name, metric, timing.median_ms, "ms", p20=timing.p20_ms,
                             p80=timing.p80_ms, n=timing.n, peak_mib=peak, error=error,
                             **case)  # fmt: skip
            shown.append(f"{timing.median_ms:.3f} ms")
        self.results.save(self.path)
        print(f"{name}, {case}: {' / '.join(shown)}, error {error:.1e}", flush=True)

    def upstream(self, length: int) -> None:
        """Let the paper's package tune itself for a length, then time it on two densities."""
        grid, name = Grid(64, length, True), "adasplash 0.2.2"
        cases = [{**grid._asdict(), "gain": gain} for gain in GAINS[:3:2]]
        if self.has(name, cases[-1]) or self.left() < 30:
            return
        with tempfile.TemporaryDirectory() as folder:
            files = []
            for case in cases:
                q, k, v = self.inputs(grid, case["gain"])
                files.append((Path(folder, f"{case['gain']}.pt"), [q, k, v, sampled_grad(v)]))
                torch.save(files[-1][1], files[-1][0])
            try:
                done = subprocess.run(
                    [sys.executable, str(WORKER), *(str(file) for file, _ in files)],
                    env={**os.environ, "PYTHONPATH": str(self.options.upstream.resolve())},
                    capture_output=True, text=True, check=True,
                    timeout=None if self.options.budget is None else self.left(),
                )  # fmt: skip
            except subprocess.TimeoutExpired:
                print(f"{name}, {length} tokens: no time left to tune it", flush=True)
                return
            except subprocess.CalledProcessError as reason:
                print(f"{name}, {length} tokens failed: {reason.stderr[-500:]}", flush=True)
                return
            lines = done.stdout.splitlines()[-len(files) :]
            for case, line, (file, tensors) in zip(cases, lines, files, strict=True):
                found = torch.load(file)
                error = worst_error(*tensors, found, True, oracle_attention)
                batch, heads = tensors[0].shape[:2]
                for metric, value in json.loads(line).items():
                    if metric.startswith("dense"):
                        continue
                    unit = "s" if "first call" in metric else "ms"
                    self.results.add(name, metric, value, unit, error=error, batch=batch,
                                     heads=heads, **case)  # fmt: skip
                print(f"{name}, {case}: {line}, error {error:.1e}", flush=True)
        self.results.save(self.path)


def grids(options: argparse.Namespace) -> Iterator[Grid]:
    """Yield every shape: lengths as they were given, non-causal ones a little later."""
    ranks = [
        (rank + 4 * (not causal), rank, options.dims.index(dim), Grid(dim, length, causal))
        for (rank, length), dim, causal in product(
            enumerate(options.lengths), options.dims, (True, False)
        )
    ]
    return (grid for *_, grid in sorted(ranks))


def measure(bench: Bench) -> None:
    """Measure the grid in its order, upstream behind the first shapes of every length."""
    options, waiting = bench.options, list(bench.options.upstream_lengths)
    for grid in grids(options):
        for name, backend in BACKENDS.items():  # their time does not depend on the data
            bench.contend(name, partial(softmax, backend, grid.causal), grid, 0.0)
        for gain in options.gains:
            bench.contend("adasplash", partial(adasplash, is_causal=grid.causal), grid, gain)
        if options.upstream and not grid.causal and waiting:
            bench.upstream(waiting.pop(0))
    for length in waiting if options.upstream else ():
        bench.upstream(length)


def ratios(results: Results, metric: str) -> dict[Grid, list[tuple[float, float]]]:
    """Return for every shape (density, time of the fastest softmax over ours), by density."""
    fastest: dict[Grid, float] = {}
    ours: dict[Grid, list[tuple[float, float]]] = {}
    for case in results.cases:
        if case["metric"] != metric or case["provider"] == "adasplash 0.2.2":
            continue
        parameters, time_ms = case["parameters"], case["median"]
        grid = Grid(*(parameters[name] for name in Grid._fields))
        if case["provider"] == "adasplash":
            ours.setdefault(grid, []).append((parameters["density"], time_ms))
        else:
            fastest[grid] = min(time_ms, fastest.get(grid, time_ms))
    return {
        grid: sorted((density, fastest[grid] / ms) for density, ms in points)
        for grid, points in ours.items() if grid in fastest
    }  # fmt: skip


def crossover(points: list[tuple[float, float]]) -> float | None:
    """Return the density at which the ratio falls through 1, on a line through the logarithms."""
    for (left, high), (right, low) in pairwise(points):
        if high >= 1 > low:
            a, b, x, y = torch.tensor([left, right, high, low], dtype=torch.float64).log()
            return float((a + (b - a) * x / (x - y)).exp())
    return None


def draw(results: Results, path: Path) -> None:
    """Write the speed over block density, forward and backward, one panel for each head size."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.lines import Line2D

    found = ratios(results, "forward + backward")
    dims = sorted({grid.dim_head for grid in found})
    lengths = sorted({grid.length for grid in found})
    if not found:
        return
    shades = mpl.colormaps["cividis"](torch.linspace(0, 0.9, len(lengths)).numpy())
    figure, axes = plt.subplots(1, len(dims), figsize=(1 + 5 * len(dims), 4.2), sharey=True,
                                squeeze=False, layout="constrained")  # fmt: skip
    for axis, dim in zip(axes[0], dims, strict=True):
        for grid, points in sorted(found.items()):
            if grid.dim_head == dim:
                axis.plot(*zip(*points, strict=True), color=shades[lengths.index(grid.length)],
                          linestyle="-" if grid.causal else "--",
                          marker="o" if grid.causal else "s", markersize=4)  # fmt: skip
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set(xscale="log", yscale="log", xlabel="share of blocks that hold weight",
                 title=f"head size {dim}")  # fmt: skip
        axis.yaxis.set_major_locator(mpl.ticker.LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter("{x:g}x")
        axis.yaxis.set_minor_formatter(mpl.ticker.NullFormatter())
        axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("times as fast as the best softmax\n(forward + backward)")
    keys = [Line2D([], [], color=c, label=f"{n:,}") for n, c in zip(lengths, shades, strict=True)]
    keys.append(Line2D([], [], color="grey", marker="o", label="causal"))
    keys.append(Line2D([], [], color="grey", marker="s", linestyle="--", label="not causal"))
    axes[0, -1].legend(handles=keys, title="tokens", fontsize=8)
    part = path.with_suffix(".part")
    figure.savefig(part, dpi=110, format="png")
    part.replace(path)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--name", default="attention", help="start of the results' file names")
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS),
                        help="the most important first")  # fmt: skip
    parser.add_argument("--dims", type=int, nargs="+", default=[64, 128], help="head sizes")
    parser.add_argument("--gains", type=float, nargs="+", default=list(GAINS),
                        help="strengths of the blocks' topics: several densities")  # fmt: skip
    parser.add_argument("--tokens", type=int, default=262144,
                        help="batch x heads x length, as far as one head allows")  # fmt: skip
    parser.add_argument("--dtypes", nargs="*", default=["float32", "float16", "bfloat16"],
                        help="dtypes of the check of small shapes; none leaves it out")  # fmt: skip
    parser.add_argument("--upstream", type=Path, help="folder with adasplash 0.2.2")
    parser.add_argument("--upstream-lengths", type=int, nargs="+", default=[8192],
                        help="powers of two")  # fmt: skip
    parser.add_argument("--budget", type=float, help="stop after so many seconds")
    parser.add_argument("--rep", type=float, default=50, help="ms of timed runs for a figure")
    parser.add_argument("--device", default="auto")
    options = parser.parse_args(arguments)
    device = pick_device(options.device)[0]
    torch.manual_seed(0)
    bench = Bench(options, device)
    if options.dtypes and device.type == "cuda":
        errors = Results("adasplash", command=COMMAND, seed=0)
        good = check(errors, options.dtypes, options.dims)
        errors.save(options.output / f"{options.name}_errors.json")
        if not good:
            raise SystemExit("an error is over its budget: nothing is timed")
    measure(bench)
    if find_spec("matplotlib"):
        draw(bench.results, options.output / f"{options.name}_crossover.png")
    print(bench.results.to_markdown())
    for metric in ("forward", "forward + backward"):
        for grid, points in ratios(bench.results, metric).items():
            falls = crossover(points)
            print(f"{metric}, {grid}: {max(r for _, r in points):.2f} at best; as fast as softmax "
                  f"at density {'unknown' if falls is None else round(falls, 3)}")  # fmt: skip
    if bench.failed:
        raise SystemExit("errors over the budget, not timed:\n" + "\n".join(bench.failed))


if __name__ == "__main__":
    main()
