"""How well maps of the demo model find objects in held-out scenes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..evaluation import Confusion, aps_paper, average_precisions, bootstrap_interval
from ..maps import ConceptMaps, Reduce
from ..segmentation import segment
from ..selection import Selection
from .model import PIXELS, DemoPipeline, encode_tokens
from .natural import NaturalScenes
from .scenes import Scenes, sample_scenes

HELD_OUT_SEED = 2**40  # on the CPU; training draws on its device, and no held-out pair
SPACES = ("output", "cross_attention")
Found = Sequence[tuple[list[int], list[list[str]], dict[str, ConceptMaps]]]
LabelledScenes = Scenes | NaturalScenes


def held_out_scenes(count: int, size: int = PIXELS) -> Scenes:
    """Return scenes that no training run draws, with pairs that none shows, from the CPU."""
    generator = torch.Generator().manual_seed(HELD_OUT_SEED)
    return sample_scenes(count, generator, size=size, held_out_pairs=True, plain_captions=True)


def segment_scenes(
    pipe: DemoPipeline,
    scenes: LabelledScenes,
    *,
    t: float = 0.5,
    captions: bool = True,
    layers: Selection = "default",
    store: str = "mean",
    batch: int = 64,
    progress: bool = False,
    **settings: Any,
) -> list[tuple[list[int], list[list[str]], dict[str, ConceptMaps]]]:
    """Return maps of the words present in every scene, in groups of equally many words.

    Further settings are those of `ConceptAttention`.

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
                layers=layers,
                store=store,
                **{"space": SPACES, **settings},
            )
            found.append((chunk, words, maps))
            bar.update(len(chunk))
    return found


def score(
    found: Found,
    scenes: LabelledScenes,
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
            "argmax": the strongest of the words present against the label map (as many classes as
            names).
    """
    confusion = Confusion(2 if protocol == "binary" else len(scenes.names))
    for chunk, words, by_space in found:
        maps = by_space[space] if layers is None else by_space[space].select(layers=layers)
        if protocol == "binary":
            for _, guess, truth, _ in _objects(chunk, words, maps, scenes):
                confusion.add(guess, truth)
        else:
            target = scenes.labels[chunk].cpu()
            labels = torch.tensor([[scenes.names.index(word) for word in row] for row in words])
            best = _enlarge(maps.argmax()[:, None], target.shape[-1])[:, 0]
            confusion.add(labels.gather(1, best.flatten(1)).view_as(best), target)
    return confusion


def reduced(found: Found, reduce: Reduce) -> Found:
    """Return the maps with another order of reduction."""
    return [
        (chunk, words, {space: maps.with_reduce(reduce) for space, maps in by_space.items()})
        for chunk, words, by_space in found
    ]


def summarise(
    found: Found, scenes: LabelledScenes, *, layers: Sequence[int] | None = None, space: str
) -> dict[str, Any]:
    """Return every metric of the binary protocol, with a 95 % interval of mIoU over scenes."""
    counts = torch.zeros(len(scenes), 4, dtype=torch.int64)
    precisions = []
    for chunk, words, by_space in found:
        maps = by_space[space] if layers is None else by_space[space].select(layers=layers)
        seen = list(_objects(chunk, words, maps, scenes))
        if seen:
            guess, truth, values = (
                torch.stack(part).flatten(1) for part in list(zip(*seen, strict=True))[1:]
            )
            cells = nn.functional.one_hot(2 * truth.long() + guess.long(), 4).sum(1)
            counts.index_add_(0, torch.tensor([scene for scene, *_ in seen]), cells)
            both = average_precisions(values, truth), aps_paper(values, truth)
            precisions.append(torch.stack(both, 1))
    counts = counts.view(-1, 2, 2)
    pooled = Confusion(2)
    pooled.counts = counts.sum(0)
    plain, paper = torch.cat(precisions).mean(0).tolist()
    row = {name: getattr(pooled, name) for name in ("accuracy", "miou", "fg_iou", "miou_paper")} | {
        "ap": plain,
        "ap_paper": paper,
    }
    low, high = bootstrap_interval(counts, "miou")
    return {name: round(value, 4) for name, value in row.items()} | {
        "miou_interval": [round(low, 4), round(high, 4)]
    }


def _objects(
    chunk: Sequence[int], words: Sequence[Sequence[str]], maps: ConceptMaps, scenes: LabelledScenes
) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
    """Yield scene, thresholded map, mask and map of every object, at the picture's size."""
    size = scenes.labels.shape[-1]
    masks, values = _enlarge(maps.to_masks("mean"), size), _enlarge(maps.values, size)
    for row, (scene, names) in enumerate(zip(chunk, words, strict=True)):
        for place, word in enumerate(names):
            label = scenes.names.index(word)
            if label >= scenes.places:
                truth = scenes.labels[scene].cpu() == label
                yield scene, masks[row, place], truth, values[row, place]


def noun_swap(
    pipe: DemoPipeline, scenes: LabelledScenes, t: float, batch: int = 128
) -> dict[str, float]:
    """Return the model's loss with true captions and with every item noun replaced by another.

    A model that reads its nouns loses by the swap; `rise` is the relative increase.
    """
    first, nouns = scenes.first_token + scenes.places, len(scenes.names) - scenes.places
    generator = torch.Generator().manual_seed(1)
    tokens = scenes.tokens.cpu()
    noun = (tokens >= first) & (tokens < first + nouns)
    shift = torch.randint(1, nouns, tokens.shape, generator=generator)
    swapped = torch.where(noun, (tokens - first + shift) % nouns + first, tokens)
    clean = torch.cat([encode_pictures(pipe, part) for part in scenes.images.split(batch)])
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
def encode_pictures(pipe: DemoPipeline, images: Tensor) -> Tensor:
    """Return pictures in [0, 1] as packed latents on the CPU, (batch, patches, channels)."""
    vae = pipe.vae
    latents = vae.encode((2 * images - 1).to(vae.device, vae.dtype)).latent_dist.mode()
    packed: Tensor = pipe._pack_latents(latents, *latents.shape)
    return packed.float().cpu()


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
