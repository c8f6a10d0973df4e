"""Options of attention beside softmax attention with the same option: errors first, then time.

Run as `python packages/adasplash/benchmarks/bench_options.py --output FOLDER`. ALiBi, softcap, an
additive bias, dropout and packed sequences are timed on the same q, k and v as the plain case,
beside FlexAttention (compiled) and what torch's SDPA can do of it. Output and gradients of one head
are compared with float64 first; softmax outputs with the same scores in float64, but for dropout,
whose random words are each backend's own.

On a GPU replays of CUDA graphs are timed, from a cold L2 cache. A process for every option compiles
and checks, side by side; then they are timed one after the other.
"""

from __future__ import annotations

import argparse
import inspect
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from bench_attention import BACKENDS, BUDGET, METRICS, blocks_of, peak_of, runs_of
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from adasplash import adasplash
from adasplash.testing import clustered_inputs, relative_error
from fourfold_common import Results, pick_device, time_call

SHARES = (16, 8, 2, 12, 4, 1, 14, 7)  # lengths of the packed sequences, in 64ths of the tokens
GROUP = 8  # query heads that share a key head, where they do
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
Mod = Callable[..., Tensor]


class Option(NamedTuple):
    """One option: how we take it, and how softmax attention does.

    Args:
        ours: Arguments of `adasplash`.
        one: The same for the first key head of the first sequence alone, if they differ.
        peers: Contenders by name.
        score: Score of FlexAttention, `score(s, batch, head, row, key)`; None for the product.
        visible: Mask of FlexAttention, `visible(batch, head, row, key)`.
        checked: Whether the outputs of softmax can be compared.
    """

    ours: dict[str, object]
    peers: dict[str, Attend]
    one: dict[str, object] | None = None
    score: Mod | None = None
    visible: Mod | None = None
    checked: bool = True


def causal(batch: Tensor, head: Tensor, row: Tensor, key: Tensor) -> Tensor:
    return row >= key


def softmax(backend: SDPBackend, options: dict[str, object], *heads: Tensor) -> Tensor:
    with sdpa_kernel(backend):
        return scaled_dot_product_attention(*heads, **options)


def varlen(bounds: Tensor, longest: int) -> Attend:
    """Return torch's own attention over packed sequences."""
    from torch.nn.attention.varlen import varlen_attn

    known = inspect.signature(varlen_attn).parameters
    how = {"is_causal": True} if "is_causal" in known else {"window_size": (-1, 0)}
    return lambda q, k, v: varlen_attn(q, k, v, bounds, bounds, longest, longest, **how)


class Peers:
    """Makes softmax contenders for queries `[batch, heads, length, dim_head]`."""

    def __init__(self, q: Tensor) -> None:
        self.q, self.gpu = q, q.is_cuda
        self.batch, self.heads, self.length = q.shape[:3]
        self.places = torch.arange(self.length, device=q.device)

    def plain(self, **options: object) -> dict[str, Attend]:
        """SDPA's fast backends."""
        return self.by_backend(("SDPA cuDNN", "SDPA flash"), {"is_causal": True, **options})

    def masked(self, mask: Tensor) -> dict[str, Attend]:
        """SDPA's backends that take a mask or bias, which is stored whole."""
        return self.by_backend(("SDPA cuDNN", "SDPA efficient"), {"attn_mask": mask})

    def by_backend(self, names: tuple[str, ...], options: dict[str, object]) -> dict[str, Attend]:
        if not self.gpu:
            return {"SDPA math": partial(softmax, SDPBackend.MATH, options)}
        return {name: partial(softmax, BACKENDS[name], options) for name in names}

    def flex(
        self, score: Mod | None, visible: Mod = causal, wide: bool = False, **options: object
    ) -> dict[str, Attend]:
        """FlexAttention with a score and a mask of blocks, compiled where kernels exist."""
        outer = (self.batch, self.heads) if wide else (1, 1)
        blocks = create_block_mask(visible, *outer, self.length, self.length,
                                   device=str(self.q.device))  # fmt: skip
        call = torch.compile(flex_attention, dynamic=False) if self.gpu else flex_attention
        return {"FlexAttention": partial(call, score_mod=score, block_mask=blocks, **options)}


