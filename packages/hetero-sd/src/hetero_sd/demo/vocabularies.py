"""Vocabularies of the demo's own models, made from the text that they are to write."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

CONTEXT = 512  # Positions of the demo's own models.


def train_drafter_tokenizer(texts: Iterable[str], vocab: int) -> Any:
    """Return a sentencepiece-style tokenizer: `▁` for a space, single digits, byte fallback."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE(byte_fallback=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    words = r"'s|'t|'re|'ve|'m|'ll|'d|▁?\p{L}+|\p{N}|▁?[^\s▁\p{L}\p{N}]+|▁+(?=▁)|▁+|\s+"
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(words), "isolated")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    special = ["<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=special + [f"<0x{byte:02X}>" for byte in range(256)],
        limit_alphabet=160,
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    # The trainer marks the byte tokens as special: take that back, they are ordinary text.
    state = json.loads(backend.to_str())
    state["added_tokens"] = [e for e in state["added_tokens"] if e["content"] in special]
    return _wrapped(Tokenizer.from_str(json.dumps(state)))


def train_target_tokenizer(texts: Iterable[str], vocab: int) -> Any:
    """Return a byte-level tokenizer for the small target."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return _wrapped(backend)


def _wrapped(backend: Any) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        clean_up_tokenization_spaces=False,
        model_max_length=CONTEXT,
    )
