"""Exactness over real tokenizers, in every order of two; they are not shipped: name a folder.

    HETERO_SD_TOKENIZERS=FOLDER pytest -m slow packages/hetero-sd/tests/test_real_tokenizers.py

Each subfolder is what `AutoTokenizer.from_pretrained` reads; the models are tiny and random. A pair
takes about half a minute on one core, more where both vocabularies are large.
"""

import itertools
import os
import random
import unicodedata
from pathlib import Path

import pytest
import torch

from hetero_sd import HeteroSpeculativeDecoder, map_vocabularies
from hetero_sd._bytes import ByteEncoder, token_bytes, tokenizer_state
from hetero_sd.context import DrafterContext
from hetero_sd.testing import distance, law_of_output, law_of_target, make_model, state_hash
from hetero_sd.verify import fits_law, spoil

FOLDER = os.environ.get("HETERO_SD_TOKENIZERS")
NAMES = sorted(p.name for p in Path(FOLDER).iterdir() if p.is_dir()) if FOLDER else []
PAIRS = list(itertools.permutations(NAMES, 2))
METHODS = ("tli", "slem", "slrs", "c-slrs")
TEXTS = [
    "The café's naïve plan cost $1,200.\n\n\tdef f(x):\r\n        return x**2  # 你好 🙂👩‍👩‍👧",
    "  leading spaces, trailing   \n",
    "שלום עולם, e\u0301 and é, ﬁ, 1234567890 " + "a" * 300,
]
PROMPTS = ("The cat sat on the", "def f(x):\n    ", "Ça, c’est 42")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not FOLDER, reason="HETERO_SD_TOKENIZERS names no folder"),
    pytest.mark.parametrize(("target", "drafter"), PAIRS),
]


@pytest.fixture(scope="module")
def real():
    from transformers import AutoTokenizer

    return {name: AutoTokenizer.from_pretrained(Path(FOLDER) / name) for name in NAMES}


@pytest.fixture(scope="module")
def build(real):
    """Return models and tokenizers of a pair, each model made once."""
    made = {}

    def model(name, seed):
        if (name, seed) not in made:
            made[name, seed] = make_model(real[name], seed, padding=5)
        return made[name, seed]

    return lambda ours, theirs: (model(ours, 0), model(theirs, 1), real[ours], real[theirs])


def methods_for(parts):
    """The methods that the vocabularies allow."""
    mapping = map_vocabularies(*parts[2:])
    return METHODS if len(mapping.keep) else METHODS[1:]


def ids_of(tokenizer, text):
    return tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids


def random_text(draw):
    """Characters of many kinds, some in runs, with combining marks and joined emoji among them."""
    kinds = [
        lambda: draw.choice("abc XYZ 012,.\t\n\r\n  "),
        lambda: chr(draw.randint(0x20, 0x24F)),
        lambda: chr(draw.randint(0x590, 0x6FF)),
        lambda: chr(draw.randint(0x4E00, 0x9FFF)),
        lambda: chr(draw.randint(0x1F300, 0x1F6FF)),
        lambda: draw.choice(["e\u0301", "\u200d", "\ufeff", "\U0001f469\u200d\U0001f4bb"]),
        lambda: draw.choice("ab ") * draw.randint(2, 40),
    ]
    return "".join(draw.choice(kinds)() for _ in range(draw.randint(1, 40)))


# ------------------------------------------------------------------ bytes, maps and contexts
class Spelling:
    """Bytes of a tokenizer's tokens, and what it does to text."""

    def __init__(self, tokenizer):
        self.table = token_bytes(tokenizer)
        self.encoder = ByteEncoder(tokenizer, self.table)
        texts = [*TEXTS, "你好 \U0001f469\u200d\U0001f4bb \u0590e\u0301 XYZ ﬁ"]
        self.lossless = all(
            self.encoder.spell(self.encoder.encode(text.encode())) == text.encode()
            for text in texts
        )
        # Where all bytes are tokens and case is kept, only composed characters are not.
        normalizer = str(tokenizer_state(tokenizer).get("normalizer"))
        single = {spelled for spelled in self.table if spelled is not None and len(spelled) == 1}
        lowers = "BertNormalizer" in normalizer or "Lowercase" in normalizer
        self.composes_alone = not lowers and len(single) >= 200


