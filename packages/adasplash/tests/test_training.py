"""Training of the demo's twins, on a few steps."""

import gzip
import json
import tarfile

import pytest
import torch
from click.testing import CliRunner

from adasplash.demo import train

pytest.importorskip("transformers")


@pytest.fixture
def data(tmp_path):
    """A corpus of one tiny book, for training and for validation."""
    text = "the cat sat on the mat and the dog ran to the hill. " * 260
    (tmp_path / "text").mkdir()
    for name in ("books_train", "books_valid"):
        with gzip.open(tmp_path / "text" / f"{name}.jsonl.gz", "wt") as file:
            file.write(json.dumps({"text": text}) + "\n")
    return tmp_path


def _tokenizer(data, folder):
    return train.train_tokenizer(train.read_books(data / "text" / "books_train.jsonl.gz"), folder)


def test_a_run_writes_everything_that_ships(data, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "CONTEXT", 32)
    output = tmp_path / "out"
    options = ["--data", str(data), "--corpus", "books_train.jsonl.gz", "--output", str(output)]
    done = CliRunner().invoke(train.main, [*options, "--steps", "2", "--batch", "1"])
    assert done.exit_code == 0, done.output
    with tarfile.open(output / "assets.tar") as tar:
        names = set(tar.getnames())
    assert {"entmax/model.safetensors", "softmax/model.safetensors", "training.json"} <= names
    record = json.loads((output / "assets" / "training.json").read_text())
    assert set(record["models"]) == {"entmax", "softmax"}


def test_both_twins_start_from_the_same_weights(data, tmp_path):
    tokenizer = _tokenizer(data, tmp_path)
    first, second = (train.build(kind, 0, tokenizer) for kind in train.ATTENTION)
    for x, y in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(x, y)


def test_validation_loss_equals_a_loop_over_tokens(data, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "CONTEXT", 8)
    tokenizer = _tokenizer(data, tmp_path)
    model = train.build("softmax", 0, tokenizer).eval()
    stream = torch.arange(2, 27)
    total = 0.0
    with torch.no_grad():
        for start in (0, 8, 16):
            logits = model(stream[None, start : start + 8]).logits[0].double()
            for place in range(8):
                total -= logits[place].log_softmax(-1)[stream[start + place + 1]].item()
    loss, count = train.validation_loss(model, stream, batch=2)
    assert count == 24
    assert loss == pytest.approx(total / 24, rel=1e-5)


def test_too_short_a_text_is_refused():
    model = torch.nn.Linear(1, 1)
    with pytest.raises(ValueError, match="over 512 tokens; got 5"):
        train.validation_loss(model, torch.arange(5))
