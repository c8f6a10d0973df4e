"""Our attention beside softmax attention on one GPU, over lengths, head sizes and block densities.

Run as `python packages/adasplash/benchmarks/bench_attention.py --output FOLDER`. `--budget SECONDS`
stops in time; the cases that matter most come first. Every figure is stored at once in
`attention_grid.json`; run again, the script leaves out what is there.

On a GPU replays of CUDA graphs are timed, so that no host work counts, from a cold L2 cache. A case
is checked, then timed: output and gradients of sampled rows are compared with float64. As the
gradient that comes in is zero in all other rows, all of dK and dV is compared. Inputs are searched
for a share of 64x64 blocks that hold weight; what was found is stored, with the share of 128x128
blocks and of weights. By default tokens of a block share a topic; with `--inputs local` heads look
near by and at the first tokens.
"""

from __future__ import annotations

import argparse
import math
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
    local_inputs,
    oracle_attention,
    oracle_weights,
    relative_error,
)
from fourfold_common import Results, pick_device, time_call

COMMAND = "bench_attention.py"
BUDGET = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}
LENGTHS = (8192, 32768, 2048, 131072, 1024, 4096, 16384, 65536)  # the most important first
DENSITIES = (0.05, 1.0, 0.1, 0.25, 0.02, 0.5)
GAIN = (0.05, 4.0)  # of a block's topic: the higher, the emptier are the blocks
BACKENDS = {
    "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION,
    "SDPA flash": SDPBackend.FLASH_ATTENTION,
    "SDPA efficient": SDPBackend.EFFICIENT_ATTENTION,
}
INPUTS = {"topics": clustered_inputs, "local": local_inputs}
METRICS = ("forward", "forward + backward")
ROWS = 16  # a run of rows that is compared with float64
Attend = Callable[..., Tensor]


class Grid(NamedTuple):
    """One shape: what all contenders of a table's block have in common."""

    dim_head: int
    length: int
    causal: bool


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