@pytest.fixture(scope="module")
def spellings(real):
    return {name: Spelling(tokenizer) for name, tokenizer in real.items()}


def test_map_and_context(real, spellings, target, drafter):
    ours, theirs = spellings[target], spellings[drafter]
    mapping = map_vocabularies(real[target], real[drafter])
    special = set(mapping.special.values())
    joined = dict(zip(mapping.keep.tolist(), mapping.to_target.tolist(), strict=True))
    for d, t in joined.items():
        assert d in special or ours.table[t] == theirs.table[d]
    exact = ours.lossless and theirs.lossless
    known = {spelled for spelled in ours.table if spelled is not None}
    if exact:  # None is missed.
        assert {d for d, spelled in enumerate(theirs.table) if spelled in known} <= set(joined)
    draw = random.Random(f"{target} {drafter}")
    for text in [*TEXTS, *(random_text(draw) for _ in range(20))]:
        ids = ours.encoder.encode(text.encode())
        context = DrafterContext(theirs.encoder, mapping, None)
        history = b""
        while ids:
            cut = draw.randint(1, 5)
            context.extend(ids[:cut])
            history += b"".join(ours.table[i] or b"" for i in ids[:cut])
            ids = ids[cut:]
            if exact:  # A prefix of the target's bytes, wherever the text is cut.
                assert theirs.encoder.spell(context.ids) + context.pending == history
        if exact:
            assert history == text.encode()
        elif ours.composes_alone and theirs.composes_alone:  # Which costs speed alone.
            found = (theirs.encoder.spell(context.ids) + context.pending).decode(errors="replace")
            assert unicodedata.normalize("NFC", found) == unicodedata.normalize("NFC", text)


# ------------------------------------------------------------------------- the law, exactly
def test_law_of_the_output_is_the_targets(build, target, drafter):
    """That of two tokens, by taking every course of the rounds that bring them, in float64."""
    ours, theirs, *tokenizers = build(target, drafter)
    parts = ours.double(), theirs.double(), *tokenizers
    try:
        prompt = ids_of(tokenizers[0], PROMPTS[0])[0].tolist()
        options = {"temperature": 0.8, "top_k": 2}
        wanted = None
        for method in methods_for(parts):
            dec = HeteroSpeculativeDecoder(*parts, method=method, lookahead=2, backend="eager")
            wanted = wanted or law_of_target(dec, prompt, options)
            found = law_of_output(dec, prompt, options)
            assert sum(found.values()) == pytest.approx(1, abs=1e-12)
            assert distance(found, wanted) < 1e-12, method
    finally:
        ours.float(), theirs.float()