def no_option(peers: Peers) -> Option:
    return Option({}, peers.plain() | peers.flex(None))


def blocks(peers: Peers, heads: tuple[Tensor, ...]) -> Option:
    """Softmax over the blocks that hold our weight: what sparse softmax could reach at best."""
    if not peers.gpu:
        return Option({}, {})
    active = blocks_of(*heads, True)

    def visible(batch, head, row, key):
        return (row >= key) & active[batch, head, row // 64, key // 64]

    return Option({}, peers.flex(None, visible, wide=True), visible=visible)


def dropout(peers: Peers) -> Option:
    return Option({"dropout_p": 0.1}, peers.plain(dropout_p=0.1), checked=False)


def softcap(peers: Peers, cap: float = 20.0) -> Option:
    def score(s, batch, head, row, key):
        return cap * torch.tanh(s / cap)

    return Option({"softcap": cap}, peers.flex(score), score=score)


def alibi(peers: Peers) -> Option:
    steps = torch.arange(peers.heads, device=peers.q.device) + 1
    slopes = torch.exp2(-8 * steps / peers.heads)

    def score(s, batch, head, row, key):
        return s - slopes[head] * (row - key)

    far = (peers.places[:, None] - peers.places).float()
    rows = [(-slope * far).masked_fill(far < 0, -torch.inf).to(peers.q.dtype) for slope in slopes]
    return Option({"alibi_slopes": slopes}, peers.masked(torch.stack(rows)[None])
                  | peers.flex(score),
                  {"alibi_slopes": slopes[:1]}, score)  # fmt: skip


def bias(peers: Peers) -> Option:
    generator = torch.Generator(peers.q.device).manual_seed(1)
    table = torch.randn(peers.length, peers.length, generator=generator, device=peers.q.device)
    table = table.to(peers.q.dtype)

    def score(s, batch, head, row, key):
        return s + table[row, key]

    mask = table.masked_fill(peers.places[:, None] < peers.places, -torch.inf)
    return Option({"attn_bias": table[None, None]}, peers.masked(mask[None, None])
                  | peers.flex(score), score=score)  # fmt: skip


def padding(peers: Peers) -> Option:
    """A fourth of the keys is hidden, in holes of 64."""
    generator = torch.Generator().manual_seed(1)
    kept = torch.rand(peers.batch, -(-peers.length // 64), generator=generator) > 0.25
    kept[:, 0] = True
    kept = kept.repeat_interleave(64, 1)[:, : peers.length].to(peers.q.device)

    def visible(batch, head, row, key):
        return (row >= key) & kept[batch, key]

    mask = (peers.places[:, None] >= peers.places) & kept[:, None, None]
    return Option({"key_padding_mask": kept}, peers.masked(mask)
                  | peers.flex(None, visible, wide=True),
                  {"key_padding_mask": kept[:1]}, visible=visible)  # fmt: skip


def window(peers: Peers) -> Option:
    left = peers.length // 8

    def visible(batch, head, row, key):
        return (row >= key) & (row - key <= left)

    return Option({"window": (left, 0)}, peers.flex(None, visible), visible=visible)


def shared_keys(peers: Peers) -> Option:
    return Option({}, peers.plain(enable_gqa=True) | peers.flex(None, enable_gqa=True))


def alphas(peers: Peers) -> Option:
    """An alpha for every head, with its gradient."""
    alpha = torch.linspace(1.2, 1.8, peers.heads, device=peers.q.device).requires_grad_()
    return Option({"alpha": alpha}, {}, {"alpha": alpha.detach()[:1]})


def packed(peers: Peers) -> Option:
    ends = torch.tensor([0, *SHARES]).cumsum(0) * peers.length // sum(SHARES)
    bounds = ends.to(peers.q.device, torch.int32)
    longest = int(ends.diff().max())
    documents = torch.searchsorted(ends[1:].to(peers.q.device), peers.places, right=True)

    def visible(batch, head, row, key):
        return (row >= key) & (documents[row] == documents[key])

    def unpacked(attend: Attend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(*(x.transpose(0, 1)[None] for x in (q, k, v)))[0].transpose(0, 1)

    others = {n: partial(unpacked, call) for n, call in peers.flex(None, visible).items()}
    if peers.gpu:
        others["torch varlen_attn"] = varlen(bounds, longest)
    return Option({"cu_seqlens_q": bounds, "max_seqlen_q": longest}, others, visible=visible)


OPTIONS = {
    "none": no_option, "alibi": alibi, "softcap": softcap, "bias": bias, "dropout": dropout,
    "packed": packed, "blocks": blocks, "padding": padding, "window": window,
    "shared keys": shared_keys, "alpha 2": lambda peers: Option({"alpha": 2.0}, {}),
    "alpha 1.25": lambda peers: Option({"alpha": 1.25}, {}), "alpha by head": alphas,
}  # fmt: skip


def shared(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries of which `GROUP` heads look for the topics of one head of keys."""
    group = min(GROUP, k.shape[1])
    noise = 0.5 * torch.randn(q.shape, generator=torch.Generator(q.device).manual_seed(1),
                              device=q.device)  # fmt: skip
    q, k, v = (x[:, ::group] for x in (q, k, v))
    return (q.repeat_interleave(group, 1) + noise).to(q.dtype), k.contiguous(), v.contiguous()


def first_head(x: Tensor, heads_kv: int) -> Tensor:
    """Return what belongs to the first key head of the first sequence, packed or not."""
    part = x[:, : x.shape[1] // heads_kv].detach()  # heads are the second axis of both
    return part[:1] if x.ndim == 4 else part


def soft_error(chosen: Option, q: Tensor, k: Tensor, v: Tensor, output: Tensor) -> float:
    """Return the relative error of a softmax output in sampled rows of the first head."""
    if q.ndim == 3:
        q, k, v, output = (x.transpose(0, 1)[None] for x in (q, k, v, output))
    q, k, v, output = (x[0, 0].double() for x in (q, k, v, output))
    keys = torch.arange(len(k), device=k.device)
    first = torch.zeros((), dtype=torch.long, device=k.device)
    want, found = [], []
    for rows in runs_of(len(q)):
        row = keys[rows, None]
        s = q[rows] @ k.T * q.shape[-1] ** -0.5
        if chosen.score is not None:
            s = chosen.score(s, first, first, row, keys)
        visible = (chosen.visible or causal)(first, first, row, keys)
        want.append(s.double().masked_fill(~visible, -torch.inf).softmax(-1) @ v)
        found.append(output[rows])
    return relative_error(torch.cat(found), torch.cat(want))


def our_error(chosen: Option, leaves: list[Tensor], grad: Tensor, found: list[Tensor]) -> float:
    """Return the largest relative error of output and gradients in the first head of keys."""
    heads_kv = leaves[1].shape[1]
    one = [first_head(x, heads_kv).double().requires_grad_() for x in leaves]
    torch.manual_seed(1)  # dropout draws its seed from the generator
    options = {"is_causal": True, **(chosen.ours if chosen.one is None else chosen.one)}
    want = adasplash(*one, **options, backend="reference")
    made = torch.autograd.grad(want, one, first_head(grad, heads_kv).double())
    pairs = zip(found, (want, *made), strict=True)
    errors = [relative_error(first_head(x, heads_kv), y.detach()) for x, y in pairs]
    return max(errors) if all(e == e for e in errors) else float("nan")


class Checked(NamedTuple):
    """A contender whose outputs are right, ready to be timed."""

    provider: str
    case: dict[str, object]
    error: float | None
    peaks: list[float | None]
    calls: list[Callable[[], object]]
    plain: list[Callable[[], object]]  # hold the tensors that the graphs in `calls` read


class Bench:
    """Checks and times one option after the other into one file."""

    def __init__(self, arguments: argparse.Namespace, device: torch.device) -> None:
        self.arguments, self.device = arguments, device
        self.results = Results("adasplash", command="bench_options.py", seed=0)
        self.failed: list[str] = []

    def cases(self, name: str) -> Iterator[tuple[str, Attend, Option, list[Tensor], dict]]:
        """Yield contender, call, option, q, k and v, and what describes the case."""
        tokens, length = self.arguments.tokens, self.arguments.length
        long = min(tokens, 4 * length) if name == "packed" else length
        heads = max(1, tokens // long)
        batch = 2 if heads % 2 == 0 and name != "packed" else 1
        q, k, v = clustered_inputs(batch, heads // batch, long, self.arguments.dim,
                                   self.arguments.gain, dtype=torch.bfloat16,
                                   device=self.device)  # fmt: skip
        if name == "shared keys":
            q, k, v = shared(q, k, v)
        peers = Peers(q)
        chosen = blocks(peers, (q, k, v)) if name == "blocks" else OPTIONS[name](peers)
        case = {"option": name, "batch": batch, "heads": heads // batch, "tokens": long,
                "dim": self.arguments.dim}  # fmt: skip
        if name == "packed":
            q, k, v = (x[0].transpose(0, 1).contiguous() for x in (q, k, v))
        backend = "triton" if self.device.type == "cuda" else "reference"
        ours = partial(adasplash, **{"is_causal": True, **chosen.ours}, backend=backend)
        for provider, call in {"adasplash": ours, **chosen.peers}.items():
            if (name, provider) != ("blocks", "adasplash"):  # that is the plain case
                yield provider, call, chosen, [q, k, v], case

    def checked(self, name: str) -> list[Checked]:
        """Return the contenders of an option that can run and are right."""
        found = []
        for provider, call, chosen, heads, case in self.cases(name):
            try:
                found.append(self.check(provider, call, chosen, heads, case))
            except (RuntimeError, TypeError) as reason:
                print(f"{provider}, {case} cannot run: {str(reason)[:300]}", flush=True)
        return [one for one in found if one is not None]

    def check(
        self, provider: str, call: Attend, chosen: Option, heads: list[Tensor], case: dict
    ) -> Checked | None:
        """Compare a contender with float64; None if it is wrong."""
        leaves = [x.clone().requires_grad_() for x in heads]
        alpha = chosen.ours.get("alpha")
        learned = [alpha] if provider == "adasplash" and isinstance(alpha, Tensor) else []
        with torch.no_grad():
            grad = torch.randn_like(call(*heads))

        def forward() -> Tensor:
            with torch.no_grad():
                return call(*heads)

        def both() -> list[Tensor]:
            output = call(*leaves)
            return [output.detach(), *torch.autograd.grad(output, [*leaves, *learned], grad)]

        torch.manual_seed(1)
        found, error = both(), None
        if provider == "adasplash":
            error = our_error(chosen, leaves, grad, found[:4])
            case["density"] = round(self.density(chosen, heads), 4)
        elif chosen.checked:
            error = soft_error(chosen, *heads, found[0])
        del found
        if error is not None and not error <= BUDGET[heads[0].dtype]:
            self.failed.append(f"{provider}, {case}: error {error:.2e}")
            print(self.failed[-1], flush=True)
            return None
        plain: list[Callable[[], object]] = [forward, both]
        calls, peaks = plain, [peak_of(timed, self.device) for timed in plain]
        if self.device.type == "cuda":
            from _gpu import graphed

            calls = [graphed(timed) for timed in plain]
        return Checked(provider, dict(case), error, peaks, calls, plain)

    def time(self, found: list[Checked], path: Path) -> None:
        """Time contenders; add their figures to the results and store these."""
        for one in found:
            shown = []
            for metric, call, peak in zip(METRICS, one.calls, one.peaks, strict=True):
                timing = time_call(call, self.device, 10, self.arguments.rep)
                self.results.add(one.provider, metric, timing.median_ms, "ms", p20=timing.p20_ms,
                                 p80=timing.p80_ms, n=timing.n, peak_mib=peak, error=one.error,
                                 **one.case)  # fmt: skip
                shown.append(f"{timing.median_ms:.3f} ms")
            error = "not compared" if one.error is None else f"{one.error:.1e}"
            self.results.save(path)
            print(f"{one.provider}, {one.case}: {' / '.join(shown)}, error {error}", flush=True)

    @staticmethod
    def density(chosen: Option, heads: list[Tensor]) -> float:
        """Return the share of visible 64x64 blocks that hold weight, in the first head of keys."""
        one = [first_head(x, heads[1].shape[1]) for x in heads]
        options = {"is_causal": True, **(chosen.ours if chosen.one is None else chosen.one)}
        shares = adasplash(*one, **options, return_aux=True, backend="reference")[1].block_density
        if "cu_seqlens_q" not in options:
            return shares.mean().item()
        rows = -(-options["cu_seqlens_q"].diff() // 64)
        blocks = rows * (rows + 1) / 2
        return ((shares[:, 0] * blocks).sum() / blocks.sum()).item()


def work(bench: Bench, name: str, folder: Path) -> None:
    """Check an option, wait until nobody else works on the device, and time it."""
    found = bench.checked(name)
    if bench.device.type == "cuda":
        torch.cuda.empty_cache()  # others need the room
    Path(folder, f"{name}.ready").touch()
    while not Path(folder, f"{name}.go").exists():
        time.sleep(0.02)
    bench.time(found, folder / f"{name}.json")
    sys.stdout.flush()
    os._exit(1 if bench.failed else 0)  # the next one waits: no time for taking things down


def side_by_side(bench: Bench, arguments: list[str], budget: float | None) -> list[str]:
    """Let a process for every option compile and check; then time them one by one.

    Returns:
        The options that were not timed.
    """
    end = time.monotonic() + (budget or float("inf"))
    path = bench.arguments.output / "options.json"
    missing = []
    with tempfile.TemporaryDirectory() as work_folder:
        folder = Path(work_folder)
        workers = {
            name: subprocess.Popen(
                [sys.executable, __file__, *arguments, "--options", name, "--worker", work_folder],
                env={**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": "1"},
            )
            for name in bench.arguments.options
        }

        def wait_for(name: str, limit: float) -> bool:
            while not Path(folder, f"{name}.ready").exists():
                if workers[name].poll() is not None or time.monotonic() > limit:
                    return False
                time.sleep(0.05)
            return True

        try:
            # All have to be quiet before the first is timed; what is late is left out.
            limit = end - 0.3 * (budget or 0)
            ready = {name: wait_for(name, limit) for name in workers}
            for name, worker in workers.items():
                if not ready[name]:
                    worker.kill()
            for name, worker in workers.items():
                Path(folder, f"{name}.go").touch()
                try:
                    worker.wait(None if budget is None else max(0.1, end - time.monotonic()))
                except subprocess.TimeoutExpired:
                    worker.kill()
                if Path(folder, f"{name}.json").exists():
                    bench.results.cases += Results.load(folder / f"{name}.json").cases
                    bench.results.save(path)
                if worker.returncode != 0 or not ready[name]:
                    missing.append(name)
        finally:
            for worker in workers.values():
                worker.kill()
    return missing


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--options", nargs="+", default=list(OPTIONS), choices=OPTIONS)
    parser.add_argument("--length", type=int, help="tokens; packed: four times; 8192 if left out, "
                        "256 on a CPU")  # fmt: skip
    parser.add_argument("--tokens", type=int, help="batch x heads x length; 262144 if left out, "
                        "1024 on a CPU")  # fmt: skip
    parser.add_argument("--dim", type=int, default=64, help="head size")
    parser.add_argument("--gain", type=float, default=1.0, help="strength of a block's topic")
    parser.add_argument("--budget", type=float, help="stop after so many seconds")
    parser.add_argument("--rep", type=float, default=50, help="ms of timed runs for a figure")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--device", default="auto")
    options = parser.parse_args(arguments)
    device = pick_device(options.device)[0]
    gpu = device.type == "cuda"
    options.length = options.length or (8192 if gpu else 256)
    options.tokens = options.tokens or (262144 if gpu else 1024)
    bench = Bench(options, device)
    if options.worker:
        work(bench, options.options[0], options.worker)
        return
    if gpu:
        same = [
            f"--{name}={getattr(options, name)}"
            for name in ("length", "tokens", "dim", "gain", "rep")
        ]
        missing = side_by_side(bench, same, options.budget)
    else:
        for name in options.options:
            bench.time(bench.checked(name), options.output / "options.json")
        missing = bench.failed
    print(bench.results.to_markdown())
    if missing:
        raise SystemExit(f"not all was timed: {', '.join(missing)}")


if __name__ == "__main__":
    main()
