import contextlib
import dataclasses
import importlib.util
import io

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from conceptattention import ConceptMaps
from conceptattention.scores import RunningMean, concept_scores

NAMES = ("cat", "grass", "sky")


def make(names=NAMES, batch=2, height=4, width=6, keys=((0, -1), (1, -1)), counts=(2, 2)):
    generator = torch.Generator().manual_seed(0)
    raw = torch.randn(len(keys), batch, 3, height, width, generator=generator)
    return ConceptMaps(
        raw=raw, soft=raw.softmax(2), concepts=names, keys=list(keys), counts=list(counts),
        coverage={0: 1.0, 1: 0.5},
    )  # fmt: skip


def test_reductions_by_hand():
    maps = make(counts=(1, 3))
    soft = 0.25 * maps.soft[0] + 0.75 * maps.soft[1]
    raw = 0.25 * maps.raw[0] + 0.75 * maps.raw[1]
    torch.testing.assert_close(maps.values, soft)
    torch.testing.assert_close(maps.with_reduce("raw").values, raw)
    heated = maps.with_reduce("mean_softmax", 10.0).values
    torch.testing.assert_close(heated, (raw / 10).softmax(1))
    torch.testing.assert_close(maps.select(layers=[1]).values, maps.soft[1])


def test_masks_and_argmax_by_hand():
    values = torch.tensor([[[[0.6, 0.1]], [[0.3, 0.7]], [[0.1, 0.2]]]])
    maps = ConceptMaps(values[None], values[None], NAMES, [(-1, -1)], [1], {0: 1.0})
    expected = torch.tensor([[[[True, False]], [[False, True]], [[False, True]]]])
    assert torch.equal(maps.to_masks(), expected)
    assert torch.equal(maps.to_masks(0.5), values > 0.5)
    assert maps.argmax().tolist() == [[[0, 1]]]
    # "grass" becomes class 0; "cat" and "sky" count from 1.
    assert maps.argmax(background=["grass"]).tolist() == [[[1, 0]]]
    assert maps.argmax(background=["cat"]).tolist() == [[[0, 1]]]


def test_lists_per_image_merge_their_own_background():
    values = torch.zeros(2, 3, 1, 1)
    values[0, 2], values[1, 2] = 1.0, 1.0
    names = (("sky", "cat", "dog"), ("cow", "tree", "sky"))
    maps = ConceptMaps(values[None], values[None], names, [(-1, -1)], [1], {0: 1.0})
    assert maps.argmax(background=["sky"]).flatten().tolist() == [2, 0]
    with pytest.raises(ValueError, match="every image has its own concepts"):
        _ = maps["sky"]


@given(st.integers(1, 9), st.integers(1, 9), st.sampled_from(["nearest", "bilinear", "bicubic"]))
def test_resize_has_pil_order_and_keeps_constants(width, height, mode):
    maps = make().resize((width, height), mode)
    assert maps.values.shape == (2, 3, height, width)
    torch.testing.assert_close(maps.values.sum(1), torch.ones(2, height, width))


def test_pictures():
    maps = make()
    picture = Image.new("RGB", (60, 40), (10, 200, 30))
    heat = maps["cat"].to_image(picture.size)
    assert heat.size == (60, 40)
    assert maps["cat"].to_image().size == (6, 4)
    faint, strong = (maps["cat"].overlay(picture, alpha=a) for a in (0.0, 1.0))
    assert np.array_equal(np.asarray(faint), np.asarray(picture))
    assert np.array_equal(np.asarray(strong), np.asarray(heat))
    joint, each = maps["cat"].unit(), maps["cat"].unit("each")
    assert each.min() == 0
    assert each.max() == 1
    assert torch.equal(joint.argmax(), each.argmax())


@pytest.mark.parametrize("shape", [(2, 5), (5, 2)])
def test_overlays_of_non_square_pictures_keep_their_place(shape):
    """One hot cell of the grid colours its own rectangle of the picture."""
    height, width = shape
    for row, column in ((0, width - 1), (height - 1, 0)):
        raw = torch.zeros(1, 1, 2, height, width)
        raw[0, 0, 0, row, column] = 1.0
        maps = ConceptMaps(raw, raw, ("cat", "sky"), [(-1, -1)], [1], {0: 1.0})
        picture = Image.new("RGB", (20 * width + 3, 20 * height - 3))
        over = maps["cat"].overlay(picture, alpha=1.0)
        assert over.size == picture.size
        bright = np.asarray(over.convert("L")).astype(int)
        found = np.argwhere(bright > 120)  # the middle of the ramp
        assert len(found) > 100
        middle = found.mean(0) / bright.shape * (height, width)
        assert np.allclose(middle, (row + 0.5, column + 0.5), atol=0.35)


