"""Errors of attention and of its gradients against float64, beside those of plain PyTorch.

Run as `python packages/adasplash/benchmarks/bench_errors.py --output FOLDER`. Plain PyTorch is
dense attention in the same dtype: products by matmul, the map in float32, weights rounded to the
dtype before they meet the values, gradients by autograd. What is wanted is the tiled reference of
the package in float64, which its tests compare with bisection. An error is the norm of the
difference over the norm of what is wanted; stored is the largest of the output and all gradients
(q, k, v, and alpha, slopes and bias where there are some), and each of them.

Variants of the kernels take longer to compile than to run, so the cases are spread over processes.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from adasplash import adasplash, entmax
from adasplash.testing import clustered_inputs, random_inputs, relative_error
from fourfold_common import Results, pick_device

DTYPES = ("bfloat16", "float16", "float32")
ALLOWED = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}
GOAL = 2.0  # times the error of plain PyTorch in a half format


class Case(NamedTuple):
    """What is computed: batch, heads, heads of keys, rows, keys and head size; options by name."""

    shape: tuple[int, int, int, int, int, int]
    options: tuple[str, ...] = ()
    causal: bool = True
    gain: float | None = None  # of a topic that 64 tokens share; None for independent tokens
    alpha: float = 1.5


LONG = 4096
CASES = {
    **{
        f"{shape[3]} x {shape[4]}, size {shape[5]}{', causal' * causal}": Case(shape, causal=causal)
        for shape, causal in product(
            ((2, 4, 2, 257, 257, 64), (1, 2, 1, 100, 333, 128), (1, 2, 2, 130, 130, 32),
             (1, 1, 1, 1, 77, 80), (1, 1, 1, 200, 200, 256)),
            (True, False),
        )
    },
    **{
        f"topics, gain {gain}, size {dim}": Case((1, 2, 2, LONG, LONG, dim), gain=gain)
        for dim, gain in product((64, 128), (4.0, 1.0, 0.0))
    },
    **{
        f"alpha {alpha}": Case((1, 2, 2, 1024, 1024, 64), gain=1.0, alpha=alpha)
        for alpha in (1.01, 1.25, 1.75, 2.0)
    },
    **{
        name: Case((2, 4, 2, 300, 300, 64), (name,))
        for name in ("alpha by head", "key mask", "window", "softcap", "ALiBi", "bias")
    },
    "all of them": Case((2, 4, 2, 300, 300, 64), ("alpha by head", "key mask", "window", "softcap",
                                                  "ALiBi", "bias")),
}  # fmt: skip


def given(case: Case, device: torch.device) -> tuple[dict[str, object], list[Tensor]]:
    """Return the options of a case, and those of them that have gradients."""
    batch, heads, _, rows, keys, _ = case.shape
    generator = torch.Generator(device).manual_seed(1)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, device=device)

    options: dict[str, object] = {"alpha": case.alpha, "is_causal": case.causal}
    if "alpha by head" in case.options:
        options["alpha"] = torch.linspace(1.2, 1.8, heads, device=device)
    if "key mask" in case.options:
        options["key_padding_mask"] = uniform(batch, keys) < 0.8
    if "window" in case.options:
        options["window"] = (90, 0)
    if "softcap" in case.options:
        options["softcap"] = 5.0
    if "ALiBi" in case.options:
        options["alibi_slopes"] = 0.1 * uniform(heads)
    if "bias" in case.options:
        options["attn_bias"] = uniform(1, heads, rows, keys)
    names = ("alpha", "alibi_slopes", "attn_bias")
    learned = [x for name, x in options.items() if name in names and isinstance(x, Tensor)]
    return options, [x.requires_grad_() for x in learned]


def plain(q: Tensor, k: Tensor, v: Tensor, *, alpha: float | Tensor, is_causal: bool,
          key_padding_mask: Tensor | None = None, window: tuple[int, int] | None = None,
          softcap: float | None = None, alibi_slopes: Tensor | None = None,
          attn_bias: Tensor | None = None) -> Tensor:  # fmt: skip
    """Return dense attention as one would write it in PyTorch, in the dtype of `q`."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = (q @ k.mT * q.shape[-1] ** -0.5).float()
    at = torch.arange(k.shape[2], device=q.device)
    place = torch.arange(q.shape[2], device=q.device)[:, None] + k.shape[2] - q.shape[2]
    seen = (at <= place) if is_causal else torch.ones_like(at <= place)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if alibi_slopes is not None:
        scores = scores - alibi_slopes[:, None, None] * (place - at).abs()
    if attn_bias is not None:
        scores = scores + attn_bias
    if window is not None:
        seen = seen & (at >= place - window[0])
    if key_padding_mask is not None:
        seen = seen & key_padding_mask[:, None, None]
    each = alpha[:, None, None] if isinstance(alpha, Tensor) else alpha
    return entmax(scores, each, mask=seen.expand(scores.shape)).to(v.dtype) @ v


