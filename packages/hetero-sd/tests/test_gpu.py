"""Whole generations by CUDA graphs and Triton kernels, on a device that has both."""

import copy
import logging

import pytest
import torch

from hetero_sd import HeteroSpeculativeDecoder
from hetero_sd.testing import law_of_target, make_model, make_tokenizer
from hetero_sd.verify import fits_law

PROMPTS = ["the cat sat on", "a dog ran over the hill and the mat.\n", "42"]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(scope="module")
def pair(tokenizers, models):
    kinds = "byte-level", "sentencepiece"
    return [copy.deepcopy(models[k]).float().cuda() for k in kinds] + [tokenizers[k] for k in kinds]


@pytest.fixture(scope="module")
def letters():
    """Few tokens, so that the law of two of them can be told from few draws."""
    ours, theirs = make_tokenizer("characters", seed=4), make_tokenizer("characters", seed=5)
    return make_model(ours, 7).float().cuda(), make_model(theirs, 8).float().cuda(), ours, theirs


@pytest.mark.parametrize("method", ["tli", "slem", "slrs", "c-slrs", "auto"])
def test_greedy_text_is_the_one_of_generate(pair, method, caplog):
    caplog.set_level(logging.DEBUG, logger="hetero_sd")
    dec = HeteroSpeculativeDecoder(*pair, method=method, lookahead=4)
    for text in PROMPTS:
        ids = pair[2](text, return_tensors="pt").input_ids.cuda()
        mask = torch.ones_like(ids)
        wanted = pair[0].generate(ids, attention_mask=mask, max_new_tokens=40, do_sample=False)
        made = dec.generate(input_ids=ids, max_new_tokens=40)
        assert made.sequences.tolist() == wanted.tolist()
    assert "no CUDA graphs" not in caplog.text


def test_rows_of_a_batch_are_what_each_is_alone(pair):
    dec = HeteroSpeculativeDecoder(*pair, method="slem", lookahead=3)
    together = dec.generate(PROMPTS, max_new_tokens=30)
    assert together.tokens == [dec.generate(text, max_new_tokens=30).new_tokens for text in PROMPTS]


@pytest.mark.parametrize("method", ["tli", "slem", "slrs", "c-slrs"])
def test_drafts_that_begin_ahead_change_no_text(pair, method, monkeypatch):
    from hetero_sd.ahead import Foresight

    texts = []
    for ahead in (False, True):
        monkeypatch.setattr(Foresight, "pays", lambda _, seconds, ahead=ahead: ahead)
        dec = HeteroSpeculativeDecoder(*pair, method=method, lookahead=3)
        for options in ({}, {"do_sample": True, "temperature": 0.7, "top_k": 0}):
            for prompts in (PROMPTS, PROMPTS[0]):
                draws = torch.Generator("cuda").manual_seed(0)
                made = dec.generate(prompts, max_new_tokens=60, generator=draws, **options)
                texts.append(made.tokens)
        kept = dec._kept._rounds.values()
        foresights = {f for whole in kept for f in (whole.foresight, whole._drafter.foresight)}
        assert sum(f.foreseen for f in foresights) > 5
        assert sum(f.missed for f in foresights) > 5
    assert texts[:4] == texts[4:]


@pytest.mark.parametrize(
    ("method", "options", "wrong"),
    [
        ("tli", {"top_k": 0}, False),
        ("tli", {"temperature": 0.8, "top_k": 9, "top_p": 0.9}, False),
        ("slem", {"temperature": 0.8, "top_k": 0, "top_p": 0.9}, False),
        ("slrs", {"temperature": 0.9, "top_k": 0, "min_p": 0.05}, False),
        ("c-slrs", {"temperature": 0.8, "top_k": 9}, False),
        ("slem", {"temperature": 0.8, "top_k": 9, "repetition_penalty": 1.2}, False),
        pytest.param("tli", {"top_k": 0}, True, id="negative control"),
    ],
)
def test_sampled_tokens_have_the_targets_law(letters, monkeypatch, method, options, wrong):
    from hetero_sd import whole

    if wrong:
        monkeypatch.setattr(whole.GraphRound, "_law", _flattened(whole.GraphRound._law))
    dec = HeteroSpeculativeDecoder(*letters, method=method, lookahead=2)
    prompt = letters[2]("ab").input_ids
    generator = torch.Generator("cuda").manual_seed(0)
    draws = []
    for _ in range(30):
        made = dec.generate(
            input_ids=torch.tensor([prompt] * 64, device="cuda"),
            do_sample=True,
            max_new_tokens=4,
            generator=generator,
            **options,
        )
        draws += [tokens[:2] for tokens in made.tokens]
    wanted = law_of_target(dec, prompt, options)
    size, fitting = letters[0].config.vocab_size, []
    for place in (0, 1):  # The first token of a draft, and the second.
        law, counts = torch.zeros(2, size, dtype=torch.float64)
        for tokens, share in wanted.items():
            if len(tokens) > place:
                law[tokens[place]] += share
        for tokens in draws:
            if len(tokens) > place:
                counts[tokens[place]] += 1
        fits, detail = fits_law(counts, law / law.sum())
        fitting.append(fits)
    assert all(fitting) != wrong, detail


def _flattened(honest):
    """Return the law of proposals as if each had been drawn from a flat one."""

    def law(self, *args):
        found = honest(self, *args)
        found.weights.zero_()
        return found

    return law


@pytest.mark.parametrize("method", ["tli", "slem", "slrs", "c-slrs"])
def test_what_was_prepared_is_not_captured_again(pair, monkeypatch, method):
    from hetero_sd.graphs import GraphRunner

    captured, capture = [], GraphRunner.capture
    monkeypatch.setattr(
        GraphRunner, "capture", lambda *args: captured.append(args) or capture(*args)
    )
    dec = HeteroSpeculativeDecoder(*pair, method=method, lookahead=3)
    text = "a dog ran over the hill and the mat. " * 3
    for options in ({}, {"do_sample": True, "top_k": 0, "top_p": 0.9}):
        dec.prepare(2, length=256, **options)
        count = len(captured)
        assert count > 0
        dec.generate([text, text], max_new_tokens=60, eos_token_id=[], **options)
        assert len(captured) == count


def test_whole_drafts_are_accepted_where_the_drafter_is_the_target(pair):
    """Graphs of few proposals are captured in a round of many, all of which are accepted."""
    target, _, tokenizer, _ = pair
    for method in ("slem", "standard"):
        dec = HeteroSpeculativeDecoder(
            target, target, tokenizer, tokenizer, method=method, lookahead=6
        )
        made = dec.generate(
            PROMPTS * 3, max_new_tokens=30, do_sample=True, temperature=1e-3, top_k=0
        )
        torch.cuda.synchronize()
        assert made.stats.acceptance > 0.9
