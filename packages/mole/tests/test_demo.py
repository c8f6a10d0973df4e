"""The training script and the demonstration, end to end on a made-up library."""

import csv
import gzip
import json
import random
import tarfile
import time

import pytest
import torch
from click.testing import CliRunner
from transformers import AutoTokenizer

from mole import DenseForCausalLM, MoeForCausalLM, MoleForCausalLM, convert
from mole.cli import main as mole_command
from mole.demo import ASSETS
from mole.demo import run as demo
from mole.demo.train import (
    END_OF_TEXT,
    SNIPPET_BOOK,
    Settings,
    _check_forms,
    crop_starts,
    encode,
    learning_rate,
)
from mole.demo.train import main as train
from mole.evaluation import token_bytes, window_losses

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "Alice", "run", "past", "it", "again"]


def library(path, titles, seed):
    chance = random.Random(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt", encoding="utf-8") as file:
        for title in titles:
            lines = (" ".join(chance.choices(WORDS, k=12)) for _ in range(120))
            file.write(json.dumps({"title": title, "text": "\n\n".join(lines)}) + "\n")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder that the training script wrote, and what it printed."""
    root = tmp_path_factory.mktemp("demo")
    library(root / "data/text/books_train.jsonl.gz", ["One", "Two"], 0)
    library(root / "data/text/books_valid.jsonl.gz", ["Three", SNIPPET_BOOK], 1)
    arguments = ["--steps", 16, "--batch", 4, "--context", 32, "--dim", 32, "--layers", 2,
                 "--vocab", 300, "--device", "cpu"]  # fmt: skip
    command = ["--data", root / "data", "--output", root / "assets", *arguments]
    done = CliRunner().invoke(train, [str(a) for a in command], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return root / "assets", done.output


def test_training_learns_and_says_so(trained):
    folder, output = trained
    with open(folder / "training_log.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for name in ("dense", "mole", "moe"):
        steps = [row for row in rows if row["model"] == name]
        assert [int(row["step"]) for row in steps] == list(range(1, 17))
        assert float(steps[-1]["loss"]) < float(steps[0]["loss"])
        assert f"{name}: validation" in output


def test_report_holds_what_the_weights_give(trained):
    folder, _ = trained
    report = json.loads((folder / "training.json").read_text())
    assert set(report["models"]) == {"dense", "mole", "moe"}
    assert set(report["versus_dense"]) == {"mole", "moe"}
    assert report["settings"]["steps"] == 16
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    excerpt = encode(tokenizer, [(folder / "snippet.txt").read_text(encoding="utf-8")])
    for name, kind in (
        ("dense", DenseForCausalLM),
        ("mole", MoleForCausalLM),
        ("moe", MoeForCausalLM),
    ):
        model = kind.from_pretrained(folder / name, dtype=torch.float32).eval()
        assert model.num_parameters() == report["models"][name]["parameters"]
        windows = excerpt[: len(excerpt) // 32 * 32].view(-1, 32).long()
        with torch.no_grad():
            loss = model(windows, labels=windows).loss.item()
        assert report["models"][name]["snippet"]["nats"] == pytest.approx(loss, rel=1e-4)


def test_archives_hold_the_assets(trained):
    folder, _ = trained
    with tarfile.open(folder / "assets.tar") as archive:
        names = set(archive.getnames())
    assert {"mole/model.safetensors", "dense/config.json", "tokenizer/tokenizer.json",
            "snippet.txt", "training.json", "training_log.csv"} <= names  # fmt: skip
    with tarfile.open(folder / "moe.tar") as archive:
        assert "moe/model.safetensors" in archive.getnames()
    assert not list(folder.rglob("*.tmp"))


def test_token_bytes_add_up_to_the_text(trained):
    folder, _ = trained
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    text = "The cat — naïve, 猫 — sat.\n\n  Twice\t"
    ids = encode(tokenizer, [text, text]).tolist()
    sizes = token_bytes(tokenizer)
    assert sum(sizes[i] for i in ids) == 2 * len(text.encode())
    assert ids.count(tokenizer.convert_tokens_to_ids(END_OF_TEXT)) == 2
    assert tokenizer.decode(ids[: len(ids) // 2 - 1]) == text


def test_forms_are_compared_for_every_format_and_store(trained):
    folder, _ = trained
    ids = torch.arange(20)[None]
    gaps = _check_forms(folder / "mole", ids, torch.device("cpu"))
    assert len(gaps) == 14
    assert gaps["fp32, mmap"] <= 1e-5
    for name, gap in gaps.items():
        assert gap == gaps[name.replace("device", "mmap")]


def test_every_model_sees_the_same_crops():
    settings = Settings(batch=3, context=10, seed=5, steps=400)
    starts = crop_starts(50, settings)
    assert torch.equal(starts, crop_starts(50, settings))
    assert starts.shape == (400, 3)
    assert starts.min() == 0
    assert starts.max() == 40  # the last crop ends with the text


def test_learning_rate_warms_up_and_decays_to_a_tenth():
    rates = [learning_rate(step, 1000, 2.0) for step in range(1000)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[19] == rates[20] == 2.0
    assert rates[-1] == pytest.approx(0.2, rel=1e-3)
    assert rates[20:] == sorted(rates[20:], reverse=True)


def test_minutes_lower_the_steps_of_all_models_alike(trained, tmp_path):
    folder, _ = trained
    command = ["--data", folder.parent / "data", "--output", tmp_path, "--steps", 10**6,
               "--minutes", 0.01, "--batch", 2, "--context", 16, "--dim", 16, "--layers", 1,
               "--vocab", 300, "--device", "cpu"]  # fmt: skip
    begin = time.monotonic()
    done = CliRunner().invoke(train, [str(a) for a in command], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert "steps fit into 0.01 minutes" in done.output
    steps = json.loads((tmp_path / "training.json").read_text())["settings"]["steps"]
    assert 1 <= steps < 10**5
    assert time.monotonic() - begin < 120  # a million steps would take hours


def test_demonstration_runs_and_is_true(trained, tmp_path):
    folder, _ = trained
    report = demo.run(
        tmp_path, fmt="fp16", prompt="the cat", new_tokens=6, assets=folder, progress=False
    )
    text = "\n".join(report.lines)
    assert "the same, token for token" in text
    assert "memory-mapped" in text
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_file()) == [
        "formats.json", "mole.png", "results.json",
    ]  # fmt: skip
    stored = json.loads((folder / "training.json").read_text())
    found = {
        (case["provider"], case["metric"], case["unit"]): case["median"]
        for case in report.forms.cases
    }
    for name, row in (("dense", "dense"), ("mole", "MoLE, experts"), ("moe", "MoE (stored)")):
        figures = stored["models"][name]
        assert found[row, "excerpt", "nats/token"] == pytest.approx(
            figures["snippet"]["nats"], rel=1e-4
        )
        assert found[row, "validation, stored", "nats/token"] == figures["validation"]["nats"]
    assert found["MoLE, table", "excerpt", "nats/token"] == pytest.approx(
        found["MoLE, experts", "excerpt", "nats/token"], abs=1e-3
    )
    assert found["MoLE, table", "weights", "MiB"] < found["MoLE, experts", "weights", "MiB"]
    formats = {(case["provider"], case["metric"]): case["median"] for case in report.formats.cases}
    assert formats["fp32", "max logit difference"] <= 1e-5
    # 2 layers, 4 experts, 32 channels
    assert formats["fp16", "read per token"] == 2 * 4 * 32 * 2
    assert formats["nf4", "read per token"] == 2 * 4 * 32 / 2 + 2 * 4 * 2


@pytest.mark.usefixtures("our_checks_only")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": ""}, "`prompt` must have 1 to 32 tokens"),
        ({"new_tokens": 32}, r"`prompt` must have 1 to 32 tokens together .* got \d \+ 32"),
        ({"fmt": "nf2"}, "`fmt` must be one of fp32, .*, nf3; got 'nf2'"),
    ],
)
def test_bad_arguments_are_named(trained, tmp_path, changes, message):
    arguments = {"fmt": "fp16", "prompt": "the", "new_tokens": 4} | changes
    with pytest.raises(ValueError, match=message):
        demo.run(tmp_path, assets=trained[0], progress=False, **arguments)
    assert not list(tmp_path.iterdir())


def test_missing_assets_are_explained(tmp_path, monkeypatch):
    with pytest.raises(OSError, match="holds no trained models"):
        demo.run(tmp_path, assets=tmp_path / "none")
    done = CliRunner().invoke(mole_command, ["demo", "--prompt", "", "--output", str(tmp_path)])
    assert done.exit_code == 2


def test_tables_of_the_shipped_model_keep_its_perplexity(tmp_path):
    model = MoleForCausalLM.from_pretrained(ASSETS / "mole", dtype=torch.float32).eval()
    words = AutoTokenizer.from_pretrained(ASSETS / "tokenizer")
    text = encode(words, [(ASSETS / "snippet.txt").read_text(encoding="utf-8")])[:2048]
    exact = window_losses(model, text, 512).double().mean()
    over = {}
    for fmt in ("int8", "nf4", "nf3"):
        table = MoleForCausalLM.from_pretrained(convert(model, tmp_path / fmt, fmt, progress=False))
        loss = window_losses(table.eval(), text, 512).double().mean()
        over[fmt] = float((loss - exact).exp()) - 1
    assert abs(over["int8"]) < 0.002
    assert 0 < over["nf4"] < 0.015
    assert over["nf4"] < over["nf3"] < 0.06
