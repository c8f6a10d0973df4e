"""Every method through the decoder: the exact law of its output, by taking every course."""

import dataclasses
import json
import logging
import math
import random

import pytest
import torch

from hetero_sd import HeteroSpeculativeDecoder
from hetero_sd.testing import distance, every_course, law_of_output, law_of_target, one_round
from hetero_sd.verify import fits_law

METHODS = ["tli", "tli by token", "slem", "slrs", "c-slrs", "slrs-plain", "standard"]
SETTINGS = {
    "plain": {"top_k": 0},
    "processors": {"temperature": 0.7, "top_k": 3, "repetition_penalty": 1.3},
}


def tiny_tokenizer(merges, seed, letters="ab"):
    """Letters, some merges of them and an end, the ids in an order of their own."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    names = ["</s>", *letters, *("".join(pair) for pair in merges)]
    random.Random(seed).shuffle(names)
    backend = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, merges))
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    assert tokenizer.eos_token_id == names.index("</s>")
    return tokenizer


def tiny_model(tokenizer, seed, padding=0):
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer) + padding,
                hidden_size=8,
                intermediate_size=8,
                num_hidden_layers=1,
                num_attention_heads=2,
                max_position_embeddings=64,
                initializer_range=0.9,
                bos_token_id=None,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.eos_token_id,
            )
        )
    return model.double().eval()


@pytest.fixture(scope="module")
def pairs():
    target = tiny_tokenizer([("a", "b")], 1)
    drafters = {
        "others": tiny_tokenizer([("b", "a"), ("ba", "b")], 2),
        "letters": tiny_tokenizer([], 3),
        "same": target,
    }
    ours = tiny_model(target, 0)
    return {
        name: (ours, tiny_model(drafter, 5, padding=1), target, drafter)
        for name, drafter in drafters.items()
    }


def make_decoder(pairs, method, lookahead=2):
    pair = pairs[{"slrs-plain": "letters", "standard": "same"}.get(method, "others")]
    verification = "token" if method == "tli by token" else "block"
    return HeteroSpeculativeDecoder(
        *pair,
        method=method.split()[0],
        lookahead=lookahead,
        verification=verification,
        backend="eager",
    )


CASES = [(method, "processors") for method in METHODS] + [("tli", "plain"), ("slrs-plain", "plain")]


@pytest.mark.parametrize(("method", "setting"), CASES)
def test_law_of_the_output_is_the_targets(pairs, method, setting):
    dec = make_decoder(pairs, method)
    prompt = [dec.target_tokenizer.convert_tokens_to_ids("a")]
    found = law_of_output(dec, prompt, SETTINGS[setting])
    assert sum(found.values()) == pytest.approx(1, abs=1e-12)
    assert distance(found, law_of_target(dec, prompt, SETTINGS[setting])) < 1e-12


def _wrong_order(dec):
    # As if the pruned head were in another order than the ids: q belongs to other tokens.
    honest = dec._shared.draft

    def draft(now):
        drafts, count = honest(now)
        return [dataclasses.replace(d, laws=d.laws.roll(1, dims=1)) for d in drafts], count

    dec._shared.draft = draft


def _other_runs(dec):
    # The drafts are what they were; the law is told with runs that belong to other tokens.
    dec._runs.runs = dec._runs.runs.roll(1, dims=0)


def _forgets_exits(dec):
    dec._spelled.tree.stay = lambda node, law: 1.0


@pytest.mark.parametrize(
    ("method", "spoil"),
    [
        pytest.param("tli by token", _wrong_order, id="columns of q in another order"),
        pytest.param("slrs", _other_runs, id="mass of other runs"),
        pytest.param("slrs-plain", _forgets_exits, id="ends of tokens not weighed"),
    ],
)
def test_negative_control_a_wrong_law_is_found(pairs, method, spoil):
    dec = make_decoder(pairs, method)
    dec.generate("a", max_new_tokens=2)
    spoil(dec)
    prompt = [dec.target_tokenizer.convert_tokens_to_ids("a")]
    found = law_of_output(dec, prompt, SETTINGS["plain"])
    assert distance(found, law_of_target(dec, prompt, SETTINGS["plain"])) > 1e-3


@pytest.mark.parametrize("method", METHODS)
def test_greedy_is_the_targets_own(pairs, method):
    for lookahead in (1, 3, 5):
        dec = make_decoder(pairs, method, lookahead)
        for prompt in ("a", "ba", "aabab"):
            ids = dec.target_tokenizer(prompt, return_tensors="pt").input_ids
            wanted = dec.target.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False
            )
            assert dec.generate(prompt, max_new_tokens=20).sequences.tolist() == wanted.tolist()


def _flat_laws(whole):
    honest = whole._run_draft

    def draft(method, width, lookahead):
        honest(method, width, lookahead)
        scores, norms = whole._laws(method)
        scores.zero_()
        norms.fill_(math.log(scores.shape[2]))

    whole._run_draft = draft


@pytest.mark.parametrize(
    ("method", "verification", "options", "wrong"),
    [
        ("tli", "block", {"temperature": 0.8, "top_k": 3}, False),
        ("standard", "token", {"temperature": 0.8, "top_k": 0}, False),
        ("slrs", "token", {"temperature": 0.8, "top_k": 3}, False),
        ("slem", "token", {"top_k": 0}, False),
        ("c-slrs", "token", {"temperature": 0.9, "top_k": 4}, False),
        pytest.param("tli", "token", {"top_k": 0}, True, id="negative control"),
        pytest.param("slrs", "token", {"top_k": 3}, True, id="negative control of runs"),
    ],
)
def test_law_by_graphs(pairs, monkeypatch, caplog, method, verification, options, wrong):
    caplog.set_level(logging.DEBUG, logger="hetero_sd")
    from hetero_sd import whole

    if wrong:
        make = whole.GraphRound.__init__
        monkeypatch.setattr(
            whole.GraphRound, "__init__", lambda self, *a: (make(self, *a), _flat_laws(self))[0]
        )
    dec = HeteroSpeculativeDecoder(
        *pairs["same" if method == "standard" else "others"],
        method=method,
        lookahead=2,
        verification=verification,
        backend="cudagraph",
    )
    prompt = [dec.target_tokenizer.convert_tokens_to_ids("a")]
    count = 1500
    made = dec.generate(
        input_ids=torch.tensor([prompt] * count),
        do_sample=True,
        max_new_tokens=5,
        generator=torch.Generator().manual_seed(0),
        **options,
    )
    assert "no CUDA graphs" not in caplog.text
    assert 0.05 < made.stats.acceptance < 0.99
    if method == "standard":  # Drafts that began before the host had read the last round.
        (foresight,) = (kept.foresight for kept in dec._kept._rounds.values())
        assert foresight.foreseen
        assert not foresight.missed
    wanted = law_of_target(dec, prompt, options, length=3)
    place = {key: i for i, key in enumerate(wanted)}
    counts = torch.zeros(len(wanted), dtype=torch.float64)
    for tokens in made.tokens:
        counts[place[tuple(tokens[:3])]] += 1
    fits, detail = fits_law(counts, torch.tensor(list(wanted.values()), dtype=torch.float64))
    assert fits != wrong, detail


def test_more_is_accepted_as_theory_says(pairs):
    """Blocks bring more than tokens one by one."""

    def mean(method):
        dec = make_decoder(pairs, method)
        prompt = [dec.target_tokenizer.convert_tokens_to_ids("a")]
        courses = every_course(one_round(dec, prompt, {"top_k": 0}))
        return sum(share * len(new) for share, new in courses)

    assert mean("tli") > mean("tli by token") + 1e-3


def test_standard_needs_one_vocabulary(pairs):
    target, drafter, ours, theirs = pairs["others"]
    with pytest.raises(ValueError, match="`method='standard'` needs one vocabulary for both"):
        HeteroSpeculativeDecoder(target, drafter, ours, theirs, method="standard")


def test_spelling_needs_letters(pairs):
    target, drafter, ours, theirs = pairs["others"]
    with pytest.raises(ValueError, match="`method='slrs-plain'` needs a drafter whose tokens are"):
        HeteroSpeculativeDecoder(target, drafter, ours, theirs, method="slrs-plain")


def test_same_model_accepts_all(pairs):
    target, _, tokenizer, _ = pairs["same"]
    dec = HeteroSpeculativeDecoder(
        target, target, tokenizer, tokenizer, method="standard", lookahead=3
    )
    for sample in (False, True):
        stats = dec.generate("abab", max_new_tokens=20, do_sample=sample, top_k=0).stats
        assert stats.accepted == stats.proposed > 0
    assert json.dumps(stats.by_position)
