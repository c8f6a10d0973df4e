import contextlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from conceptattention import ConceptMaps, cli, harness, segment
from conceptattention.datasets import VOID, Dataset, Sample, load_dataset
from conceptattention.harness import Settings, evaluate

MASK = np.array([[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 255, 255], [2, 2, 255, 255]], np.uint8)


def write(path, numbers=None, size=(4, 4)):
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.new("RGB", size, "red") if numbers is None else Image.fromarray(numbers)
    if numbers is not None and path.parent.name == "SegmentationClass":
        picture.putpalette([3, 5, 7] * 256)  # colours say nothing about classes
    picture.save(path)


def test_imagenet_segmentation(tmp_path):
    write(tmp_path / "images/n01_1.jpg")
    write(tmp_path / "masks/n01_1.png", (MASK == 1).astype(np.uint8) * 255)
    (tmp_path / "classes.csv").write_text("n01_1,tench\nn01_2,goldfish\n")
    data = load_dataset("imagenet-segmentation", tmp_path)
    assert len(data) == 1
    sample = data[0]
    assert sample.names == {1: "tench"}
    assert sample.present == [1]
    assert torch.equal(sample.labels, torch.from_numpy(MASK == 1).long())


def test_voc(tmp_path):
    for key, numbers in (("a", MASK), ("b", np.where(MASK == 2, 0, MASK))):
        write(tmp_path / f"JPEGImages/{key}.jpg")
        write(tmp_path / f"SegmentationClass/{key}.png", numbers)
    (tmp_path / "ImageSets/Segmentation").mkdir(parents=True)
    (tmp_path / "ImageSets/Segmentation/val.txt").write_text("b\na\n")
    data = load_dataset("voc", tmp_path)
    assert data.ids == ["a", "b"]
    sample = data[0]
    assert [sample.names[number] for number in sample.present] == ["airplane", "bicycle"]
    assert (sample.labels == VOID).sum() == 4
    assert load_dataset("voc", tmp_path, "val-single").ids == ["b"]


def test_camvid(tmp_path):
    write(tmp_path / "test/0001.png")
    write(tmp_path / "testannot/0001.png", np.where(MASK == 255, 11, MASK).astype(np.uint8))
    sample = load_dataset("camvid", tmp_path, "test")[0]
    assert [sample.names[number] for number in sample.present] == ["sky", "building", "pole"]
    assert (sample.labels == VOID).sum() == 4


def test_clothing_co_parsing(tmp_path):
    matlab = pytest.importorskip("scipy.io")
    write(tmp_path / "photos/0001.jpg")
    (tmp_path / "annotations/pixel-level").mkdir(parents=True)
    words = np.empty((1, 3), dtype=object)
    words[0] = ["null", "hair", "bag"]
    matlab.savemat(tmp_path / "label_list.mat", {"label_list": words})
    numbers = np.where(MASK == 255, 0, MASK)
    matlab.savemat(tmp_path / "annotations/pixel-level/0001.mat", {"groundtruth": numbers})
    sample = load_dataset("ccp", tmp_path)[0]
    assert [sample.names[number] for number in sample.present] == ["hair", "bag"]
    assert torch.equal(sample.labels, torch.from_numpy(numbers.astype("int64")))


