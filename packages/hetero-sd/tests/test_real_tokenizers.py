"""Real tokenizers, in every order of two; they are not shipped: name a folder of them.

    HETERO_SD_TOKENIZERS=FOLDER pytest -m slow packages/hetero-sd/tests/test_real_tokenizers.py

Each subfolder is what `AutoTokenizer.from_pretrained` reads.
"""

import itertools
import os
import random
import unicodedata
from pathlib import Path

import pytest
import torch

from hetero_sd import HeteroSpeculativeDecoder, map_vocabularies
from hetero_sd._bytes import ByteEncoder, token_bytes
from hetero_sd.context import DrafterContext
from hetero_sd.testing import make_model

FOLDER = os.environ.get("HETERO_SD_TOKENIZERS")
NAMES = sorted(p.name for p in Path(FOLDER).iterdir() if p.is_dir()) if FOLDER else []
PAIRS = list(itertools.permutations(NAMES, 2))
TEXTS = [
    "The café's naïve plan cost $1,200.\n\n\tdef f(x):\r\n        return x**2  # 你好 🙂👩‍👩‍👧",
    "  leading spaces, trailing   \n",
    "שלום עולם, e\u0301 and é, ﬁ, 1234567890 " + "a" * 300,
]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not FOLDER, reason="HETERO_SD_TOKENIZERS names no folder"),
]


@pytest.fixture(scope="module")
def real():
    from transformers import AutoTokenizer

    return {name: AutoTokenizer.from_pretrained(Path(FOLDER) / name) for name in NAMES}


@pytest.mark.parametrize(("target", "drafter"), PAIRS)
def test_map_and_context(real, target, drafter):
    ours, theirs = real[target], real[drafter]
    mapping = map_vocabularies(ours, theirs)
    mine, other = token_bytes(ours), token_bytes(theirs)
    special = set(mapping.special.values())
    for d, t in zip(mapping.keep.tolist(), mapping.to_target.tolist(), strict=True):
        assert d in special or mine[t] == other[d]
    draw = random.Random(0)
    encoder = ByteEncoder(ours, mine)
    for text in TEXTS:
        ids = encoder.encode(text.encode())
        context = DrafterContext(ByteEncoder(theirs, other), mapping, None)
        while ids:
            cut = draw.randint(1, 5)
            context.extend(ids[:cut])
            ids = ids[cut:]
        spelled = ByteEncoder(theirs, other).spell(context.ids)
        if target.startswith("bert") or drafter.startswith("bert"):
            continue  # Lower-cases: what it drafts from differs, and costs speed alone.
        found = (spelled + context.pending).decode()
        # Some tokenizers compose characters; that, too, costs speed alone.
        assert unicodedata.normalize("NFC", found) == unicodedata.normalize("NFC", text)


@pytest.mark.parametrize(("target", "drafter"), PAIRS)
def test_greedy_is_the_targets_own(real, target, drafter):
    models = [
        make_model(real[name], seed, padding=5) for seed, name in enumerate((target, drafter))
    ]
    ids = real[target]("The cat sat on the", return_tensors="pt", add_special_tokens=False)
    ids = ids.input_ids
    wanted = models[0].generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False
    )
    for method, lookahead in (("tli", 3), ("slem", 4), ("slrs", 2)):
        dec = HeteroSpeculativeDecoder(
            *models, real[target], real[drafter], method=method, lookahead=lookahead
        )
        made = dec.generate(input_ids=ids, max_new_tokens=24)
        assert made.sequences.tolist() == wanted.tolist()
