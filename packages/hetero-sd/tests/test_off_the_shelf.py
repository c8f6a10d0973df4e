"""Two pretrained models of unlike vocabularies, each drafting for the other: SmolLM2, Gemma 3 270M.

    HETERO_SD_GGUF=FOLDER pytest -m slow packages/hetero-sd/tests/test_off_the_shelf.py

The folder holds their GGUF files, any names with `smollm2` and `gemma` in them.
"""

import os
from pathlib import Path

import pytest
import torch

from hetero_sd import HeteroSpeculativeDecoder
from hetero_sd.pairs import load_pair

FOLDER = Path(os.environ.get("HETERO_SD_GGUF", ""))
NAMES = ("smollm2", "gemma")
FILES = {name: next(FOLDER.glob(f"*{name}*.gguf"), None) for name in NAMES}
PROMPTS = ("The capital of France is", "def add(a, b):\n    ", "Der Hund läuft über")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        "HETERO_SD_GGUF" not in os.environ or None in FILES.values(),
        reason="HETERO_SD_GGUF names no folder with both files",
    ),
]


@pytest.fixture(scope="module")
def both():
    pair = load_pair(FILES["smollm2"], FILES["gemma"], dtype="float32", device="cpu")
    ours, theirs, *tokenizers = pair.parts
    return {"smollm2": (ours, tokenizers[0]), "gemma": (theirs, tokenizers[1])}


@pytest.mark.parametrize(("target", "drafter"), [NAMES, NAMES[::-1]])
def test_greedy_is_the_targets_own(both, target, drafter):
    (ours, ours_tokenizer), (theirs, theirs_tokenizer) = both[target], both[drafter]
    parts = ours, theirs, ours_tokenizer, theirs_tokenizer
    accepted = 0
    decoders = [HeteroSpeculativeDecoder(*parts, method=m, lookahead=4) for m in ("tli", "slem")]
    for text in PROMPTS:
        ids = ours_tokenizer(text, return_tensors="pt").input_ids
        mask = torch.ones_like(ids)
        right = ours.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False)
        for dec in decoders:
            made = dec.generate(input_ids=ids, max_new_tokens=12, do_sample=False)
            assert made.sequences.tolist() == right.tolist(), dec.method
            accepted += made.stats.accepted
    assert accepted > 0, "each must have guessed something of the other"
