"""The decoder through its public interface, on tiny models with shuffled vocabularies."""

import hashlib
import itertools
import json

import pytest
import torch

from hetero_sd import HeteroSpeculativeDecoder
from hetero_sd.testing import make_model, make_tokenizer, sentences

KINDS = ("byte-level", "byte-level 2", "sentencepiece", "prefixed", "characters")
PAIRS = [pair for pair in itertools.product(KINDS, repeat=2) if pair[0] != pair[1]]
PROMPTS = ["the cat sat on", "café über 42\n"]


def build(tokenizers, models, target, drafter, **options):
    return HeteroSpeculativeDecoder(
        models[target], models[drafter], tokenizers[target], tokenizers[drafter], **options
    )


@pytest.mark.parametrize(("target", "drafter"), PAIRS)
def test_greedy_output_is_the_targets_own(tokenizers, models, target, drafter):
    for method, lookahead in (("tli", 1), ("tli", 4), ("slem", 2), ("slem", 5)):
        dec = build(tokenizers, models, target, drafter, method=method, lookahead=lookahead)
        for prompt in PROMPTS:
            ids = tokenizers[target](prompt, return_tensors="pt").input_ids
            wanted = models[target].generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False
            )
            found = dec.generate(prompt, max_new_tokens=24)
            assert found.sequences.tolist() == wanted.tolist()
            assert found.stats.generated == len(found.new_tokens)


def test_greedy_with_a_processor_that_looks_at_ids(tokenizers, models):
    target, drafter = "byte-level", "sentencepiece"
    ids = tokenizers[target](PROMPTS[0], return_tensors="pt").input_ids
    wanted = models[target].generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=30,
        do_sample=False,
        repetition_penalty=1.7,
    )
    for method in ("tli", "slem"):
        dec = build(tokenizers, models, target, drafter, method=method)
        found = dec.generate(input_ids=ids, max_new_tokens=30, repetition_penalty=1.7)
        assert found.sequences.tolist() == wanted.tolist()


class _NoToken:
    """Forbids a token."""

    def __init__(self, token):
        self.token = token

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        scores[:, self.token] = float("-inf")
        return scores


def test_custom_processor_acts_on_target_ids(tokenizers, models):
    dec = build(tokenizers, models, "byte-level", "byte-level 2")
    usual = dec.generate(PROMPTS[0], max_new_tokens=12).new_tokens
    changed = dec.generate(
        PROMPTS[0], max_new_tokens=12, logits_processor=[_NoToken(usual[0])]
    ).new_tokens
    assert changed[0] != usual[0]
    assert usual[0] not in changed