def errors(case: Case, dtype: torch.dtype, device: torch.device) -> dict[str, dict[str, float]]:
    """Return the errors of our attention and of plain PyTorch, by what they are errors of."""
    batch, heads, heads_kv, rows, keys, dim = case.shape
    if case.gain is None:
        inputs = random_inputs(batch, heads, heads_kv, rows, keys, dim, dtype=dtype, device=device)
    else:
        inputs = clustered_inputs(batch, heads, rows, dim, case.gain, dtype=dtype, device=device)
    options, learned = given(case, device)
    others = [f"d{name}" for name, x in options.items() if any(x is one for one in learned)]
    names = ["output", "dq", "dk", "dv", *others]
    generator = torch.Generator(device).manual_seed(2)
    grad = torch.randn(batch, heads, rows, dim, generator=generator, device=device).to(dtype)

    def run(attend: Callable[..., Tensor], exact: bool = False, **how: object) -> list[Tensor]:
        leaves = [x.detach().to(torch.float64 if exact else x.dtype).requires_grad_()
                  for x in inputs]  # fmt: skip
        output = attend(*leaves, **options, **how)
        made = torch.autograd.grad(output, [*leaves, *learned], grad.to(output.dtype))
        return [output.detach(), *made]

    want = run(adasplash, exact=True, backend="reference")
    return {
        name: {
            what: relative_error(x, y) for what, x, y in zip(names, found, want, strict=True)
        }
        for name, found in (("adasplash", run(adasplash, backend="triton")),
                            ("plain PyTorch", run(plain)))
    }  # fmt: skip


def measure(
    results: Results, jobs: list[tuple[str, str]], device: torch.device
) -> list[tuple[str, str]]:
    """Add the errors of cases by name and dtype; return those that are over what is allowed."""
    failed = []
    for name, kind in jobs:
        dtype = getattr(torch, kind)
        found = errors(CASES[name], dtype, device)
        worst = {
            provider: float(torch.tensor(list(each.values()), dtype=torch.float64).max())
            for provider, each in found.items()
        }  # NaN, if one is
        for provider, each in found.items():
            results.add(provider, "worst relative error", worst[provider], "", dtype=kind,
                        case=name, **each)  # fmt: skip
        ratio = max(found["adasplash"][what] / max(x, 1e-12)
                    for what, x in found["plain PyTorch"].items())  # fmt: skip
        results.add("adasplash", "times the error of plain PyTorch", ratio, "", dtype=kind,
                    case=name)  # fmt: skip
        print(f"{kind}, {name}: {worst['adasplash']:.1e}, {ratio:.2f} times plain PyTorch's",
              flush=True)  # fmt: skip
        if not worst["adasplash"] <= ALLOWED[dtype]:  # also where it is NaN
            failed.append((name, kind))
    return failed


def spread(options: argparse.Namespace) -> list[tuple[str, str]]:
    """Let processes measure shares of the cases; put their results together."""
    failed = []
    results = Results("adasplash", command="bench_errors.py", seed=0)
    with tempfile.TemporaryDirectory() as folder:
        workers = [
            subprocess.Popen([
                sys.executable, __file__, "--share", f"{place}/{options.workers}",
                "--output", f"{folder}/{place}", "--dtypes", *options.dtypes,
                "--cases", *options.cases, "--device", options.device,
            ])
            for place in range(options.workers)
        ]  # fmt: skip
        for place, worker in enumerate(workers):
            if worker.wait():
                failed.append((f"share {place}", "all"))
            path = Path(folder, str(place), "errors.json")
            results.cases += Results.load(path).cases if path.exists() else []
    results.save(options.output / "errors.json")
    return failed


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=DTYPES)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--workers", type=int, default=8, help="processes")
    parser.add_argument("--share", help=argparse.SUPPRESS)
    parser.add_argument("--device", default="auto")
    options = parser.parse_args(arguments)
    device = pick_device(options.device)[0]
    if options.share is None and options.workers > 1:
        failed = spread(options)
    else:
        place, workers = map(int, (options.share or "0/1").split("/"))
        jobs = list(product(options.cases, options.dtypes))[place::workers]
        results = Results("adasplash", command="bench_errors.py", seed=0)
        failed = measure(results, jobs, device)
        results.save(options.output / "errors.json")
    if failed:
        raise SystemExit(f"errors over what is allowed: {failed}")


if __name__ == "__main__":
    main()
