"""Batches, padding, stops, streams and chats through the decoder."""

import io
import logging
import random

import pytest
import torch

from hetero_sd import HeteroSpeculativeDecoder
from hetero_sd.control import PLAIN, Arm, Bandit
from hetero_sd.testing import make_model, make_tokenizer

PROMPTS = ["the cat sat on", "café", "a dog ran over the hill and the mat.\n", "42"]


@pytest.fixture(scope="module")
def pair(tokenizers, models):
    kinds = "byte-level", "sentencepiece"
    return [models[k] for k in kinds] + [tokenizers[k] for k in kinds]


@pytest.fixture(scope="module")
def letters():
    """A pair that writes whole characters, which random models with byte tokens do not."""
    ours, theirs = make_tokenizer("characters", seed=4), make_tokenizer("sentencepiece", 330, 5)
    return make_model(ours, 7), make_model(theirs, 8), ours, theirs


def padded(tokenizer, side):
    rows = [tokenizer(text).input_ids for text in PROMPTS]
    width, end = max(map(len, rows)), tokenizer.eos_token_id
    fill = [[end] * (width - len(row)) for row in rows]
    zeros = [[0] * (width - len(row)) for row in rows]
    ones = [[1] * len(row) for row in rows]
    left = side == "left"
    ids = [f + r if left else r + f for f, r in zip(fill, rows, strict=True)]
    mask = [z + o if left else o + z for z, o in zip(zeros, ones, strict=True)]
    return torch.tensor(ids), torch.tensor(mask)


@pytest.mark.parametrize("backend", ["auto", "eager", "cudagraph"])
@pytest.mark.parametrize("method", ["tli", "slem", "slrs", "auto"])
def test_a_batch_is_what_generate_makes_of_it(pair, caplog, method, backend):
    caplog.set_level(logging.DEBUG, logger="hetero_sd.rounds")
    ids, mask = padded(pair[2], "left")
    wanted = pair[0].generate(ids, attention_mask=mask, max_new_tokens=20, do_sample=False)
    dec = HeteroSpeculativeDecoder(*pair, method=method, lookahead=4, backend=backend)
    made = dec.generate(input_ids=ids, attention_mask=mask, max_new_tokens=20)
    assert made.sequences.tolist() == wanted.tolist()
    assert dec.generate(PROMPTS, max_new_tokens=20).sequences.tolist() == wanted.tolist()
    ids, mask = padded(pair[2], "right")
    again = dec.generate(input_ids=ids, attention_mask=mask, max_new_tokens=20)
    assert again.sequences.tolist() == wanted.tolist()
    assert "no CUDA graphs" not in caplog.text


class Wandering(Bandit):
    """Chooses at random, plain rounds in stretches."""

    def __init__(self, methods, seed):
        super().__init__(methods)
        self.draw, self.methods, self.arm = random.Random(seed), methods, PLAIN

    def choose(self):
        if self.draw.random() < 0.4:
            arms = [PLAIN, PLAIN, *(Arm(m, self.draw.randint(1, 6)) for m in self.methods)]
            self.arm = self.draw.choice(arms)
        return self.arm

    def learn(self, arm, outcome):
        assert 1 <= outcome.tokens <= 1 + 8 * arm.lookahead  # Of the row furthest behind.
        assert outcome.accepted <= outcome.judged <= outcome.proposed
        assert outcome.readied >= 0
        assert outcome.seconds > 0


@pytest.mark.parametrize("backend", ["auto", "cudagraph"])
def test_plain_rounds_may_begin_ahead_of_any_other(pair, backend):
    """Whatever follows them, and wherever rows end meanwhile."""
    ids, mask = padded(pair[2], "left")
    options = {"max_new_tokens": 24, "eos_token_id": list(range(0, 300, 11))}
    wanted = pair[0].generate(ids, attention_mask=mask, do_sample=False, **options)
    dec = HeteroSpeculativeDecoder(*pair, backend=backend)
    dec._methods_to_try = lambda greedy: ["tli", "slem"]
    for seed in range(6):
        dec._policies[True, 3] = Wandering(["tli", "slem"], seed)
        made = dec.generate(input_ids=ids, attention_mask=mask, **options)
        assert made.sequences.tolist() == wanted.tolist()
        assert len(made.stats.arms) > 1


