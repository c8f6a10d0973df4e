"""Saliency maps as a value: reduce, select, threshold, resize, draw, save, load."""

from __future__ import annotations

import io
import json
import os
import tempfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .scores import Temperature, check_temperature, spread

if TYPE_CHECKING:
    from PIL.Image import Image

Reduce = Literal["softmax_mean", "mean_softmax", "raw"]
# Dark violet over red to light yellow, even in lightness.
_RAMP = (
    (8, 6, 28), (42, 14, 84), (92, 22, 108), (142, 36, 100), (190, 55, 78),
    (228, 86, 48), (247, 132, 22), (248, 186, 54), (250, 244, 170),
)  # fmt: skip


@dataclass(frozen=True)
class ConceptMap:
    """The map of one concept.

    Args:
        name: The concept.
        values: Saliency, (batch, height, width).
        limits: Least and greatest value over all concepts of the set it comes from.
    """

    name: str
    values: Tensor
    limits: tuple[float, float]

    def __repr__(self) -> str:
        """Return the name and the shape."""
        return f"ConceptMap({self.name!r}, {' x '.join(map(str, self.values.shape))})"

    def _repr_png_(self) -> bytes:
        """Return the first picture of the batch as notebooks show it."""
        height, width = self.values.shape[-2:]
        written = io.BytesIO()
        self.to_image((256, max(round(256 * height / width), 1))).save(written, "PNG")
        return written.getvalue()

    def unit(self, scale: Literal["joint", "each"] = "joint") -> Float[Tensor, "*batch_and_grid"]:
        """Return the map scaled to [0, 1], over all concepts jointly or by itself.

        Raises:
            ValueError: `scale` is neither "joint" nor "each".
        """
        if scale not in ("joint", "each"):
            raise ValueError(f"`scale` must be 'joint' or 'each'; got {scale!r}.")
        low, high = self.limits
        if scale == "each":
            low, high = float(self.values.min()), float(self.values.max())
        return ((self.values - low) / max(high - low, 1e-12)).clamp(0, 1)

    def to_image(
        self,
        size: tuple[int, int] | None = None,
        *,
        index: int = 0,
        frame: int = 0,
        scale: Literal["joint", "each"] = "joint",
    ) -> Image:
        """Return the map as a coloured picture.

        Args:
            size: Width and height in pixels; one pixel per value when None.
            index: Which image of the batch.
            frame: Which latent frame of a video.
            scale: As in `unit`.
        """
        from PIL import Image as Pictures

        height, width = self.values.shape[-2:]
        unit = self.unit(scale)[index]
        unit = unit[frame] if unit.ndim == 3 else unit
        unit = _interpolate(unit[None], size or (width, height), "bicubic")[0]
        place = unit.clamp(0, 1) * (len(_RAMP) - 1)
        low = place.floor().long().clamp(max=len(_RAMP) - 2)
        share = (place - low)[..., None]
        ramp = torch.tensor(_RAMP, dtype=torch.float32)
        colour = ramp[low] * (1 - share) + ramp[low + 1] * share
        return Pictures.fromarray(colour.round().to(torch.uint8).numpy())

    def overlay(
        self,
        image: Image,
        *,
        alpha: float = 0.6,
        index: int = 0,
        frame: int = 0,
        scale: Literal["joint", "each"] = "joint",
    ) -> Image:
        """Return the picture with the map laid over it; arguments as in `to_image`.

        Raises:
            ValueError: `alpha` is outside 0 to 1.
        """
        from PIL import Image as Pictures

        if not 0 <= alpha <= 1:
            raise ValueError(f"`alpha` must be between 0 and 1; got {alpha}.")
        heat = self.to_image(image.size, index=index, frame=frame, scale=scale)
        return Pictures.blend(image.convert("RGB"), heat, alpha)

    def frames(
        self, pictures: Sequence[Image], *, index: int = 0, alpha: float = 0.6
    ) -> list[Image]:
        """Return a video's pictures with the map laid over each.

        Args:
            pictures: The video's pictures. Latent frame 0 covers the first; the others share the
                rest evenly, as causal video autoencoders do.
            index: Which video of the batch.
            alpha: As in `overlay`.

        Raises:
            ValueError: The maps are no video's, or there are too few pictures.
        """
        places = latent_frames(self.values.shape[1:-2], len(pictures))
        return [
            self.overlay(picture, alpha=alpha, index=index, frame=place)
            for picture, place in zip(pictures, places, strict=True)
        ]

    def to_video(
        self,
        path: str | os.PathLike[str],
        frames: Sequence[Image],
        *,
        index: int = 0,
        fps: float = 8.0,
        alpha: float = 0.6,
    ) -> Path:
        """Write the map over a video's frames as .gif or .mp4, and return its path.

        Args:
            path: File to write; .mp4 needs the extra `video`.
            frames: The video's pictures, as in `frames`.
            index: Which video of the batch.
            fps: Frames per second.
            alpha: As in `overlay`.

        Raises:
            ValueError: The maps are no video's, there are too few frames, or the file's ending is
                neither .gif nor .mp4.
        """
        return write_video(path, self.frames(frames, index=index, alpha=alpha), fps)


