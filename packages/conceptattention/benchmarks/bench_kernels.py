"""What each kernel takes: microseconds and share of the card's own copy bandwidth, cold weights.

    python benchmarks/bench_kernels.py --output results/kernels-h100.json           # one GPU
    python benchmarks/bench_kernels.py --tune --output results/kernels-tuning.json  # and all tiles

Every operation of one dual-stream layer of Flux.1 (width 3072, 24 heads, 4,096 patches, bfloat16),
checked against float64 on fresh random inputs. Inputs rotate over so many copies that the cache
cannot hold them; launches are captured in a CUDA graph, so the host is not timed. The torch twin is
timed in the same way.
"""

import argparse
import functools
import itertools
import json
import multiprocessing
import statistics
import time
from pathlib import Path

import torch

from conceptattention.kernels import concept, linear
from conceptattention.kernels.concept import op as concept_op
from conceptattention.kernels.linear import Norm
from fourfold_common import environment_report

WIDTH, HEADS, PATCHES = 3072, 24, 4096
COLD = 400e6  # bytes over which the inputs of one operation rotate


def normal(*shape, dtype=torch.bfloat16):
    """Return normal numbers on the GPU."""
    return torch.randn(shape, device="cuda", dtype=torch.float32).to(dtype)


def linear_case(name, rows, dtype, width=WIDTH):
    """Return weights' shape and count, and the keyword arguments, of one layer's linear layer."""
    table = normal(1, 1, 6 * width, dtype=dtype)
    norm = Norm(table[..., :width], table[..., width : 2 * width], 1e-6)
    gated = {
        "gate": table[..., 2 * width : 3 * width],
        "residual": normal(1, rows, width, dtype=dtype),
    }
    return {
        "modulation": (1, 6 * width, width, 1, {"act_in": "silu"}),
        "qkv": (rows, width, width, 3, {"norm": norm}),
        "out": (rows, width, width, 1, gated),
        "up": (rows, 4 * width, width, 1, {"norm": norm, "act_out": "gelu_tanh"}),
        "down": (rows, width, 4 * width, 1, gated),
    }[name]


def widened(value):
    """Return float64 copies."""
    if isinstance(value, torch.Tensor):
        return value.double()
    if isinstance(value, Norm):
        return Norm(**{key: widened(part) for key, part in vars(value).items()})
    return value


def error(ours, exact):
    """Return the relative error; NaN where something was not written."""
    return float((ours.double() - exact).norm() / exact.norm())


