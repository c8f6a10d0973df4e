"""The settings behind `results/bench-h200.json`, by name, until a time is over.

    python packages/hetero-sd/benchmarks/bench_gpu.py --smollm2 FOLDER --data FOLDER --output OUT \\
        --seconds 600 greedy sampled batch-8

The target is SmolLM2-135M-Instruct inflated to 5.4 B parameters where nothing else is said.
`--data` holds `spec_bench.jsonl.gz`, `human_eval.jsonl.gz`, `gsm8k_test.jsonl.gz` and
`long.jsonl.gz`. Each setting gets a folder with its figures, table and plots; `OUT/bench.json`
holds all of them.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from fourfold_common import Results
from hetero_sd.bench import Decoding, run_bench
from hetero_sd.demo.inflate import inflate, shape_for
from hetero_sd.demo.models import load_model
from hetero_sd.pairs import Pair, load_side, prompt_ids, read_prompts
from hetero_sd.verify import verify_pair

GREEDY, SAMPLED, NUCLEUS = Decoding(0.0), Decoding(1.0), Decoding(0.7, 0.9)
BOTH, OURS = (GREEDY, SAMPLED), ("tli", "slem", "slrs", "auto")
FEW, LEAST = ("tli", "slem", "auto"), ("tli", "auto")
LARGE, MIDDLE, LOOKAHEAD = 5e9, 5.1e8, 4
SETS = ("human_eval", "gsm8k_test", "summarization", "long")
CONTEXT = {"long": 3000}  # Tokens of a prompt to keep; else 400.
QUESTIONS = (
    "What is bread?",
    "Write a story about a dog.",
    "Why is the sky blue?",
    "Tell me about horses.",
    "What is rain?",
    "Write a poem about the sea.",
    "How do birds fly?",
    "Write a story about a king.",
)


@dataclasses.dataclass(frozen=True)
class Setting:
    """One call of `run_bench`.

    Attributes:
        seconds: What it took on an H200 beside other jobs.
        drafter: Which pair; see `Pairs.make`.
        size: Parameters of the target; as it is if missing.
        prompts: Prompts of each set.
        sets: Names of sets.
        decodings: Ways to choose tokens.
        batch: Rows decoded together.
        methods: Methods of ours.
        peers: Whether transformers' assisted generation is timed too.
        repeats: Timed passes over the prompts.
        tokens: New tokens of each prompt; a batch is as slow as its slowest row, which evens out
            over longer texts.
    """

    seconds: int
    drafter: str = "4m"
    size: float | None = LARGE
    prompts: int = 3
    sets: tuple[str, ...] = ("spec_bench",)
    decodings: tuple[Decoding, ...] = BOTH
    batch: int = 1
    methods: tuple[str, ...] = OURS
    peers: bool = False
    repeats: int = 2
    tokens: int = 48


SETTINGS = {
    "greedy": Setting(72, decodings=(GREEDY,), peers=True),
    "sampled": Setting(62, decodings=(SAMPLED,), peers=True),
    "nucleus": Setting(35, decodings=(NUCLEUS,)),
    "wide": Setting(120, prompts=12, repeats=1),
    "batch-4": Setting(50, prompts=16, batch=4, methods=FEW, tokens=96),
    "batch-8": Setting(45, prompts=16, batch=8, methods=FEW, tokens=96),
    "sets": Setting(65, prompts=2, sets=SETS, decodings=(GREEDY,), methods=FEW),
    "sets-sampled": Setting(45, prompts=2, sets=SETS, decodings=(SAMPLED,), methods=LEAST),
    "cut": Setting(43, "cut"),
    "cut-8": Setting(50, "cut", prompts=8, batch=8, methods=FEW, tokens=96),
    "small-cut-8": Setting(
        45, "small cut", sets=("questions",), prompts=8, batch=8, methods=FEW, tokens=96
    ),
    "worst": Setting(37, "random", methods=LEAST),
    "worst-8": Setting(30, "random", prompts=8, batch=8, methods=LEAST),
    "larger": Setting(55, "20m"),
    "middle": Setting(40, size=MIDDLE),
    "small": Setting(35, size=None),
}
EXACT = "exact"


class Pairs:
    """Makes the pairs, and keeps the last target.

    Args:
        smollm2: Folder or GGUF file of SmolLM2-135M-Instruct.
        large: Folder of the 20m drafter.
        trial: Sizes at which all runs on a CPU in little time.
    """

    def __init__(self, smollm2: Path, large: Path | None, trial: bool) -> None:
        self.device, self.dtype = ("cpu", torch.float32) if trial else ("cuda", torch.bfloat16)
        self._smollm2, self._large, self._trial = smollm2, large, trial
        self._known: dict[tuple[str, float | None], tuple[Any, Any]] = {}

    def _base(self, name: str) -> tuple[Any, Any]:
        if name == "SmolLM2-135M-Instruct":
            model, tokenizer = load_side(self._smollm2)
        else:
            model, tokenizer = load_model("target")
        return model.to(self.device, self.dtype), tokenizer

    def _target(self, name: str, size: float | None) -> tuple[Any, Any]:
        if (name, size) not in self._known:
            self._known.clear()
            model, tokenizer = self._base(name)
            if size is not None:
                size = 2 * sum(p.numel() for p in model.parameters()) if self._trial else size
                shape = shape_for(model, size)
                model = inflate(model, *shape, dtype=self.dtype, device=self.device)
            self._known[name, size] = model, tokenizer
        return self._known[name, size]

    def make(self, drafter: str, size: float | None) -> Pair:
        """Return a pair.

        Args:
            drafter: `"4m"`, which ships, `"20m"`, `"random"` for the former's shape with random
                weights, `"cut"` for the target's own small weights behind its tokenizer's first
                20,000 merges, `"small cut"` for the same of the package's small target.
            size: Parameters of the target.
        """
        name = "SmolLM2-135M-Instruct"
        if self._trial or drafter == "small cut":
            name = "small target"
        target, tokenizer = self._target(name, size)
        if size is not None:
            name += f", inflated to {sum(p.numel() for p in target.parameters()) / 1e9:.2f} B"
        if drafter.endswith("cut"):
            merges = 20_000 if "SmolLM2" in name else 680
            model, other = cut_merges(*self._base(name.split(",")[0]), merges)
            title = f"its own weights, {len(other):,} tokens ({merges:,} merges)"
        elif drafter == "20m":
            if self._large is None:
                raise click.UsageError("the setting `larger` needs --large-drafter.")
            (model, other), title = load_side(self._large), "drafter 20m"
        else:
            (model, other), title = load_model("drafter"), "drafter 4m"
        if drafter == "random":
            title = "a drafter with random weights"
            for weight in model.parameters():
                if weight.ndim > 1:
                    torch.nn.init.normal_(weight, 0, 0.02)
        model = model.to(self.device, self.dtype).eval()
        return Pair(f"{name}; {title}", target, model, tokenizer, other)


def cut_merges(model: Any, tokenizer: Any, merges: int) -> tuple[Any, Any]:
    """Return a model of fewer tokens, and its tokenizer: the longest tokens are gone, ids stay.

    Args:
        model: Its table of embeddings is cut.
        tokenizer: A BPE whose ids go by merges.
        merges: Merges to keep, the first.
    """
    from tokenizers import Tokenizer

    state = json.loads(tokenizer.backend_tokenizer.to_str())
    bpe = state["model"]
    gone = {"".join(pair) for pair in bpe["merges"][merges:]}
    bpe["merges"] = bpe["merges"][:merges]
    gone -= {"".join(pair) for pair in bpe["merges"]}
    bpe["vocab"] = {token: i for token, i in bpe["vocab"].items() if token not in gone}
    other = copy.deepcopy(tokenizer)
    other._tokenizer = Tokenizer.from_str(json.dumps(state))
    model.resize_token_embeddings(max(bpe["vocab"].values()) + 1)
    return model, other


def prompts_of(name: str, count: int, data: Path, tokenizer: Any) -> list[Tensor]:
    """Return a set's prompts as ids, shape `(1, length)` each, in the chat template."""
    if name == "questions":
        texts: Sequence[str] = QUESTIONS[:count]
    elif name == "summarization":
        texts = read_prompts(data / "spec_bench.jsonl.gz", count, (name,))
    else:
        texts = read_prompts(data / f"{name}.jsonl.gz", count)
    if name == "long":
        texts = [f"Summarize: {text}" for text in texts]
    return [prompt_ids(tokenizer, text, True, CONTEXT.get(name, 400)) for text in texts]


