"""Loss on held-out text: what is averaged, and how sure it is."""

import json
import math

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from mole import MoleForCausalLM, convert
from mole.demo import ASSETS
from mole.evaluation import (
    last_word_cloze,
    paired_difference,
    summarise,
    token_bytes,
    window_losses,
)


def test_losses_are_those_of_a_loop(make_mole):
    model = make_mole()
    tokens = torch.randint(1, 60, (23,), generator=torch.Generator().manual_seed(0)).int()
    found = window_losses(model, tokens, 5, batch=3)
    assert found.shape == (4, 4)
    for row in range(4):
        ids = tokens[5 * row : 5 * row + 5].long()
        with torch.no_grad():
            logits = model(ids[None]).logits[0]
        for t in range(4):
            expected = -torch.log_softmax(logits[t], 0)[ids[t + 1]]
            assert found[row, t].item() == pytest.approx(expected.item(), rel=1e-4)


def test_bits_per_byte_counts_predicted_text_only():
    tokens = torch.tensor([0, 1, 2, 0, 2, 2, 1])  # two windows of three, one left over
    losses = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    loss = summarise(losses, tokens, [100, 3, 5])
    assert loss.nats == 2.5
    assert loss.tokens == 4
    assert loss.bits_per_byte == pytest.approx(10 / math.log(2) / (3 + 5 + 5 + 5))


def test_bytes_of_tokens_that_are_spelled_out():
    """As SentencePiece has them: a mark for a space, single bytes for what is not known."""
    vocabulary = {"<s>": 0, "▁": 1, "a": 2, "é": 3, "▁a": 4}
    vocabulary |= {f"<0x{byte:02X}>": 5 + byte for byte in range(256)}
    words = Tokenizer(models.BPE(vocabulary, [("▁", "a")], byte_fallback=True))
    words.normalizer = normalizers.Replace(" ", "▁")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>")
    text = "<s>é a a猫é"
    ids = tokenizer(text).input_ids
    assert tokenizer.convert_ids_to_tokens(ids)[:4] == ["<s>", "é", "▁a", "▁a"]
    assert sum(token_bytes(tokenizer)[i] for i in ids) == len("é a a猫é".encode())


def test_interval_covers_the_mean_as_often_as_it_says():
    generator = torch.Generator().manual_seed(0)
    hits = 0
    for _ in range(100):
        sample = 3 + torch.randn(60, 4, generator=generator)
        loss = summarise(sample, torch.zeros(300, dtype=torch.long), [1])
        hits += loss.low <= 3 <= loss.high
        assert loss.low < loss.nats < loss.high
    assert 85 <= hits <= 100


def test_paired_difference_removes_what_windows_share():
    generator = torch.Generator().manual_seed(0)
    shared = 10 * torch.randn(80, 1, generator=generator)
    first = shared + 0.1 * torch.randn(80, 4, generator=generator)
    second = shared + 0.5 + 0.1 * torch.randn(80, 4, generator=generator)
    gap = paired_difference(first, second)
    assert gap["low"] < gap["nats"] < gap["high"] < 0
    assert gap["nats"] == pytest.approx(-0.5, abs=0.05)
    assert gap["high"] - gap["low"] < 0.1


@pytest.mark.parametrize(("count", "context"), [(4, 5), (10, 1)])
def test_text_shorter_than_a_window_is_refused(make_mole, count, context):
    with pytest.raises(ValueError, match=f"got {count} tokens and context {context}"):
        window_losses(make_mole(), torch.zeros(count, dtype=torch.long), context)


class Words:
    """One id for every letter."""

    def __call__(self, text, add_special_tokens):
        return type("Ids", (), {"input_ids": [ord(c) % 60 for c in text]})


def test_cloze_counts_last_words_that_the_model_would_write(make_mole):
    model, words = make_mole(), Words()
    context = torch.tensor([[*words("ab cd", False).input_ids, ord(" ") % 60]])
    with torch.no_grad():
        logits = model(context).logits[0]
    letter = next(chr(c) for c in range(65, 125) if c % 60 == int(logits[-1].argmax()))
    space_is_likeliest = int(logits[-2].argmax()) == ord(" ") % 60
    found = last_word_cloze(model, words, [f"ab cd {letter}"])
    assert found.accuracy == float(space_is_likeliest)
    expected = -torch.log_softmax(logits, -1)
    nats = expected[-2, ord(" ") % 60] + expected[-1, ord(letter) % 60]
    assert found.nats == pytest.approx(nats.item(), rel=1e-4)
    assert found.passages == 1


def test_cloze_needs_two_words(make_mole):
    with pytest.raises(ValueError, match="at least two words; number 1 has not"):
        last_word_cloze(make_mole(), Words(), ["a b", "word"])
    with pytest.raises(ValueError, match="at least one passage"):
        last_word_cloze(make_mole(), Words(), [])


@pytest.mark.parametrize("form", ["experts", "table"])
def test_lm_eval_scores_a_local_task_as_this_package_does(make_mole, tmp_path, form):
    lm_eval = pytest.importorskip("lm_eval")
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "tokenizer")
    model = make_mole(vocab_size=len(tokenizer))
    if form == "table":
        model = MoleForCausalLM.from_pretrained(convert(model, tmp_path, progress=False)).eval()
    passages = ["The old man said", "Alice was beginning to get very tired"]
    (tmp_path / "words.jsonl").write_text("".join(json.dumps({"text": p}) + "\n" for p in passages))
    task = {
        "task": "last_word",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "words.jsonl")}},
        "test_split": "test",
        "output_type": "loglikelihood",
        "doc_to_text": "{{text.rsplit(' ', 1)[0]}}",
        "doc_to_target": "{{' ' + text.rsplit(' ', 1)[1]}}",
        "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
    }
    harness = huggingface.HFLM(pretrained=model, tokenizer=tokenizer, device="cpu", batch_size=1)
    found = lm_eval.simple_evaluate(model=harness, tasks=[task], bootstrap_iters=0)["results"]
    expected = last_word_cloze(model, tokenizer, passages)
    assert found["last_word"]["perplexity,none"] == pytest.approx(math.exp(expected.nats), rel=1e-3)
    assert found["last_word"]["acc,none"] == expected.accuracy
