"""The main job of `adasplash demo`: a sparse language model at work, beside its softmax twin."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from fourfold_common import Results, seed_everything

from ..integration import register_with_transformers
from ..kernels.entmax import entmax15
from .train import ATTENTION, CONTEXT, encode, validation_loss

PROMPT = "It was a dark and stormy evening, and the old man"
BLOCK = 64
_RECORDER = "adasplash-recorder"
_SHOWN = 128  # tokens of the attention maps that are drawn
_WINDOWS = 6  # windows of the context in which the loss is computed


@dataclass(frozen=True)
class Sparsity:
    """How much of one head's attention is exactly zero, as shares of 0 to 1."""

    zero_weights: float
    empty_blocks: float


def load(kind: str) -> tuple[Any, Any]:
    """Return the shipped model of a kind, `"entmax"` or `"softmax"`, in float32, and its tokenizer.

    Raises:
        ValueError: There is no such kind.
        FileNotFoundError: The installation lacks the models.
    """
    from transformers import LlamaForCausalLM
    from transformers.utils import logging

    if kind not in ATTENTION:
        raise ValueError(f"`kind` must be 'entmax' or 'softmax'; got {kind!r}.")
    folder = _assets()
    if not (folder / kind / "model.safetensors").exists():
        raise FileNotFoundError(f"the demo's models are missing from {folder}: reinstall adasplash")
    register_with_transformers()
    logging.disable_progress_bar()  # a bar per model would tear the one of the demo
    model = LlamaForCausalLM.from_pretrained(
        folder / kind, dtype=torch.float32, attn_implementation=ATTENTION[kind]
    )
    return model.eval(), load_tokenizer()


def load_tokenizer() -> Any:
    """Return the shipped tokenizer; the models need not be there."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(_assets() / "tokenizer")


def _assets() -> Path:
    return Path(str(files(__package__) / "assets"))


def measure_sparsity(
    weights: Float[Tensor, "heads seq_q seq_k"], block: int = BLOCK, *, is_causal: bool = True
) -> list[Sparsity]:
    """Return the sparsity of every head.

    Only what attention may use counts: under a causal mask weights on and below the diagonal, and
    blocks that hold any of them.

    Args:
        weights: Attention weights; as many rows as columns if `is_causal`.
        block: Rows and columns of a block.
        is_causal: Whether what is above the diagonal is left out.

    Raises:
        ValueError: `is_causal`, and the weights are not square.
    """
    seq_q, seq_k = weights.shape[-2:]
    if is_causal and seq_q != seq_k:
        raise ValueError(f"`weights` must be square; got {seq_q} rows and {seq_k} columns.")
    seen = torch.ones(seq_q, seq_k, dtype=torch.bool, device=weights.device)
    seen = seen.tril() if is_causal else seen
    found = []
    for head in weights != 0:
        used = _by_block(seen, block)
        holding = _by_block(head & seen, block)
        found.append(
            Sparsity(
                zero_weights=1 - (head & seen).sum().item() / seen.sum().item(),
                empty_blocks=1 - holding.sum().item() / used.sum().item(),
            )
        )
    return found


def _by_block(x: Tensor, block: int) -> Tensor:
    """Return which blocks of a boolean matrix hold a True; the last ones may be smaller."""
    padded = torch.nn.functional.pad(x, (0, -x.shape[1] % block, 0, -x.shape[0] % block))
    blocks: Tensor = padded.unflatten(1, (-1, block)).unflatten(0, (-1, block)).any(3).any(1)
    return blocks


@contextmanager
def _recorded(model: Any, weigh: Callable[[Tensor], Tensor]) -> Iterator[dict[int, Tensor]]:
    """Let the model attend with dense weights `weigh(scores)` and collect them by layer."""
    from transformers import AttentionInterface, AttentionMaskInterface

    maps: dict[int, Tensor] = {}

    def attend(
        module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, scaling: float, **__: Any
    ) -> tuple[Tensor, None]:
        scores = query @ key.mT * scaling
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).triu(1)
        weights = weigh(scores.masked_fill(future, -torch.inf))
        maps[module.layer_idx] = weights[0]
        return (weights @ value).transpose(1, 2).contiguous(), None

    AttentionInterface.register(_RECORDER, attend)
    AttentionMaskInterface.register(_RECORDER, lambda *_, **__: None)
    before = model.config._attn_implementation
    model.set_attn_implementation(_RECORDER)
    try:
        yield maps
    finally:
        model.set_attn_implementation(before)


@torch.no_grad()
def attention_maps(kind: str, model: Any, ids: Tensor) -> dict[int, Tensor]:
    """Return the attention weights `[heads, seq_q, seq_k]` of every layer for one text."""
    weigh = entmax15 if kind == "entmax" else lambda scores: scores.softmax(-1)
    with _recorded(model, weigh) as maps:
        model(ids[None], use_cache=False)
    return maps


def draw_maps(maps: dict[str, Tensor], layer: int, path: Path) -> None:
    """Write one layer's maps as PNG: a row per kind, a column per head; exact zeros stay white."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.colors import PowerNorm

    heads = next(iter(maps.values())).shape[0]
    figure, axes = plt.subplots(
        len(maps),
        heads,
        figsize=(2.2 * heads, 2.5 * len(maps)),
        squeeze=False,
        layout="constrained",
    )
    colours = mpl.colormaps["viridis_r"].with_extremes(bad="white")
    for row, (kind, weights) in zip(axes, maps.items(), strict=True):
        for head, axis in enumerate(row):
            shown = weights[head, :_SHOWN, :_SHOWN]
            masked = shown.masked_fill(shown == 0, torch.nan).numpy()
            image = axis.imshow(masked, cmap=colours, norm=PowerNorm(0.4, 0, 1))
            axis.set_title(f"{kind}, head {head}", fontsize=9)
            axis.set_xticks([])
            axis.set_yticks([])
    axes[-1][0].set_xlabel("key (token)", fontsize=8)
    axes[-1][0].set_ylabel("query (token)", fontsize=8)
    figure.colorbar(image, ax=axes, shrink=0.7, label="weight (white: exactly 0)")
    figure.suptitle(f"Attention of layer {layer}, first {_SHOWN} tokens")
    part = path.with_suffix(".tmp")
    figure.savefig(part, dpi=110, format="png")
    part.replace(path)
    plt.close(figure)


