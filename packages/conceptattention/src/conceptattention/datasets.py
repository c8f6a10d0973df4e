"""Segmentation data sets read from folders that a user has: nothing is downloaded."""

from __future__ import annotations

import csv
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image

VOID = -1
_PICTURES = (".jpg", ".jpeg", ".png", ".JPEG", ".JPG")


@dataclass(frozen=True)
class Sample:
    """One picture with its labels.

    Args:
        id: Its name, unique in the data set.
        image: The picture.
        labels: Class numbers (height, width), `VOID` where the truth is not known.
        names: Word of every class number that can be asked for.
        caption: What the picture shows; None for "a" and the words.
    """

    id: str
    image: Image
    labels: Tensor
    names: dict[int, str]
    caption: str | None = None

    @property
    def present(self) -> list[int]:
        """The named classes with at least one pixel."""
        return [number for number in self.labels.unique().tolist() if number in self.names]


class Dataset(ABC):
    """Pictures with labels, in a fixed order.

    Args:
        root: The data set's folder.
        split: Which part of it.

    Raises:
        ValueError: The split is not known.
        OSError: The folder does not look as it should.
    """

    name: ClassVar[str]
    layout: ClassVar[str]  # what the folder must hold
    splits: ClassVar[tuple[str, ...]] = ("val",)
    reads_folder: ClassVar[bool] = True
    classes: int
    background: tuple[str, ...] = ()  # words whose region counts as class 0

    def __init__(self, root: Path, split: str | None = None) -> None:
        self.root, self.split = Path(root), split or self.splits[0]
        if self.split not in self.splits:
            raise ValueError(f"`split` must be one of {self.splits}; got {split!r}.")
        self.ids = self.find()
        if not self.ids:
            raise OSError(f"{self.root} holds no pictures of {self.name}; expected {self.layout}.")

    def __len__(self) -> int:
        """Return the number of pictures."""
        return len(self.ids)

    @abstractmethod
    def find(self) -> list[str]:
        """Return the names of the pictures, sorted."""

    @abstractmethod
    def __getitem__(self, index: int) -> Sample:
        """Return one picture."""

    def _need(self, path: Path) -> Path:
        if not path.exists():
            raise OSError(f"`root` has no {path}; {self.name} needs {self.layout}.")
        return path


class ImageNetSegmentation(Dataset):
    """ImageNet-Segmentation, exported to pictures, masks and one word per picture."""

    name = "imagenet-segmentation"
    layout = "images/ID.jpg, masks/ID.png (above 0 inside) and classes.csv with rows `ID,word`"
    classes = 2
    background = ("background", "floor", "tree", "person", "grass", "face")

    def find(self) -> list[str]:
        with open(self._need(self.root / "classes.csv"), newline="", encoding="utf-8") as file:
            self.words = {row[0]: row[1].strip() for row in csv.reader(file) if len(row) == 2}
        stems = {path.stem for path in (self.root / "images").glob("*")}
        return sorted(stems & self.words.keys())

    def __getitem__(self, index: int) -> Sample:
        key = self.ids[index]
        labels = _labels(self._need(self.root / "masks" / f"{key}.png")) > 0
        picture = _picture(self.root / "images", key)
        return Sample(key, picture, labels.long(), {1: self.words[key]})


class PascalVOC(Dataset):
    """PASCAL VOC: every picture, or those with one class ("single")."""

    name = "voc"
    layout = "JPEGImages, SegmentationClass and ImageSets/Segmentation/val.txt"
    splits = ("val", "val-single", "train", "train-single")
    words = (
        "airplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
        "table", "dog", "horse", "motorcycle", "person", "plant", "sheep", "sofa", "train",
        "monitor",
    )  # fmt: skip
    classes = 21
    background = ("background", "floor", "grass", "tree", "sky")

    def find(self) -> list[str]:
        part = self.split.removesuffix("-single")
        rows = self._need(self.root / "ImageSets/Segmentation" / f"{part}.txt").read_text().split()
        if self.split.endswith("-single"):
            rows = [
                key for key in rows if len(set(self._mask(key).unique().tolist()) - {0, -1}) == 1
            ]
        return sorted(rows)

    def _mask(self, key: str) -> Tensor:
        labels = _labels(self._need(self.root / "SegmentationClass" / f"{key}.png"))
        return torch.where(labels == 255, VOID, labels)

    def __getitem__(self, index: int) -> Sample:
        key = self.ids[index]
        names = {number + 1: word for number, word in enumerate(self.words)}
        return Sample(key, _picture(self.root / "JPEGImages", key), self._mask(key), names)


class CamVid(Dataset):
    """CamVid in the layout of the SegNet tutorial: eleven street classes."""

    name = "camvid"
    layout = "val/*.png and valannot/*.png, likewise for train and test"
    splits = ("val", "test", "train")
    words = (
        "sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car",
        "pedestrian", "bicyclist",
    )  # fmt: skip
    classes = 11

    def find(self) -> list[str]:
        return sorted(path.stem for path in (self.root / f"{self.split}annot").glob("*.png"))

    def __getitem__(self, index: int) -> Sample:
        key = self.ids[index]
        labels = _labels(self.root / f"{self.split}annot" / f"{key}.png")
        labels = torch.where(labels >= self.classes, VOID, labels)
        return Sample(
            key, _picture(self.root / self.split, key), labels, dict(enumerate(self.words))
        )


