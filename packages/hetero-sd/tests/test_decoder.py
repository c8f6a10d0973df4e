"""The decoder through its public interface, on tiny models with shuffled vocabularies."""

import itertools

import pytest
import torch

from hetero_sd import HeteroSpeculativeDecoder
from hetero_sd.runners import make_runner
from hetero_sd.testing import make_model, make_tokenizer, sentences, state_hash

KINDS = ("byte-level", "byte-level 2", "sentencepiece", "prefixed", "characters")
# Every two kinds, each in one order; in the other among the slow tests.
PAIRS = [
    pytest.param(a, b, marks=() if (i < j) == ((i + j) % 2 == 1) else pytest.mark.slow)
    for (i, a), (j, b) in itertools.permutations(enumerate(KINDS), 2)
]
PROMPTS = ["the cat sat on", "café über 42\n"]


def build(tokenizers, models, target, drafter, **options):
    return HeteroSpeculativeDecoder(
        models[target], models[drafter], tokenizers[target], tokenizers[drafter], **options
    )


@pytest.mark.parametrize(("target", "drafter"), PAIRS)
def test_greedy_output_is_the_targets_own(tokenizers, models, target, drafter):
    for method, lookahead in (("tli", 4), ("slem", 5), ("slrs", 3), ("auto", "auto")):
        dec = build(tokenizers, models, target, drafter, method=method, lookahead=lookahead)
        for prompt in PROMPTS:
            ids = tokenizers[target](prompt, return_tensors="pt").input_ids
            wanted = models[target].generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=18, do_sample=False
            )
            found = dec.generate(prompt, max_new_tokens=18)
            assert found.sequences.tolist() == wanted.tolist()
            assert found.stats.generated == len(found.new_tokens)


GREEDY_OPTIONS = [
    {"repetition_penalty": 1.7},
    {"no_repeat_ngram_size": 2},
    {"min_new_tokens": 12, "eos_token_id": list(range(0, 300, 3))},
    {"bad_words_ids": [[5], [7, 9], *([i] for i in range(100, 180))]},
    {"suppress_tokens": list(range(40, 90)), "begin_suppress_tokens": list(range(90, 140))},
    {"sequence_bias": [[[3], 4.0], [[200], -8.0]], "exponential_decay_length_penalty": (5, 1.3)},
    {"encoder_repetition_penalty": 1.5, "forced_eos_token_id": 3},
    {"prefix_allowed_tokens_fn": lambda row, ids: list(range(20 + row, 20 + len(ids) + 40))},
]


