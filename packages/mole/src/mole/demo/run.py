"""The main job: convert the shipped model to a table, generate, compare with its twins."""

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from fourfold_common import Results, seed_everything

from ..conversion import convert, verify
from ..evaluation import summarise, token_bytes, window_losses
from ..lut import FORMATS
from ..modeling import MoleForCausalLM
from . import ASSETS
from .train import encode

PROMPT = "The old man looked at the boy and said"
NAMES = {
    "dense": "dense",
    "moe": "MoE (stored)",
    "experts": "MoLE, experts",
    "table": "MoLE, table",
}
_PREFILL, _DECODE, _MEMORY_TOKENS = 64, 160, 64


@dataclass
class Report:
    """What the demonstration found.

    Attributes:
        lines: Sentences to print.
        forms: Losses, memory and speed of the twins and of both forms.
        formats: Size and accuracy of the table in every format.
        files: What was written.
    """

    lines: list[str]
    forms: Results
    formats: Results
    files: list[Path]


def run(
    output: Path,
    fmt: str = "fp16",
    seed: int = 0,
    prompt: str = PROMPT,
    new_tokens: int = 60,
    assets: Path = ASSETS,
    progress: bool = True,
) -> Report:
    """Run the demonstration and return what it found.

    Args:
        output: Folder for the converted models, the picture and `results.json`.
        fmt: Format of the table that generates and is timed.
        seed: Seed of the sampled continuation.
        prompt: Text to continue.
        new_tokens: Tokens to generate.
        assets: Folder of the trained models, as `mole.demo.train` writes it.
        progress: Show progress bars.

    Raises:
        ValueError: `fmt` is unknown, `prompt` is empty, or `new_tokens` does not fit the context.
        OSError: The assets are missing, or `output` cannot be written.
    """
    if fmt not in FORMATS:
        raise ValueError(f"`fmt` must be one of {', '.join(FORMATS)}; got {fmt!r}.")
    if not (assets / "training.json").is_file():
        raise OSError(f"{assets} holds no trained models; `python -m mole.demo.train` makes them.")
    tokenizer = AutoTokenizer.from_pretrained(assets / "tokenizer")
    training = json.loads((assets / "training.json").read_text(encoding="utf-8"))
    context = int(training["settings"]["context"])
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    if not 0 < ids.shape[1] <= context - new_tokens or new_tokens < 1:
        raise ValueError(
            f"`prompt` must have 1 to {context} tokens together with at least one of `new_tokens`; "
            f"got {ids.shape[1]} + {new_tokens}."
        )
    seed_everything(seed)
    sizes = token_bytes(tokenizer)
    expert: Any = MoleForCausalLM.from_pretrained(assets / "mole", dtype=torch.float32).eval()
    dense: Any = AutoModelForCausalLM.from_pretrained(assets / "dense", dtype=torch.float32).eval()
    excerpt = encode(tokenizer, [(assets / "snippet.txt").read_text(encoding="utf-8")])
    window = excerpt[None, :context].long()

    formats = Results("mole", command="mole demo", seed=seed)
    with torch.inference_mode():
        exact = expert(window).logits
    for name in dict.fromkeys((fmt, *FORMATS)):
        folder = output / f"table-{name}"
        shutil.rmtree(folder, ignore_errors=True)
        begin = time.perf_counter()
        convert(expert, folder, name, progress=progress and name == fmt)
        seconds = time.perf_counter() - begin
        verify(folder / "lut", expert)
        tokenizer.save_pretrained(folder)
        converted: Any = MoleForCausalLM.from_pretrained(folder).eval()
        gap = _add_format(formats, converted, seconds, exact, window, excerpt, sizes)
        if name == fmt:
            table, largest_gap = converted, gap

    with torch.inference_mode():
        greedy = _generate(table, ids, new_tokens)
        same = torch.equal(greedy, _generate(expert, ids, new_tokens))
        torch.manual_seed(seed)
        sampled = _generate(table, ids, new_tokens, do_sample=True, temperature=0.8, top_k=50)
        speed = decode_speed({"dense": dense, "experts": expert, "table": table}, excerpt)

    forms = Results("mole", command="mole demo", seed=seed)
    losses = _add_losses(
        forms, training, {"dense": dense, "experts": expert, "table": table}, excerpt, sizes
    )
    folders = {
        "dense": assets / "dense",
        "experts": assets / "mole",
        "table": output / f"table-{fmt}",
    }
    memory = _add_memory(forms, folders)
    for name, (median, p20, p80) in speed.items():
        forms.add(NAMES[name], "decode", median, "ms/token", p20=p20, p80=p80, n=_DECODE)
    files = [forms.save(output / "results.json"), formats.save(output / "formats.json")]
    picture = _picture(output / "mole.png", losses, speed, memory)
    files += [picture] if picture else []

    meta, ratio = table.lut.meta, speed["table"][0] / speed["dense"][0]
    lines = [
        f"Prompt:         {prompt!r}",
        f"Table, greedy:  {tokenizer.decode(greedy[0, ids.shape[1] :])!r}",
        f"Table, sampled: {tokenizer.decode(sampled[0, ids.shape[1] :])!r}",
        f"Logits of the table ({fmt}) and of the experts differ by at most {largest_gap:.1e} over "
        f"{context} tokens of unseen text (largest logit {exact.abs().max().item():.1f}); the "
        f"greedy continuation {'is the same, token for token' if same else 'differs'}.",
        f"The table: {meta.vocab:,} ids x {meta.layers} layers x {meta.experts} experts x "
        f"{meta.dim}, {meta.file_bytes / 2**20:.1f} MiB on disk, memory-mapped; "
        f"{meta.row_bytes:,} bytes are read per token.",
        f"Decoding on {torch.get_num_threads()} CPU thread(s): {speed['table'][0]:.2f} ms per "
        f"token from the table, {ratio:.2f} times the dense twin's.",
    ]
    if picture is None:
        lines.append("No picture: matplotlib is not installed (`pip install matplotlib`).")
    return Report(lines, forms, formats, files)


