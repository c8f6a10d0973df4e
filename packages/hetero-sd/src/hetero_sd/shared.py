"""TLI: drafts of the tokens that both vocabularies hold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .devices import is_spread
from .drafting import Situation, Table, nothing
from .drafts import Certain, Draft, Drawn
from .vocab import VocabMap


class SharedTokens:
    """TLI: draws from the drafter restricted to tokens that the target has too.

    Processors act on target ids, before the draw. Where the vocabularies are one, this is standard
    speculative decoding.

    Args:
        mapping: The vocabularies' map.
        eos: End tokens of the target.
        target_size: Rows of the target's head.
        device: Device of the drafter.
        block: Whether drafts are judged as blocks when sampling.

    Source: Timor et al. 2025, algorithm 4.
    """

    def __init__(
        self,
        mapping: VocabMap,
        eos: Sequence[int],
        target_size: int,
        device: torch.device,
        block: bool = True,
    ) -> None:
        self._eos = set(eos)
        self._size = target_size
        self._block = block
        # Distinct target ids that can be drafted; the column of each kept drafter id among them.
        distinct, column = mapping.to_target.unique(return_inverse=True)
        self.column = column.to(device) if len(distinct) < len(column) else None
        self.keep = mapping.keep if self.column is not None else mapping.keep[column.argsort()]
        self.keep = self.keep.to(device)
        self.kept_target = distinct.to(device)
        self._forth = mapping.to_drafter
        self.head: Tensor | None = None  # Set by `use_head`, else the whole head is computed.

    def use_head(self, weight: Tensor) -> None:
        """Compute these rows of the drafter's head alone, shape `(vocab, hidden)`."""
        whole = torch.arange(len(weight), device=weight.device)
        self.head = weight if torch.equal(self.keep, whole) else weight[self.keep]

    def table(self, vocab: int) -> Table:
        """Return what a graph needs to draft by itself, for a target's head of so many rows."""
        device, kept = self.kept_target.device, self.kept_target
        forth = torch.tensor([self._forth[token] for token in kept.tolist()], device=device)
        column_of = torch.full((vocab,), -1, dtype=torch.int32, device=device)
        column_of[kept] = torch.arange(len(kept), dtype=torch.int32, device=device)
        among = None if self.head is not None else self.keep[:, None]
        if self.column is not None:
            ids: list[list[int]] = [[] for _ in kept]
            names = range(len(self.keep)) if self.head is not None else self.keep.tolist()
            for name, column in zip(names, self.column.tolist(), strict=True):
                ids[column].append(name)
            most = max(map(len, ids))
            among = torch.tensor([i + [-1] * (most - len(i)) for i in ids], device=device)
        return Table(self.head, among, forth, kept[:, None].contiguous(), column_of, self._block)

    def shared_logits(self, logits: Tensor) -> Tensor:
        """Return logits over `kept_target` out of what the drafter gave, shape `(rows, kept)`."""
        if self.head is None:
            logits = logits[:, self.keep]
        if self.column is None:
            return logits
        # Several drafter ids for one target id: their probabilities add.
        peak = logits.amax(dim=1, keepdim=True)
        mass = logits.new_zeros(len(logits), len(self.kept_target))
        return mass.index_add_(1, self.column, (logits - peak).exp()).log() + peak

    def draft(self, now: Situation) -> tuple[list[Draft], int]:
        """See `Method`."""
        rooms = [min(room, now.lookahead) for room in now.rooms]
        feeds = now.memory.missing(rooms)
        tokens: list[list[int]] = [[] for _ in feeds]
        laws: list[list[Tensor]] = [[] for _ in feeds]
        active = [row for row, feed in enumerate(feeds) if feed]
        drafted = 0
        while active:
            said = now.memory.feed(feeds, self.head)
            logits = self.shared_logits(torch.cat([said[row] for row in active]))
            if now.processors.by_score:
                logits = now.processors.scores_only(logits)
            else:
                logits = torch.cat(
                    [
                        self._processed(now, row, logits[i : i + 1], tokens[row])
                        for i, row in enumerate(active)
                    ]
                )
            if now.processors.greedy:
                columns = logits.argmax(dim=1).tolist()
            else:
                law = logits.softmax(dim=1)
                usable = law.isfinite().all(dim=1)
                if not bool(usable.all()):  # The processors allow none of the shared tokens.
                    active = [
                        row for row, fits in zip(active, usable.tolist(), strict=True) if fits
                    ]
                    law = law[usable]
                    if not active:
                        break
                columns = now.chance.draw(law)
                for i, row in enumerate(active):
                    laws[row].append(law[i])
            feeds = [[] for _ in feeds]
            picked = self.kept_target[torch.tensor(columns, device=self.kept_target.device)]
            drafted += len(active)
            for row, token in zip(active, picked.tolist(), strict=True):
                tokens[row].append(token)
                if len(tokens[row]) < rooms[row] and token not in self._eos:
                    feeds[row] = [self._forth[token]]
            active = [row for row in active if feeds[row]]
        if now.processors.greedy:
            return [Certain(t) for t in tokens], drafted
        drafts = nothing(len(feeds))
        for row, (t, law_list) in enumerate(zip(tokens, laws, strict=True)):
            if t:
                drafts[row] = Drawn(t, torch.stack(law_list), self.kept_target, self._block)
        return drafts, drafted

    def _processed(self, now: Situation, row: int, logits: Tensor, tokens: list[int]) -> Tensor:
        full = logits.new_full((1, self._size), float("-inf"))
        full[:, self.kept_target] = logits
        full = now.processors(full, now.histories[row] + tokens, now.rows[row])
        return full[:, self.kept_target]


def find_head(drafter: Any, keep: Tensor) -> Tensor | None:
    """Return the weight of a drafter's head, if its logits are a plain product with it.

    Checked by running it, since some models scale or cap their logits.

    Args:
        drafter: A causal language model of `transformers`.
        keep: Drafter ids to compare at.
    """
    head, body = drafter.get_output_embeddings(), drafter.base_model
    weight = getattr(head, "weight", None)
    if body is drafter or not isinstance(weight, Tensor) or type(weight.data) is not Tensor:
        return None  # Quantised weights are methods or tensors of a kind of their own.
    if not weight.is_floating_point():
        return None
    if getattr(head, "bias", None) is not None or is_spread(drafter):
        return None
    rows: Tensor = weight.detach()
    probe = keep[:2][None]
    with torch.no_grad():
        wanted = drafter(input_ids=probe, use_cache=False).logits[0, -1, keep]
        hidden = body(input_ids=probe, use_cache=False).last_hidden_state[0, -1]
        found = hidden.to(rows) @ rows[keep].T
    slack = 1e-3 * float(wanted.abs().max()) + 1e-6
    error = float((wanted - found.to(wanted)).abs().max())
    return rows if error <= slack * (1 if rows.dtype == torch.float32 else 30) else None
