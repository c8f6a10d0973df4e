"""Tiny models and tokenizers for tests and benchmarks, made on the spot."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch

WORDS = ["the", "cat", "dog", "sat", "on", "a", "mat", "and", "ran", "over", "hill", "café", "über"]


def sentences(count: int, seed: int = 0) -> list[str]:
    """Return nonsense sentences with digits, newlines and letters beyond ASCII.

    Args:
        count: How many, 1 or more.
        seed: Seed of the draw.
    """
    draw = random.Random(seed)
    return [
        " ".join(draw.choice(WORDS) for _ in range(draw.randint(3, 9)))
        + draw.choice([".", "!\n", " 42.", " 🙂", ",\n\n"])
        for _ in range(count)
    ]


def make_tokenizer(kind: str, vocab: int = 300, seed: int = 0) -> Any:
    """Return a tokenizer of some kind, trained on `sentences`, its ids shuffled.

    Args:
        kind: `"byte-level"`, `"sentencepiece"` (byte fallback, `▁`), `"prefixed"` (the same, with
            a space put before every text) or `"characters"`.
        vocab: Tokens wanted, above 260 for the first three.
        seed: Seed of the text and of the order of ids.

    Raises:
        ValueError: The kind is unknown.
    """
    import json

    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<s>", "</s>"]
    if kind == "byte-level":
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        first = special
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    elif kind in ("sentencepiece", "prefixed"):
        backend = Tokenizer(models.BPE(byte_fallback=True))
        steps: list[Any] = [normalizers.Replace(" ", "▁")]
        if kind == "prefixed":
            steps.insert(0, normalizers.Prepend("▁"))
        backend.normalizer = normalizers.Sequence(steps)
        backend.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        )
        first = special + [f"<0x{byte:02X}>" for byte in range(256)]
        alphabet = list("▁abcdefghijklmnopqrstuvwxyz")
    elif kind == "characters":
        backend = Tokenizer(models.BPE())
        backend.decoder = decoders.Fuse()
        first = special
        alphabet = sorted(set("".join(sentences(200))))
        vocab = len(alphabet) + 2
    else:
        raise ValueError(
            "`kind` must be 'byte-level', 'sentencepiece', 'prefixed' or 'characters'; got "
            f"{kind!r}."
        )
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=first,
        initial_alphabet=alphabet,
        limit_alphabet=max(len(alphabet), 40),
        show_progress=False,
    )
    backend.train_from_iterator(sentences(400, seed), trainer)
    state = json.loads(backend.to_str())
    order = list(range(len(state["model"]["vocab"])))
    random.Random(seed).shuffle(order)
    state["model"]["vocab"] = {t: order[i] for t, i in state["model"]["vocab"].items()}
    state["added_tokens"] = [
        {**entry, "id": order[entry["id"]]}
        for entry in state["added_tokens"]
        if entry["content"] in special
    ]
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)), bos_token="<s>", eos_token="</s>"
    )


def make_model(
    tokenizer: Any, seed: int = 0, *, padding: int = 0, layers: int = 1, sharpness: float = 6.0
) -> Any:
    """Return a tiny Llama with random weights, in evaluation mode.

    Args:
        tokenizer: Its tokenizer.
        seed: Seed of the weights.
        padding: Rows of its head beyond the tokenizer's, 0 or more.
        layers: Layers, 1 or more.
        sharpness: Factor on the head's random weights; the larger, the surer the model.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer) + padding,
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=layers,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=256,
                initializer_range=0.3,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.eos_token_id,
            )
        )
        with torch.no_grad():
            model.lm_head.weight.mul_(sharpness / 6.0)
    return model.eval()


def total_variation(p: Sequence[float] | torch.Tensor, q: Sequence[float] | torch.Tensor) -> float:
    """Return half the sum of |p − q|, in [0, 1]."""
    difference = torch.as_tensor(p, dtype=torch.float64) - torch.as_tensor(q, dtype=torch.float64)
    return float(difference.abs().sum()) / 2