def graph_time(calls, repeats=3, replays=4):
    """Return the median microseconds of one call, over replays of a graph of all calls."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for call in calls:
                call()
        graph.replay()
        torch.cuda.synchronize()
        times = []
        for _ in range(repeats):
            marks = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            marks[0].record()
            for _ in range(replays):
                graph.replay()
            marks[1].record()
            torch.cuda.synchronize()
            times.append(1000 * marks[0].elapsed_time(marks[1]) / replays / len(calls))
    return statistics.median(times)


@functools.lru_cache(maxsize=1)
def linear_inputs(name, rows, dtype):
    """Return rows, sets of weights, biases, keyword arguments, the exact result and megabytes."""
    tokens, columns, features, weights, rest = linear_case(name, rows, dtype)
    size = weights * columns * features * 2
    copies = max(2, int(COLD / size))
    sets = [
        [normal(columns, features, dtype=dtype) / features**0.5 for _ in range(weights)]
        for _ in range(copies)
    ]
    bias = [normal(columns, dtype=dtype) for _ in range(weights)]
    x = normal(1, tokens, features, dtype=dtype) + 1
    exact = linear.reference.few_row_linear(
        widened(x), [w.double() for w in sets[0]], [b.double() for b in bias],
        **{key: widened(value) for key, value in rest.items()},
    )  # fmt: skip
    return x, sets, bias, rest, exact, size / 1e6


def linear_row(name, rows, options=None, *, twin=True, dtype=torch.bfloat16):
    """Return errors and times of one linear layer."""
    x, sets, bias, rest, exact, size = linear_inputs(name, rows, dtype)
    ours = linear.few_row_linear(x, sets[0], bias, **rest, options=options)
    row = {"kernel": name, "rows": rows, "error": error(ours, exact), "megabytes": size}
    row["us"] = graph_time([
        lambda w=w: linear.few_row_linear(x, w, bias, **rest, options=options) for w in sets
    ])  # fmt: skip
    if twin:
        row["torch_us"] = graph_time([
            lambda w=w: linear.reference.few_row_linear(x, w, bias, **rest) for w in sets
        ])  # fmt: skip
    return row


@functools.lru_cache(maxsize=1)
def attention_inputs(rows, dtype, dim=128):
    """Return queries, keys and values of concepts, several sets of the patches', and the tables."""
    q, k, v = normal(3, 1, rows, HEADS, dim, dtype=dtype).transpose(2, 3).unbind(0)
    copies = max(2, int(COLD / (2 * PATCHES * HEADS * dim * 2)))
    sides = [
        tuple(normal(1, PATCHES, HEADS, dim, dtype=dtype).transpose(1, 2) for _ in range(2))
        for _ in range(copies)
    ]
    angle = torch.randn(PATCHES, dim // 2, device="cuda").repeat_interleave(2, dim=1)
    norms = [concept.HeadNorm("rms", normal(dim, dtype=dtype) + 1, 1e-6) for _ in range(2)]
    return (q, k, v), sides, (angle.cos(), angle.sin()), tuple(norms)


def attention_row(rows, options=None, *, twin=True, dtype=torch.bfloat16):
    """Return errors and times of the attention, partial and merge together."""
    (q, k, v), sides, turns, norms = attention_inputs(rows, dtype)
    halves = concept.halved(turns, q.shape[-1])
    tables = tuple(part.to(dtype) for part in turns)

    def normed(x, norm):
        return torch.nn.functional.rms_norm(x, x.shape[-1:], norm.weight.to(x.dtype), norm.eps)

    def kernel(side):
        return concept.concept_attention(q, k, v, *side, halves, norms, options)

    def by_torch(side):
        own = normed(q, norms[0]), normed(k, norms[1]), v
        return concept.reference.concept_attention(*own, *side, tables)

    wide = [
        part.double() for part in (normed(q.double(), norms[0]), normed(k.double(), norms[1]), v)
    ]
    exact = concept.reference.concept_attention(
        *wide, *(part.double() for part in sides[0]), tuple(part.double() for part in turns)
    )
    row = {
        "kernel": "attention", "rows": rows, "error": error(kernel(sides[0]), exact),
        "torch_error": error(by_torch(sides[0]), exact),
        "megabytes": 2 * sides[0][0].numel() * 2 / 1e6,
        "us": graph_time([lambda side=side: kernel(side) for side in sides]),
    }  # fmt: skip
    if twin:
        row["torch_us"] = graph_time([lambda side=side: by_torch(side) for side in sides])
    return row


def score_row(rows, options=None, *, twin=True, dtype=torch.bfloat16):
    """Return errors and times of scores, softmax and running means."""
    sets = [
        normal(1, PATCHES, WIDTH, dtype=dtype) for _ in range(int(COLD / (PATCHES * WIDTH * 2)))
    ]
    ours = normal(1, rows, WIDTH, dtype=dtype) / WIDTH**0.5
    means = torch.zeros(6, 1, rows, PATCHES, device="cuda")
    rest = (1, 1.0, 1.0, False)
    concept_op.add_scores(ours, sets[0], means[0], means[1], *rest, options)
    exact = ours.double() @ sets[0].double().mT
    row = {
        "kernel": "scores", "rows": rows, "error": error(means[0], exact),
        "soft_error": error(means[1], exact.softmax(1)), "megabytes": sets[0].numel() * 2 / 1e6,
        "us": graph_time([
            lambda x=x: concept_op.add_scores(ours, x, means[2], means[3], *rest, options)
            for x in sets
        ]),
    }  # fmt: skip
    if twin:
        row["torch_us"] = graph_time([
            lambda x=x: concept.reference.add_scores(ours, x, means[4], means[5], *rest)
            for x in sets
        ])  # fmt: skip
    return row


def copy_bandwidth():
    """Return bytes per second, read and written, of a copy of 1 GB."""
    source = torch.randn(2**28, device="cuda")
    target = torch.empty_like(source)
    micro = graph_time([lambda: target.copy_(source)] * 2)
    return 2 * source.numel() * 4 / micro * 1e6


def tiles(name):
    """Return every choice to try."""
    if name == "attention":
        return [
            {"block": block, "programs": programs, "num_warps": warps, "num_stages": stages}
            for (block, stages, warps), programs in itertools.product(
                ((32, 2, 4), (32, 3, 4), (64, 2, 4), (64, 2, 8), (64, 3, 4), (128, 2, 8)),
                (264, 396, 528, 792),
            )
        ]
    if name == "scores":
        return [
            {"BLOCK_N": n, "BLOCK_D": d, "num_warps": w, "num_stages": s}
            for n, d, w, s in itertools.product((16, 32), (128, 256), (2, 4), (3, 5))
        ]
    made = [
        {"BLOCK_N": n, "BLOCK_K": k, "num_warps": w, "num_stages": s}
        for (n, w), k, s in itertools.product(
            ((16, 4), (16, 2), (32, 4), (32, 2), (64, 4), (128, 8)), (64, 128, 256, 512), (4, 6)
        )
    ]
    return [
        part for part in made
        if 16384 <= part["BLOCK_N"] * part["BLOCK_K"] * 2 * part["num_stages"] <= 100000
    ]  # fmt: skip


NAMES = ("modulation", "qkv", "out", "up", "down", "attention", "scores")


def make(name, rows, options=None, **rest):
    """Return the row of one kernel."""
    by_name = {"attention": attention_row, "scores": score_row}
    if name in by_name:
        return by_name[name](rows, options, **rest)
    return linear_row(name, rows, options, **rest)


def compile_one(job):
    """Compile one choice in a process of its own, so that it is found in the cache later."""
    name, rows, options = job
    global COLD
    COLD = 0
    try:
        torch.manual_seed(0)
        if name in ("attention", "scores"):
            (q, k, v), sides, turns, norms = attention_inputs(rows, torch.bfloat16)
            halves = concept.halved(turns, 128)
            if name == "attention":
                concept.concept_attention(q, k, v, *sides[0], halves, norms, options)
            else:
                means = torch.zeros(2, 1, rows, PATCHES, device="cuda")
                x = normal(1, PATCHES, WIDTH)
                concept_op.add_scores(normal(1, rows, WIDTH), x, means[0], means[1], 1, 1.0, 1.0,
                                      False, options)  # fmt: skip
        else:
            tokens, columns, features, weights, given = linear_case(name, rows, torch.bfloat16)
            made = [normal(columns, features)] * weights
            linear.few_row_linear(
                normal(1, tokens, features), made, [normal(columns)] * weights, **given,
                options=options,
            )  # fmt: skip
        torch.cuda.synchronize()
    except Exception as problem:  # a tile that does not fit
        return str(problem)[:200]
    return ""


def main():
    """Run the benchmark and write its rows as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", default="5", help="numbers of concepts, separated by commas")
    parser.add_argument("--tune", action="store_true", help="time every tile, for the first number")
    parser.add_argument("--dtypes", action="store_true", help="check float32 and float16 too")
    parser.add_argument("--processes", type=int, default=12, help="that compile, with --tune")
    parser.add_argument("--seconds", type=float, default=60, help="limit of the tuning")
    parser.add_argument("--output", type=Path, default=None)
    given = parser.parse_args()
    counts = [int(part) for part in given.rows.split(",")]
    rows, tuned = [], []
    start = time.perf_counter()
    if given.tune:
        jobs = [(name, counts[0], options) for name in NAMES for options in tiles(name)]
        with multiprocessing.get_context("spawn").Pool(given.processes) as pool:
            problems = pool.map(compile_one, jobs, chunksize=4)
        print(f"{len(jobs)} tiles compiled in {time.perf_counter() - start:.0f} s", flush=True)
        start = time.perf_counter()
        for (name, count, options), problem in zip(jobs, problems, strict=True):
            if problem or time.perf_counter() - start > given.seconds:
                tuned.append({"kernel": name, "options": options, "problem": problem or "late"})
                continue
            row = make(name, count, options, twin=False)
            tuned.append({**row, "options": options})
        for name in NAMES:
            fine = [row for row in tuned if row["kernel"] == name and row.get("error", 1) < 2e-2]
            for row in sorted(fine, key=lambda row: row["us"])[:4]:
                print(f"{name:10} {row['us']:7.2f} us  {row['options']}", flush=True)
    torch.manual_seed(0)
    bandwidth = copy_bandwidth()
    print(f"copy: {bandwidth / 1e12:.2f} TB/s", flush=True)
    for name, count in itertools.product(NAMES, counts):
        row = make(name, count)
        row["percent_of_copy"] = 100 * row["megabytes"] / row["us"] * 1e12 / bandwidth
        rows.append(row)
        print(
            f"{name:10} r={count:2}  {row['us']:7.2f} us  {row['percent_of_copy']:5.1f} % of copy  "
            f"torch {row['torch_us']:7.2f} us  error {row['error']:.1e}", flush=True,
        )  # fmt: skip
    for dtype, bound in ((torch.float32, 1e-5), (torch.float16, 2e-3)):
        for name in NAMES if given.dtypes else ():
            row = make(name, counts[0], twin=False, dtype=dtype)
            print(f"{name:10} {dtype}  error {row['error']:.1e}", flush=True)
            rows.append({**row, "dtype": str(dtype), "passed": row["error"] < bound})
    if given.output is not None:
        report = {
            "environment": environment_report(), "copy_bandwidth": bandwidth, "rows": rows,
            "tuning": tuned,
        }  # fmt: skip
        given.output.write_text(json.dumps(report, indent=1, default=str))


if __name__ == "__main__":
    main()
