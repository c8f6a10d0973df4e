"""A check of a pair of models: is what the decoder writes the target's own?"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .decoder import HeteroSpeculativeDecoder
from .devices import input_device
from .drafts import Drawn
from .pairs import Pair

_LEAST = 5.0  # Least number of draws that a cell of the statistic is expected to get.
_WIDTHS = 4.5  # Standard deviations of Pearson's statistic that count as chance.


@dataclass(frozen=True)
class Check:
    """One comparison.

    Attributes:
        kind: `"greedy"`, `"sampled"` or `"control"`, which has to fail.
        method: Drafting method.
        lookahead: Tokens drafted a round.
        passed: Whether it went as it must.
        detail: What was found.
    """

    kind: str
    method: str
    lookahead: int
    passed: bool
    detail: str


def verify_pair(
    pair: Pair,
    prompts: Sequence[Tensor],
    *,
    methods: Sequence[str] = ("tli", "slem", "slrs"),
    lookaheads: Sequence[int] = (1, 4),
    tokens: int = 32,
    draws: int = 400,
    seed: int = 0,
) -> Iterator[Check]:
    """Yield what the comparisons with the target alone find, as they find it.

    Greedy output is compared token for token with transformers' `generate`. In half precision,
    where passes of other widths round otherwise, a first difference passes if the target finds both
    tokens equally good up to that rounding. Sampled first tokens are compared with the target's
    law by Pearson's statistic, and so is a control with wrong drafter probabilities, which must
    fail.

    Args:
        pair: The models.
        prompts: Target ids of each prompt, shape `(1, length)`.
        methods: Methods to check.
        lookaheads: Lookaheads to check.
        tokens: New tokens of each prompt.
        draws: Samples for each statistic; 0 for none.
        seed: Seed of the samples.
    """
    wanted = [_alone(pair.target, ids, tokens) for ids in prompts]
    for method in methods:
        for lookahead in lookaheads:
            dec = HeteroSpeculativeDecoder(*pair.parts, method=method, lookahead=lookahead)
            yield _greedy(dec, prompts, wanted, tokens)
        if draws:
            yield _sampled(dec, prompts[0], draws, seed, "sampled")
    if draws and "tli" in methods:
        dec = HeteroSpeculativeDecoder(
            *pair.parts, method="tli", lookahead=1, verification="token", backend="eager"
        )
        spoil(dec)
        yield _sampled(dec, prompts[0], draws, seed, "control")


def _alone(target: Any, ids: Tensor, tokens: int) -> list[int]:
    ids = ids.to(input_device(target))
    made = target.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False
    )
    new: list[int] = made[0, ids.shape[1] :].tolist()
    return new


def _greedy(
    dec: HeteroSpeculativeDecoder, prompts: Sequence[Tensor], wanted: list[list[int]], tokens: int
) -> Check:
    same, near, worst = 0, 0, 0.0
    for ids, right in zip(prompts, wanted, strict=True):
        found = dec.generate(input_ids=ids, max_new_tokens=tokens, do_sample=False).new_tokens
        if found == right:
            same += 1
            continue
        gap = gap_at_difference(dec.target, ids, found, right)
        worst = max(worst, gap)
        near += gap < rounding(dec.target)
    detail = f"{same} of {len(prompts)} prompts identical"
    if same < len(prompts):
        detail += f", {near} more at a tie; largest gap {worst:.2g} of the logits' range"
    passed = same + near == len(prompts)
    return Check("greedy", str(dec.method), int(dec.lookahead), passed, detail)


@torch.no_grad()
def gap_at_difference(target: Any, ids: Tensor, found: list[int], right: list[int]) -> float:
    """Return how much worse the first differing token is, in ranges of the logits.

    Args:
        target: The target.
        ids: The prompt, shape `(1, length)`.
        found: Tokens found.
        right: The target's own.
    """
    pairs = zip(found, right, strict=False)
    place = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
    if place is None:
        return float("inf")
    history = torch.cat([ids, torch.tensor([right[:place]]).to(ids)], dim=1)
    logits = target(history.to(input_device(target))).logits[0, -1].float()
    spread = float(logits.max() - logits.mean())
    return abs(float(logits[found[place]] - logits[right[place]])) / spread


def rounding(target: Any) -> float:
    """Return the gap that the target's rounding explains, in ranges of the logits."""
    dtype = next(target.parameters()).dtype
    return 2e-2 if dtype in (torch.float16, torch.bfloat16) else 1e-5


@torch.no_grad()
def _sampled(dec: HeteroSpeculativeDecoder, ids: Tensor, draws: int, seed: int, kind: str) -> Check:
    target = dec.target
    logits = target(ids.to(input_device(target))).logits[0, -1].double().cpu()
    best = logits.topk(min(50, len(logits)))
    law = torch.zeros_like(logits)
    law[best.indices] = best.values.softmax(-1)
    generator = torch.Generator(input_device(target)).manual_seed(seed)
    counts = torch.zeros_like(law)
    rows = min(draws, 64)
    for start in range(0, draws, rows):
        batch = ids.expand(min(rows, draws - start), -1)
        made = dec.generate(
            input_ids=batch,
            max_new_tokens=2,
            do_sample=True,
            temperature=1.0,
            top_p=1.0,
            top_k=50,
            generator=generator,
        )
        for tokens in made.tokens:
            counts[tokens[0]] += 1
    fits, detail = fits_law(counts, law)
    return Check(kind, str(dec.method), int(dec.lookahead), fits == (kind != "control"), detail)


def fits_law(counts: Tensor, law: Tensor, slack: float = 0.0) -> tuple[bool, str]:
    """Return whether counts may come from a law, by Pearson's statistic, and what was found.

    Its cells are tokens, the likeliest first, rare ones several together.

    Args:
        counts: How often each token came, shape `(vocab,)`.
        law: Probability of each token, shape `(vocab,)`.
        slack: Share of draws that may be of tokens which the law rules out, where rounding moves
            the bounds of top-k and top-p.
    """
    draws = float(counts.sum())
    order = law.argsort(descending=True)
    cells, seen = [0.0], [0.0]
    for expected, count in zip((law * draws)[order].tolist(), counts[order].tolist(), strict=True):
        if cells[-1] >= _LEAST:
            cells.append(0.0)
            seen.append(0.0)
        cells[-1] += expected
        seen[-1] += count
    cells[-1] += slack * draws
    if cells[-1] < _LEAST and len(cells) > 1:  # The rest is too little for a cell of its own.
        rest, others = cells.pop(), seen.pop()
        cells[-1] += rest
        seen[-1] += others
    statistic = sum((s - c) ** 2 / c for s, c in zip(seen, cells, strict=True))
    freedom = max(len(cells) - 1, 1)
    ruled_out = bool(counts[law == 0].any()) and not slack
    fits = statistic < freedom + _WIDTHS * (2 * freedom) ** 0.5 and not ruled_out
    return fits, f"statistic {statistic:.1f} at {freedom} degrees of freedom, {draws:.0f} draws"


def spoil(dec: HeteroSpeculativeDecoder) -> None:
    """Report that every drafter probability belongs to another token."""
    honest = dec._shared.draft

    def draft(now: Any) -> Any:
        drafts, count = honest(now)
        spoiled = [
            dataclasses.replace(d, laws=d.laws.roll(1, dims=1)) if isinstance(d, Drawn) else d
            for d in drafts
        ]
        return spoiled, count

    dec._shared.draft = draft  # type: ignore[method-assign]