def exactness(pairs: Pairs, data: Path, output: Path, trial: bool) -> None:
    """Compare all methods in float32 with the target alone, and write what was found."""
    pair = pairs.make("4m", None)
    models = {"target": copy.deepcopy(pair.target).float(), "drafter": pair.drafter.float()}
    prompts = prompts_of("spec_bench", 2 if trial else 4, data, pair.target_tokenizer)
    found = verify_pair(
        dataclasses.replace(pair, **models),
        prompts,
        methods=("tli", "slem", "slrs", "c-slrs"),
        lookaheads=(1, 4),
        tokens=8 if trial else 48,
        draws=64 if trial else 600,
    )
    results = Results("hetero-sd verify", command="bench_gpu.py exact", seed=0)
    for check in found:
        where = {"target": pair.name, "kind": check.kind, "lookahead": check.lookahead}
        results.add(check.method, "passed", str(check.passed), "", **where)
        results.add(check.method, "found", check.detail, "", **where)
    results.save(output / "verify.json")
    click.echo(results.to_markdown())


@click.command()
@click.argument("names", nargs=-1, type=click.Choice([*SETTINGS, EXACT]))
@click.option("--smollm2", required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--data", required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--large-drafter", type=click.Path(path_type=Path), help="Folder of the 20m drafter.")
@click.option("--output", default=Path("bench-output/gpu"), type=click.Path(path_type=Path))
@click.option("--seconds", default=1e9, help="Begin no setting that may end later than this.")
@click.option("--trial", is_flag=True, help="Small models on the CPU: does all of it run?")
def main(
    names: tuple[str, ...],
    smollm2: Path,
    data: Path,
    large_drafter: Path | None,
    output: Path,
    seconds: float,
    trial: bool,
) -> None:
    """Run settings, all of them if none is named."""
    begun = time.perf_counter()
    torch.set_num_threads(4)
    pairs = Pairs(smollm2, large_drafter, trial)
    everything = Results("hetero-sd", command=f"bench_gpu.py {' '.join(names)}", seed=0)
    for name in names or (*SETTINGS, EXACT):
        setting = SETTINGS.get(name, Setting(65))
        start = time.perf_counter() - begun
        if start + 0.8 * setting.seconds > seconds:
            click.echo(f"[{start:.0f} s] no time for {name}")
            continue
        try:
            if name == EXACT:
                exactness(pairs, data, output / name, trial)
            else:
                everything.cases += _run(setting, pairs, data, output / name, trial)
                everything.save(output / "bench.json")
        except Exception as error:  # The others' figures are wanted all the same.
            click.echo(f"{name} failed: {type(error).__name__}: {error}")
        took = time.perf_counter() - begun - start
        click.echo(f"[{start + took:.0f} s] {name} took {took:.0f} s, {setting.seconds} expected")