def make_folder(root, count=3):
    rows = []
    for number in range(count):
        write(root / f"{number}.png", None, (64, 64))
        turned = np.kron(np.rot90(np.where(MASK == 255, 0, MASK), number), np.ones((16, 16)))
        write(root / f"mask{number}.png", turned.astype(np.uint8))
        rows.append({"id": f"p/{number}", "image": f"{number}.png", "mask": f"mask{number}.png"})
    (root / "index.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    names = {"names": ["void", "fish", "box"], "ignore": [], "background": ["grass"]}
    (root / "classes.json").write_text(json.dumps(names))
    return load_dataset("folder", root)


def test_folder(tmp_path):
    sample = make_folder(tmp_path)[0]
    assert sample.id == "p/0"
    assert [sample.names[number] for number in sample.present] == ["fish", "box"]
    (tmp_path / "classes.json").write_text('{"names": ["fish", "box"], "ignore": [1]}')
    sample = load_dataset("folder", tmp_path)[0]
    assert sorted(sample.labels.unique().tolist()) == [VOID, 0]


@pytest.mark.usefixtures("unchecked")
def test_errors(tmp_path):
    with pytest.raises(ValueError, match=r"`name` must be one of .*; got 'coco'"):
        load_dataset("coco", tmp_path)
    with pytest.raises(ValueError, match=r"`split` must be one of .*; got 'night'"):
        load_dataset("camvid", tmp_path, "night")
    with pytest.raises(OSError, match="holds no pictures of camvid; expected val"):
        load_dataset("camvid", tmp_path)
    with pytest.raises(OSError, match=r"`root` has no .*index.jsonl; folder needs index"):
        load_dataset("folder", tmp_path)
    for settings, message in (
        ({"spaces": ("depth",)}, "`spaces` must be among"),
        ({"protocol": "best"}, "`protocol` must be among"),
        ({"noise": (0.0,)}, "`noise` must be above 0"),
        ({"score_size": 0}, "`score_size` must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            Settings(**settings)


def fake_maps(names, *rows):
    raw = torch.tensor(rows)[None, None]
    return ConceptMaps(raw, raw, tuple(names), [(-1, -1)], [1], {0: 1.0})


class Two(Dataset):
    """A data set of one picture: four known pixels of class 1, four of class 2, the rest void."""

    classes, background, name, layout, splits = 3, ("grass",), "two", "nothing", ("all",)

    def find(self):
        return ["a"]

    def __getitem__(self, index):
        labels = torch.full((4, 4), VOID)
        labels[0], labels[1] = 1, 2
        picture = Image.new("RGB", (64, 64))
        return Sample("a", picture, labels, {1: "fish", 2: "box"})


def test_counts_by_hand(monkeypatch):
    grid = torch.zeros(4, 4)
    fish, box, grass = grid.clone(), grid.clone(), grid.clone()
    fish[0, :3], fish[1, 0] = 9, 9  # three of four right, one of the box's pixels wrong
    box[1, 1:] = 5
    grass[0, 3] = 7
    given = []

    def answer(pipe, image, concepts, caption, **settings):
        given.append((concepts, caption))
        every = {"fish": fish, "box": box, "grass": grass}
        return fake_maps(concepts, *(every[word].tolist() for word in concepts))

    monkeypatch.setattr(harness, "segment", answer)
    settings = Settings(spaces=("output",), reduces=("raw",), score_size=None)
    found = list(harness.score(None, Two(Path()), 0, settings))
    assert given == [(["fish", "grass"], "a fish, a box"), (["box", "grass"], "a fish, a box")]
    # Class 1 against its mean: targets of fish 3 right and 1 missed, one of box taken for it.
    assert found[0]["counts"] == [[0, 0, 3], [0, 1, 1], [1, 0, 1], [1, 1, 3]]
    assert found[0]["ap"] == pytest.approx((3 * 3 / 4 + 1 * 4 / 8) / 4)
    assert found[1]["counts"] == [[0, 0, 4], [1, 0, 1], [1, 1, 3]]
    (row,) = harness.table([found], 2)  # both classes of the picture count
    assert row["accuracy"] == pytest.approx((6 + 7) / 16)
    assert row["fg_iou"] == pytest.approx((3 + 3) / (5 + 4))
    several = Settings("multiclass", ("output",), ("raw",), score_size=None)
    (found,) = harness.score(None, Two(Path()), 0, several)
    assert given[-1][0] == ["fish", "box", "grass"]
    # Target, guess, pixels: grass counts as class 0.
    assert found["counts"] == [[1, 0, 1], [1, 1, 3], [2, 1, 1], [2, 2, 3]]
    (row,) = harness.table([[found], [found]], 3)
    assert row["accuracy"] == pytest.approx(6 / 8)
    assert row["fg_iou"] == pytest.approx((3 / 5 + 3 / 4) / 2)
    assert row["pictures"] == 2


def test_daam_is_read_from_the_words_of_the_caption(demo_pipe, tmp_path):
    data = make_folder(tmp_path / "data", 1)
    settings = Settings("multiclass", ("output", "daam"), ("raw",), score_size=None, size=64)
    rows = evaluate(demo_pipe, data, tmp_path / "run", settings, progress=False)["rows"]
    assert [row["space"] for row in rows] == ["output", "daam"]
    assert 0 <= rows[1]["accuracy"] <= 1
    sample = data[0]
    words = [sample.names[number] for number in sample.present]
    caption = "a " + ", a ".join(words)
    maps = segment(demo_pipe, sample.image.resize((64, 64)), words, caption, space="daam")
    shares = maps.with_reduce("raw").values
    assert shares.min() > 0
    assert shares.sum(1).max() < 1  # shares of the picture's attention to the whole caption


SWEEP = Settings(
    spaces=("output", "prompt_attention"), noise=(0.3, 0.6),
    self_attention=(True, False), each_layer=True, layers="all", size=64, score_size=16,
)  # fmt: skip


def test_an_interrupted_run_goes_on(demo_pipe, tmp_path, monkeypatch):
    data = make_folder(tmp_path / "data", 2)
    whole = evaluate(demo_pipe, data, tmp_path / "whole", SWEEP, progress=False)
    assert len(whole["rows"]) == 2 * 2 * 3 * (2 + 1)
    real, seen = harness.score, []

    def stops(pipe, dataset, index, settings):
        if index == 1 and not seen.count("again"):
            raise KeyboardInterrupt
        seen.append(index)
        return real(pipe, dataset, index, settings)

    monkeypatch.setattr(harness, "score", stops)
    with pytest.raises(KeyboardInterrupt):
        evaluate(demo_pipe, data, tmp_path / "cut", SWEEP, progress=False)
    assert not (tmp_path / "cut/results.json").exists()
    seen.append("again")
    resumed = evaluate(demo_pipe, data, tmp_path / "cut", SWEEP, progress=False)
    assert seen == [0, "again", 1]
    assert resumed["rows"] == whole["rows"]
    for name in ("layer.png", "noise.png", "results.md"):
        assert (tmp_path / "cut" / name).stat().st_size > 100
    with pytest.raises(ValueError, match="holds a run with other settings"):
        evaluate(demo_pipe, data, tmp_path / "cut", Settings(), progress=False)
    assert not [path for path in (tmp_path / "cut").rglob("*.tmp")]


def test_damaged_counts_are_made_again_and_whole_ones_kept(demo_pipe, tmp_path, monkeypatch):
    data = make_folder(tmp_path / "data")
    settings = Settings(spaces=("output",), reduces=("raw",), size=64, score_size=16)
    whole = evaluate(demo_pipe, data, tmp_path / "run", settings, progress=False)
    files = sorted((tmp_path / "run/samples").glob("*.json"))
    files[0].write_text("")
    files[2].write_text(files[2].read_text()[:-7])
    real, seen = harness.score, []

    def watched(pipe, dataset, index, settings):
        seen.append(index)
        return real(pipe, dataset, index, settings)

    monkeypatch.setattr(harness, "score", watched)
    again = evaluate(demo_pipe, data, tmp_path / "run", settings, progress=False)
    assert seen == [0, 2]
    assert again == whole


def test_processes_share_what_is_missing(demo_pipe, tmp_path, monkeypatch):
    """Process 1 of 2 had finished its pictures so far: what is left is shared by both."""
    data = make_folder(tmp_path / "data", 6)
    monkeypatch.setattr(harness, "_wait", lambda world: None)
    done = {0: [], 1: []}
    for rank in done:
        output = tmp_path / f"run{rank}"
        (output / "samples").mkdir(parents=True)
        for index in (1, 3):
            (output / f"samples/{harness._file_name(data.ids[index])}.json").write_text("[]")
        monkeypatch.setattr(harness, "_place", lambda rank=rank: (rank, 2))
        monkeypatch.setattr(
            harness, "score", lambda *given, rank=rank: done[rank].append(given[2]) or []
        )
        with contextlib.suppress(FileNotFoundError):  # process 0 misses the other's files
            evaluate(demo_pipe, data, output, progress=False)
    assert done == {0: [0, 4], 1: [2, 5]}


def test_another_folder_of_the_same_kind_is_refused(demo_pipe, tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "score", lambda *_: [])
    evaluate(demo_pipe, make_folder(tmp_path / "a"), tmp_path / "run", progress=False)
    with pytest.raises(ValueError, match="holds a run with other folder"):
        evaluate(demo_pipe, make_folder(tmp_path / "b"), tmp_path / "run", progress=False)


def test_eval_command(demo_pipe, tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "load", lambda model, device: demo_pipe)
    given = (
        "eval", "--dataset", "scenes", "--split", "20", "--limit", "2", "--protocol", "multiclass",
        "--spaces", "output", "--output", str(tmp_path), "--no-progress",
    )  # fmt: skip
    result = CliRunner().invoke(cli.main, given)
    assert result.exit_code == 0, result.output
    assert "| output | each, then mean | 0.5 | yes | mean |" in result.output
    assert json.loads((tmp_path / "results.json").read_text())["pictures"] == 2
    result = CliRunner().invoke(cli.main, (*given, "--noise", "high"))
    assert result.exit_code == 2
    assert "`--noise` must be numbers" in result.output


RUN = """
import sys, torch
from pathlib import Path
from conceptattention.datasets import load_dataset
from conceptattention.demo.model import build_pipeline
from conceptattention.harness import Settings, evaluate
torch.set_num_threads(1)
torch.manual_seed(0)
pipe = build_pipeline(
    {"num_layers": 2, "num_single_layers": 1, "num_attention_heads": 2}, {"num_layers": 1}
)
evaluate(
    pipe, load_dataset("folder", Path(sys.argv[1])), Path(sys.argv[2]),
    Settings(noise=(0.5,), size=64, score_size=16), progress=False,
)
"""


@pytest.mark.filterwarnings("ignore")
def test_two_processes_equal_one(demo_pipe, tmp_path):
    make_folder(tmp_path / "data")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    settings = Settings(noise=(0.5,), size=64, score_size=16)
    data = load_dataset("folder", tmp_path / "data")
    evaluate(demo_pipe, data, tmp_path / "one", settings, progress=False)
    # The run of two goes on from one that broke: one picture done, one cut short.
    (tmp_path / "two/samples").mkdir(parents=True)
    done, cut, _ = sorted((tmp_path / "one/samples").iterdir())
    for path, text in ((done, done.read_text()), (cut, cut.read_text()[:30])):
        (tmp_path / "two/samples" / path.name).write_text(text)
    running = []
    for rank in range(2):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_PORT": port}
        place = {key: str(value) for key, value in place.items()} | {
            "MASTER_ADDR": "127.0.0.1", "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        running.append(
            subprocess.Popen(
                [sys.executable, "-c", RUN, str(tmp_path / "data"), str(tmp_path / "two")],
                env={**os.environ, **place}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )
        )  # fmt: skip
    for process in running:
        text, _ = process.communicate(timeout=200)
        assert process.returncode == 0, text.decode()
    one, two = ((tmp_path / name / "results.json").read_text() for name in ("one", "two"))
    assert json.loads(one)["rows"] == json.loads(two)["rows"]
    assert len(json.loads(one)["rows"]) == 6
