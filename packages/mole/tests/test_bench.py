"""Benchmarks run on tiny models and write figures."""

import json
import mmap
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from fourfold_common import Results
from mole.bench import draw, pages, run
from mole.bench.shapes import zipf_ids


def test_decode(tmp_path):
    lines = []
    path = run(
        "decode", tmp_path, lines.append, "cpu", shape="tiny", batches=(1, 2), length=48, steps=2,
        cases=((4, "fp16", "pinned"), (2, "nf4", "pageable"), (2, "nf4", "mmap"),
               (2, "nf4", "disk warm"), (2, "nf4", "disk cold")),
    )  # fmt: skip
    cases = json.loads(path.read_text())["cases"]
    ratios = {c["provider"]: c["parameters"] for c in cases if c["metric"] == "over dense"}
    assert set(ratios) == {
        "MoLE-4E fp16 pinned", "MoLE-2E nf4 pageable", "MoLE-2E nf4 mmap", "MoLE-2E nf4 disk warm",
        "MoLE-2E nf4 disk cold", "MoE-10E resident",
    }  # fmt: skip
    assert "page_cache" not in ratios["MoLE-4E fp16 pinned"]
    for kind, state in (("mmap", "warm"), ("disk warm", "warm"), ("disk cold", "dropped")):
        assert ratios[f"MoLE-2E nf4 {kind}"]["page_cache"] == state
    for kind in ("mmap", "disk warm"):
        assert ratios[f"MoLE-2E nf4 {kind}"]["resident"] == 1
    assert ratios["MoLE-2E nf4 disk warm"]["direct"] is False
    for kind in ("disk warm", "disk cold"):
        assert 0 < ratios[f"MoLE-2E nf4 {kind}"]["hit_rate"] <= 1
    memory = {(c["provider"], c["parameters"]["batch"]): c["median"] for c in cases
              if c["metric"] == "device memory over dense"}  # fmt: skip
    # Three layers' routers, in eight rows of 64 float32, and a row of 3 x 4 x 64 float16 a token.
    for batch in (1, 2):
        expected = (3 * 8 * 64 * 4 + batch * 3 * 4 * 64 * 2) / 2**20
        assert memory["MoLE-4E fp16 pinned", batch] == pytest.approx(expected)
    eager = [c["provider"] for c in cases if "eager" in c["provider"]]
    assert {"MoLE-4E fp16 device, eager", "MoE-10E offloaded by accelerate, eager"} < set(eager)
    found = {(c["provider"], c["parameters"]["batch"], c["metric"]): c["median"] for c in cases}
    offloaded = "MoE-10E offloaded by accelerate, eager"
    assert found[offloaded, 2, "over lookup experts"] == pytest.approx(
        found[offloaded, 2, "decode"] / found["MoLE-4E fp16 device, eager", 2, "decode"]
    )
    for batch in (1, 2):
        cold = {c["metric"]: c["median"] for c in cases if c["parameters"].get("batch") == batch
                and c["provider"] == "MoLE-2E nf4 disk cold"}  # fmt: skip
        assert cold["over floor"] == pytest.approx(cold["decode"] / cold["floor"])
        assert cold["floor"] >= found["dense beside MoLE-2E nf4 disk cold", batch, "decode"]
    assert all(c["error"] == 0 for c in cases if c["error"] is not None)


def test_the_page_cache_is_seen_and_emptied(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(40 * mmap.PAGESIZE + 1))
    if pages.resident(path) is None:
        pytest.skip("this system does not tell which pages are in memory")
    assert pages.resident(path) == 1  # just written
    kind = subprocess.run(["stat", "-f", "-c", "%T", path], capture_output=True, text=True).stdout
    pages.drop(path)
    if kind.strip() == "tmpfs":  # a file in memory stays there
        assert pages.resident(path) == 1
        return
    assert pages.resident(path) == 0
    with open(path, "rb", buffering=0) as file:
        file.read(1)
    assert 0 < pages.resident(path) <= 1
    pages.load(path)
    assert pages.resident(path) == 1