def _first_two(dec, runs, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    pairs = []
    for _ in range(runs):
        made = dec.generate(
            PROMPTS[0], max_new_tokens=2, do_sample=True, generator=generator, **options
        )
        pairs.append(tuple(made.new_tokens))
    return pairs


@pytest.fixture(scope="module")
def near_pair():
    """Two models that agree somewhat, so that acceptance and rejection both happen often."""
    ours = make_tokenizer("byte-level", 290, seed=1)
    theirs = make_tokenizer("sentencepiece", 330, seed=2)
    return make_model(ours, 1, sharpness=9.0), make_model(theirs, 2, sharpness=9.0), ours, theirs


def _chi_square(found, law):
    """Pearson's statistic over cells of at least five, and its degrees of freedom."""
    expected = law * len(found)
    counts = torch.bincount(torch.tensor(found), minlength=len(law)).double()
    large = expected >= 5
    cells = torch.cat([expected[large], expected[~large].sum()[None]])
    seen = torch.cat([counts[large], counts[~large].sum()[None]])
    cells, seen = cells[cells > 0], seen[cells > 0]
    return float(((seen - cells) ** 2 / cells).sum()), len(cells) - 1


@pytest.mark.parametrize("method", ["tli", "slem"])
def test_sampled_first_token_has_the_targets_law(near_pair, method):
    target, _, ours, _ = near_pair
    dec = HeteroSpeculativeDecoder(*near_pair, method=method, lookahead=1)
    ids = ours(PROMPTS[0], return_tensors="pt").input_ids
    with torch.no_grad():
        logits = target(ids).logits[0, -1].double() / 0.8
    best = logits.topk(12)
    law = torch.zeros(len(logits), dtype=torch.float64)
    law[best.indices] = best.values.softmax(-1)
    first = [pair[0] for pair in _first_two(dec, 500, temperature=0.8, top_k=12)]
    statistic, freedom = _chi_square(first, law)
    assert statistic < freedom + 4.5 * (2 * freedom) ** 0.5


def test_negative_control_the_same_test_finds_a_misordered_drafter(near_pair):
    target, _, ours, _ = near_pair
    dec = HeteroSpeculativeDecoder(*near_pair, method="tli", lookahead=1)
    # As if the pruned head were in another order than the ids: q belongs to other tokens.
    dec._kept_target = dec._kept_target.roll(1)
    ids = ours(PROMPTS[0], return_tensors="pt").input_ids
    with torch.no_grad():
        law = target(ids).logits[0, -1].double().softmax(-1)
    first = [pair[0] for pair in _first_two(dec, 500)]
    statistic, freedom = _chi_square(first, law)
    assert statistic > freedom + 10 * (2 * freedom) ** 0.5


def test_several_drafter_tokens_for_one_target_token_add_up(tokenizers, models):
    dec = build(tokenizers, models, "byte-level", "sentencepiece")
    assert dec._column is not None, "byte tokens and letters are the same bytes"
    from hetero_sd.context import DrafterCache

    ids = [dec.drafter_tokenizer.bos_token_id, 5, 9]
    merged = dec.shared_logits(ids, DrafterCache(256)).softmax(-1)
    with torch.no_grad():
        full = models["sentencepiece"](torch.tensor([ids])).logits[0, -1].float()
    wanted = torch.zeros(len(dec._kept_target))
    q = full[dec.mapping.keep].softmax(-1)
    places = {t: i for i, t in enumerate(dec._kept_target.tolist())}
    for share, target in zip(q, dec.mapping.to_target.tolist(), strict=True):
        wanted[places[target]] += share
    torch.testing.assert_close(merged, wanted)


def test_same_model_and_tokenizer_accepts_nearly_all(tokenizers, models):
    # Random models write no valid text in bytes; in whole characters they do.
    tokenizer = tokenizers["characters"]
    model = make_model(tokenizer, seed=3)
    dec = HeteroSpeculativeDecoder(model, model, tokenizer, tokenizer, lookahead=4)
    stats = dec.generate("<s>" + PROMPTS[0], max_new_tokens=40).stats
    assert stats.accepted == stats.proposed >= 8


def test_an_end_token_anywhere_in_a_block_ends_the_text(tokenizers, models):
    target = models["byte-level"]
    ids = tokenizers["byte-level"](PROMPTS[0], return_tensors="pt").input_ids
    usual = target.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=10, do_sample=False
    )[0, ids.shape[1] :].tolist()
    for drafter, method in itertools.product(("byte-level", "sentencepiece"), ("tli", "slem")):
        for offset, end in enumerate(usual):
            if end in usual[:offset]:
                continue
            dec = build(tokenizers, models, "byte-level", drafter, method=method, lookahead=4)
            dec.target_eos = [*dec.target_eos, end]
            made = dec.generate(input_ids=ids, max_new_tokens=10)
            assert made.new_tokens == usual[: offset + 1]


def test_long_text_outgrows_the_drafters_context(tokenizers, models):
    drafter = make_model(tokenizers["sentencepiece"], 3)
    drafter.config.max_position_embeddings = 24
    dec = HeteroSpeculativeDecoder(
        models["byte-level"], drafter, tokenizers["byte-level"], tokenizers["sentencepiece"]
    )
    prompt = "the cat sat on a mat and ran " * 3
    ids = tokenizers["byte-level"](prompt, return_tensors="pt").input_ids
    wanted = models["byte-level"].generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=30, do_sample=False
    )
    assert dec.generate(prompt, max_new_tokens=30).sequences.tolist() == wanted.tolist()


def _state(*parts):
    digest = hashlib.sha256()
    for part in parts:
        if hasattr(part, "state_dict"):
            for name, value in sorted(part.state_dict().items()):
                digest.update(name.encode() + value.numpy().tobytes())
            digest.update(part.config.to_json_string().encode())
            digest.update(part.generation_config.to_json_string().encode())
        else:
            digest.update(part.backend_tokenizer.to_str().encode())
            digest.update(json.dumps(part.init_kwargs, default=str).encode())
    return digest.hexdigest()


