"""Assisted generation of transformers, as shipped and with its token order corrected."""

from __future__ import annotations

import copy
from typing import Any

from ..pairs import Pair


def on_a_copy(pair: Pair) -> dict[str, Any]:
    """Return the arguments that make `generate` use a copy of the drafter, as shipped.

    A copy, since it changes the drafter and keeps what it found out by tokenizer.
    """
    return {
        "assistant_model": copy.deepcopy(pair.drafter),
        "tokenizer": copy.deepcopy(pair.target_tokenizer),
        "assistant_tokenizer": copy.deepcopy(pair.drafter_tokenizer),
    }


def in_order(pair: Pair) -> dict[str, Any]:
    """Return the same with the columns of the drafter's head in the order they are read in.

    As shipped, the shared rows of the head are taken in the order of a dictionary, and its logits
    are read in the order of ids: sampled drafts are then judged by other tokens' probabilities. A
    translator that sorts the rows takes the place of the one that `generate` would make. It also
    runs where the target has all the drafter's tokens, at which the shipped one fails.
    """
    import weakref

    from transformers.generation.candidate_generator import (
        AssistantToTargetTranslator,
        AssistantVocabTranslatorCache,
    )

    class InOrder(AssistantToTargetTranslator):  # type: ignore[misc]
        def _get_assistant_to_target_input_ids(self) -> tuple[Any, dict[int, int]]:
            to_target, to_assistant = super()._get_assistant_to_target_input_ids()
            return to_target, dict(sorted(to_assistant.items(), key=lambda entry: entry[1]))

    extra = on_a_copy(pair)
    drafter, theirs = extra["assistant_model"], extra["assistant_tokenizer"]
    ours = extra["tokenizer"]
    size = pair.target.config.get_text_config().vocab_size
    translator = InOrder(ours, theirs, size, drafter, True)
    if not len(translator._get_suppress_input_ids()):
        translator.assistant_prune_lm_head = False  # Nothing was left out, which it overlooks.
    known = weakref.WeakKeyDictionary({theirs: translator})
    AssistantVocabTranslatorCache._cache[ours] = known
    return extra