@pytest.mark.parametrize("options", GREEDY_OPTIONS, ids=lambda options: next(iter(options)))
@pytest.mark.parametrize("method", ["tli", "slem"])
def test_processors_act_as_in_generate(tokenizers, models, method, options):
    target, drafter = "byte-level", "sentencepiece"
    tokenizer = tokenizers[target]
    rows = [tokenizer(text).input_ids for text in PROMPTS]
    width, end = max(map(len, rows)), tokenizer.eos_token_id
    ids = torch.tensor([[end] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    wanted = models[target].generate(
        ids, attention_mask=mask, max_new_tokens=24, do_sample=False, **options
    )
    dec = build(tokenizers, models, target, drafter, method=method, lookahead=3)
    found = dec.generate(input_ids=ids, attention_mask=mask, max_new_tokens=24, **options)
    assert found.sequences.tolist() == wanted.tolist()
    changed = models[target].generate(ids, attention_mask=mask, max_new_tokens=24, do_sample=False)
    assert wanted.tolist() != changed.tolist(), "the options must matter"


class _NoToken:
    """Forbids a token."""

    def __init__(self, token):
        self.token = token

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        scores[:, self.token] = float("-inf")
        return scores


def test_custom_processor_acts_on_target_ids(tokenizers, models):
    dec = build(tokenizers, models, "byte-level", "byte-level 2", method="tli", lookahead=4)
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


@pytest.mark.parametrize(("method", "backend"), [("auto", "eager"), ("tli", "auto")])
def test_sampled_first_token_has_the_targets_law(near_pair, method, backend):
    target, _, ours, _ = near_pair
    dec = HeteroSpeculativeDecoder(*near_pair, method=method, lookahead=1, backend=backend)
    ids = ours(PROMPTS[0], return_tensors="pt").input_ids
    with torch.no_grad():
        logits = target(ids).logits[0, -1].double() / 0.8
    best = logits.topk(12)
    law = torch.zeros(len(logits), dtype=torch.float64)
    law[best.indices] = best.values.softmax(-1)
    first = [pair[0] for pair in _first_two(dec, 250, temperature=0.8, top_k=12)]
    statistic, freedom = _chi_square(first, law)
    assert statistic < freedom + 4.5 * (2 * freedom) ** 0.5


def test_graphs_that_fail_are_done_without(near_pair, monkeypatch):
    """Where graphs fail, the rounds go on without them."""
    from hetero_sd.whole import GraphRound

    def broken(*_):
        raise RuntimeError("capture failed")

    monkeypatch.setattr(GraphRound, "play", broken)
    dec = HeteroSpeculativeDecoder(*near_pair, method="tli", lookahead=3, backend="cudagraph")
    alone = HeteroSpeculativeDecoder(*near_pair, lookahead=0, backend="eager")
    found, wanted = (d.generate(PROMPTS[0], max_new_tokens=20) for d in (dec, alone))
    assert found.tokens == wanted.tokens
    assert found.stats.proposed > 0


def test_several_drafter_tokens_for_one_target_token_add_up(tokenizers, models):
    dec = build(tokenizers, models, "byte-level", "sentencepiece")
    assert dec._shared.column is not None, "byte tokens and letters are the same bytes"
    ids = [dec.drafter_tokenizer.bos_token_id, 5, 9]
    shared = dec._shared
    (logits,) = make_runner(models["sentencepiece"], 1).extend([ids], [1], shared.head)
    merged = shared.shared_logits(logits)[0].softmax(-1)
    with torch.no_grad():
        full = models["sentencepiece"](torch.tensor([ids])).logits[0, -1].float()
    wanted = torch.zeros(len(shared.kept_target))
    q = full[dec.mapping.keep].softmax(-1)
    places = {t: i for i, t in enumerate(shared.kept_target.tolist())}
    for share, target in zip(q, dec.mapping.to_target.tolist(), strict=True):
        wanted[places[target]] += share
    torch.testing.assert_close(merged, wanted)


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
            made = dec.generate(input_ids=ids, max_new_tokens=10, eos_token_id=[end])
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


def test_nothing_that_is_passed_in_changes(tokenizers, models):
    parts = (
        models["byte-level"],
        models["prefixed"],
        tokenizers["byte-level"],
        tokenizers["prefixed"],
    )
    before = state_hash(*parts)
    for method in ("tli", "slem", "slrs", "c-slrs", "auto"):
        for backend in ("auto", "eager", "cudagraph"):
            dec = HeteroSpeculativeDecoder(*parts, method=method, lookahead=3, backend=backend)
            dec.generate(PROMPTS, max_new_tokens=8, do_sample=True, top_p=0.9, eos_token_id=[5])
    assert state_hash(*parts) == before


def test_same_generator_same_text(tokenizers, models):
    dec = build(tokenizers, models, "byte-level", "characters", method="slrs", lookahead=3)
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
    dec = build(tokenizers, models, "byte-level", "byte-level 2", method="slem", lookahead=3)
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
        ({"method": "best"}, "`method` must be 'auto', 'tli', .* or 'standard'; got 'best'"),
        ({"lookahead": -1}, "`lookahead` must be 'auto' or an integer of 0 or more; got -1"),
        ({"lookahead": True}, "`lookahead` must be 'auto' or an integer of 0 or more; got True"),
        ({"verification": "none"}, "`verification` must be 'block' or 'token'; got 'none'"),
        ({"backend": "fpga"}, "`backend` must be 'auto', 'eager' or 'cudagraph'; got 'fpga'"),
    ],
)
def test_bad_settings_are_refused(tokenizers, models, options, message):
    with pytest.raises(ValueError, match=message):
        build(tokenizers, models, "byte-level", "characters", **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give exactly one of `prompts`, `input_ids` and `messages`; got 0"),
        ({"prompts": ""}, "every prompt must have at least one token"),
        ({"prompts": ["a", ""]}, "every prompt must have at least one token"),
        ({"input_ids": torch.ones(3, dtype=torch.long)}, r"must be integers of shape \(batch"),
        ({"input_ids": torch.ones(1, 3)}, r"integers of shape .* got float32 of shape \(1"),
        (
            {"input_ids": [[1, 2]], "attention_mask": [[1]]},
            r"`attention_mask` must have the shape of `input_ids`, \(1, 2\); got \(1, 1\)",
        ),
        ({"prompts": "a", "attention_mask": [[1]]}, "`attention_mask` belongs to `input_ids`"),
        ({"input_ids": torch.tensor([[99999]])}, r"`input_ids` must be in \[0, \d+\); got 99999"),
        ({"prompts": "a", "max_new_tokens": 0}, "`max_new_tokens` must be 1 or more; got 0"),
        ({"prompts": "a", "max_new_tokens": 999}, "within the target's 256 positions; got 999"),
        ({"prompts": "a", "stop_strings": [""]}, r"`stop_strings` must hold no empty text; got"),
        ({"prompts": "a", "num_beams": 2}, "`num_beams` must be 1; got 2"),
        ({"prompts": "a", "output_scores": True}, "`output_scores` is not kept by speculative"),
        ({"prompts": "a", "guidance_scale": 2.0}, "`guidance_scale` keeps a state from token to"),
        ({"prompts": ["a", "b"], "streamer": object()}, "`streamer` takes one row at a time"),
        ({"prompts": "a", "do_sample": True, "temperature": -1.0}, "temperature"),
    ],
)
def test_bad_requests_are_refused(tokenizers, models, options, message):
    import jaxtyping

    dec = build(tokenizers, models, "byte-level", "characters")
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        with pytest.raises(ValueError, match=message):
            dec.generate(**options)
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


