"""The demo behind `hetero-sd demo`: one target, one small drafter, two methods, real prompts."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fourfold_common import Results, seed_everything

from .._files import write_atomically
from ..decoder import HeteroSpeculativeDecoder
from .models import ASSETS, chat_ids, load_model, load_target

_logger = logging.getLogger(__name__)
LOOKAHEAD = 3
SAMPLING: dict[str, Any] = {"temperature": 0.7, "top_k": 50}


@dataclass
class _Tally:
    """Sums over the prompts."""

    tokens: int = 0
    passes: int = 0
    proposed: int = 0
    accepted: int = 0
    seconds: float = 0.0


@dataclass
class Outcome:
    """What the demo found.

    Attributes:
        target: Name of the target.
        identical: For each method, prompts whose greedy output is the target's own, and all.
        results: The figures.
        samples: Texts, by prompt.
        files: Files written.
        notes: Lines for the user.
    """

    target: str
    identical: dict[str, tuple[int, int]]
    results: Results
    samples: list[dict[str, str]]
    files: list[Path] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@torch.no_grad()
def _warm_up(model: Any) -> None:
    """Run once before timing, so that nothing is set up inside it."""
    model(input_ids=torch.tensor([[1, 2, 3, 4]]))


def run(
    output: Path,
    *,
    seed: int = 0,
    tokens: int = 24,
    embedded: bool = False,
    progress: bool = True,
) -> Outcome:
    """Generate for the shipped prompts with the target alone and with each method.

    Args:
        output: Folder for `results.json`, `samples.json` and `speed.png`.
        seed: Seed of sampling.
        tokens: New tokens a prompt, 1 or more.
        embedded: Use the package's small target.
        progress: Show a progress bar.

    Raises:
        ValueError: `tokens` is below 1.
        FileNotFoundError: A shipped model is missing.
    """
    if tokens < 1:
        raise ValueError(f"`tokens` must be 1 or more; got {tokens}.")
    from tqdm.auto import tqdm

    seed_everything(seed)
    name, target, tokenizer, notes = load_target(embedded)
    drafter, drafter_tokenizer = load_model("drafter")
    questions = json.loads((ASSETS / "prompts.json").read_text(encoding="utf-8"))
    prompts = [chat_ids(tokenizer, question) for question in questions]
    methods = ("tli", "slem")
    decoders = {
        method: HeteroSpeculativeDecoder(
            target, drafter, tokenizer, drafter_tokenizer, method=method, lookahead=LOOKAHEAD
        )
        for method in methods
    }
    tallies: dict[tuple[str, str], _Tally] = {}
    identical = {method: 0 for method in methods}
    samples: list[dict[str, str]] = []
    steps = len(prompts) * 2 * (1 + len(methods))
    _warm_up(target)
    _warm_up(drafter)
    with tqdm(total=steps, disable=not progress) as bar:
        for place, (question, ids) in enumerate(zip(questions, prompts, strict=True)):
            texts = {"prompt": question}
            for mode in ("greedy", "sampled"):
                options: dict[str, Any] = {"do_sample": False}
                if mode == "sampled":
                    options = {"do_sample": True, **SAMPLING}
                bar.set_description(f"{mode}, target alone")
                alone = tallies.setdefault((mode, "target alone"), _Tally())
                torch.manual_seed(seed + place)
                reference = _generate_alone(target, ids, tokens, options, alone)
                texts[f"{mode}, target alone"] = tokenizer.decode(
                    reference, skip_special_tokens=True
                )
                bar.update()
                for method, decoder in decoders.items():
                    bar.set_description(f"{mode}, {method}")
                    torch.manual_seed(seed + place)
                    made = decoder.generate(input_ids=ids, max_new_tokens=tokens, **options)
                    tally = tallies.setdefault((mode, method), _Tally())
                    tally.tokens += made.stats.generated
                    tally.passes += made.stats.rounds
                    tally.proposed += made.stats.proposed
                    tally.accepted += made.stats.accepted
                    tally.seconds += made.stats.seconds["total"]
                    texts[f"{mode}, {method}"] = made.text
                    if mode == "greedy":
                        identical[method] += made.new_tokens == reference
                    bar.update()
            samples.append(texts)
    results = _figures(name, tallies, seed, tokens)
    outcome = Outcome(
        target=name,
        identical={method: (count, len(prompts)) for method, count in identical.items()},
        results=results,
        samples=samples,
        notes=notes,
    )
    outcome.files = [
        results.save(output / "results.json"),
        _write_json(output / "samples.json", samples),
        _plot(output / "speed.png", name, tallies),
    ]
    return outcome


def _generate_alone(
    target: Any, ids: torch.Tensor, tokens: int, options: dict[str, Any], tally: _Tally
) -> list[int]:
    """Return the new tokens of `transformers`' own `generate`, and count them."""
    begun = time.perf_counter()
    made = target.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, **options
    )
    tally.seconds += time.perf_counter() - begun
    new: list[int] = made[0, ids.shape[1] :].tolist()
    tally.tokens += len(new)
    tally.passes += len(new)
    return new


def _figures(name: str, tallies: dict[tuple[str, str], _Tally], seed: int, tokens: int) -> Results:
    results = Results("hetero-sd", command=f"hetero-sd demo --tokens {tokens}", seed=seed)
    for (mode, provider), tally in tallies.items():
        alone = tallies[mode, "target alone"]
        speed, base = tally.tokens / tally.seconds, alone.tokens / alone.seconds

        def add(
            metric: str, value: float, unit: str = "", mode: str = mode, who: str = provider
        ) -> None:
            results.add(who, metric, value, unit, target=name, decoding=mode)

        add("speed", speed, "tokens/s")
        add("speed-up", speed / base, "x")
        if provider != "target alone":
            add("acceptance", tally.accepted / max(tally.proposed, 1))
        add("block efficiency", tally.tokens / tally.passes, "tokens/pass")
    return results


def _write_json(path: Path, content: Any) -> Path:
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    return write_atomically(path, lambda name: Path(name).write_text(text, encoding="utf-8"))


def _plot(path: Path, name: str, tallies: dict[tuple[str, str], _Tally]) -> Path:
    """Draw tokens a second and tokens a target pass, by method."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    colours = {"target alone": "#7f7f7f", "tli": "#0072b2", "slem": "#e69f00"}
    modes = list(dict.fromkeys(mode for mode, _ in tallies))
    figure, axes = pyplot.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
    panels: list[tuple[str, Callable[[_Tally], float]]] = [
        ("tokens per second", lambda tally: tally.tokens / tally.seconds),
        ("tokens per target pass", lambda tally: tally.tokens / tally.passes),
    ]
    for axis, (label, value) in zip(axes, panels, strict=True):
        for rank, (provider, colour) in enumerate(colours.items()):
            heights = [value(tallies[mode, provider]) for mode in modes]
            places = [place + (rank - 1) * 0.27 for place in range(len(modes))]
            bars = axis.bar(places, heights, 0.25, color=colour, label=provider)
            axis.bar_label(bars, fmt="%.2f", fontsize=8)
        axis.set_xticks(range(len(modes)), modes)
        axis.set_ylabel(label)
        axis.spines[["top", "right"]].set_visible(False)
    axes[1].legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=3)
    figure.suptitle(f"{name}, drafter of 3.8 M parameters with another vocabulary", fontsize=10)
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=130))
    pyplot.close(figure)
    return path
