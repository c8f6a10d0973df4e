"""Plain decoding at the shape of an 8 B model: our loop, and transformers eager and compiled.

    python packages/hetero-sd/benchmarks/bench_plain.py --output plain.json

Random bfloat16 weights, batch 1; the drafter is there only because the decoder asks for one. With
random weights a text soon parts at a near tie. Where it does, the target's logits are computed in
float32, too: the verdict says whether transformers' own rounding there is as large as the gap.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch

from fourfold_common import Results
from hetero_sd import HeteroSpeculativeDecoder

VOCAB, PROMPT, NEW = 128_256, 128, 64


def make(**shape: int) -> Any:
    """Return a Llama with random weights on the GPU."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        eos_token_id=None,
        bos_token_id=1,
        pad_token_id=0,
        tie_word_embeddings=False,
        **shape,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model = model.to(torch.bfloat16).to_empty(device="cuda")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("norm.weight"):
                weight.fill_(1)
            else:
                weight.normal_(0, 0.02)
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config).to("cuda")
    return model.eval()


@torch.no_grad()
def judge(target: Any, ids: torch.Tensor, found: list[int], wanted: list[int]) -> tuple[str, str]:
    """Return the verdict on greedy tokens, and what it rests on.

    Args:
        target: The target.
        ids: The prompt, shape `(1, length)`.
        found: Tokens found.
        wanted: Those of transformers' eager passes.
    """
    pairs = zip(found, wanted, strict=True)
    place = next((i for i, (ours, theirs) in enumerate(pairs) if ours != theirs), None)
    if place is None:
        return "exact", f"{len(wanted)} tokens identical"
    text = torch.cat([ids, torch.tensor([wanted[:place]]).to(ids)], dim=1)
    rounded = target(text).logits[0, -1].float()
    true = copy.deepcopy(target).float()(text).logits[0, -1]
    error = float((rounded - true).abs().max())
    gap = abs(float(true[found[place]] - true[wanted[place]]))
    detail = f"token {place}: float32 gap {gap:.3g}, transformers' rounding there {error:.3g}"
    return ("exact but for ties" if gap <= 2 * error else "NOT EXACT"), detail


def seconds_a_token(run: Callable[[int], Any]) -> tuple[float, list[float]]:
    """Return the median time of a token, the prompt's pass taken off, and all times."""
    taken: dict[int, list[float]] = {2: [], NEW: []}
    for new in (2, 2, NEW, NEW, NEW):
        torch.cuda.synchronize()
        begun = time.perf_counter()
        run(new)
        torch.cuda.synchronize()
        taken[new].append(time.perf_counter() - begun)
    least = taken[2][-1]
    each = [(whole - least) / (NEW - 2) for whole in taken[NEW]]
    return statistics.median(each), each


@click.command()
@click.option("--output", type=click.Path(path_type=Path), required=True)
def main(output: Path) -> None:
    """Time all three, the compiled one last; figures are written after each."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    target = make(
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
    )
    drafter = make(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    words = {f"w{i}": i for i in range(VOCAB)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")), pad_token="w0"
    )
    ids = torch.randint(1, VOCAB, (1, PROMPT), device="cuda")
    mask = torch.ones_like(ids)
    decoder = HeteroSpeculativeDecoder(target, drafter, tokenizer, tokenizer, lookahead=0)

    def library(new: int, **extra: Any) -> Any:
        return target.generate(
            ids,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=new,
            min_new_tokens=new,
            **extra,
        )

    results = Results("hetero-sd plain decoding", command="bench_plain.py")
    where = {"parameters": sum(p.numel() for p in target.parameters()), "prompt": PROMPT}
    ways: dict[str, Callable[[int], Any]] = {
        "plain": lambda new: decoder.generate(input_ids=ids, max_new_tokens=new).sequences,
        "transformers": library,
        "transformers, static and compiled": lambda new: library(
            new, cache_implementation="static"
        ),
    }
    times: dict[str, float] = {}
    texts: dict[str, list[int]] = {}
    for name, run in ways.items():
        begun = time.perf_counter()
        for _ in range(2):  # The longest first: transformers compiles anew for a longer cache.
            texts[name] = run(NEW)[0, PROMPT:].tolist()
        results.add(name, "warm-up", time.perf_counter() - begun, "s", **where)
        times[name], each = seconds_a_token(run)
        spread = {"p20": 1e3 * min(each), "p80": 1e3 * max(each), "n": len(each)}
        results.add(name, "time a token", 1e3 * times[name], "ms", **spread, **where)
        results.add(name, "plain over it", times[name] / times["plain"], "x", **where)
        for other in {"transformers": ["plain"], "plain": []}.get(name, [name]):
            verdict, detail = judge(target, ids, texts[other], texts["transformers"])
            results.add(other, "verdict", verdict, "", **where)
            results.add(other, "tested", detail, "", **where)
        results.save(output)
    click.echo(results.to_markdown())


if __name__ == "__main__":
    main()