def latent_frames(sizes: Sequence[int], count: int) -> list[int]:
    """Return the latent frame of each of `count` pixel frames.

    Args:
        sizes: Number of latent frames, as the only entry; empty for maps of pictures.
        count: Number of pixel frames.
    """
    if not sizes:
        raise ValueError("`frames` needs maps of a video; these are maps of a picture.")
    (latent,) = sizes
    if count < latent:
        raise ValueError(f"`frames` must hold at least {latent} pictures; got {count}.")
    step = (count - 1) / max(latent - 1, 1)
    return [latent_frame(place, step, latent) for place in range(count)]


def check_video_format(path: str | os.PathLike[str], fps: float) -> None:
    """Check that a video can be written.

    Raises:
        ValueError: The file's ending or the rate is out of range, or a package is missing.
    """
    from importlib.util import find_spec

    path = Path(path)
    if not fps > 0:
        raise ValueError(f"`fps` must be above 0; got {fps}.")
    if path.suffix.lower() not in (".gif", ".mp4"):
        raise ValueError(f"`path` must end with .gif or .mp4; got {path.name!r}.")
    missing = [name for name in ("imageio", "imageio_ffmpeg") if find_spec(name) is None]
    if path.suffix.lower() == ".mp4" and missing:
        raise ValueError(
            "`path`: writing .mp4 needs imageio and imageio-ffmpeg, the extra "
            "`conceptattention[video]`; .gif needs nothing."
        )