def _generate(model: Any, ids: Tensor, new_tokens: int, **options: Any) -> Tensor:
    options = {"do_sample": False, **options}
    generated: Tensor = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        pad_token_id=0,
        **options,
    )
    return generated


def _add_format(
    results: Results,
    model: Any,
    seconds: float,
    exact: Tensor,
    window: Tensor,
    excerpt: Tensor,
    sizes: list[int],
) -> float:
    """Add one table's size, time and accuracy; return how far its logits are from the experts'."""
    meta = model.lut.meta
    with torch.inference_mode():
        gap: float = (model(window).logits - exact).abs().max().item()
    loss = summarise(window_losses(model, excerpt, window.shape[1]), excerpt, sizes)
    results.add(meta.format, "table", meta.file_bytes / 2**20, "MiB")
    results.add(meta.format, "read per token", float(meta.row_bytes), "B")
    results.add(meta.format, "conversion", seconds, "s")
    results.add(meta.format, "max logit difference", gap, "")
    results.add(meta.format, "excerpt loss", loss.nats, "nats/token")
    return gap


def _add_losses(
    results: Results,
    training: dict[str, Any],
    models: dict[str, Any],
    excerpt: Tensor,
    sizes: list[int],
) -> dict[str, dict[str, float]]:
    """Add the losses, and return those on all validation books, which are stored.

    Loss on the shipped excerpt is computed here, but for the mixture of experts, whose weights are
    not shipped: that row is what the training script stored.
    """
    stored = {"dense": "dense", "moe": "moe", "experts": "mole"}
    context = int(training["settings"]["context"])
    found: dict[str, dict[str, float]] = {}
    for name in ("dense", "moe", "experts", "table"):
        if name == "moe" and name not in training["models"]:
            continue  # training stopped before its last model
        if name in models:
            loss = summarise(window_losses(models[name], excerpt, context), excerpt, sizes).nats
        else:
            loss = training["models"][stored[name]]["snippet"]["nats"]
        if name in stored:
            found[name] = training["models"][stored[name]]["validation"]
            figures = found[name]
            results.add(NAMES[name], "validation, stored", figures["nats"], "nats/token")
            results.add(NAMES[name], "validation, stored", figures["bits_per_byte"], "bits/byte")
        results.add(NAMES[name], "excerpt", loss, "nats/token")
    return found