def test_decoders_that_share_runners_keep_their_own_ways_to_draft(pair):
    decoders = [
        HeteroSpeculativeDecoder(*pair, method=method, lookahead=2, backend="cudagraph")
        for method in ("tli", "slrs")
    ]
    decoders[1]._kept = decoders[0]._kept
    made = [dec.generate(PROMPTS[0], max_new_tokens=6).tokens for dec in decoders]
    assert made[0] == made[1]
    kept = decoders[0]._kept._rounds.values()
    assert [list(round.methods) for round in kept] == [["tli"], ["slrs"]]


def test_rows_do_not_depend_on_their_neighbours(pair):
    dec = HeteroSpeculativeDecoder(*pair, method="slem", lookahead=3)
    together = dec.generate(PROMPTS, max_new_tokens=16)
    alone = [dec.generate(text, max_new_tokens=16) for text in PROMPTS]
    assert together.tokens == [made.new_tokens for made in alone]
    assert together.texts == [made.text for made in alone]
    assert together.stats.generated == sum(map(len, together.tokens))
    with pytest.raises(ValueError, match="there are 4 rows; use `tokens` and `texts`"):
        _ = together.text


def test_rows_end_at_their_own_time(pair):
    ids, mask = padded(pair[2], "left")
    ends = list(range(0, 300, 7))
    wanted = pair[0].generate(
        ids, attention_mask=mask, max_new_tokens=20, do_sample=False, eos_token_id=ends
    )
    for method in ("tli", "slem"):
        dec = HeteroSpeculativeDecoder(*pair, method=method, lookahead=4)
        made = dec.generate(PROMPTS, max_new_tokens=20, eos_token_id=ends)
        assert made.sequences.tolist() == wanted.tolist()
        assert len({len(tokens) for tokens in made.tokens}) > 1


def test_several_sequences_of_each_prompt(pair):
    dec = HeteroSpeculativeDecoder(*pair, method="tli", lookahead=2)
    made = dec.generate(
        PROMPTS[:2],
        max_new_tokens=6,
        do_sample=True,
        top_k=0,
        num_return_sequences=3,
        generator=torch.Generator().manual_seed(0),
    )
    assert made.sequences.shape[0] == 6
    first = [row[row != pair[2].eos_token_id] for row in made.sequences]
    assert all(r.tolist()[:3] == first[0].tolist()[:3] for r in first[:3])
    assert len({tuple(tokens) for tokens in made.tokens}) > 2


def test_a_stream_that_is_left_alone_does_no_harm(letters):
    dec = HeteroSpeculativeDecoder(*letters, method="tli", lookahead=3, backend="cudagraph")
    wanted = dec.generate("the cat", max_new_tokens=20)
    ongoing = dec.stream("the cat", max_new_tokens=20)
    first = next(ongoing)
    assert dec.generate("the cat", max_new_tokens=20).tokens == wanted.tokens
    assert first + "".join(ongoing) == wanted.text
    ongoing = dec.stream("the cat", max_new_tokens=20)
    next(ongoing)
    ongoing.close()
    assert dec.generate("the cat", max_new_tokens=20).tokens == wanted.tokens


@pytest.mark.parametrize("method", ["tli", "slem"])
def test_stop_strings_at_any_place(letters, method):
    target, _, tokenizer, _ = letters
    usual = HeteroSpeculativeDecoder(*letters, method=method, lookahead=4).generate(
        "the cat", max_new_tokens=24
    )
    dec = HeteroSpeculativeDecoder(*letters, method=method, lookahead=5)
    ids = tokenizer("the cat", return_tensors="pt").input_ids
    for place in range(2, 16, 3):
        stop = usual.text[place : place + 2]
        wanted = target.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=24,
            do_sample=False,
            stop_strings=[stop],
            tokenizer=tokenizer,
        )
        made = dec.generate("the cat", max_new_tokens=24, stop_strings=[stop])
        assert made.sequences.tolist() == wanted.tolist()


def test_custom_criteria_are_asked_after_every_token(pair):
    seen = []

    class Enough:
        def __call__(self, input_ids, scores, **kwargs):
            seen.append(input_ids.shape[1])
            return torch.tensor([input_ids.shape[1] >= 18])

    dec = HeteroSpeculativeDecoder(*pair, method="slem", lookahead=5)
    made = dec.generate(PROMPTS[0], max_new_tokens=40, stopping_criteria=[Enough()])
    assert made.sequences.shape[1] == 18
    assert seen == list(range(seen[0], 19))


