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


@pytest.fixture
def encoder(tmp_path):
    """A tiny random BERT with a tokenizer of its own, and books by three authors."""
    from tokenizers import BertWordPieceTokenizer
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    text = (FOLDER.parent / "src/adasplash/demo/assets/snippet.txt").read_text(encoding="utf-8")
    backend = BertWordPieceTokenizer()
    backend.train_from_iterator([text], vocab_size=200, show_progress=False)
    backend.enable_truncation(16)
    PreTrainedTokenizerFast(
        tokenizer_object=backend._tokenizer, cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]"
    ).save_pretrained(tmp_path / "model")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=200, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=48,
    )  # fmt: skip
    BertModel(config).save_pretrained(tmp_path / "model")
    with gzip.open(tmp_path / "books.jsonl.gz", "wt", encoding="utf-8") as file:
        for i in range(7):
            book = {"author": "abcd"[i // 2], "title": str(i), "text": text[i * 2500 :][:2500]}
            file.write(json.dumps(book) + "\n")
    return ["--model", f"{tmp_path}/model", "--books", f"{tmp_path}/books.jsonl.gz"]


def test_the_encoder_is_fine_tuned_and_measured_for_every_alpha(
    encoder, tmp_path, capsys, monkeypatch
):
    script = _script("reproduce_encoder")
    monkeypatch.setattr(script, "SAMPLED", 1)  # 128 tokens are a long passage
    out = tmp_path / "out"
    options = [
        *encoder, "--output", str(out), "--lengths", "48", "128", "--steps", "6", "2",
        "--tokens", "256", "--query", "8", "--min-books", "2", "--evaluated", "12",
        "--device", "cpu", "--quiet", "--rate", "0.003",
    ]  # fmt: skip
    script.main([*options, "--alphas", "1", "2"])
    assert "3 books to train on, 3 held out" in capsys.readouterr().out
    script.main([*options, "--alphas", "1", "1.5", "2"])  # only alpha 1.5 is left to do
    shown = capsys.readouterr().out
    assert shown.count("alpha 1.5: accuracy") == 2
    assert "softmax:" not in shown
    cases = Results.load(out / "results.json").cases
    for metric in ("accuracy", "nDCG@10", "nDCG@10 before", "step"):
        found = sorted((c["provider"], c["parameters"]["length"]) for c in cases
                       if c["metric"] == metric)  # fmt: skip
        names = ("alpha 1.5", "alpha 2", "softmax")
        assert found == [(name, length) for name in names for length in (48, 128)]
    zeros = [c for c in cases if c["metric"] == "zero weights"]
    assert {c["provider"] for c in zeros} == {"alpha 1.5", "alpha 2"}
    assert len(zeros) == 2 * 2 * 2
    with (out / "log.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 * (6 + 2)
    alphas = [row["alpha"] for row in rows if row["length"] == "48"]
    assert alphas[6:12] == ["1.0100", "1.3400", "1.6700", *["2.0000"] * 3]
    soft = [float(row["loss"]) for row in rows if row["length"] == "48" and row["alpha"] == "1"]
    assert min(soft[1:]) < soft[0]
    assert (out / "results.png").stat().st_size > 10_000
    with pytest.raises(SystemExit, match="holds another run"):
        script.main([*options, "--positions", "tile"])


def test_passages_and_queries_partition_the_text():
    script = _script("reproduce_encoder")

    class Tokenizer:
        cls_token_id, sep_token_id = 101, 102

    cut = script.Passages(Tokenizer, 10, 3)
    passage, query = cut.cut(torch.arange(50), 5, 2)
    assert passage.tolist() == [101, 5, 6, 10, 11, 12, 13, 14, 15, 102]
    assert query.tolist() == [101, 7, 8, 9, 102]
    books = [script.Book(torch.arange(100 * i, 100 * i + 60), i) for i in range(3)]
    texts, asked, authors = cut.draw(books, 20, seed=1)
    for text, question, author in zip(texts, asked, authors, strict=True):
        both = torch.cat([text[1:-1], question[1:-1]]).sort().values
        assert both.tolist() == list(range(int(both[0]), int(both[0]) + 11))
        assert both[0] // 100 == author
    assert all(map(torch.equal, cut.draw(books, 20, seed=1), (texts, asked, authors)))
    texts, asked, authors = cut.lay(books, 9)
    assert authors.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert len(set(texts[:, 1:-1].flatten().tolist()) & set(asked[:, 1:-1].flatten().tolist())) == 0


def test_lines_are_encoded_to_the_same_ids(encoder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(encoder[1])
    texts = ["One line\r\nand\x0ba second.\n\n\u00e9 third", "", "\n"]
    found = _script("reproduce_encoder").encode(texts, tokenizer)
    want = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    assert [ids.tolist() for ids in found] == want
    assert len(want[0]) > 5


def test_the_tokenizer_needs_no_weights(tmp_path, monkeypatch):
    import shutil

    from adasplash.demo import run

    assets = FOLDER.parent / "src/adasplash/demo/assets"
    shutil.copytree(assets / "tokenizer", tmp_path / "assets/tokenizer")
    monkeypatch.setattr(run, "files", lambda package: tmp_path)
    assert run.load_tokenizer().decode(run.load_tokenizer()("a whale")["input_ids"]) == "a whale"
    with pytest.raises(FileNotFoundError, match="models are missing"):
        run.load("entmax")


def test_ndcg_counts_only_the_first_ten_places():
    script = _script("reproduce_encoder")
    passages = torch.eye(12)
    queries = torch.eye(12)
    assert script.ndcg_at_10(queries, passages) == pytest.approx(1.0)
    queries[0, 1] = 2.0  # the right passage comes second
    assert script.ndcg_at_10(queries, passages) == pytest.approx((11 + 0.63093) / 12, abs=1e-4)
    queries[0] = torch.tensor([0.5, *[1.0] * 11])  # and now twelfth
    assert script.ndcg_at_10(queries, passages) == pytest.approx(11 / 12, abs=1e-4)


@pytest.mark.parametrize("how", ["interpolate", "tile"])
def test_stretched_positions_keep_what_was_learned(how):
    from transformers import BertConfig, BertModel

    script = _script("reproduce_encoder")
    config = BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=8, max_position_embeddings=16,
    )  # fmt: skip
    model = BertModel(config).eval()
    old = model.embeddings.position_embeddings.weight.detach().clone()
    script.stretch_positions(model, 16, how)
    assert torch.equal(model.embeddings.position_embeddings.weight, old)
    script.stretch_positions(model, 31, how)
    new = model.embeddings.position_embeddings.weight.detach()
    want = old if how == "interpolate" else torch.cat([old, old[:15]])
    assert torch.allclose(new[::2] if how == "interpolate" else new, want, atol=1e-6)
    assert model(torch.zeros(1, 31, dtype=torch.long)).last_hidden_state.shape == (1, 31, 8)


def test_the_measures_of_sparsity_also_hold_without_a_causal_mask():
    from adasplash import sparsemax
    from adasplash.demo.run import measure_sparsity
    from adasplash.testing import oracle_weights

    weights = torch.zeros(1, 4, 4)
    weights[0, :, :2] = 0.5
    both = measure_sparsity(weights, 2, is_causal=False)[0]
    assert (both.zero_weights, both.empty_blocks) == (0.5, 0.5)
    assert measure_sparsity(weights[:, :2], 2, is_causal=False)[0] == both
    causal = measure_sparsity(weights, 2)[0]
    assert (causal.zero_weights, causal.empty_blocks) == (pytest.approx(0.3), pytest.approx(1 / 3))
    q, k = torch.randn(2, 1, 2, 9, 4, dtype=torch.float64).unbind(0)
    want = sparsemax(q @ k.mT / 2)
    assert torch.allclose(oracle_weights(q, k, False, alpha=2.0), want, atol=1e-12)
