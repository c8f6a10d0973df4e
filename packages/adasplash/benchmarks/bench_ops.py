"""The dense map, decoding and first calls on one GPU beside their peers: errors first, then time.

Run as `python packages/adasplash/benchmarks/bench_ops.py --output FOLDER`. With
`--upstream FOLDER`, where `pip install --no-deps --target FOLDER adasplash==0.2.2` has put the
paper's own package, its dense map and its attention are timed in a process of their own.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from itertools import product
from pathlib import Path

import torch
from _gpu import graphed, soft
from torch.nn.attention import SDPBackend

from adasplash import adasplash, adasplash_decode, entmax15, page_stats
from adasplash.kernels.entmax import reference
from adasplash.testing import clustered_inputs, relative_error
from fourfold_common import Results, time_call

WORKER = Path(__file__).with_name("_upstream.py")


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
        for name, function in (
            ("adasplash", entmax15),
            ("torch.softmax", partial(torch.softmax, dim=-1)),
        ):
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


def cache(
    batch: int, heads: int, heads_kv: int, keys: int, dim: int, gain: float, noise: float
):  # fmt: skip
    """Return queries of one new token, and keys that share a topic over 64 places."""
    generator = torch.Generator("cuda").manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator, device="cuda")

    topics = draw(batch, heads_kv, max(2, keys // 64 // 4), dim)
    chosen = torch.randint(topics.shape[2], (keys // 64,), generator=generator, device="cuda")
    k = gain * topics[:, :, chosen].repeat_interleave(64, 2)
    k = k + noise * draw(batch, heads_kv, keys, dim)
    q = gain * topics[:, :, :1].repeat_interleave(heads // heads_kv, 1)
    q = q + draw(batch, heads, 1, dim)
    return q.bfloat16(), k.bfloat16(), draw(batch, heads_kv, keys, dim).bfloat16()


def decode(results: Results, keys: int, gain: float, noise: float) -> None:
    """Time one new token of 8 sequences, 32 heads over 4 of keys, with graphs all round.

    Keys of one topic with little noise are what the bounds of pages can tell apart.
    """
    q, k, v = cache(8, 32, 4, keys, 128, gain, noise)
    lengths = torch.full((8,), keys, dtype=torch.int32, device="cuda")
    want = adasplash_decode(q.double(), k.double(), v.double(), lengths)
    folded = q.unflatten(1, (4, -1))[:, :, :, 0]  # the heads of a key head as rows of one
    z = folded.double() @ k.double().mT * 128**-0.5 / 2
    near = (z > z.amax(-1, keepdim=True) - 1).unflatten(-1, (-1, 64)).any(-1).any(2)
    ours = partial(adasplash_decode, q, k, v, lengths)
    flash, cudnn = SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION
    for name, call in {
        "adasplash with page bounds": partial(ours, None, page_stats(k)),
        "adasplash": ours,
        "SDPA flash, heads folded": partial(soft, folded, k, v, flash),
        "SDPA cuDNN, heads folded": partial(soft, folded, k, v, cudnn),
        "SDPA flash, enable_gqa": partial(soft, q, k, v, flash, enable_gqa=True),
        "SDPA cuDNN, enable_gqa": partial(soft, q, k, v, cudnn, enable_gqa=True),
    }.items():
        case = {
            "keys": keys,
            "gain": gain,
            "noise": noise,
            "near_blocks": round(near.double().mean().item(), 3),
        }
        try:
            if name.startswith("adasplash"):
                case["relative_error"] = relative_error(call(), want)
                assert case["relative_error"] < 1e-2, case
            timing = time_call(graphed(call), "cuda")
        except RuntimeError as error:
            print(f"{name}, {keys} keys cannot run: {str(error)[:300]}", flush=True)
            continue
        results.add(name, "decode", timing.median_ms, "ms", p20=timing.p20_ms,
                    p80=timing.p80_ms, n=timing.n, **case)  # fmt: skip
        print(f"{name}, {keys} keys: {timing.median_ms:.4f} ms", case, flush=True)


def beside_upstream(results: Results, folder: Path, length: int, gain: float) -> None:
    """Time attention of both packages on the same tensors, and the dense map of the paper's."""
    heads = 32 * 8192 // length
    q, k, v = clustered_inputs(1, heads, length, 64, gain, dtype=torch.bfloat16, device="cuda")
    with tempfile.NamedTemporaryFile(suffix=".pt") as file:
        torch.save([q, k, v], file.name)
        found = subprocess.run(
            [sys.executable, str(WORKER), file.name],
            env={**os.environ, "PYTHONPATH": str(folder)},
            capture_output=True,
            text=True,
            check=False,
        )
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    grad = torch.randn_like(v)
    cudnn = partial(soft, backend=SDPBackend.CUDNN_ATTENTION, is_causal=True)
    rows = []
    for name, attend in (("adasplash", partial(adasplash, is_causal=True)), ("SDPA cuDNN", cudnn)):

        def both(attend=attend):
            torch.autograd.grad(attend(*leaves), leaves, grad)

        rows.append((name, "forward + backward", time_call(both, "cuda").median_ms))
        with torch.no_grad():
            rows.append((name, "forward", time_call(partial(attend, q, k, v), "cuda").median_ms))
    if found.returncode:
        print("adasplash 0.2.2 failed:", found.stderr[-500:], flush=True)
    else:
        theirs = json.loads(found.stdout.splitlines()[-1])
        rows += [("adasplash 0.2.2", name, value) for name, value in theirs.items()]
    for provider, metric, value in rows:
        unit = "s" if "first call" in metric else "ms"
        results.add(provider, metric, value, unit, length=length, gain=gain, heads=heads)
        print(f"{provider} {metric}, {length}, gain {gain}: {value:.3f} {unit}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--upstream", type=Path, help="folder with adasplash 0.2.2")
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192])
    parser.add_argument("--parts", nargs="+", default=["first", "dense", "decode", "upstream"])
    arguments = parser.parse_args()
    torch.manual_seed(0)
    results = Results("adasplash", command="bench_ops.py", seed=0)
    path = arguments.output / "ops.json"
    if "first" in arguments.parts:
        first_calls(results)
    if "dense" in arguments.parts:
        dense(results)
    if "decode" in arguments.parts:
        for keys, (gain, noise) in product((8192, 65536), ((1.0, 1.0), (1.0, 0.1), (0.0, 1.0))):
            decode(results, keys, gain, noise)
    results.save(path)
    if arguments.upstream and "upstream" in arguments.parts:
        for length, gain in product(arguments.lengths, (4.0, 0.0)):
            beside_upstream(results, arguments.upstream, length, gain)
        results.save(path)
    print(results.to_markdown())


if __name__ == "__main__":
    main()