def test_save_and_load_round_trip(tmp_path):
    maps = make().with_reduce("mean_softmax", 2.0)
    path = maps.save(tmp_path / "new" / "maps.npz")
    again = ConceptMaps.load(path)
    assert torch.equal(again.raw, maps.raw)
    assert torch.equal(again.values, maps.values)
    assert (again.concepts, again.keys, again.counts) == (maps.concepts, maps.keys, maps.counts)
    assert again.coverage == maps.coverage
    assert [p.name for p in path.parent.iterdir()] == ["maps.npz"]
    auto = dataclasses.replace(maps, temperature="auto", space="value", keys=[(3, 0), (4, 1)])
    again = ConceptMaps.load(auto.save(tmp_path / "auto"))  # any name, written as given
    assert (again.temperature, again.space, again.reduce) == ("auto", "value", "mean_softmax")
    assert torch.equal(again.select(layers=[4], steps=[1]).values, auto.select(layers=[4]).values)
    lists = make(names=(("a", "b", "c"), ("d", "e", "f")))
    assert ConceptMaps.load(lists.save(tmp_path / "l.npz")).names(1) == ("d", "e", "f")


def test_load_refuses_other_and_truncated_files(tmp_path):
    path = make().save(tmp_path / "maps.npz")
    whole = path.read_bytes()
    for content in (b"", b"nothing", whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="must name a file written by"):
            ConceptMaps.load(path)
    for place in range(40, len(whole) - 100, 20):  # damaged anywhere: never another exception
        damaged = bytearray(whole)
        damaged[place] ^= 0xFF
        path.write_bytes(damaged)
        with contextlib.suppress(ValueError):
            ConceptMaps.load(path)
    with open(path, "wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(ValueError, match="must name a file written by"):
        ConceptMaps.load(path)
    np.savez(path, raw=np.zeros(3), soft=np.zeros(3), meta="{}")
    with pytest.raises(ValueError, match="must name a file written by"):
        ConceptMaps.load(path)
    with pytest.raises(FileNotFoundError):
        ConceptMaps.load(tmp_path / "missing.npz")


@pytest.mark.usefixtures("unchecked")
def test_errors():
    maps, picture = make(), Image.new("RGB", (2, 2))
    for call, message in (
        (lambda: maps.with_reduce("median"), "`reduce` must be 'softmax_mean'.*; got 'median'"),
        (
            lambda: maps.with_reduce("raw", -1.0),
            "`temperature` must be above 0 or 'auto'; got -1.0",
        ),
        (
            lambda: maps.with_reduce("softmax_mean", 2.0),
            "`temperature` can only be changed for reduce='mean_softmax'; got 2.0",
        ),
        (lambda: maps.select(steps=[0]), "`steps` were averaged while recording"),
        (lambda: maps.select(layers=[4]), r"`layers` must be among \[0, 1\]; got \[4\]"),
        (lambda: maps.select(layers=[]), "select nothing"),
        (lambda: maps.to_masks("median"), "`threshold` must be 'mean' or a number; got 'median'"),
        (lambda: maps.argmax(["sea"]), "`background` must be among .*; got 'sea'"),
        (lambda: maps.resize((0, 3)), "`size` must be a width and a height of at least 1"),
        (lambda: maps.resize((3, 3), "cubic"), "`mode` must be 'nearest'.*; got 'cubic'"),
        (lambda: maps["cat"].unit("all"), "`scale` must be 'joint' or 'each'; got 'all'"),
        (lambda: maps["cat"].overlay(picture, alpha=2.0), "`alpha` must be between"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(KeyError, match="`name` must be one of"):
        _ = maps["sea"]


def test_scores_against_a_loop():
    generator = torch.Generator().manual_seed(0)
    concepts = torch.randn(2, 3, 5, generator=generator)
    patches = torch.randn(2, 7, 5, generator=generator)
    for name in (None, "l2", "cosine", "linear"):
        scores = concept_scores(concepts, patches, name)
        for b in range(2):
            for j in range(3):
                for i in range(7):
                    c, x = concepts[b, j].double(), patches[b, i].double()
                    if name in ("l2", "cosine"):
                        c = c / c.norm()
                    if name == "cosine":
                        x = x / x.norm()
                    if name == "linear":
                        every = concepts[b].double()
                        shifted = every - every.min(0).values
                        c = shifted[j] / shifted.sum(0)
                    assert abs(float(c @ x) - float(scores[b, j, i])) < 1e-5
    constant = concept_scores(torch.ones(1, 2, 3), torch.ones(1, 4, 3), "linear")
    assert constant.isfinite().all()


def test_running_mean_equals_the_mean():
    scores = torch.randn(6, 2, 3, 5, generator=torch.Generator().manual_seed(0))
    mean = RunningMean()
    for part in scores:
        mean.add(part, 2.0)
    torch.testing.assert_close(mean.raw, scores.mean(0))
    torch.testing.assert_close(mean.soft, (scores / 2).softmax(2).mean(0))


def test_video_maps(tmp_path):
    from conceptattention.maps import latent_frame

    raw = torch.randn(1, 2, 3, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    maps = ConceptMaps(raw, raw.softmax(2), NAMES, [(-1, -1)], [1], {0: 1.0})
    assert maps.values.shape == (2, 3, 3, 4, 6)
    assert maps.to_masks().shape == maps.values.shape
    assert torch.equal(maps.argmax(), maps.values.argmax(1))
    assert maps.resize((12, 8)).values.shape == (2, 3, 3, 8, 12)
    # Nine pixel frames of three latent ones: 1 + 4 + 4.
    assert [latent_frame(i, 4.0, 3) for i in range(9)] == [0, 1, 1, 1, 1, 2, 2, 2, 2]
    frames = [Image.new("RGB", (12, 8), (20 * i, 0, 0)) for i in range(9)]
    with Image.open(maps["cat"].to_video(tmp_path / "cat.gif", frames)) as written:
        assert written.n_frames == 9
        assert written.size == (12, 8)
    drawn = maps["cat"].frames(frames)
    # Frames of one latent frame share the map; pictures differ by their red channel alone.
    assert [picture.getpixel((3, 3))[1] for picture in drawn][5:] == [
        drawn[5].getpixel((3, 3))[1]
    ] * 4
    with Image.open(maps.to_video(tmp_path / "all.gif", frames, size=24)) as written:
        assert written.n_frames == 9
        assert written.size == (4 * 24, 16 + 16)
    loaded = ConceptMaps.load(maps.save(tmp_path / "maps.npz"))
    assert torch.equal(loaded.values, maps.values)
    first, last = (maps["cat"].to_image(frame=f) for f in (0, 2))
    assert first.tobytes() != last.tobytes()


@pytest.mark.usefixtures("unchecked")
def test_video_errors(tmp_path):
    frames = [Image.new("RGB", (6, 4))]
    with pytest.raises(ValueError, match="these are maps of a picture"):
        make()["cat"].to_video(tmp_path / "a.gif", frames)
    raw = torch.zeros(1, 1, 3, 2, 4, 6)
    maps = ConceptMaps(raw, raw, NAMES, [(-1, -1)], [1], {0: 1.0})
    with pytest.raises(ValueError, match="at least 2 pictures; got 1"):
        maps["cat"].to_video(tmp_path / "a.gif", frames)
    with pytest.raises(ValueError, match=r"must end with \.gif or \.mp4; got 'a\.avi'"):
        maps["cat"].to_video(tmp_path / "a.avi", frames * 2)
    with pytest.raises(ValueError, match="`fps` must be above 0"):
        maps.to_video(tmp_path / "a.gif", frames * 2, fps=0)


def test_mp4(tmp_path):
    imageio = pytest.importorskip("imageio.v3")
    pytest.importorskip("imageio_ffmpeg")
    raw = torch.randn(1, 1, 3, 2, 4, 6, generator=torch.Generator().manual_seed(0))
    maps = ConceptMaps(raw, raw.softmax(2), NAMES, [(-1, -1)], [1], {0: 1.0})
    frames = [Image.new("RGB", (49, 33), (40 * i, 0, 0)) for i in range(5)]
    path = maps["cat"].to_video(tmp_path / "cat.mp4", frames)
    assert imageio.imread(path).shape == (5, 32, 48, 3)


def test_mp4_without_its_extra(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    raw = torch.zeros(1, 1, 3, 1, 4, 6)
    maps = ConceptMaps(raw, raw, NAMES, [(-1, -1)], [1], {0: 1.0})
    with pytest.raises(ValueError, match=r"needs imageio and imageio-ffmpeg, the extra"):
        maps["cat"].to_video(tmp_path / "cat.mp4", [Image.new("RGB", (6, 4))])
    assert not (tmp_path / "cat.mp4").exists()


def test_maps_show_what_they_are_not_their_numbers():
    maps = make()
    assert repr(maps).startswith("ConceptMaps(('cat', 'grass', 'sky'), batch 2, 4 x 6, ")
    assert repr(maps["cat"]) == "ConceptMap('cat', 2 x 4 x 6)"
    assert list(maps) == list(maps.names())
    assert "cat" in maps
    assert "dog" not in maps
    for shown, size in ((maps["cat"], (256, 171)), (maps, (3 * 192, 128 + 16))):
        assert Image.open(io.BytesIO(shown._repr_png_())).size == size


def test_plot_names_every_concept():
    maps = make()
    assert maps.plot().size == (3 * 192, 128 + 16)
    assert maps.plot(Image.new("RGB", (60, 40)), size=60).size == (4 * 60, 40 + 16)