def write_video(path: str | os.PathLike[str], pictures: Sequence[Image], fps: float) -> Path:
    """Write pictures as an animated .gif, or as .mp4 where imageio and ffmpeg are installed."""
    path = Path(path)
    check_video_format(path, fps)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix.lower() == ".gif":
        pictures[0].save(
            path, format="GIF", save_all=True, append_images=list(pictures[1:]),
            duration=1000 / fps, loop=0,
        )  # fmt: skip
        return path
    imageio: Any = import_module("imageio.v3")
    import numpy as np

    # The common player format wants even sizes.
    even = [np.asarray(p.convert("RGB"))[: p.height // 2 * 2, : p.width // 2 * 2] for p in pictures]
    imageio.imwrite(path, np.stack(even), fps=fps, macro_block_size=1)
    return path


def latent_frame(place: int, step: float, count: int) -> int:
    """Return the latent frame of a pixel frame: 0 for the first, then one per `step` frames."""
    return 0 if place == 0 or count == 1 else min(1 + int((place - 1) / step), count - 1)


@dataclass(frozen=True)
class ConceptMaps:
    """Saliency maps of a set of concepts, for a batch of images.

    Args:
        raw: Mean scores before the softmax, (groups, batch, concepts, height, width).
        soft: Mean of the softmax over concepts, same shape.
        concepts: Words, or one tuple of words per image.
        keys: Layer and step of every group, -1 where all were averaged.
        counts: Number of layer-step pairs behind every group.
        coverage: Share of the selected steps in which each layer was seen.
        space: Where the scores come from.
        temperature: Of the softmax.
        reduce: "softmax_mean" (the paper's Flux.1 order), "mean_softmax", or "raw" scores.
    """

    raw: Tensor
    soft: Tensor
    concepts: tuple[str, ...] | tuple[tuple[str, ...], ...]
    keys: Sequence[tuple[int, int]]
    counts: Sequence[int]
    coverage: Mapping[int, float]
    space: str = "output"
    temperature: Temperature = 1.0
    reduce: Reduce = "softmax_mean"

    @property
    def values(self) -> Float[Tensor, "batch concepts *grid"]:
        """The maps: mean over layers and steps, reduced as `reduce` says."""
        weight = torch.tensor(self.counts, dtype=torch.float32)
        weight = (weight / weight.sum()).view(-1, *[1] * (self.raw.ndim - 1))
        if self.reduce == "softmax_mean":
            return (self.soft * weight).sum(0)
        mean = (self.raw * weight).sum(0)
        return (
            mean if self.reduce == "raw" else (mean / spread(mean, self.temperature)).softmax(dim=1)
        )

    def __len__(self) -> int:
        """Return the number of concepts."""
        return self.raw.shape[2]

    def __iter__(self) -> Iterator[str]:
        """Yield the concepts, as a dictionary does; of the first image if each has its own."""
        return iter(self.names())

    def __repr__(self) -> str:
        """Return what the maps are of, without their numbers."""
        groups, batch, _, *grid = self.raw.shape
        return (
            f"ConceptMaps({self.concepts}, batch {batch}, {' x '.join(map(str, grid))}, "
            f"space {self.space!r}, {groups} group{'s' * (groups > 1)}, reduce {self.reduce!r})"
        )

    def _repr_png_(self) -> bytes:
        """Return the maps of the first picture beside each other as notebooks show them."""
        written = io.BytesIO()
        self.plot().save(written, "PNG")
        return written.getvalue()

    def names(self, index: int = 0) -> tuple[str, ...]:
        """Return the concepts of one image of the batch."""
        first = self.concepts[0]
        if isinstance(first, str):
            return self.concepts  # type: ignore[return-value]
        lists: Any = self.concepts
        return lists[index * len(lists) // self.raw.shape[1]]  # type: ignore[no-any-return]

    def __getitem__(self, name: str) -> ConceptMap:
        """Return the map of one concept.

        Raises:
            KeyError: It is not among the concepts.
            ValueError: Every image has concepts of its own.
        """
        if not isinstance(self.concepts[0], str):
            raise ValueError("`name` is ambiguous: every image has its own concepts; use `values`.")
        if name not in self.concepts:
            raise KeyError(f"`name` must be one of {self.concepts}; got {name!r}.")
        values = self.values
        limits = (float(values.min()), float(values.max()))
        return ConceptMap(name, values[:, self.names().index(name)], limits)

    def with_reduce(self, reduce: Reduce, temperature: Temperature | None = None) -> ConceptMaps:
        """Return the maps with another order of reduction.

        Args:
            reduce: "softmax_mean", "mean_softmax" or "raw".
            temperature: Of "mean_softmax"; unchanged when None, and "auto" for the standard
                deviation of each image's scores. That of "softmax_mean" is fixed while recording.

        Raises:
            ValueError: An argument is out of range, or `temperature` has no meaning.
        """
        if reduce not in ("softmax_mean", "mean_softmax", "raw"):
            raise ValueError(
                f"`reduce` must be 'softmax_mean', 'mean_softmax' or 'raw'; got {reduce!r}."
            )
        if temperature is not None:
            check_temperature(temperature)
            if reduce != "mean_softmax":
                raise ValueError(
                    "`temperature` can only be changed for reduce='mean_softmax'; "
                    f"got {temperature!r} for {reduce!r}. Give it to `ConceptAttention` instead."
                )
        return replace(self, reduce=reduce, temperature=temperature or self.temperature)

    def select(
        self, *, layers: Iterable[int] | None = None, steps: Iterable[int] | None = None
    ) -> ConceptMaps:
        """Return the maps of some layers and steps only.

        Raises:
            ValueError: They were not stored one by one, or nothing is left.
        """
        chosen = range(len(self.keys))
        for name, place, wanted in (("layers", 0, layers), ("steps", 1, steps)):
            if wanted is None:
                continue
            wanted = set(wanted)
            known = sorted({key[place] for key in self.keys})
            if known == [-1]:
                raise ValueError(
                    f"`{name}` were averaged while recording; "
                    f"record with store='{name}' or store='all'."
                )
            if not wanted <= set(known):
                raise ValueError(f"`{name}` must be among {known}; got {sorted(wanted)}.")
            chosen = [i for i in chosen if self.keys[i][place] in wanted]  # type: ignore[assignment]
        if not len(chosen):
            raise ValueError("`layers` and `steps` select nothing.")
        rows = list(chosen)
        return replace(
            self,
            raw=self.raw[rows],
            soft=self.soft[rows],
            keys=[self.keys[i] for i in rows],
            counts=[self.counts[i] for i in rows],
        )

    def to_masks(
        self, threshold: float | Literal["mean"] = "mean"
    ) -> Bool[Tensor, "batch concepts *grid"]:
        """Return where each map lies above its own mean, or above a fixed value.

        Source: Helbling et al. 2025, section 5 (binary protocol).
        """
        values = self.values
        if threshold == "mean":
            return values > values.mean(dim=tuple(range(2, values.ndim)), keepdim=True)
        if isinstance(threshold, str):
            raise ValueError(f"`threshold` must be 'mean' or a number; got {threshold!r}.")
        return values > threshold

    def argmax(self, background: Sequence[str] = ()) -> Int[Tensor, "*batch_and_grid"]:
        """Return the strongest concept of every pixel.

        Args:
            background: Concepts merged into class 0; the others count from 1 in their order.

        Returns:
            Positions in `concepts`, or class numbers where `background` is given.

        Raises:
            ValueError: A background word is not among the concepts.
        """
        best = self.values.argmax(dim=1)
        if not background:
            return best
        table = []
        for index in range(self.raw.shape[1]):
            names = self.names(index)
            unknown = sorted(set(background) - set(names))
            if unknown and isinstance(self.concepts[0], str):
                raise ValueError(f"`background` must be among {names}; got {unknown[0]!r}.")
            kept = [name for name in names if name not in background]
            table.append([0 if n in background else kept.index(n) + 1 for n in names])
        lookup = torch.tensor(table)
        return lookup.gather(1, best.flatten(1)).view_as(best)

    def resize(
        self, size: tuple[int, int], mode: Literal["nearest", "bilinear", "bicubic"] = "bilinear"
    ) -> ConceptMaps:
        """Return the maps at another width and height, given in PIL's order.

        Raises:
            ValueError: `size` or `mode` is out of range.
        """
        if len(size) != 2 or min(size) < 1:
            raise ValueError(f"`size` must be a width and a height of at least 1; got {size}.")
        if mode not in ("nearest", "bilinear", "bicubic"):
            raise ValueError(f"`mode` must be 'nearest', 'bilinear' or 'bicubic'; got {mode!r}.")
        groups = self.raw.shape[:2]
        raw, soft = (
            _interpolate(part.flatten(0, 1), size, mode).unflatten(0, groups)
            for part in (self.raw, self.soft)
        )
        return replace(self, raw=raw, soft=soft)

    def to_video(
        self,
        path: str | os.PathLike[str],
        frames: Sequence[Image],
        *,
        index: int = 0,
        fps: float = 8.0,
        size: int = 192,
    ) -> Path:
        """Write the video beside the maps of all its concepts, as .gif or .mp4.

        Arguments and errors are those of `ConceptMap.to_video`; `size` is one picture's width.
        """
        places = latent_frames(self.raw.shape[3:-2], len(frames))
        sheets = [
            self.plot(picture, index=index, size=size, frame=place)
            for picture, place in zip(frames, places, strict=True)
        ]
        return write_video(path, sheets, fps)

    def plot(
        self, image: Image | None = None, *, index: int = 0, size: int = 192, frame: int = 0
    ) -> Image:
        """Return one row of named pictures: the image, if given, then every concept's map.

        Args:
            image: The picture under the maps.
            index: Which image of the batch.
            size: Width of one picture in pixels.
            frame: Which latent frame of a video.
        """
        from PIL import Image as Pictures
        from PIL import ImageDraw

        height, width = self.raw.shape[-2:]
        tile = (size, max(round(size * height / width), 1))
        values = self.values
        limits = (float(values.min()), float(values.max()))
        names = self.names(index)
        pictures = [] if image is None else [("", image.convert("RGB").resize(tile))]
        for place, name in enumerate(names):
            one = ConceptMap(name, values[:, place], limits)
            if image is None:
                drawn = one.to_image(tile, index=index, frame=frame)
            else:
                drawn = one.overlay(image.resize(tile), index=index, frame=frame)
            pictures.append((name, drawn))
        sheet = Pictures.new("RGB", (size * len(pictures), tile[1] + 16), "white")
        pen = ImageDraw.Draw(sheet)
        for place, (name, picture) in enumerate(pictures):
            sheet.paste(picture, (place * size, 16))
            pen.text((place * size + 3, 2), name, fill="black")
        return sheet

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the maps to an .npz file, whole or not at all, and return its path."""
        import numpy as np

        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        meta = {
            "concepts": self.concepts,
            "keys": list(self.keys),
            "counts": list(self.counts),
            "coverage": {str(layer): share for layer, share in self.coverage.items()},
            "space": self.space,
            "temperature": self.temperature,
            "reduce": self.reduce,
        }
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        try:
            with os.fdopen(handle, "wb") as file:
                np.savez_compressed(
                    file, raw=self.raw.numpy(), soft=self.soft.numpy(), meta=json.dumps(meta)
                )
            os.chmod(name, 0o644)
            os.replace(name, path)
        except BaseException:
            os.unlink(name)
            raise
        return path

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ConceptMaps:
        """Return the maps that `save` wrote.

        Raises:
            ValueError: The file is no such file, cut short, or damaged.
            OSError: It cannot be read.
        """
        import numpy as np

        try:
            with np.load(path, allow_pickle=False) as stored:
                meta = json.loads(str(stored["meta"]))
                raw, soft = (torch.from_numpy(stored[name]) for name in ("raw", "soft"))
            words: Any = tuple(w if isinstance(w, str) else tuple(w) for w in meta["concepts"])
            return cls(
                raw=raw,
                soft=soft,
                concepts=words,
                keys=[(layer, step) for layer, step in meta["keys"]],
                counts=meta["counts"],
                coverage={int(layer): share for layer, share in meta["coverage"].items()},
                space=meta["space"],
                temperature=meta["temperature"],
                reduce=meta["reduce"],
            )
        except (
            ValueError, KeyError, TypeError, EOFError, NotImplementedError,
            zipfile.BadZipFile, zlib.error,
        ) as error:  # fmt: skip
            raise ValueError(
                f"`path` must name a file written by `ConceptMaps.save`; got {str(path)!r}."
            ) from error


def _interpolate(values: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    """Return maps (..., height, width) at another (width, height)."""
    if tuple(values.shape[-2:]) == (size[1], size[0]):
        return values
    flat = values.reshape(1, -1, *values.shape[-2:])
    align = {} if mode == "nearest" else {"align_corners": False}
    flat = F.interpolate(flat, size=(size[1], size[0]), mode=mode, **align)  # type: ignore[arg-type]
    return flat.view(*values.shape[:-2], size[1], size[0])