class ClothingCoParsing(Dataset):
    """Clothing co-parsing: street fashion with 58 kinds of clothes and body parts."""

    name = "ccp"
    layout = "photos/0001.jpg, annotations/pixel-level/0001.mat and label_list.mat"
    classes = 59
    background = ("background", "wall", "street", "tree")

    def find(self) -> list[str]:
        rows = _matlab(self._need(self.root / "label_list.mat"))["label_list"].ravel()
        self.words = [str(row.item() if hasattr(row, "item") else row) for row in rows]
        return sorted(path.stem for path in (self.root / "annotations/pixel-level").glob("*.mat"))

    def __getitem__(self, index: int) -> Sample:
        key = self.ids[index]
        found = _matlab(self.root / "annotations/pixel-level" / f"{key}.mat")["groundtruth"]
        names = {number: word for number, word in enumerate(self.words) if number}
        labels = torch.from_numpy(found.astype("int64"))
        return Sample(key, _picture(self.root / "photos", key), labels, names)


class Folder(Dataset):
    """Any pictures with masks: one line of index.jsonl each, and classes.json."""

    name = "folder"
    layout = (
        "index.jsonl (one object a line: id, image, mask, perhaps caption) and "
        'classes.json: {"names": [...], "ignore": [...], "background": [...]}'
    )
    splits = ("all",)

    def find(self) -> list[str]:
        text = self._need(self.root / "index.jsonl").read_text(encoding="utf-8")
        rows = [json.loads(line) for line in text.splitlines() if line.strip()]
        self.rows = {str(row["id"]): row for row in rows}
        given = json.loads(self._need(self.root / "classes.json").read_text(encoding="utf-8"))
        self.words, self.ignored = list(given["names"]), list(given.get("ignore", ()))
        self.background = tuple(given.get("background", ()))
        self.classes = len(self.words)
        return sorted(self.rows)

    def __getitem__(self, index: int) -> Sample:
        from PIL import Image

        key = self.ids[index]
        row = self.rows[key]
        labels = _labels(self.root / row["mask"])
        labels = torch.where(labels >= self.classes, VOID, labels)
        for number in self.ignored:
            labels = torch.where(labels == number, VOID, labels)
        first = 1 if self.background else 0
        names = {number: word for number, word in enumerate(self.words) if number >= first}
        with Image.open(self.root / row["image"]) as picture:
            return Sample(key, picture.convert("RGB"), labels, names, row.get("caption"))


class HeldOutScenes(Dataset):
    """The demo model's held-out scenes, drawn anew; `root` is not read."""

    name = "scenes"
    layout = "nothing"
    reads_folder = False
    splits = ("500", "100", "20")

    def find(self) -> list[str]:
        from .demo.evaluate import held_out_scenes
        from .demo.scenes import BACKGROUNDS, LABELS

        self.scenes = held_out_scenes(int(self.split))
        self.words, self.classes = LABELS, len(LABELS)
        self.names = dict(enumerate(LABELS))
        self.places = range(len(BACKGROUNDS))
        return [f"{index:05}" for index in range(len(self.scenes))]

    def __getitem__(self, index: int) -> Sample:
        from PIL import Image

        pixels = (self.scenes.images[index].clamp(0, 1) * 255).round().byte().permute(1, 2, 0)
        picture = Image.fromarray(pixels.cpu().numpy())
        labels = self.scenes.labels[index].long().cpu()
        return Sample(self.ids[index], picture, labels, self.names, self.scenes.captions()[index])


DATASETS: dict[str, type[Dataset]] = {
    kind.name: kind
    for kind in (
        ImageNetSegmentation, PascalVOC, CamVid, ClothingCoParsing, Folder, HeldOutScenes
    )
}  # fmt: skip


def load_dataset(name: str, root: Path, split: str | None = None) -> Dataset:
    """Return a data set by its name.

    Raises:
        ValueError: The name or the split is not known, or a package is missing.
        OSError: The folder does not look as it should.
    """
    if name not in DATASETS:
        raise ValueError(f"`name` must be one of {tuple(DATASETS)}; got {name!r}.")
    return DATASETS[name](root, split)


def _picture(folder: Path, key: str) -> Image:
    from PIL import Image

    for ending in _PICTURES:
        if (folder / f"{key}{ending}").exists():
            with Image.open(folder / f"{key}{ending}") as picture:
                return picture.convert("RGB")
    raise OSError(f"{folder} holds no picture named {key} with an ending of {_PICTURES}.")


def _labels(path: Path) -> Tensor:
    """Return the numbers of a mask as they are stored, without its palette's colours."""
    import numpy as np
    from PIL import Image

    with Image.open(path) as mask:
        numbers = np.array(mask)
    if numbers.ndim != 2:
        raise OSError(f"{path} must hold class numbers in one channel; got {numbers.shape}.")
    return torch.from_numpy(numbers.astype("int64"))


def _matlab(path: Path) -> Any:
    try:
        matlab: Any = import_module("scipy.io")
    except ImportError:
        raise ValueError(
            "`name='ccp'` reads Matlab files with scipy, in the extra `conceptattention[eval]`."
        ) from None
    return matlab.loadmat(path)


__all__: Sequence[str] = ["DATASETS", "VOID", "Dataset", "Sample", "load_dataset"]
