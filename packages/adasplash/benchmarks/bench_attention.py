"""Our attention beside softmax attention on one GPU: exactness first, then time.

Run as `python packages/adasplash/benchmarks/bench_attention.py --output FOLDER`.
"""

from __future__ import annotations

import argparse
from functools import partial
from itertools import product
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from adasplash import adasplash
from adasplash.kernels.attention.forward import screen, solve
from adasplash.kernels.attention.tiles import tiles_for
from adasplash.testing import (
    clustered_inputs,
    oracle_attention,
    random_inputs,
    relative_error,
)
from fourfold_common import Results, time_call

BUDGET = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}


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


def softmax(backend: SDPBackend, causal: bool, q, k, v):
    with sdpa_kernel(backend):
        return scaled_dot_product_attention(q, k, v, is_causal=causal)


def parts(q, k, v, causal: bool) -> tuple[dict[str, object], float, float]:
    """Return the stages of the forward as calls, and the shares of listed and active blocks."""
    tiles, scale = tiles_for(q, v), q.shape[-1] ** -0.5
    top, marked = screen(q, k, None, None, scale, causal, None, tiles)
    active = solve(q, k, v, None, None, top, marked, scale, causal, None, tiles)[2]
    blocks = active.shape[-1]
    whole = active[..., 0].numel() * (blocks + 1) / 2 if causal else active.numel()
    stages = {
        "screen": partial(screen, q, k, None, None, scale, causal, None, tiles),
        "solve": partial(solve, q, k, v, None, None, top, marked, scale, causal, None, tiles),
    }
    return stages, marked.sum().item() / whole, active.sum().item() / whole


def measure(results: Results, lengths: list[int], dims: list[int]) -> None:
    """Time forward and forward with backward at several block densities, bf16."""
    for dim, length, causal in product(dims or (64, 128), lengths, (True, False)):
        heads = max(1, 2 * 16 * 8192 // length // 2)
        for gain in (4.0, 2.0, 1.0, 0.0):
            contenders = {"adasplash": partial(adasplash, is_causal=causal)}
            if gain == 0.0:  # softmax does not depend on the data
                for name, backend in (
                    ("SDPA flash", SDPBackend.FLASH_ATTENTION),
                    ("SDPA cuDNN", SDPBackend.CUDNN_ATTENTION),
                ):
                    contenders[name] = partial(softmax, backend, causal)
            q, k, v = clustered_inputs(
                2, heads, length, dim, gain, dtype=torch.bfloat16, device="cuda"
            )
            stages, listed, density = parts(q, k, v, causal)
            case = {"length": length, "dim_head": dim, "heads": 2 * heads, "causal": causal,
                    "density": round(density, 3), "listed": round(listed, 3)}  # fmt: skip

            def add(name, metric, call, case=case):
                timing = time_call(call, "cuda")
                results.add(name, metric, timing.median_ms, "ms", p20=timing.p20_ms,
                            p80=timing.p80_ms, n=timing.n, **case)  # fmt: skip

            with torch.no_grad():
                for name, attend in contenders.items():
                    add(name, "forward", partial(attend, q, k, v))
                for stage, call in stages.items():
                    add("adasplash", stage, call)
            for name, attend in contenders.items():
                leaves = [x.clone().requires_grad_() for x in (q, k, v)]
                grad = torch.randn_like(v)

                def both(attend=attend, leaves=leaves, grad=grad):
                    attend(*leaves).backward(grad)

                add(name, "forward + backward", both)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096, 8192])
    parser.add_argument("--dims", type=int, nargs="+", default=[], help="head sizes; all if none")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "float16", "bfloat16"],
                        help="dtypes of the error check")  # fmt: skip
    parser.add_argument("--name", default="attention", help="start of the results' file names")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    errors = Results("adasplash", command="bench_attention.py", seed=0)
    good = check(errors, arguments.dtypes, arguments.dims)
    errors.save(arguments.output / f"{arguments.name}_errors.json")
    if not good:
        raise SystemExit("an error is over its budget: nothing is timed")
    times = Results("adasplash", command="bench_attention.py", seed=0)
    measure(times, arguments.lengths, arguments.dims)
    times.save(arguments.output / f"{arguments.name}_times.json")
    print(times.to_markdown())


if __name__ == "__main__":
    main()
