"""Which tokens two vocabularies share, byte for byte, and a report for users."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from ._bytes import ByteEncoder, canonical, token_bytes, tokenizer_kind, tokenizer_state
from .checks import check_tokenizer


@dataclass(frozen=True)
class VocabMap:
    """The tokens that a drafter may propose, and what they are for the target.

    Attributes:
        keep: Drafter ids that have a target token, ascending. Shape `(kept,)`.
        to_target: The target id of each. Shape `(kept,)`. Several may be equal: their
            probabilities add.
        to_drafter: The drafter id to go on with after each of these target ids: of several, the one
            that the drafter's tokenizer writes.
        target_bytes: Bytes of each target id; None for special tokens.
        drafter_bytes: Bytes of each drafter id; None for special tokens.
        special: Drafter id for each special target id that has a counterpart.
    """

    keep: Tensor
    to_target: Tensor
    to_drafter: dict[int, int]
    target_bytes: list[bytes | None]
    drafter_bytes: list[bytes | None]
    special: dict[int, int]

    def identity(self, size: int) -> VocabMap:
        """Return the map of a vocabulary onto itself.

        Args:
            size: Ids from 0 on that both models have.
        """
        ids = torch.arange(size)
        return replace(self, keep=ids, to_target=ids, to_drafter=dict(enumerate(range(size))))


def _contents(tokenizer: Any) -> dict[str, int]:
    """Return the id of each special token by its string."""
    return {
        entry.content: index
        for index, entry in tokenizer.added_tokens_decoder.items()
        if entry.special
    }


def same_vocabularies(target_tokenizer: Any, drafter_tokenizer: Any) -> bool:
    """Return whether every id means the same token to both, and text becomes the same ids."""
    if target_tokenizer.get_vocab() != drafter_tokenizer.get_vocab():
        return False
    states = [tokenizer_state(t) for t in (target_tokenizer, drafter_tokenizer)]
    return all(
        states[0].get(part) == states[1].get(part)
        for part in ("normalizer", "pre_tokenizer", "model", "decoder", "added_tokens")
    )


def map_vocabularies(
    target_tokenizer: Any,
    drafter_tokenizer: Any,
    *,
    target_eos: Iterable[int] = (),
    drafter_eos: Iterable[int] = (),
    target_size: int | None = None,
    drafter_size: int | None = None,
) -> VocabMap:
    """Return the byte-exact map from drafter tokens to target tokens.

    Tokens match if they stand for the same bytes, however their tokenizers write them. Special
    tokens match by role: every end token of the drafter is the target's first end token, and
    special tokens with the same string are the same.

    Args:
        target_tokenizer: A fast tokenizer.
        drafter_tokenizer: A fast tokenizer.
        target_eos: End tokens of the target; the first one is drafted.
        drafter_eos: End tokens of the drafter.
        target_size: Rows of the target's head; target ids from there on are left out.
        drafter_size: Rows of the drafter's head; drafter ids from there on are left out.

    Raises:
        TypeError: A tokenizer has no backend of the `tokenizers` library.

    Source: TLI, Timor et al. 2025, algorithm 4; the byte rule is our own.
    """
    target_table, drafter_table = token_bytes(target_tokenizer), token_bytes(drafter_tokenizer)
    target_size = len(target_table) if target_size is None else target_size
    drafter_size = len(drafter_table) if drafter_size is None else drafter_size
    target_eos, drafter_eos = list(target_eos), list(drafter_eos)
    by_bytes = canonical(target_tokenizer, target_table)
    pairs = {
        index: by_bytes[spelled]
        for index, spelled in enumerate(drafter_table)
        if spelled is not None and spelled in by_bytes
    }
    target_special, drafter_special = _contents(target_tokenizer), _contents(drafter_tokenizer)
    back: dict[int, int] = {}
    for text, index in drafter_special.items():
        if text in target_special:
            pairs[index] = target_special[text]
            back[target_special[text]] = index
    if target_eos and drafter_eos:
        pairs.update(dict.fromkeys(drafter_eos, target_eos[0]))
        for index in target_eos:
            back.setdefault(index, drafter_eos[0])
    # A start token is context, never a proposal.
    start = drafter_tokenizer.bos_token_id, target_tokenizer.bos_token_id
    if None not in start and start[1] not in target_eos:
        back.setdefault(start[1], start[0])
    kept = sorted((d, t) for d, t in pairs.items() if d < drafter_size and t < target_size)
    keep, to_target = zip(*kept, strict=True) if kept else ((), ())
    written = canonical(drafter_tokenizer, drafter_table[:drafter_size])
    to_drafter: dict[int, int] = {}
    for index, token in kept:
        spelled = drafter_table[index]
        to_drafter.setdefault(token, index if spelled is None else written[spelled])
    return VocabMap(
        torch.tensor(keep, dtype=torch.long),
        torch.tensor(to_target, dtype=torch.long),
        to_drafter,
        target_table,
        drafter_table,
        {t: d for t, d in back.items() if d < drafter_size},
    )


@dataclass(frozen=True)
class VocabReport:
    """What two vocabularies share, and what that means for drafting.

    Attributes:
        target_size: Tokens of the target, special ones included.
        drafter_size: Tokens of the drafter.
        target_kind: How the target's tokens spell bytes, such as `"byte-level"`.
        drafter_kind: How the drafter's do.
        shared: Target tokens that the drafter can propose.
        drafter_coverage: Share of the corpus's drafter tokens that are shared, in [0, 1].
        target_coverage: Share of the corpus's target tokens that are shared, in [0, 1].
        fertility: Target tokens for each drafter token on the corpus.
        newline: Whether a newline can be drafted by TLI.
        space: Whether a space can.
        digits: Whether all ten digits can.
        end: Whether the end of the text can.
        lossy: Tokenizers that change some text, with what they change; empty if none does.
        suggestion: Method to start with, and why.
    """

    target_size: int
    drafter_size: int
    target_kind: str
    drafter_kind: str
    shared: int
    drafter_coverage: float
    target_coverage: float
    fertility: float
    newline: bool
    space: bool
    digits: bool
    end: bool
    lossy: tuple[str, ...]
    suggestion: str

    def to_markdown(self) -> str:
        """Return the report as a table."""
        rows = []
        for entry in fields(self):
            value = getattr(self, entry.name)
            if isinstance(value, tuple):
                value = "; ".join(value) or "none"
            elif isinstance(value, bool):
                value = "yes" if value else "no"
            elif isinstance(value, float):
                value = f"{value:.3f}"
            rows.append(f"| {entry.name.replace('_', ' ')} | {value} |")
        return "\n".join(["| | |", "| --- | --- |", *rows])

    def __str__(self) -> str:
        """Return the same."""
        return self.to_markdown()


SAMPLE = (
    "The quick brown fox jumps over the lazy dog. It was 7:45 on 31 December 2026,\n"
    "and nobody in the café had noticed that the naïve plan cost $1,200 too much.\n\n"
    "def area(radius: float) -> float:\n    return 3.14159 * radius**2\n\n"
    "“Why,” asked the engineer, “does a smaller model write the same words?” "
    "Because most words are easy: the large one is needed for the others.\n"
)


def inspect_vocab(
    target_tokenizer: Any, drafter_tokenizer: Any, corpus: str | Iterable[str] | None = None
) -> VocabReport:
    """Return how well two tokenizers go together.

    Args:
        target_tokenizer: A fast tokenizer.
        drafter_tokenizer: A fast tokenizer.
        corpus: Text like that to be generated, or several; a short sample of our own if missing.

    Raises:
        TypeError: A tokenizer has no backend of the `tokenizers` library.
        ValueError: The corpus is empty.

    Source: own.
    """
    for name, tokenizer in (("target", target_tokenizer), ("drafter", drafter_tokenizer)):
        check_tokenizer(name, tokenizer)
    corpus = [corpus] if isinstance(corpus, str) else corpus
    texts = [SAMPLE] if corpus is None else [text for text in corpus if text]
    if not texts:
        raise ValueError("`corpus` must hold at least one text that is not empty; got none.")
    ends = [
        [t.eos_token_id] if t.eos_token_id is not None else []
        for t in (target_tokenizer, drafter_tokenizer)
    ]
    mapping = map_vocabularies(
        target_tokenizer, drafter_tokenizer, target_eos=ends[0], drafter_eos=ends[1]
    )
    kept, targets = set(mapping.keep.tolist()), set(mapping.to_target.tolist())
    encoders = (
        ByteEncoder(target_tokenizer, mapping.target_bytes),
        ByteEncoder(drafter_tokenizer, mapping.drafter_bytes),
    )
    ours = [i for text in texts for i in encoders[0].encode(text.encode())]
    theirs = [i for text in texts for i in encoders[1].encode(text.encode())]
    spelled = {mapping.target_bytes[t] for t in targets}
    lossy = []
    for name, encoder in zip(("target", "drafter"), encoders, strict=True):
        changed = [t for t in texts if encoder.spell(encoder.encode(t.encode())) != t.encode()]
        if changed:
            lossy.append(f"the {name}'s tokenizer changes {len(changed)} of {len(texts)} texts")
    drafter_coverage = sum(i in kept for i in theirs) / max(len(theirs), 1)
    target_coverage = sum(i in targets for i in ours) / max(len(ours), 1)
    share = f"{target_coverage:.0%} of the target's running tokens are shared"
    if not targets:
        suggestion = "slem: no token is shared"
    elif target_coverage < 0.5:
        suggestion = f"slrs for sampling, slem for greedy decoding: only {share}"
    else:
        suggestion = f"tli for sampling and on a GPU, slem for greedy decoding on a CPU: {share}"
    return VocabReport(
        target_size=len(mapping.target_bytes),
        drafter_size=len(mapping.drafter_bytes),
        target_kind=tokenizer_kind(tokenizer_state(target_tokenizer)),
        drafter_kind=tokenizer_kind(tokenizer_state(drafter_tokenizer)),
        shared=len(targets),
        drafter_coverage=drafter_coverage,
        target_coverage=target_coverage,
        fertility=len(ours) / max(len(theirs), 1),
        newline=b"\n" in spelled,
        space=b" " in spelled,
        digits=all(str(digit).encode() in spelled for digit in range(10)),
        end=bool(ends[0] and ends[0][0] in targets),
        lossy=tuple(lossy),
        suggestion=suggestion,
    )