def test_max_time_ends_it(pair):
    dec = HeteroSpeculativeDecoder(*pair, method="slem", lookahead=2)
    made = dec.generate(PROMPTS[0], max_new_tokens=100, max_time=0.0)
    assert len(made.new_tokens) == 1


def test_custom_generate_hook(pair):
    ids, mask = padded(pair[2], "left")
    options = {"attention_mask": mask, "max_new_tokens": 15, "repetition_penalty": 1.4}
    wanted = pair[0].generate(ids, do_sample=False, **options)
    dec = HeteroSpeculativeDecoder(*pair, method="tli", lookahead=3)
    hook = dec.as_custom_generate()
    made = pair[0].generate(ids, do_sample=False, custom_generate=hook, **options)
    assert made.tolist() == wanted.tolist()
    output = pair[0].generate(
        ids, do_sample=False, custom_generate=hook, return_dict_in_generate=True, **options
    )
    assert output.sequences.tolist() == wanted.tolist()
    with pytest.raises(ValueError, match="must be called by the decoder's own target"):
        pair[1].generate(ids % 50, custom_generate=hook, attention_mask=mask, max_new_tokens=2)


def test_a_generation_config_counts(pair):
    from transformers import GenerationConfig

    config = GenerationConfig(max_new_tokens=7, repetition_penalty=1.5, do_sample=False)
    before = config.to_dict()
    ids = pair[2](PROMPTS[0], return_tensors="pt").input_ids
    wanted = pair[0].generate(ids, generation_config=config, attention_mask=torch.ones_like(ids))
    dec = HeteroSpeculativeDecoder(*pair, method="slem", lookahead=3)
    made = dec.generate(PROMPTS[0], generation_config=config)
    assert made.sequences.tolist() == wanted.tolist()
    assert config.to_dict() == before


def test_streams_are_whole_characters(pair, letters):
    from transformers import TextStreamer

    for models in (pair, letters):
        dec = HeteroSpeculativeDecoder(*models, method="slem", lookahead=4)
        whole = dec.generate("the café", max_new_tokens=40).text
        pieces = []
        for piece in dec.stream("the café", max_new_tokens=40):
            assert torch.is_grad_enabled(), "the caller's own mode lasts"
            pieces.append(piece)
        assert "".join(pieces) == whole
        assert all("\ufffd" not in piece for piece in pieces[:-1]) or "\ufffd" in whole
    assert len(pieces) > 3

    class Kept(TextStreamer):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            self.kept = io.StringIO()

        def on_finalized_text(self, text, stream_end=False):
            self.kept.write(text)

    streamer = Kept(letters[2], skip_prompt=True, skip_special_tokens=True)
    dec.generate("the café", max_new_tokens=40, streamer=streamer)
    assert streamer.kept.getvalue() == whole


TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def test_chats_go_in_each_sides_own_template(letters):
    import copy

    ours, theirs = copy.copy(letters[2]), copy.copy(letters[3])
    ours.chat_template = TEMPLATE
    theirs.chat_template = TEMPLATE.replace(": ", " says ")
    dec = HeteroSpeculativeDecoder(*letters[:2], ours, theirs, method="slem", lookahead=3)
    chat = [{"role": "the", "content": "cat sat"}]
    text = ours.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    made = dec.generate(messages=chat, max_new_tokens=12)
    assert made.new_tokens == dec.generate(text, max_new_tokens=12).new_tokens
    rounds, _ = dec._start(None, None, None, [chat, chat], None, {"max_new_tokens": 4})
    spelled = dec._text.drafter.spell(rounds._memory.contexts[1].ids).decode()
    assert spelled.strip().startswith("the says cat sat")
    assert spelled.strip().endswith("assistant says")
    both = dec.generate(messages=[chat, chat], max_new_tokens=12)
    assert both.tokens == [made.new_tokens] * 2


def test_cpu_generator_and_devices(pair):
    dec = HeteroSpeculativeDecoder(*pair, method="c-slrs", lookahead=3)
    runs = [
        dec.generate(
            PROMPTS[:2],
            max_new_tokens=12,
            do_sample=True,
            generator=torch.Generator().manual_seed(3),
        ).tokens
        for _ in range(2)
    ]
    assert runs[0] == runs[1]
