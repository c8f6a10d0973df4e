"""What a drafter's proposals would be worth on text that it was not trained on.

Run as `python -m hetero_sd.demo.held_out --gguf FILE --texts FILE --drafter FOLDER` where a drafter
was trained on what `demo.sampling` wrote, without its target.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from ..vocab import map_vocabularies
from . import smollm2
from .sampling import as_ids, as_text, read_texts, split
from .vocabularies import CONTEXT


def _ends(table: list[bytes | None], ids: list[int], special: int) -> list[int]:
    """Return the number of bytes up to the end of each token; special tokens count `special`."""
    ends, total = [], 0
    for index in ids:
        spelled = table[index] if index < len(table) else None
        total += special if spelled is None else len(spelled)
        ends.append(total)
    return ends


@torch.inference_mode()
def held_out_acceptance(
    target: Any,
    target_tokenizer: Any,
    drafter: Any,
    drafter_tokenizer: Any,
    rows: Tensor | Sequence[Sequence[int]],
) -> dict[str, float]:
    """Return what TLI would accept, per proposal, on held-out rows of the target's own text.

    Counted where a target token and a drafter token end at the same byte, which is where the
    drafter's context is exact: the share of equal argmax (greedy), and the sum over tokens of
    min(p, q') at temperature 1 (sampled).
    """
    device = next(drafter.parameters()).device
    mapping = map_vocabularies(
        target_tokenizer,
        drafter_tokenizer,
        target_eos=[target_tokenizer.eos_token_id],
        drafter_eos=[drafter_tokenizer.eos_token_id],
    )
    keep, to_target = mapping.keep.to(device), mapping.to_target.to(device)
    drafter_bytes = mapping.drafter_bytes
    greedy = sampled = covered = 0.0
    places = boundaries = 0
    lines = rows.tolist() if isinstance(rows, Tensor) else [list(row) for row in rows]
    for ids, text in zip(lines, as_text(target_tokenizer, lines), strict=True):
        ids = ids[: ids.index(0)] if 0 in ids else ids
        if not ids or ids[0] != 1:
            continue  # Only chats: their texts align from the first token on.
        drafted = drafter_tokenizer.backend_tokenizer.encode(text).ids[:CONTEXT]
        ends = _ends(mapping.target_bytes, ids, 1)
        theirs = {end: place for place, end in enumerate(_ends(drafter_bytes, drafted, 1))}
        common = [(i, theirs[end]) for i, end in enumerate(ends) if end in theirs]
        ours = torch.tensor([i for i, _ in common], device=device)
        other = torch.tensor([j for _, j in common], device=device)
        p = target(input_ids=torch.tensor([ids], device=device)).logits[0, ours].float()
        z = drafter(input_ids=torch.tensor([drafted], device=device)).logits[0, other].float()
        q = torch.zeros_like(p)
        q.index_add_(1, to_target, z[:, keep].softmax(-1))
        p = p.softmax(-1)
        greedy += (p.argmax(-1) == q.argmax(-1)).sum().item()
        sampled += torch.minimum(p, q).sum().item()
        covered += p[:, to_target.unique()].sum().item()
        places += len(common)
        boundaries += len(ends)
    return {
        "greedy": greedy / max(places, 1),
        "sampled": sampled / max(places, 1),
        "covered_probability": covered / max(places, 1),
        "common_boundaries": places / max(boundaries, 1),
        "places": places,
        "shared_tokens": len(keep),
    }


@click.command()
@click.option("--gguf", type=click.Path(dir_okay=False, path_type=Path), required=True)
@click.option("--texts", multiple=True, type=click.Path(exists=True, path_type=Path), required=True)
@click.option(
    "--drafter", multiple=True, type=click.Path(file_okay=False, path_type=Path), required=True
)
@click.option("--limit", type=int, default=48, help="Texts to take.")
@click.option("--seed", type=int, default=0, help="Seed of the training.")
def main(
    gguf: Path, texts: tuple[Path, ...], drafter: tuple[Path, ...], limit: int, seed: int
) -> None:
    """Print the held-out acceptance of each drafter."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    target, tokenizer = smollm2.load(gguf)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    target.to(device)
    held = split(read_texts(texts), seed)[1][:limit]
    rows = [as_ids(tokenizer, text) for text in held]
    for folder in drafter:
        model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).float().eval()
        model.to(device)
        own = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        found = held_out_acceptance(target, tokenizer, model, own, rows)
        click.echo(json.dumps({"drafter": str(folder), "texts": len(rows), **found}))


if __name__ == "__main__":
    main()
