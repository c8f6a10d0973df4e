"""The reproductions run from end to end and go on where they stopped; tiny, on the CPU."""

import csv
import gzip
import importlib.util
import json
from pathlib import Path

import pytest
import torch

from adasplash import adasplash, set_alpha
from fourfold_common import Results

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")
FOLDER = Path(__file__).parents[1] / "benchmarks"


def _script(name):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def books(tmp_path):
    text = (FOLDER.parent / "src/adasplash/demo/assets/snippet.txt").read_text(encoding="utf-8")
    pieces = [text[i : i + 4000] for i in range(0, 16000, 2000)]
    for name, part in (("train", pieces[:6]), ("valid", pieces[6:])):
        with gzip.open(tmp_path / f"{name}.jsonl.gz", "wt", encoding="utf-8") as file:
            file.writelines(json.dumps({"text": piece}) + "\n" for piece in part)
    return ["--train", f"{tmp_path}/train.jsonl.gz", "--valid", f"{tmp_path}/valid.jsonl.gz"]


TINY = [
    "--layers", "2", "--width", "32", "--heads", "2", "--context", "128", "--batch", "2",
    "--steps", "6", "--logged", "6", "--save-every", "1", "--checked", "2", "--quiet",
    "--device", "cpu", "--lengths", "64", "128", "--rate", "0.01",
]  # fmt: skip


def _rows(folder):
    with (folder / "log.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [{k: v for k, v in row.items() if k != "seconds_per_step"} for row in rows]


def test_gpt2_twins_go_on_where_they_stopped(books, tmp_path, monkeypatch):
    script = _script("reproduce_gpt2")
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    script.main([*books, *TINY, "--output", str(whole)])
    rows = _rows(whole)
    assert [(row["model"], int(row["step"])) for row in rows] == [
        (kind, step) for kind in ("entmax", "softmax") for step in range(1, 7)
    ]
    assert [row["alpha"] for row in rows[:6]] == ["1.0100", "1.1733", "1.3367", *["1.5000"] * 3]
    assert float(rows[5]["validation_loss"]) < float(rows[0]["validation_loss"]) - 0.1
    assert (whole / "results.png").stat().st_size > 10_000
    cases = Results.load(whole / "results.json").cases
    found = {(c["provider"], c["metric"]) for c in cases}
    assert found >= {("softmax", "validation loss"), ("entmax", "step while alpha moves")}
    assert found >= {("adasplash", "forward + backward"), ("SDPA math", "forward")}
    assert max(c["error"] for c in cases if c["error"] is not None) < 1e-4
    shares = [c["median"] for c in cases if c["metric"] == "zero weights"]
    assert len(shares) == 4
    assert all(0 <= share < 1 for share in shares)

    real = script.Training.train_step

    def stopped(self, *inputs):
        if self.kind == "entmax" and self.step == 4:
            raise KeyboardInterrupt
        return real(self, *inputs)

    monkeypatch.setattr(script.Training, "train_step", stopped)
    with pytest.raises(KeyboardInterrupt):
        script.main([*books, *TINY, "--output", str(broken)])
    assert len(_rows(broken)) == 4
    monkeypatch.setattr(script.Training, "train_step", real)
    script.main([*books, *TINY, "--output", str(broken)])
    assert _rows(broken) == rows
    with pytest.raises(SystemExit, match="holds another run"):
        script.main([*books, *TINY, "--output", str(broken), "--batch", "3"])


def test_gpt2_steps_can_be_given_as_time(books, tmp_path):
    script = _script("reproduce_gpt2")
    few = ["--seconds", "0.1", "--layers", "1", "--lengths", "64"]
    script.main([*books, *TINY, *few, "--output", str(tmp_path / "out")])
    steps = json.loads((tmp_path / "out" / "settings.json").read_text())["steps"]
    assert 1 <= steps < 100
    assert _rows(tmp_path / "out")[-1]["step"] == str(steps)


def test_the_measured_inputs_are_those_of_the_model(books, tmp_path):
    script = _script("reproduce_gpt2")
    script.register_with_transformers()
    config = script.GPT2Config(
        vocab_size=50, n_positions=32, n_embd=16, n_layer=2, n_head=2, attn_pdrop=0.0,
        attn_implementation="adasplash", initializer_range=0.4,
    )  # fmt: skip
    torch.manual_seed(0)
    model = script.GPT2LMHeadModel(config).eval()
    set_alpha(model, 1.5)
    ids = torch.randint(50, (1, 32))
    found = script.heads_of(model, ids)
    assert [tuple(q.shape) for q, _, _ in found] == [(1, 2, 32, 8)] * 2
    caught = []
    layer = model.transformer.h[1].attn
    layer.c_proj.register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0]))
    with torch.no_grad():
        model(ids)
    want = adasplash(*found[1]).transpose(1, 2).flatten(2)
    assert torch.allclose(caught[0], want, atol=1e-6)
    assert model.config._attn_implementation == "adasplash"
