"""Decoding a token from a long cache beside softmax attention on one GPU: errors first, then time.

Run as `python packages/adasplash/benchmarks/bench_decode.py --output FOLDER`. 8 sequences of 32
heads over 4 of keys, fewer where they are longer than 131,072; the cache contiguous and in pages of
64, shuffled, with and without bounds of pages, with a mask of keys and with other alphas; replays
of CUDA graphs are timed, from a cold L2 cache. Keys of one page are alike as far as their topic
outweighs their noise: the more, the more pages the bounds can tell apart. The output is compared
with float64 first.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from adasplash import adasplash_decode, page_stats
from adasplash.testing import relative_error
from fourfold_common import Results, pick_device, time_call

PAGE = 64
HEADS, HEADS_KV = 32, 4
CHECKED = 2  # sequences that are compared with float64
KEYS = ((1.0, 1.0), (1.0, 0.1), (0.0, 1.0))  # how strong topics are, and noise
Variant = tuple[Callable[[], Tensor], Callable[[], Tensor]]


def sequences(keys: int) -> int:
    """Return how many sequences there are: a million keys at most, but for one."""
    return max(1, min(8, 2**20 // keys))


def cache(keys: int, dim: int, gain: float, noise: float, device: torch.device) -> tuple:
    """Return queries of one new token, keys that share a topic over a page, and values."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    batch = sequences(keys)
    topics = draw(batch, HEADS_KV, max(2, keys // PAGE // 4), dim)
    chosen = torch.randint(topics.shape[2], (keys // PAGE,), generator=generator, device=device)
    k = gain * topics[:, :, chosen].repeat_interleave(PAGE, 2)
    k = k + noise * draw(batch, HEADS_KV, keys, dim)
    q = gain * topics[:, :, :1].repeat_interleave(HEADS // HEADS_KV, 1)
    q = q + draw(batch, HEADS, 1, dim)
    return q.bfloat16(), k.bfloat16(), draw(batch, HEADS_KV, keys, dim).bfloat16()


def variants(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Variant]:
    """Return our ways to decode, each with the same in float64."""
    batch, keys, device = len(k), k.shape[2], q.device
    generator = torch.Generator(device).manual_seed(1)
    lengths = torch.full((batch,), keys, dtype=torch.int32, device=device)
    table = torch.randperm(batch * keys // PAGE, generator=generator, device=device).view(batch, -1)
    pages = [x.new_empty(table.numel(), HEADS_KV, PAGE, x.shape[3]) for x in (k, v)]
    for paged, whole in zip(pages, (k, v), strict=True):
        paged[table.flatten()] = whole.unflatten(2, (-1, PAGE)).transpose(1, 2).flatten(0, 1)
    shown = torch.rand(batch, keys, generator=generator, device=device) > 0.25
    alphas = torch.linspace(1.2, 1.8, HEADS, device=device)
    table, stats = table.int(), (page_stats(k), page_stats(pages[0]))

    def both(k_own: Tensor, v_own: Tensor, table_own=None, stats_own=None, **options) -> Variant:
        ours = partial(adasplash_decode, q, k_own, v_own, lengths, table_own, stats_own, **options)
        few = {
            name: x[:CHECKED] if name == "key_padding_mask" else x for name, x in options.items()
        }
        return ours, lambda: adasplash_decode(*(x[:CHECKED].double() for x in (q, k, v)),
                                              lengths[:CHECKED], backend="reference",
                                              **few)  # fmt: skip

    return {
        "adasplash": both(k, v),
        "adasplash, bounds": both(k, v, None, stats[0]),
        "adasplash, pages": both(*pages, table),
        "adasplash, pages, bounds": both(*pages, table, stats[1]),
        "adasplash, mask": both(k, v, key_padding_mask=shown),
        "adasplash, alpha by head": both(k, v, alpha=alphas),
        "adasplash, alpha 2": both(k, v, alpha=2.0),
    }


def softmax(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Return ways of softmax: the heads that share keys as rows of one, or left to torch."""
    folded = q.unflatten(1, (HEADS_KV, -1))[:, :, :, 0]
    names = {"flash": SDPBackend.FLASH_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION}
    if not q.is_cuda:
        names = {"math": SDPBackend.MATH}

    def call(backend: SDPBackend, heads: Tensor, **options: bool) -> Tensor:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(heads, k, v, **options)

    return {
        f"SDPA {name}, {how}": partial(call, backend, heads, **options)
        for name, backend in names.items()
        for how, heads, options in (("heads folded", folded, {}),
                                    ("enable_gqa", q, {"enable_gqa": True}))
    }  # fmt: skip


def exact_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return softmax attention of one token in float64."""
    q, k, v = (x[:CHECKED].double() for x in (q, k, v))
    folded = q.unflatten(1, (HEADS_KV, -1))[:, :, :, 0]
    return ((folded @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v).reshape(q.shape)


def near_blocks(q: Tensor, k: Tensor) -> float:
    """Return the share of pages with a score that may have weight: within 1 of the maximum.

    Of the sequences that are compared with float64.
    """
    q, k = q[:CHECKED], k[:CHECKED]
    folded = q.unflatten(1, (HEADS_KV, -1))[:, :, :, 0].double()
    z = folded @ k.double().mT * q.shape[-1] ** -0.5 / 2
    near = (z > z.amax(-1, keepdim=True) - 1).unflatten(-1, (-1, PAGE)).any(-1).any(2)
    return near.double().mean().item()


def measure(results: Results, device: torch.device, keys: int, gain: float, noise: float,
            dim: int, rep: float) -> None:  # fmt: skip
    """Check and time all ways on one cache."""
    q, k, v = cache(keys, dim, gain, noise, device)
    case = {
        "keys": keys,
        "batch": len(q),
        "gain": gain,
        "noise": noise,
        "near_blocks": round(near_blocks(q, k), 3),
    }
    ways: list[tuple[str, Callable[[], Tensor], Callable[[], Tensor]]] = [
        (name, *way) for name, way in variants(q, k, v).items()
    ]
    ways += [
        (name, call, partial(exact_softmax, q, k, v)) for name, call in softmax(q, k, v).items()
    ]
    for name, call, exact in ways:
        try:
            found = call()
        except RuntimeError as reason:
            print(f"{name}, {keys} keys cannot run: {str(reason)[:200]}", flush=True)
            continue
        error = relative_error(found.reshape(q.shape)[:CHECKED], exact())
        if not error < 1e-2:
            raise SystemExit(f"{name}, {case}: error {error:.2e}")
        if device.type == "cuda":
            from _gpu import graphed

            call = graphed(call)
        timing = time_call(call, device, 10, rep)
        results.add(name, "decode", timing.median_ms, "ms", p20=timing.p20_ms, p80=timing.p80_ms,
                    n=timing.n, error=error, **case)  # fmt: skip
        print(f"{name}, {case}: {timing.median_ms:.4f} ms, error {error:.1e}", flush=True)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--keys", type=int, nargs="+",
                        help="8192 to 1048576 if left out, 512 on a CPU")  # fmt: skip
    parser.add_argument("--dim", type=int, help="head size; 128 if left out, 32 on a CPU")
    parser.add_argument("--rep", type=float, default=50, help="ms of timed runs for a figure")
    parser.add_argument("--device", default="auto")
    options = parser.parse_args(arguments)
    device = pick_device(options.device)[0]
    results = Results("adasplash", command="bench_decode.py", seed=0)
    lengths, dim = ([65536, 8192, 262144, 1048576], 128) if device.type == "cuda" else ([512], 32)
    for keys, (gain, noise) in product(options.keys or lengths, KEYS):
        measure(results, device, keys, gain, noise, options.dim or dim, options.rep)
        results.save(options.output / "decode.json")
    print(results.to_markdown())


if __name__ == "__main__":
    main()