def test_prefill(tmp_path):
    path = run(
        "prefill", tmp_path, lambda line: None, "cpu", shape="tiny", batches=(1, 2), length=40,
        cases=((4, "fp16", "pinned"), (2, "nf4", "pageable")),
    )  # fmt: skip
    cases = json.loads(path.read_text())["cases"]
    assert {(c["provider"], c["parameters"]["batch"]) for c in cases if c["unit"] == "x"} == {
        (name, batch)
        for name in ("MoLE-4E fp16 pinned", "MoLE-2E nf4 pageable", "MoE-10E resident",
                     "MoE-10E offloaded by accelerate")
        for batch in (1, 2)
    }  # fmt: skip
    assert all(c["error"] < 1e-5 for c in cases if c["error"] is not None)


def test_train(tmp_path):
    path = run(
        "train", tmp_path, lambda line: None, "cpu", shape="tiny", sequences=2, context=16, steps=1,
        cases=(("dense", 2), ("micro", 2), ("off", 2), ("step", 2)),
    )  # fmt: skip
    cases = json.loads(path.read_text())["cases"]
    assert [c["provider"] for c in cases if c["metric"] == "train"] == [
        "dense", "MoLE micro", "MoLE naive", "MoLE step",
    ]  # fmt: skip


def test_machine_and_tables(tmp_path):
    options = {"hw": {"megabytes": 8}, "quant": {"tokens": 257}, "cache": {"tokens": 300}}
    found = {}
    for topic in ("hw", "convert", "quant", "cache"):
        path = run(topic, tmp_path, lambda line: None, "cpu", **options.get(topic, {}))
        found[topic] = json.loads(path.read_text())["cases"]
        assert draw(path).read_bytes()[:4] == b"\x89PNG"
    assert all(c["median"] > 0 for c in found["hw"])
    assert {c["parameters"].get("depth") for c in found["hw"]} == {None, 1, 4, 16, 64}
    speeds = {c["provider"]: c["median"] for c in found["convert"] if c["metric"] == "speed"}
    (share,) = (c for c in found["convert"] if c["metric"] == "of a plain write")
    assert (share["n"], set(speeds)) == (3, {"convert", "plain write"})
    assert 0 < share["p20"] <= share["median"] <= share["p80"]
    path = run("convert", tmp_path, print, "cpu", shape="tiny", fmt="nf4")
    assert json.loads(path.read_text())["cases"][0]["parameters"]["model"] == "tiny"
    losses = {c["provider"]: c["median"] for c in found["quant"] if c["metric"] == "loss"}
    assert losses["fp32"] == pytest.approx(losses["experts"], abs=1e-5)
    assert losses["nf3"] > losses["experts"]
    rates = [c["median"] for c in found["cache"]]
    assert 0 < rates[0] < rates[1] <= rates[2] < 1


RESULTS = Path(__file__).parents[1] / "benchmarks/results"


@pytest.mark.parametrize("name", ["decode_h200.json", "train_h200.json"])
def test_stored_results_are_drawn(tmp_path, name):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    shutil.copyfile(RESULTS / name, tmp_path / name)
    picture = draw(tmp_path / name)
    assert picture == tmp_path / name.replace(".json", ".png")
    height, width, _ = pyplot.imread(picture).shape
    assert width > 900
    assert height > 200


def test_results_of_other_commands_are_not_drawn(tmp_path):
    path = Results("mole", command="mole demo").save(tmp_path / "results.json")
    with pytest.raises(ValueError, match="results of `mole bench`; got those of 'mole demo'"):
        draw(path)


def test_ids_repeat_as_in_prose():
    ids = zipf_ids((16384,), 50304)
    assert 2500 < len(ids.unique()) < 4500
    assert torch.equal(ids, zipf_ids((16384,), 50304))


def test_unknown_topics_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"`topic` must be one of .*; got 'speed'"):
        run("speed", tmp_path, print)