def blocks_of(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """Return where 64x64 blocks hold any weight, bool `[batch, heads, rows, blocks]`."""
    if q.is_cuda:  # as the kernels recorded it: their tiles are 64x64 up to a head size of 128
        return recorded_blocks(q, k, v, causal)
    weights = torch.nn.functional.pad(
        oracle_weights(q, k, causal), (0, -k.shape[2] % 64, 0, -q.shape[2] % 64)
    )
    return (weights.unflatten(-1, (-1, 64)).unflatten(-3, (-1, 64)) > 0).any(-1).any(-2)


def recorded_blocks(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """Return the blocks for which the kernels keep a bit: eight in a byte, the lowest first."""
    op = torch.ops.adasplash.attention_forward
    packed = op(q, k, v, None, None, q.shape[-1] ** -0.5, causal, -1, -1)[2]
    bits = packed[..., None] >> torch.arange(8, dtype=torch.uint8, device=packed.device) & 1
    return bits.flatten(-2)[..., : -(-k.shape[2] // 64)].bool()


def share(active: Tensor, causal: bool, merged: int = 1) -> float:
    """Return the share of the blocks that causality leaves which are active.

    Args:
        active: From `blocks_of`.
        causal: Whether blocks above the diagonal are out of sight.
        merged: So many blocks a side count as one, active if any of them is.
    """
    rows, blocks = (-size % merged for size in active.shape[-2:])
    whole = torch.nn.functional.pad(active, (0, blocks, 0, rows))
    whole = whole.unflatten(3, (-1, merged)).unflatten(2, (-1, merged)).any(5).any(3)
    rows, blocks = whole.shape[-2:]
    ends = -(-(torch.arange(rows) + 1) * blocks // rows)  # the tile of the diagonal belongs to it
    visible = int(ends.sum()) if causal else rows * blocks
    return int(whole.count_nonzero()) / (visible * whole.shape[0] * whole.shape[1])


def weights_above_zero(q: Tensor, k: Tensor, causal: bool) -> float:
    """Return the share of visible weights above zero, in sampled rows of the first head."""
    q, k = q[:1, :1], k[:1, :1]
    held = seen = 0
    for rows in runs_of(q.shape[2]):
        end = rows.stop if causal else k.shape[2]
        held += int((oracle_weights(q[:, :, rows], k[:, :, :end], causal) > 0).sum())
        many = rows.stop - rows.start
        seen += many * end - (many * (many - 1) // 2 if causal else 0)
    return held / seen


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
        end = "grid" if options.inputs == "topics" else options.inputs
        self.path = options.output / f"{options.name}_{end}.json"
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

    def inputs(self, grid: Grid, gain: float, heads: int | None = None) -> tuple[Tensor, ...]:
        """Return q, k and v in bfloat16: fewer heads the longer they are, at least one."""
        heads = heads or max(1, self.options.tokens // grid.length)
        batch = 2 if heads % 2 == 0 else 1
        return INPUTS[self.options.inputs](
            batch, heads // batch, grid.length, grid.dim_head, gain,
            dtype=torch.bfloat16, device=self.device,
        )  # fmt: skip

    def gain(self, grid: Grid, density: float) -> float:
        """Return the strength of topics that leaves a share of blocks active, found by halving.

        It stays within `GAIN`: a short sequence has no topic to spare, so its blocks empty less.
        """
        if density >= 1:
            return 0.0
        low, high = (math.log(gain) for gain in GAIN)
        for _ in range(7):
            middle = (low + high) / 2
            q, k, v = self.inputs(grid, math.exp(middle), heads=1)
            if share(blocks_of(q, k, v, grid.causal), grid.causal) > density:
                low = middle
            else:
                high = middle
        return round(math.exp(high), 3)

    def contend(self, name: str, attend: Attend, grid: Grid, density: float = 1.0) -> None:
        """Check and time one contender on one input, unless that is stored."""
        case: dict[str, object] = {**grid._asdict(), "asked": density}
        if self.has(name, case) or self.left() < 3:
            return
        gain = self.gain(grid, density)
        if gain == GAIN[1] and self.has(name, {**grid._asdict(), "gain": gain}):
            return  # fewer blocks than in a case before cannot be had
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
        case |= {"batch": q.shape[0], "heads": q.shape[1], "inputs": self.options.inputs}
        if ours:
            active = blocks_of(q, k, v, grid.causal)
            case |= {"gain": gain, "density": round(share(active, grid.causal), 4),
                     "density_128": round(share(active, grid.causal, 2), 4),
                     "weights": round(weights_above_zero(q, k, grid.causal), 5),
                     "saved_mib": self.saved(attend, leaves)}  # fmt: skip
        shown = []
        for metric, call in zip(METRICS, (forward, both), strict=True):
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

    def saved(self, attend: Attend, leaves: list[Tensor]) -> float | None:
        """Return the MiB that wait for the backward, beyond q, k, v and the output."""
        if self.device.type != "cuda":
            return None
        before = torch.cuda.memory_allocated(self.device)
        output = attend(*leaves)
        held = torch.cuda.memory_allocated(self.device) - before
        return (held - output.numel() * output.element_size()) / 2**20


def grids(options: argparse.Namespace) -> Iterator[Grid]:
    """Yield every shape: lengths as they were given, non-causal ones a little later."""
    ranks = [
        (rank + 4 * (not causal), rank, options.dims.index(dim), Grid(dim, length, causal))
        for (rank, length), dim, causal in product(
            enumerate(options.lengths), options.dims, options.causal
        )
    ]
    return (grid for *_, grid in sorted(ranks))


def measure(bench: Bench) -> None:
    """Measure the grid in its order."""
    options = bench.options
    for grid in grids(options):
        for name in options.backends:  # their time does not depend on the data
            bench.contend(name, partial(softmax, BACKENDS[name], grid.causal), grid)
        for density in options.densities:
            bench.contend("adasplash", partial(adasplash, is_causal=grid.causal), grid, density)


def ratios(results: Results, metric: str) -> dict[Grid, list[tuple[float, float]]]:
    """Return for every shape (density, time of the fastest softmax over ours), by density."""
    fastest: dict[Grid, float] = {}
    ours: dict[Grid, list[tuple[float, float]]] = {}
    for case in results.cases:
        if case["metric"] != metric:
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
    """Write the speed over block density: a panel for each head size, the backward below."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.lines import Line2D

    both = [ratios(results, metric) for metric in METRICS]
    grids = sorted({grid for found in both for grid in found})
    if not grids:
        return
    dims = sorted({grid.dim_head for grid in grids})
    lengths = sorted({grid.length for grid in grids})
    shades = mpl.colormaps["cividis"](torch.linspace(0, 0.9, len(lengths)).numpy())
    figure, panels = plt.subplots(2, len(dims), figsize=(1 + 5 * len(dims), 7.4), sharex=True,
                                  squeeze=False, layout="constrained")  # fmt: skip
    for found, axes, metric in zip(both, panels, METRICS, strict=True):
        for axis, dim in zip(axes, dims, strict=True):
            for grid, points in sorted(found.items()):
                if grid.dim_head == dim:
                    axis.plot(*zip(*points, strict=True), color=shades[lengths.index(grid.length)],
                              linestyle="-" if grid.causal else "--",
                              marker="o" if grid.causal else "s", markersize=4)  # fmt: skip
            axis.axhline(1, color="black", linewidth=0.8)
            axis.set(xscale="log", yscale="log", title=f"{metric}, head size {dim}")
            axis.xaxis.set_major_locator(mpl.ticker.LogLocator(subs=(1, 2, 5)))
            axis.xaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_major_locator(mpl.ticker.LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_major_formatter("{x:g}x")
            axis.xaxis.set_minor_formatter(mpl.ticker.NullFormatter())
            axis.yaxis.set_minor_formatter(mpl.ticker.NullFormatter())
            axis.grid(alpha=0.3)
        axes[0].set_ylabel("times as fast as the best softmax")
    for axis in panels[-1]:
        axis.set_xlabel("share of 64x64 blocks that hold weight")
    keys = [Line2D([], [], color=c, label=f"{n:,}") for n, c in zip(lengths, shades, strict=True)]
    if {grid.causal for grid in grids} == {True, False}:
        keys.append(Line2D([], [], color="grey", marker="o", label="causal"))
        keys.append(Line2D([], [], color="grey", marker="s", linestyle="--", label="not causal"))
    panels[0, -1].legend(handles=keys, title="tokens", fontsize=8)
    part = path.with_suffix(".part")
    figure.savefig(part, dpi=110, format="png")
    part.replace(path)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--name", default="attention", help="start of the results' file names")
    parser.add_argument("--lengths", type=int, nargs="+", help="the most important first; "
                        "1K to 128K if left out, 256 on a CPU")  # fmt: skip
    parser.add_argument("--dims", type=int, nargs="+", default=[64, 128], help="head sizes")
    parser.add_argument("--densities", type=float, nargs="+", help="shares of blocks that "
                        "hold weight; 0.02 to 1 if left out, fewer on a CPU")  # fmt: skip
    parser.add_argument("--inputs", default="topics", choices=INPUTS, help="what q and k are like")
    parser.add_argument("--causal", type=int, nargs="+", default=[1, 0], choices=[0, 1],
                        help="1: with a causal mask; 0: without")  # fmt: skip
    parser.add_argument("--backends", nargs="*", default=list(BACKENDS), choices=list(BACKENDS),
                        help="of softmax attention")  # fmt: skip
    parser.add_argument("--tokens", type=int, help="batch x heads x length, as far as one head "
                        "allows; 262144 if left out, 2048 on a CPU")  # fmt: skip
    parser.add_argument("--budget", type=float, help="stop after so many seconds")
    parser.add_argument("--rep", type=float, default=50, help="ms of timed runs for a figure")
    parser.add_argument("--device", default="auto")
    options = parser.parse_args(arguments)
    options.causal = [bool(causal) for causal in options.causal]
    device = pick_device(options.device)[0]
    gpu = device.type == "cuda"
    options.lengths = options.lengths or (list(LENGTHS) if gpu else [256])
    options.densities = options.densities or (list(DENSITIES) if gpu else [0.6, 1.0])
    options.tokens = options.tokens or (262144 if gpu else 2048)
    torch.manual_seed(0)
    bench = Bench(options, device)
    measure(bench)
    if find_spec("matplotlib"):
        draw(
            bench.results,
            bench.path.with_name(f"{bench.path.stem.replace('grid', 'crossover')}.png"),
        )
    print(bench.results.to_markdown())
    for metric in METRICS:
        for grid, points in ratios(bench.results, metric).items():
            falls = crossover(points)
            print(f"{metric}, {grid}: {max(r for _, r in points):.2f} at best; as fast as softmax "
                  f"at density {'unknown' if falls is None else round(falls, 3)}")  # fmt: skip
    if bench.failed:
        raise SystemExit("errors over the budget, not timed:\n" + "\n".join(bench.failed))


if __name__ == "__main__":
    main()