def test_prompts_as_generate_of_transformers_takes_them(tokenizers, models):
    dec = build(tokenizers, models, "byte-level", "characters", method="slem", lookahead=2)
    texts = ["the cat sat", "a dog ran over the hill"]
    wanted = dec.generate(texts, max_new_tokens=6).tokens
    rows = [tokenizers["byte-level"](text).input_ids for text in texts]
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    for prompts in ({"input_ids": ids, "attention_mask": mask}, [*texts]):
        assert dec.generate(prompts, max_new_tokens=6).tokens == wanted
    assert dec.generate(input_ids=rows, max_new_tokens=6).tokens == wanted
    assert dec.generate(torch.tensor(rows[:1]), max_new_tokens=6).tokens == wanted[:1]
    assert "slem" in repr(dec)


def test_a_configuration_is_completed_on_a_copy(tokenizers, models, recwarn):
    from transformers import GenerationConfig

    dec = build(tokenizers, models, "byte-level", "characters", method="slem", lookahead=2)
    config = GenerationConfig(max_new_tokens=5, stop_strings=["q"])
    before = config.to_dict()
    assert len(dec.generate("the cat", generation_config=config).new_tokens) <= 5
    assert config.to_dict() == before
    long = dec.generate("the cat", generation_config=GenerationConfig(), eos_token_id=[])
    assert len(long.new_tokens) == 128


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
    with pytest.raises(TypeError, match=r"`target` must be a causal .* got str"):
        HeteroSpeculativeDecoder("name", models["characters"], object(), object())
    with pytest.raises(TypeError, match="`messages` must be a list of chats"):
        build(tokenizers, models, "byte-level", "characters").generate(messages="hello")
    with pytest.raises(TypeError, match="`target_tokenizer` must be a fast tokenizer"):
        HeteroSpeculativeDecoder(
            models["byte-level"], models["characters"], object(), tokenizers["characters"]
        )
