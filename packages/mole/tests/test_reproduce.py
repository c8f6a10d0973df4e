"""The reproduction script, end to end on a made-up library."""

import csv
import gzip
import json
import random

import pytest
import torch
from click.testing import CliRunner
from transformers import AutoTokenizer

from mole import MoleForCausalLM
from mole.bench.reproduce import build, main
from mole.demo.train import SNIPPET_BOOK, Settings, encode
from mole.evaluation import window_losses

NAMES = ["dense", "moe-3e", "mole-2e", "mole-2e-uniform"]
WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "Alice", "run", "past", "it", "again"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    root = tmp_path_factory.mktemp("reproduction")
    (root / "text").mkdir()
    chance = random.Random(0)
    for file, titles in (("books_train", ["One", "Two"]), ("books_valid", [SNIPPET_BOOK])):
        with gzip.open(root / f"text/{file}.jsonl.gz", "wt", encoding="utf-8") as lines:
            for title in titles:
                text = "\n\n".join(" ".join(chance.choices(WORDS, k=12)) for _ in range(120))
                lines.write(json.dumps({"title": title, "text": text}) + "\n")
    arguments = ["--data", root, "--output", root / "out", "--corpus", "books_train.jsonl.gz",
                 "--models", ",".join(NAMES), "--formats", "fp32,fp16,nf3",
                 "--steps", 12, "--batch", 4, "--context", 32,
                 "--dim", 32, "--layers", 2, "--vocab", 300, "--device", "cpu"]  # fmt: skip
    done = CliRunner().invoke(main, [str(a) for a in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return root


def test_figures_are_those_of_the_weights(trained):
    out = trained / "out"
    report = json.loads((out / "reproduction.json").read_text())
    assert list(report["models"]) == NAMES
    assert report["seen_tokens"] == 12 * 4 * 32
    tokenizer = AutoTokenizer.from_pretrained(out / "tokenizer")
    with gzip.open(trained / "text/books_valid.jsonl.gz", "rt") as lines:
        valid = encode(tokenizer, [json.loads(line)["text"] for line in lines])
    model = MoleForCausalLM.from_pretrained(out / "mole-2e", dtype=torch.float32).eval()
    nats = window_losses(model, valid, 32).double().mean().item()
    assert report["models"]["mole-2e"]["validation"]["nats"] == pytest.approx(nats, rel=1e-6)
    gap = report["paired_differences"]["mole-2e - dense"]["nats"]
    assert gap == pytest.approx(nats - report["models"]["dense"]["validation"]["nats"], abs=1e-6)
    table = report["tables"]["mole-2e"]
    assert table["fp32"]["over_experts"]["nats"] == pytest.approx(0, abs=1e-5)
    assert table["nf3"]["bytes_per_token"] < table["fp16"]["bytes_per_token"]
    assert "mole-2e-uniform" not in report["tables"]
    assert (out / "reproduction.png").read_bytes()[:4] == b"\x89PNG"


def test_every_model_learns(trained):
    with open(trained / "out/reproduction_log.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for name in NAMES:
        losses = [float(row["loss"]) for row in rows if row["model"] == name]
        assert losses[-1] < losses[0]


def test_the_control_cannot_choose(trained):
    model = MoleForCausalLM.from_pretrained(trained / "out/mole-2e-uniform")
    assert all(not layer.lookup.router.weight.any() for layer in model.model.layers)
    free = build("mole-2e", Settings(dim=32, layers=2), 300)
    assert all(layer.lookup.router.weight.any() for layer in free.model.layers)


@pytest.mark.parametrize("names", ["mole-4e,dense", "dense,gru", "dense,mole-4e-random"])
def test_unknown_models_are_refused(tmp_path, names):
    done = CliRunner().invoke(
        main, ["--data", str(tmp_path), "--output", str(tmp_path), "--models", names]
    )
    assert done.exit_code == 1
    assert "must begin with dense" in done.output
