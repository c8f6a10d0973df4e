"""Options of attention beside softmax attention with the same option: errors first, then time.

Run as `python packages/adasplash/benchmarks/bench_options.py --output FOLDER`. ALiBi, softcap, an
additive bias, dropout and packed sequences are timed on the same q, k and v as the plain case,
beside FlexAttention (compiled) and what torch's SDPA can do of it. Output and gradients of one head
are compared with float64 first; softmax outputs with the same scores in float64, but for dropout,
whose random words are each backend's own.

On a GPU replays of CUDA graphs are timed, from a cold L2 cache; what has to be compiled is compiled
by one process for each option, side by side.
"""

from __future__ import annotations

import argparse
import inspect
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from bench_attention import BUDGET, peak_of, runs_of
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from adasplash import adasplash
from adasplash.testing import clustered_inputs, relative_error
from fourfold_common import Results, pick_device, time_call

BACKENDS = {
    "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION,
    "SDPA flash": SDPBackend.FLASH_ATTENTION,
    "SDPA efficient": SDPBackend.EFFICIENT_ATTENTION,
    "SDPA math": SDPBackend.MATH,
}
SHARES = (16, 8, 2, 12, 4, 1, 14, 7)  # lengths of the packed sequences, in 64ths of the tokens
DROPPED = 0.1
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
Score = Callable[..., Tensor]


class Option(NamedTuple):
    """One option: how we take it, and how softmax attention does.

    Args:
        ours: Arguments of `adasplash`.
        one: The same for the first head of the first sequence alone.
        peers: Contenders by name.
        score: The score of FlexAttention, `score(s, batch, head, row, key)`; None for none.
        packed: Bounds of packed sequences.
        checked: Whether the outputs of softmax can be compared.
    """

    ours: dict[str, object]
    one: dict[str, object]
    peers: dict[str, Attend]
    score: Score | None = None
    packed: Tensor | None = None
    checked: bool = True


def causal(batch: Tensor, head: Tensor, row: Tensor, key: Tensor) -> Tensor:
    return row >= key


def softmax(backend: SDPBackend, options: dict[str, object], *heads: Tensor) -> Tensor:
    with sdpa_kernel(backend):
        return scaled_dot_product_attention(*heads, **options)


def flex(score: Score | None, length: int, device: torch.device, mask: Score = causal) -> Attend:
    """Return FlexAttention with a score and a mask of blocks, compiled where kernels exist."""
    blocks = create_block_mask(mask, None, None, length, length, device=str(device))
    call = torch.compile(flex_attention, dynamic=False) if device.type == "cuda" else flex_attention
    return partial(call, score_mod=score, block_mask=blocks)