def decode_speed(models: dict[str, Any], excerpt: Tensor) -> dict[str, tuple[float, ...]]:
    """Return median, 20th and 80th percentile of the time of one decoding step, in ms.

    The models take turns token by token, so that a busy machine slows all of them alike.
    """
    tokens = excerpt[: _PREFILL + _DECODE + 8].long()[None]
    caches = {
        name: model(tokens[:, :_PREFILL], use_cache=True).past_key_values
        for name, model in models.items()
    }
    times: dict[str, list[float]] = {name: [] for name in models}
    for position in range(_PREFILL, tokens.shape[1]):
        token = tokens[:, position : position + 1]
        for name, model in models.items():
            begin = time.perf_counter()
            model(token, past_key_values=caches[name], use_cache=True)
            times[name].append(1000 * (time.perf_counter() - begin))
    speed: dict[str, tuple[float, ...]] = {}
    for name, values in times.items():
        cuts = statistics.quantiles(values[8:], n=5)  # the first steps warm up
        speed[name] = (statistics.median(values[8:]), cuts[0], cuts[3])
    return speed


def _add_memory(results: Results, folders: dict[str, Path]) -> dict[str, dict[str, float]]:
    """Add what every form holds in memory, measured in a process of its own."""
    running = {
        name: subprocess.Popen(
            [sys.executable, "-m", "mole.demo.memory", str(folder), str(_MEMORY_TOKENS)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
        )
        for name, folder in folders.items()
    }
    found = {}
    for name, process in running.items():
        printed, complaint = process.communicate()
        if process.returncode:
            raise OSError(f"measuring memory failed: {complaint.strip().splitlines()[-1:]}")
        figures = json.loads(printed.splitlines()[-1])
        found[name] = figures
        results.add(NAMES[name], "weights", figures["weights_mib"], "MiB")
        if figures["resident_mib"] is not None:
            # Pages of the table belong to the page cache: the system takes them back at any time.
            own = figures["resident_mib"] - figures["table_mib"]
            results.add(NAMES[name], "resident growth", own, "MiB")
            results.add(NAMES[name], "table pages, evictable", figures["table_mib"], "MiB")
    return found


def _picture(
    path: Path,
    losses: dict[str, dict[str, float]],
    speed: dict[str, tuple[float, ...]],
    memory: dict[str, dict[str, float]],
) -> Path | None:
    """Draw loss, time and memory beside each other; None if matplotlib is missing."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    colours = {"dense": "#999999", "moe": "#E69F00", "experts": "#56B4E9", "table": "#0072B2"}
    figure, axes = pyplot.subplots(1, 3, figsize=(11, 3.4), layout="constrained")
    panels: list[tuple[str, str, dict[str, tuple[float, ...]]]] = [
        (
            "validation loss, all books (stored)",
            "nats per token (axis cut)",
            {name: (f["nats"], f["low"], f["high"]) for name, f in losses.items()},
        ),
        ("decoding, measured now", "ms per token", dict(speed)),
        (
            "weights in memory (float32), measured now",
            "MiB",
            {name: (f["weights_mib"],) * 3 for name, f in memory.items()},
        ),
    ]
    for axis, (title, unit, bars) in zip(axes, panels, strict=True):
        names = [name for name in NAMES if name in bars]
        middle = [bars[name][0] for name in names]
        errors = [
            [bars[n][0] - bars[n][1] for n in names],
            [bars[n][2] - bars[n][0] for n in names],
        ]
        drawn = axis.bar(
            [NAMES[name] for name in names],
            middle,
            yerr=errors,
            color=[colours[name] for name in names],
            capsize=4,
        )
        axis.bar_label(drawn, fmt="%.3g", padding=4)
        axis.set_title(title, fontsize=10)
        axis.set_ylabel(unit)
        axis.margins(y=0.15)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(axis="x", labelsize=8)
    low = min(f["low"] for f in losses.values())
    high = max(f["high"] for f in losses.values())
    axes[0].set_ylim(low - 2 * (high - low) - 0.02, high + (high - low) + 0.02)
    partial = path.with_name(path.name + ".tmp")
    figure.savefig(partial, dpi=150, format="png")
    pyplot.close(figure)
    partial.replace(path)
    return path


__all__ = ["PROMPT", "Report", "decode_speed", "run"]
