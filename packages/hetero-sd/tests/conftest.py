import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest

from hetero_sd import testing

KINDS = ("byte-level", "sentencepiece", "prefixed", "characters")


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tokenizers():
    """A tokenizer of each kind; two of one kind differ in text, order and size."""
    made = {kind: testing.make_tokenizer(kind, 330, seed=i) for i, kind in enumerate(KINDS)}
    made["byte-level 2"] = testing.make_tokenizer("byte-level", 300, seed=9)
    return made


@pytest.fixture(scope="session")
def models(tokenizers):
    return {
        kind: testing.make_model(tokenizer, seed=i, padding=3 * i)
        for i, (kind, tokenizer) in enumerate(tokenizers.items())
    }
