"""How well maps of the demo model find objects in held-out scenes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from ..evaluation import Confusion
from ..maps import ConceptMaps
from ..segmentation import segment
from ..selection import Selection
from .model import PIXELS, DemoPipeline, encode_tokens
from .scenes import BACKGROUNDS, ITEMS, LABELS, VOCABULARY, Scenes, patchify, sample_scenes

HELD_OUT_SEED = 2**40  # training draws seeds far below
SPACES = ("output", "cross_attention")


def held_out_scenes(count: int, size: int = PIXELS) -> Scenes:
    """Return scenes that no training run draws, with pairs that none shows, from the CPU."""
    generator = torch.Generator().manual_seed(HELD_OUT_SEED)
    return sample_scenes(count, generator, size=size, held_out_pairs=True, plain_captions=True)


def segment_scenes(
    pipe: DemoPipeline,
    scenes: Scenes,
    *,
    t: float = 0.5,
    captions: bool = True,
    layers: Selection = "default",
    store: str = "mean",
    batch: int = 64,
    progress: bool = False,
) -> list[tuple[list[int], list[list[str]], dict[str, ConceptMaps]]]:
    """Return maps of the words present in every scene, in groups of equally many words.

    Returns:
        For every group: positions of its scenes, their words, and maps by space.
    """
    groups: dict[int, list[int]] = defaultdict(list)
    for index in range(len(scenes)):
        groups[len(scenes.words(index))].append(index)
    chunks = [
        members[start : start + batch]
        for _, members in sorted(groups.items())
        for start in range(0, len(members), batch)
    ]
    texts = scenes.captions()
    found = []
    with tqdm(total=len(scenes), desc="scenes", disable=not progress, leave=False) as bar:
        for chunk in chunks:
            words = [scenes.words(i) for i in chunk]
            maps: Any = segment(
                pipe,
                scenes.images[chunk],
                words,
                [texts[i] if captions else "" for i in chunk],
                t=t,
                seed=chunk[0],
                space=SPACES,
                layers=layers,
                store=store,
            )
            found.append((chunk, words, maps))
            bar.update(len(chunk))
    return found


def score(
    found: Sequence[tuple[list[int], list[list[str]], dict[str, ConceptMaps]]],
    scenes: Scenes,
    *,
    layers: Sequence[int] | None = None,
    space: str = "output",
    protocol: str = "binary",
) -> Confusion:
    """Return the pooled confusion matrix of one space under one protocol.

    Args:
        found: Output of `segment_scenes`.
        scenes: The same scenes.
        layers: Layers to average, when they were stored one by one.
        space: Which maps.
        protocol: "binary": for every object, its map above its mean against its mask (2 classes).
            "argmax": the strongest of the words present against the label map (24 classes).
    """
    confusion = Confusion(2 if protocol == "binary" else len(LABELS))
    size = scenes.labels.shape[-1]
    for chunk, words, by_space in found:
        maps = by_space[space]
        if layers is not None:
            maps = maps.select(layers=layers)
        labels = torch.tensor([[LABELS.index(word) for word in row] for row in words])
        target = scenes.labels[chunk].cpu()
        if protocol == "binary":
            masks = _enlarge(maps.to_masks("mean"), size)
            objects = labels >= len(BACKGROUNDS)
            truth = target[:, None] == labels[:, :, None, None]
            if objects.any():
                confusion.add(masks[objects], truth[objects])
        else:
            best = _enlarge(maps.argmax()[:, None], size)[:, 0]
            confusion.add(labels.gather(1, best.flatten(1)).view_as(best), target)
    return confusion


def noun_swap(pipe: DemoPipeline, scenes: Scenes, t: float, batch: int = 128) -> dict[str, float]:
    """Return the model's loss with true captions and with every item noun replaced by another.

    A model that reads its nouns loses by the swap; `rise` is the relative increase.
    """
    first = VOCABULARY.index(ITEMS[0])
    generator = torch.Generator().manual_seed(1)
    tokens = scenes.tokens.cpu()
    noun = (tokens >= first) & (tokens < first + len(ITEMS))
    shift = torch.randint(1, len(ITEMS), tokens.shape, generator=generator)
    swapped = torch.where(noun, (tokens - first + shift) % len(ITEMS) + first, tokens)
    clean = patchify(scenes.images.cpu())
    noise = torch.randn(clean.shape, generator=generator)
    losses = {}
    for name, rows in (("true", tokens), ("swapped", swapped)):
        total = 0.0
        for start in range(0, len(clean), batch):
            part = slice(start, start + batch)
            velocity = predict(pipe, (1 - t) * clean[part] + t * noise[part], rows[part], t)
            error = (velocity.float().cpu() - (noise - clean)[part]) ** 2
            total += float(error.mean(dim=(1, 2)).sum())
        losses[name] = total / len(clean)
    return {**losses, "rise": losses["swapped"] / losses["true"] - 1}


@torch.no_grad()
def predict(pipe: DemoPipeline, noised: Tensor, tokens: Tensor, t: float) -> Tensor:
    """Return the velocity that the transformer predicts at noise level `t`."""
    model = pipe.transformer
    side = int(noised.shape[1] ** 0.5)
    states, pooled = encode_tokens(pipe.text_encoder_2, tokens.to(model.device))
    result: Tensor = model(
        hidden_states=noised.to(model.device, model.dtype),
        timestep=torch.full((len(noised),), t, device=model.device, dtype=model.dtype),
        pooled_projections=pooled,
        encoder_hidden_states=states,
        txt_ids=torch.zeros(states.shape[1], 3, device=model.device),
        img_ids=pipe._prepare_latent_image_ids(1, side, side, model.device, model.dtype),
        return_dict=False,
    )[0]
    return result


def _enlarge(labels: Tensor, size: int) -> Tensor:
    """Return label maps (batch, channels, height, width) enlarged without mixing labels."""
    enlarged = F.interpolate(labels.float(), size=(size, size), mode="nearest")
    return enlarged.to(labels.dtype)