def test_law_of_samples_is_the_targets(build, target, drafter):
    """The first two tokens, drawn through `generate`: Pearson's statistic, with a control."""
    parts = build(target, drafter)
    prompt, options = ids_of(parts[2], PROMPTS[0]), {"temperature": 0.9, "top_k": 6}

    def fits(decoder, count):
        """Return whether so many draws may come from the target's law, and what was found."""
        made = decoder.generate(
            input_ids=prompt.expand(count, -1),
            do_sample=True,
            max_new_tokens=3,
            generator=torch.Generator().manual_seed(0),
            **options,
        )
        counts = torch.zeros(len(wanted) + 1, dtype=torch.float64)
        for tokens in made.tokens:
            counts[place.get(tuple(tokens[:2]), len(wanted))] += 1
        return *fits_law(counts, law), made.stats.accepted

    wanted = None
    for method in methods_for(parts):
        dec = HeteroSpeculativeDecoder(*parts, method=method, lookahead=2)
        if wanted is None:
            wanted = law_of_target(dec, prompt[0].tolist(), options)
            place = {key: i for i, key in enumerate(wanted)}
            law = torch.tensor([*wanted.values(), 0.0], dtype=torch.float64)
        right, detail, _ = fits(dec, 200)
        assert right, (method, detail)
    if "tli" not in methods_for(parts):
        return
    control = HeteroSpeculativeDecoder(
        *parts, method="tli", lookahead=2, verification="token", backend="eager"
    )
    spoil(control)
    for count in (200, 800, 3200):  # Few shared tokens are seldom proposed, and show late.
        right, detail, accepted = fits(control, count)
        if not right:
            return
    assert not accepted, detail  # What is never proposed cannot be judged wrongly.


# ------------------------------------------------------------------------------- greedy texts
def test_greedy_is_the_targets_own(build, target, drafter):
    """Every prompt alone and all of them in a batch; nothing that is passed in changes."""
    parts = build(target, drafter)
    ours, tokenizer = parts[0], parts[2]
    before = state_hash(*parts)
    prompts = [ids_of(tokenizer, text) for text in PROMPTS]
    wanted = [
        ours.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False)
        for ids in prompts
    ]
    width = max(ids.shape[1] for ids in prompts)
    padded = torch.zeros(len(prompts), width, dtype=torch.long)
    mask = torch.zeros_like(padded)
    for row, ids in enumerate(prompts):
        padded[row, width - ids.shape[1] :], mask[row, width - ids.shape[1] :] = ids[0], 1
    settings = [*((method, 4) for method in methods_for(parts)), ("slem", 1), ("auto", "auto")]
    for method, lookahead in settings:
        dec = HeteroSpeculativeDecoder(*parts, method=method, lookahead=lookahead)
        for ids, right in zip(prompts, wanted, strict=True):
            made = dec.generate(input_ids=ids, max_new_tokens=16, do_sample=False)
            assert made.sequences.tolist() == right.tolist(), (method, lookahead)
        rows = dec.generate(
            input_ids=padded, attention_mask=mask, max_new_tokens=16, do_sample=False
        )
        for new, ids, right in zip(rows.tokens, prompts, wanted, strict=True):
            assert new == right[0, ids.shape[1] :].tolist(), (method, lookahead)
    assert state_hash(*parts) == before


def test_ends_at_any_place_of_a_block(build, target, drafter):
    """End tokens, a stop string, lengths, and a penalty: as transformers' `generate` does."""
    parts = build(target, drafter)
    ours, tokenizer = parts[0], parts[2]
    ids = ids_of(tokenizer, PROMPTS[0])
    mask = torch.ones_like(ids)
    free = ours.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False)
    free = free[0, ids.shape[1] :].tolist()
    requests = [{"eos_token_id": [token], "max_new_tokens": 8} for token in free[:4]]
    requests += [{"max_new_tokens": n} for n in (1, 2, 5)]
    requests += [{"max_new_tokens": 8, "repetition_penalty": 1.4, "no_repeat_ngram_size": 2}]
    text = tokenizer.decode(free[2:4]).strip()
    if text:
        requests += [{"max_new_tokens": 8, "stop_strings": [text], "tokenizer": tokenizer}]
    decoders = [
        HeteroSpeculativeDecoder(*parts, method=method, lookahead=4)
        for method in methods_for(parts)
    ]
    for options in requests:
        right = ours.generate(ids, attention_mask=mask, do_sample=False, pad_token_id=0, **options)[
            0, ids.shape[1] :
        ].tolist()
        options.pop("tokenizer", None)
        for dec in decoders:
            made = dec.generate(input_ids=ids, do_sample=False, **options)
            assert made.new_tokens == right, (dec.method, options)