def _run(
    setting: Setting, pairs: Pairs, data: Path, output: Path, trial: bool
) -> list[dict[str, Any]]:
    pair = pairs.make(setting.drafter, setting.size)
    count = max(setting.batch // 4, 1) if trial else setting.prompts
    sets = {
        f"{name}, {count}": prompts_of(name, count, data, pair.target_tokenizer)
        for name in setting.sets
    }
    found = run_bench(
        pair,
        sets,
        output,
        methods=setting.methods,
        lookaheads=(LOOKAHEAD,),
        decodings=setting.decodings,
        batches=(setting.batch,),
        tokens=4 if trial else setting.tokens,
        repeats=setting.repeats,
        peer_repeats=1,
        peers=setting.peers,
        progress=False,
    )
    shown = {"over plain": ".3f", "acceptance": ".2f", "of predicted": ".3f", "overhead": ".3f"}
    for case in found.cases:
        if case["metric"] in shown or case["metric"] in ("verdict", "note", "rounds"):
            where, value = case["parameters"], case["median"]
            value = value if isinstance(value, str) else f"{value:{shown[case['metric']]}}"
            kind = f"{where['prompts']}, {where['decoding']}, batch {where['batch']}"
            click.echo(f"  {kind:36} {case['provider']:30} {case['metric']:13} {value}")
    return found.cases


if __name__ == "__main__":
    main()