def test_nothing_that_is_passed_in_changes(tokenizers, models):
    parts = (
        models["byte-level"],
        models["prefixed"],
        tokenizers["byte-level"],
        tokenizers["prefixed"],
    )
    before = _state(*parts)
    for method in ("tli", "slem"):
        dec = HeteroSpeculativeDecoder(*parts, method=method)
        dec.generate(PROMPTS[1], max_new_tokens=12, do_sample=True, top_p=0.9)
    assert _state(*parts) == before


def test_same_generator_same_text(tokenizers, models):
    dec = build(tokenizers, models, "byte-level", "characters")
    texts = [
        dec.generate(
            PROMPTS[0],
            max_new_tokens=16,
            do_sample=True,
            generator=torch.Generator().manual_seed(5),
        ).new_tokens
        for _ in range(2)
    ]
    assert texts[0] == texts[1]


def test_counts_belong_together(tokenizers, models):
    dec = build(tokenizers, models, "byte-level", "byte-level 2", lookahead=3)
    stats = dec.generate(sentences(1)[0], max_new_tokens=25).stats
    assert 0 <= stats.accepted <= stats.proposed <= 3 * stats.rounds
    assert stats.generated <= stats.accepted + stats.rounds
    assert stats.block_efficiency == stats.generated / stats.rounds
    assert stats.seconds["draft"] + stats.seconds["verify"] <= stats.seconds["total"]
    plain = build(tokenizers, models, "byte-level", "byte-level 2", lookahead=0)
    assert plain.generate(sentences(1)[0], max_new_tokens=5).stats.block_efficiency == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "auto"}, "`method` must be 'tli' or 'slem'; got 'auto'"),
        ({"lookahead": -1}, "`lookahead` must be an integer of 0 or more; got -1"),
        ({"lookahead": True}, "`lookahead` must be an integer of 0 or more; got True"),
    ],
)
def test_bad_settings_are_refused(tokenizers, models, options, message):
    with pytest.raises(ValueError, match=message):
        build(tokenizers, models, "byte-level", "characters", **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give exactly one of `prompts`, `input_ids` and `messages`; got 0"),
        ({"prompts": ["a", "b"]}, "`prompts` must be one text.*got 2"),
        ({"prompts": ""}, "the prompt must have at least one token"),
        ({"input_ids": torch.ones(2, 3, dtype=torch.long)}, r"`input_ids` must have shape \(1"),
        ({"input_ids": torch.tensor([[99999]])}, r"`input_ids` must be in \[0, \d+\); got 99999"),
        ({"prompts": "a", "max_new_tokens": 0}, "`max_new_tokens` must be 1 or more; got 0"),
        ({"prompts": "a", "max_new_tokens": 999}, "within the target's 256 positions; got 999"),
        ({"prompts": "a", "temperature": 0.0}, "`temperature` must be above 0"),
        ({"prompts": "a", "top_k": -3}, "`top_k` must be 0 or more; got -3"),
        ({"prompts": "a", "top_p": 1.5}, r"`top_p` must be in \(0, 1\]; got 1.5"),
        ({"prompts": "a", "min_p": -0.1}, r"`min_p` must be in \[0, 1\]; got -0.1"),
        ({"prompts": "a", "repetition_penalty": 0.0}, "`repetition_penalty` must be above 0"),
    ],
)
def test_bad_requests_are_refused(tokenizers, models, options, message):
    dec = build(tokenizers, models, "byte-level", "characters")
    with pytest.raises(ValueError, match=message):
        dec.generate(**options)


def test_models_that_do_not_fit_are_refused(tokenizers, models):
    training = make_model(tokenizers["byte-level"]).train()
    with pytest.raises(ValueError, match=r"`target` must be in evaluation mode; call `target.eval"):
        HeteroSpeculativeDecoder(
            training, models["characters"], tokenizers["byte-level"], tokenizers["characters"]
        )
    with pytest.raises(ValueError, match="`drafter_tokenizer` must fit `drafter`, whose vocab"):
        HeteroSpeculativeDecoder(
            models["byte-level"],
            models["characters"],
            tokenizers["byte-level"],
            tokenizers["byte-level 2"],
        )
    with pytest.raises(TypeError, match="`target_tokenizer` must be a fast tokenizer"):
        HeteroSpeculativeDecoder(
            models["byte-level"], models["characters"], object(), tokenizers["characters"]
        )