def run(
    output: Path,
    *,
    prompt: str = PROMPT,
    new_tokens: int = 60,
    seed: int = 0,
    progress: bool = True,
) -> tuple[Results, Results, dict[str, str]]:
    """Run the demonstration; return losses, sparsity, and each model's continuation.

    Args:
        output: Folder for `attention_layer_*.png`, `losses.json` and `sparsity.json`.
        prompt: Text to continue.
        new_tokens: Tokens to add to it, at most what fits the context of 512.
        seed: Seed of the sampling.
        progress: Show a progress bar.

    Raises:
        ValueError: The prompt is empty, or prompt and new tokens do not fit the context.
    """
    if not prompt.strip():
        raise ValueError("`prompt` must hold some text; got an empty one.")
    output.mkdir(parents=True, exist_ok=True)
    folder = files(__package__) / "assets"
    record = json.loads((folder / "training.json").read_text())
    snippet = (folder / "snippet.txt").read_text(encoding="utf-8")
    losses, zeros = (Results("adasplash", command="adasplash demo", seed=seed) for _ in range(2))
    texts: dict[str, str] = {}
    maps: dict[str, dict[int, Tensor]] = {}
    loaded = {kind: load(kind) for kind in ATTENTION}
    ids = loaded["entmax"][1](prompt, return_tensors="pt").input_ids
    if ids.shape[1] + new_tokens > CONTEXT:
        raise ValueError(
            f"`prompt` and `new_tokens` must fit the context of {CONTEXT} tokens; "
            f"got {ids.shape[1]} and {new_tokens}."
        )
    bar = tqdm(total=3 * len(ATTENTION), desc="adasplash demo", disable=not progress)
    for kind, (model, tokenizer) in loaded.items():
        seed_everything(seed)
        with torch.no_grad():
            written = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new_tokens,
                do_sample=True,
                temperature=0.8,
                top_k=50,
            )
        texts[kind] = tokenizer.decode(written[0], skip_special_tokens=True)
        bar.update()
        stream = encode(tokenizer, [snippet])
        loss, count = validation_loss(model, stream[: _WINDOWS * CONTEXT + 1], batch=2)
        stored = record["models"][kind]
        losses.add(kind, f"snippet, {count:,} tokens", loss, "nats", n=count)
        whole = f"all held-out books, {stored['validation_tokens']:,} tokens, stored"
        losses.add(kind, whole, stored["validation_loss_nats"], "nats")
        bar.update()
        maps[kind] = attention_maps(kind, model, stream[:CONTEXT].long())
        bar.update()
    bar.close()
    for layer, weights in maps["entmax"].items():
        for head, sparsity in enumerate(measure_sparsity(weights)):
            for name, share in (
                ("zero weights", sparsity.zero_weights),
                ("empty 64x64 blocks", sparsity.empty_blocks),
            ):
                zeros.add(name, f"head {head}", round(100 * share, 1), "%", layer=layer)
        draw_maps(
            {kind: maps[kind][layer] for kind in maps},
            layer,
            output / f"attention_layer_{layer}.png",
        )
    losses.save(output / "losses.json")
    zeros.save(output / "sparsity.json")
    return losses, zeros, texts