def unpacked(attend: Attend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Call attention of `[1, heads, tokens, dim_head]` with `[tokens, heads, dim_head]`."""
    return attend(*(x.transpose(0, 1)[None] for x in (q, k, v)))[0].transpose(0, 1)


def varlen(bounds: Tensor, longest: int) -> Attend:
    """Return torch's own attention over packed sequences."""
    from torch.nn.attention.varlen import varlen_attn

    known = inspect.signature(varlen_attn).parameters
    how = {"is_causal": True} if "is_causal" in known else {"window_size": (-1, 0)}
    return lambda q, k, v: varlen_attn(q, k, v, bounds, bounds, longest, longest, **how)


def backends(options: dict[str, object], *names: str) -> dict[str, Attend]:
    return {name: partial(softmax, BACKENDS[name], options) for name in names}


def option(name: str, q: Tensor, length: int, capped: float = 20.0) -> Option:
    """Return an option by its name, for queries `[batch, heads, length, dim_head]`."""
    device, heads = q.device, q.shape[1]
    gpu = device.type == "cuda"
    fast = ("SDPA cuDNN", "SDPA flash") if gpu else ("SDPA math",)
    biased = ("SDPA cuDNN", "SDPA efficient") if gpu else ("SDPA math",)
    plain = {"is_causal": True}
    places = torch.arange(length, device=device)
    if name == "none":
        peers = backends(plain, *fast) | {"FlexAttention": flex(None, length, device)}
        return Option(plain, plain, peers)
    if name == "dropout":
        ours = plain | {"dropout_p": DROPPED}
        return Option(ours, ours, backends(ours, *fast), checked=False)
    if name == "softcap":

        def cap(s, batch, head, row, key):
            return capped * torch.tanh(s / capped)

        ours = plain | {"softcap": capped}
        return Option(ours, ours, {"FlexAttention": flex(cap, length, device)}, cap)
    if name == "alibi":
        slopes = torch.exp2(-8 * (torch.arange(heads, device=device) + 1) / heads)

        def slope(s, batch, head, row, key):
            return s - slopes[head] * (row - key)

        far = (places[:, None] - places).float()
        mask = (-slopes[:, None, None] * far).masked_fill(far < 0, -torch.inf).to(q.dtype)[None]
        peers = backends({"attn_mask": mask}, *biased)
        peers["FlexAttention"] = flex(slope, length, device)
        return Option(plain | {"alibi_slopes": slopes}, plain | {"alibi_slopes": slopes[:1]},
                      peers, slope)  # fmt: skip
    if name == "bias":
        generator = torch.Generator(device).manual_seed(1)
        table = torch.randn(length, length, generator=generator, device=device).to(q.dtype)

        def shift(s, batch, head, row, key):
            return s + table[row, key]

        mask = table.masked_fill(places[:, None] < places, -torch.inf)[None, None]
        ours = plain | {"attn_bias": table[None, None]}
        peers = backends({"attn_mask": mask}, *biased)
        peers["FlexAttention"] = flex(shift, length, device)
        return Option(ours, ours, peers, shift)
    ends = torch.tensor([0, *SHARES]).cumsum(0) * length // sum(SHARES)
    bounds = ends.to(device, torch.int32)
    longest = int(ends.diff().max())
    documents = torch.searchsorted(ends[1:].to(device), places, right=True)

    def inside(batch, head, row, key):
        return (row >= key) & (documents[row] == documents[key])

    ours = plain | {"cu_seqlens_q": bounds, "max_seqlen_q": longest}
    peers = {"FlexAttention": partial(unpacked, flex(None, length, device, inside))}
    if gpu:
        peers["torch varlen_attn"] = varlen(bounds, longest)
    return Option(ours, ours, peers, packed=documents)


OPTIONS = ("none", "alibi", "softcap", "bias", "dropout", "packed")


def soft_error(chosen: Option, q: Tensor, k: Tensor, v: Tensor, output: Tensor) -> float:
    """Return the relative error of a softmax output in sampled rows of the first head."""
    if chosen.packed is not None:
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
        hidden = row < keys
        if chosen.packed is not None:
            hidden = hidden | (chosen.packed[row] != chosen.packed[keys])
        want.append(s.double().masked_fill(hidden, -torch.inf).softmax(-1) @ v)
        found.append(output[rows])
    return relative_error(torch.cat(found), torch.cat(want))


def our_error(chosen: Option, leaves: list[Tensor], grad: Tensor, found: list[Tensor]) -> float:
    """Return the largest relative error of output and gradients in the first head."""

    def head(x: Tensor) -> Tensor:
        return (x[:, :1] if chosen.packed is not None else x[:1, :1]).detach()

    one = [head(x).double().requires_grad_() for x in leaves]
    torch.manual_seed(1)  # dropout draws its seed from the generator
    want = adasplash(*one, **chosen.one, backend="reference")
    made = torch.autograd.grad(want, one, head(grad).double())
    pairs = zip(found, (want, *made), strict=True)
    errors = [relative_error(head(x), y.detach()) for x, y in pairs]
    return max(errors) if all(e == e for e in errors) else float("nan")


class Bench:
    """Measures one option after the other into one file, until the time is up."""

    def __init__(self, arguments: argparse.Namespace, device: torch.device) -> None:
        self.arguments, self.device = arguments, device
        self.end = time.monotonic() + (arguments.budget or float("inf"))
        self.path = arguments.output / "options.json"
        self.results = Results("adasplash", command="bench_options.py", seed=0)
        self.failed: list[str] = []

    def cases(self, name: str) -> Iterator[tuple[str, Attend, Option, list[Tensor], dict]]:
        """Yield contender, call, option, q, k and v, and what describes the case."""
        tokens, length = self.arguments.tokens, self.arguments.length
        long = min(tokens, 4 * length) if name == "packed" else length
        heads = max(1, tokens // long)
        batch = 2 if heads % 2 == 0 and name != "packed" else 1
        q, k, v = clustered_inputs(batch, heads // batch, long, 64, self.arguments.gain,
                                   dtype=torch.bfloat16, device=self.device)  # fmt: skip
        chosen = option(name, q, long)
        case = {"option": name, "batch": batch, "heads": heads // batch, "tokens": long}
        if name == "packed":
            q, k, v = (x[0].transpose(0, 1).contiguous() for x in (q, k, v))
        backend = "triton" if self.device.type == "cuda" else "reference"
        attend = partial(adasplash, **chosen.ours, backend=backend)
        for provider, call in {"adasplash": attend, **chosen.peers}.items():
            yield provider, call, chosen, [q, k, v], case

    def warm(self, name: str) -> None:
        """Compile what an option needs: ours, and FlexAttention's."""
        for provider, call, _, heads, _ in self.cases(name):
            if provider in ("adasplash", "FlexAttention"):
                with torch.no_grad():
                    call(*heads)
                call(*(x.requires_grad_() for x in heads)).sum().backward()
        torch.cuda.synchronize()

    def measure(self, name: str) -> None:
        """Check and time all contenders of an option."""
        torch.compiler.reset()  # else every option counts as one more recompilation
        for provider, call, chosen, heads, case in self.cases(name):
            if time.monotonic() > self.end:
                return
            try:
                self.contend(provider, call, chosen, heads, case)
            except (RuntimeError, TypeError) as reason:
                print(f"{provider}, {case} cannot run: {str(reason)[:300]}", flush=True)
            self.results.save(self.path)

    def contend(
        self, provider: str, call: Attend, chosen: Option, heads: list[Tensor], case: dict
    ) -> None:
        """Check and time one contender."""
        leaves = [x.clone().requires_grad_() for x in heads]
        grad = torch.randn_like(heads[2])

        def forward() -> Tensor:
            with torch.no_grad():
                return call(*heads)

        def both() -> list[Tensor]:
            output = call(*leaves)
            return [output.detach(), *torch.autograd.grad(output, leaves, grad)]

        torch.manual_seed(1)
        found, error = both(), None
        if provider == "adasplash":
            error = our_error(chosen, leaves, grad, found)
            case["density"] = round(self.density(chosen, heads), 4)
        elif chosen.checked:
            error = soft_error(chosen, *heads, found[0])
        del found
        if error is not None and not error <= BUDGET[heads[0].dtype]:
            self.failed.append(f"{provider}, {case}: error {error:.2e}")
            print(self.failed[-1], flush=True)
            return
        shown = []
        for metric, timed in (("forward", forward), ("forward + backward", both)):
            peak = peak_of(timed, self.device)
            if self.device.type == "cuda":
                from _gpu import graphed

                timed = graphed(timed)
            timing = time_call(timed, self.device, 10, self.arguments.rep)
            self.results.add(provider, metric, timing.median_ms, "ms", p20=timing.p20_ms,
                             p80=timing.p80_ms, n=timing.n, peak_mib=peak, error=error,
                             **case)  # fmt: skip
            shown.append(f"{timing.median_ms:.3f} ms")
        print(f"{provider}, {case}: {' / '.join(shown)}, error "
              f"{'not compared' if error is None else f'{error:.1e}'}", flush=True)  # fmt: skip

    @staticmethod
    def density(chosen: Option, heads: list[Tensor]) -> float:
        """Return the share of visible 64x64 blocks that hold weight, in the first head."""
        axis = 1 if chosen.packed is not None else slice(None, 1)
        one = [x[:, :1] if axis == 1 else x[:1, :1] for x in heads]
        shares = adasplash(*one, **chosen.one, return_aux=True, backend="reference")[
            1
        ].block_density
        if chosen.packed is None:
            return shares.mean().item()
        rows = -(-chosen.packed.bincount() // 64)
        blocks = rows * (rows + 1) / 2
        return ((shares[:, 0] * blocks).sum() / blocks.sum()).item()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--options", nargs="+", default=list(OPTIONS), choices=OPTIONS)
    parser.add_argument("--length", type=int, default=8192, help="tokens; packed: four times")
    parser.add_argument("--tokens", type=int, default=262144, help="batch x heads x length")
    parser.add_argument("--gain", type=float, default=1.0, help="strength of a block's topic")
    parser.add_argument("--budget", type=float, help="stop after so many seconds")
    parser.add_argument("--rep", type=float, default=50, help="ms of timed runs for a figure")
    parser.add_argument("--warm", action="store_true", help="compile only, measure nothing")
    parser.add_argument("--device", default="auto")
    options = parser.parse_args(arguments)
    bench = Bench(options, pick_device(options.device)[0])
    if options.warm:
        for name in options.options:
            bench.warm(name)
        return
    if bench.device.type == "cuda":
        command = [sys.executable, __file__, "--warm", "--length", str(options.length),
                   "--tokens", str(options.tokens), "--options"]  # fmt: skip
        few = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": "1"}
        helpers = [subprocess.Popen([*command, name], env=few) for name in options.options]
        limit = None if options.budget is None else options.budget / 2
        for helper in helpers:
            try:
                helper.wait(limit and max(0.1, bench.end - limit - time.monotonic()))
            except subprocess.TimeoutExpired:
                helper.kill()
    for name in options.options:
        bench.measure(name)
    print(bench.results.to_markdown())
    if bench.failed:
        raise SystemExit("errors over the budget, not timed:\n" + "\n".join(bench.failed))


if __name__ == "__main__":
    main()
