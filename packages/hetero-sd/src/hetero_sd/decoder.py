"""Speculative decoding with a drafter whose vocabulary differs from the target's."""

from __future__ import annotations

import inspect
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from ._bytes import ByteEncoder, unfinished_tail
from .acceptance import verify, verify_greedy
from .context import DrafterCache, DrafterContext
from .processors import Processors
from .vocab import map_vocabularies

_logger = logging.getLogger(__name__)
_logger.addHandler(logging.NullHandler())

_METHODS = ("tli", "slem")
_LOOKBACK = 4  # Target tokens before a draft that are tokenised anew with it.


@dataclass
class Stats:
    """What one generation did.

    Attributes:
        rounds: Draft-and-verify rounds; each is one forward pass of the target.
        drafted: Tokens the drafter drafted.
        proposed: Target tokens proposed.
        accepted: Proposals accepted.
        generated: New tokens.
        seconds: Time spent, in seconds: `draft`, `verify`, `text` (turning tokens into tokens)
            and `total`.
    """

    rounds: int = 0
    drafted: int = 0
    proposed: int = 0
    accepted: int = 0
    generated: int = 0
    seconds: dict[str, float] = field(
        default_factory=lambda: {"draft": 0.0, "verify": 0.0, "text": 0.0, "total": 0.0}
    )

    @property
    def acceptance(self) -> float:
        """Share of proposals accepted, in [0, 1]; 0 where nothing was proposed."""
        return self.accepted / self.proposed if self.proposed else 0.0

    @property
    def block_efficiency(self) -> float:
        """New tokens for each forward pass of the target; plain decoding has 1."""
        return self.generated / self.rounds if self.rounds else 0.0

    @property
    def tokens_per_second(self) -> float:
        """New tokens a second, prompt included."""
        total = self.seconds["total"]
        return self.generated / total if total else 0.0


@dataclass(frozen=True)
class Generation:
    """What `HeteroSpeculativeDecoder.generate` returns.

    Attributes:
        sequences: Prompt and new tokens, shape `(1, length)`, as `generate` returns them.
        new_tokens: The new tokens alone.
        text: Their text, without special tokens.
        stats: What it took.
    """

    sequences: Tensor
    new_tokens: list[int]
    text: str
    stats: Stats


@dataclass(frozen=True)
class _Draft:
    """Target tokens to verify, and for TLI the law that each was drawn from."""

    tokens: list[int]
    laws: Tensor | None = None


class HeteroSpeculativeDecoder:
    """Generates what the target alone would, with fewer of its forward passes.

    Greedy output is the target's own, token for token; sampled output has the target's own
    distribution, after all logits processors. The drafter changes only the speed. Neither the
    models nor the tokenizers are changed.

    Args:
        target: A decoder-only causal language model of `transformers`, in evaluation mode.
        drafter: A smaller one; its vocabulary may be any other.
        target_tokenizer: The target's fast tokenizer.
        drafter_tokenizer: The drafter's fast tokenizer.
        method: `"tli"` drafts with the tokens that both vocabularies hold, and suits sampling.
            `"slem"` drafts text and turns it into target tokens, and suits greedy decoding.
        lookahead: Tokens drafted a round; 0 decodes without the drafter.

    Raises:
        TypeError: A tokenizer is not a fast one.
        ValueError: A model is of an unsupported kind, in training mode or does not fit its
            tokenizer; or an argument is out of range; or the vocabularies share no token.

    Source: Timor et al., Accelerating LLM Inference with Lossless Speculative Decoding Algorithms
        for Heterogeneous Vocabularies, ICML 2025.
    """

    def __init__(
        self,
        target: Any,
        drafter: Any,
        target_tokenizer: Any,
        drafter_tokenizer: Any,
        *,
        method: str = "tli",
        lookahead: int = 4,
    ) -> None:
        if method not in _METHODS:
            raise ValueError(f"`method` must be 'tli' or 'slem'; got {method!r}.")
        if isinstance(lookahead, bool) or not isinstance(lookahead, int) or lookahead < 0:
            raise ValueError(f"`lookahead` must be an integer of 0 or more; got {lookahead!r}.")
        for name, model, tokenizer in (
            ("target", target, target_tokenizer),
            ("drafter", drafter, drafter_tokenizer),
        ):
            _check_model(name, model)
            if getattr(tokenizer, "backend_tokenizer", None) is None:
                raise TypeError(
                    f"`{name}_tokenizer` must be a fast tokenizer (one with `backend_tokenizer`); "
                    f"got {type(tokenizer).__name__}."
                )
        self.method = method
        self.lookahead = lookahead
        self.target, self.drafter = target, drafter
        self.target_tokenizer, self.drafter_tokenizer = target_tokenizer, drafter_tokenizer
        self.target_eos = _end_tokens(target, target_tokenizer)
        drafter_eos = _end_tokens(drafter, drafter_tokenizer)
        heads = target.get_output_embeddings(), drafter.get_output_embeddings()
        self.mapping = map_vocabularies(
            target_tokenizer,
            drafter_tokenizer,
            target_eos=self.target_eos,
            drafter_eos=drafter_eos,
            target_size=heads[0].weight.shape[0],
            drafter_size=heads[1].weight.shape[0],
        )
        for name, model, table in (
            ("target", target, self.mapping.target_bytes),
            ("drafter", drafter, self.mapping.drafter_bytes),
        ):
            _check_size(name, model, table)
        if method == "tli" and len(self.mapping.keep) == 0:
            raise ValueError(
                "`drafter_tokenizer` shares no token with `target_tokenizer`, so TLI has nothing "
                "to draft with; use `method='slem'`."
            )
        self._drafter_eos = set(drafter_eos)
        self._target_text = ByteEncoder(target_tokenizer, self.mapping.target_bytes)
        self._drafter_text = ByteEncoder(drafter_tokenizer, self.mapping.drafter_bytes)
        # Distinct target ids that can be drafted, the column of each kept drafter id among them,
        # and the drafter id to go on with after each.
        device = drafter.device
        distinct, column = self.mapping.to_target.unique(return_inverse=True)
        self._column = column.to(device) if len(distinct) < len(column) else None
        order = column.argsort()
        keep = self.mapping.keep if self._column is not None else self.mapping.keep[order]
        self._kept_target = distinct.to(device)
        self._kept_target_ids: list[int] = distinct.tolist()
        self._kept = keep.to(device)
        self._forth = dict(
            zip(
                reversed(self.mapping.to_target.tolist()),
                reversed(self.mapping.keep.tolist()),
                strict=True,
            )
        )
        self._limit = getattr(drafter.config, "max_position_embeddings", None) or 1 << 30
        self._trims_logits = _accepts(target, "logits_to_keep")
        self._head = self._head_rows() if method == "tli" else None

    # ------------------------------------------------------------------------ generation
    @torch.no_grad()
    def generate(
        self,
        prompts: str | Sequence[str] | None = None,
        *,
        input_ids: Int[Tensor, "batch length"] | None = None,
        messages: list[dict[str, str]] | None = None,
        max_new_tokens: int = 128,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float = 1.0,
        logits_processor: list[Any] | None = None,
        generator: torch.Generator | None = None,
    ) -> Generation:
        """Return the target's continuation of one prompt.

        Args:
            prompts: A text, or a list of one; tokenised as it stands.
            input_ids: Target ids instead, shape `(1, length)`.
            messages: A chat instead, put through the target's chat template.
            max_new_tokens: Most tokens to generate, 1 or more.
            do_sample: Draw tokens; otherwise the best one is taken.
            temperature: Above 0; only when drawing, as are the next three.
            top_k: Draw from the k best tokens; 0 or None is all.
            top_p: Draw from the smallest set with this mass, in (0, 1].
            min_p: Draw from tokens with this share of the best one's probability, in [0, 1].
            repetition_penalty: Above 0; 1 is none.
            logits_processor: Further processors of `transformers`, called on each position with
                target ids.
            generator: Source of randomness, on the models' device.

        Raises:
            ValueError: Not exactly one kind of prompt, an empty one, more than one row, a number
                out of range, too long for the target, or logits that are no numbers.
        """
        ids = self._prompt(prompts, input_ids, messages)
        if isinstance(max_new_tokens, bool) or max_new_tokens < 1:
            raise ValueError(f"`max_new_tokens` must be 1 or more; got {max_new_tokens!r}.")
        limit = getattr(self.target.config, "max_position_embeddings", None)
        if limit is not None and len(ids) + max_new_tokens > limit:
            raise ValueError(
                f"`max_new_tokens` must leave prompt and output within the target's {limit} "
                f"positions; got {max_new_tokens} after a prompt of {len(ids)} tokens."
            )
        process = Processors(
            do_sample=do_sample,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            custom=logits_processor,
        )
        run = _Run(self, ids, process, generator)
        with run.timed("total"):
            new = run.generate(max_new_tokens)
        run.stats.generated = len(new)
        text: str = self.target_tokenizer.decode(new, skip_special_tokens=True)
        sequences = torch.tensor([ids + new], device=self.target.device)
        return Generation(sequences, new, text, run.stats)

    def _prompt(
        self,
        prompts: str | Sequence[str] | None,
        input_ids: Tensor | None,
        messages: list[dict[str, str]] | None,
    ) -> list[int]:
        given = [x is not None for x in (prompts, input_ids, messages)]
        if sum(given) != 1:
            raise ValueError(
                "give exactly one of `prompts`, `input_ids` and `messages`; got "
                f"{sum(given)} of them."
            )
        if input_ids is not None:
            rows = input_ids.shape[0] if input_ids.ndim == 2 else 0
            if rows != 1:
                raise ValueError(
                    "`input_ids` must have shape (1, length): this version decodes one prompt at "
                    f"a time; got {tuple(input_ids.shape)}."
                )
            ids: list[int] = input_ids[0].tolist()
        elif messages is not None:
            ids = list(
                self.target_tokenizer.apply_chat_template(
                    messages, add_generation_prompt=True, return_dict=True
                )["input_ids"]
            )
        else:
            texts = [prompts] if isinstance(prompts, str) else list(prompts or [])
            if len(texts) != 1:
                raise ValueError(
                    "`prompts` must be one text: this version decodes one prompt at a time; got "
                    f"{len(texts)}."
                )
            ids = list(self.target_tokenizer(texts[0])["input_ids"])
        if not ids:
            raise ValueError("the prompt must have at least one token; got an empty one.")
        size = self.target.get_output_embeddings().weight.shape[0]
        wrong = [i for i in ids if not 0 <= i < size]
        if wrong:
            raise ValueError(f"`input_ids` must be in [0, {size}); got {wrong[0]}.")
        return ids

    # --------------------------------------------------------------------------- drafter
    def _head_rows(self) -> Tensor | None:
        """Return the drafter's head for the shared tokens, if its head is a plain product.

        Checked by running it, since some models scale or cap their logits.
        """
        head = self.drafter.get_output_embeddings()
        body = self.drafter.base_model
        if body is self.drafter or getattr(head, "bias", None) is not None:
            return None
        rows: Tensor = head.weight.detach()[self._kept]
        probe = self._kept[:2][None]
        with torch.no_grad():
            wanted = self.drafter(input_ids=probe, use_cache=False).logits[0, -1, self._kept]
            hidden = body(input_ids=probe, use_cache=False).last_hidden_state[0, -1]
            found = hidden @ rows.T
        slack = 1e-3 * float(wanted.abs().max()) + 1e-6
        if float((wanted - found).abs().max()) > slack * (1 if rows.dtype == torch.float32 else 30):
            _logger.debug("the drafter's logits are no plain product: its whole head is used")
            return None
        return rows

    def shared_logits(self, ids: list[int], cache: DrafterCache) -> Tensor:
        """Return the drafter's next-token logits over the shared target ids, shape `(kept,)`.

        Args:
            ids: Ids to feed.
            cache: Its cache, which grows by them.
        """
        if self._head is None:
            whole = self._forward(self.drafter, ids, cache).logits[0, -1]
            logits: Tensor = whole[self._kept].float()
        else:
            hidden = self._forward(self.drafter.base_model, ids, cache).last_hidden_state[0, -1]
            logits = (hidden @ self._head.T).float()
        if self._column is None:
            return logits
        # Several drafter ids for one target id: their probabilities add.
        peak = logits.max()
        mass = torch.zeros(len(self._kept_target), device=logits.device)
        return mass.index_add_(0, self._column, (logits - peak).exp()).log() + peak

    def full_logits(self, ids: list[int], cache: DrafterCache) -> Tensor:
        """Return the drafter's next-token logits over its own vocabulary."""
        logits: Tensor = self._forward(self.drafter, ids, cache).logits[0, -1]
        return logits

    def _forward(self, module: Any, ids: list[int], cache: DrafterCache) -> Any:
        cache.held += ids
        feed = torch.tensor([ids], device=self.drafter.device)
        return module(input_ids=feed, past_key_values=cache.cache, use_cache=True)


class _Run:
    """One generation: the target's history, both caches and the counts."""

    def __init__(
        self,
        decoder: HeteroSpeculativeDecoder,
        ids: list[int],
        process: Processors,
        generator: torch.Generator | None,
    ) -> None:
        from transformers import DynamicCache

        self.decoder = decoder
        self.prompt = len(ids)
        self.ids = list(ids)
        self.process = process
        self.generator = generator
        self.stats = Stats()
        self.cache = DynamicCache()
        self.cached = 0  # Target tokens in the cache.
        self.eos = set(decoder.target_eos)
        self.context = DrafterContext(
            decoder._drafter_text, decoder.mapping, decoder.drafter_tokenizer.bos_token_id
        )
        self.drafter_cache = DrafterCache(decoder._limit)
        self.told = 0  # Target tokens that the drafter's context holds.

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.stats.seconds[what] += time.perf_counter() - begun

    def generate(self, max_new_tokens: int) -> list[int]:
        """Return the new tokens, up to and with the first end token."""
        end = self.prompt + max_new_tokens
        while len(self.ids) < end:
            draft = self._draft(min(self.decoder.lookahead, end - len(self.ids) - 1))
            new = self._verify(draft)
            self.ids += new
            if any(token in self.eos for token in new):
                break
        return self.ids[self.prompt :]

    # ---------------------------------------------------------------------------- draft
    def _draft(self, room: int) -> _Draft:
        if room < 1:
            return _Draft([])
        with self.timed("text"):
            self.context.extend(self.ids[self.told :])
            self.told = len(self.ids)
        if self.context.pending or not self.context.ids:
            return _Draft([])  # In the middle of a character the drafter cannot help.
        missing = self.drafter_cache.missing(self.context.ids, room)
        with self.timed("draft"):
            if self.decoder.method == "tli":
                return self._draft_tokens(missing, room)
            drafted, ended = self._draft_text(missing, room)
        with self.timed("text"):
            proposal = self._retokenise(drafted)[: room - 1 if ended else room]
            return _Draft(proposal + self.decoder.target_eos[:1] if ended else proposal)

    def _draft_tokens(self, feed: list[int], room: int) -> _Draft:
        """TLI: draw from the drafter restricted to shared tokens, processors applied."""
        decoder, process = self.decoder, self.process
        tokens: list[int] = []
        laws: list[Tensor] = []
        while True:
            logits = decoder.shared_logits(feed, self.drafter_cache)[None]
            if process.need_ids:
                full = logits.new_full((1, self._vocab()), float("-inf"))
                full[0, decoder._kept_target] = logits[0]
                history = torch.tensor(self.ids + tokens, device=logits.device)
                logits = process(full, history)[:, decoder._kept_target]
            else:
                logits = process(logits)
            if process.greedy:
                column = int(logits[0].argmax())
            else:
                law = logits[0].softmax(dim=-1)
                if not bool(law.isfinite().all()):
                    break  # The processors allow none of the shared tokens.
                column = int(torch.multinomial(law, 1, generator=self.generator))
                laws.append(law)
            token = decoder._kept_target_ids[column]
            tokens.append(token)
            self.stats.drafted += 1
            if len(tokens) == room or token in self.eos:
                break
            feed = [decoder._forth[token]]
        return _Draft(tokens, torch.stack(laws) if laws else None)

    def _vocab(self) -> int:
        return int(self.decoder.target.get_output_embeddings().weight.shape[0])

    def _draft_text(self, feed: list[int], room: int) -> tuple[list[int], bool]:
        """SLEM: the drafter's best tokens, from its whole vocabulary; and whether it ended."""
        drafted: list[int] = []
        while len(drafted) < room:
            token = int(self.decoder.full_logits(feed, self.drafter_cache).argmax())
            self.stats.drafted += 1
            if token in self.decoder._drafter_eos:
                return drafted, bool(self.decoder.target_eos)
            drafted.append(token)
            feed = [token]
        return drafted, False

    def _retokenise(self, drafted: list[int]) -> list[int]:
        """Return target tokens for the drafted text, as they would follow the history."""
        text = self.decoder._target_text
        data = self.decoder._drafter_text.spell(drafted)
        data = data[: len(data) - unfinished_tail(data)]
        if not data:
            return []
        table = text.table
        recent: list[int] = []
        for token in reversed(self.ids[-_LOOKBACK:]):
            if token >= len(table) or table[token] is None:
                break
            recent.insert(0, token)
        both = text.encode(text.spell(recent) + data)
        if both[: len(recent)] == recent:
            return both[len(recent) :]
        return text.encode(data)

    # --------------------------------------------------------------------------- verify
    def _verify(self, draft: _Draft) -> list[int]:
        """Run the target over the proposals and return the tokens that it settles."""
        decoder, tokens, process = self.decoder, draft.tokens, self.process
        count = len(tokens)
        with self.timed("verify"):
            device = decoder.target.device
            feed = torch.tensor([self.ids[self.cached :] + tokens], device=device)
            keep = {"logits_to_keep": count + 1} if decoder._trims_logits else {}
            out = decoder.target(input_ids=feed, past_key_values=self.cache, use_cache=True, **keep)
            logits = out.logits[0, -count - 1 :].float()
            history = None
            if process.need_ids:
                history = torch.tensor(self.ids + tokens, device=device)
            logits = process(logits, history)
            proposed = torch.tensor(tokens, dtype=torch.long, device=device)
            if process.greedy:
                accepted, following = verify_greedy(logits.argmax(dim=-1), proposed)
            else:
                p = logits.softmax(dim=-1)
                if not bool(p.isfinite().all()):
                    raise ValueError("`target` gave logits that are no numbers.")
                coins = torch.rand(count, generator=self.generator, device=device)
                laws = None if draft.laws is None else draft.laws.to(device)
                kept = None if laws is None else decoder._kept_target.to(device)
                accepted, law = verify(p, proposed, coins, laws, kept)
                following = int(torch.multinomial(law, 1, generator=self.generator))
        self.stats.rounds += 1
        self.stats.proposed += count
        self.stats.accepted += accepted
        new = tokens[:accepted]
        if not (new and new[-1] in self.eos):
            new = [*new, following]
        for place, token in enumerate(new):
            if token in self.eos:
                new = new[: place + 1]
                break
        self.cached = len(self.ids) + accepted
        if accepted < count:
            self.cache.crop(accepted - count)  # Negative: drop so many.
        return new


def _check_model(name: str, model: Any) -> None:
    config = model.config
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"`{name}` must be decoder-only; got {type(model).__name__}.")
    if getattr(model, "_is_stateful", False):
        raise ValueError(
            f"`{name}` must keep keys and values, which can be cropped; {type(model).__name__} "
            "keeps a running state."
        )
    if model.training:
        raise ValueError(f"`{name}` must be in evaluation mode; call `{name}.eval()` first.")


def _check_size(name: str, model: Any, table: list[bytes | None]) -> None:
    rows = model.get_output_embeddings().weight.shape[0]
    used = max((i for i, spelled in enumerate(table) if spelled is not None), default=-1) + 1
    if used > rows:
        raise ValueError(
            f"`{name}_tokenizer` must fit `{name}`, whose vocabulary has {rows} entries; it has "
            f"tokens up to {used - 1}."
        )


def _end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Return the ids that end a text, first the one to propose."""
    settings = getattr(model, "generation_config", None)
    for value in (
        getattr(settings, "eos_token_id", None),
        getattr(model.config, "eos_token_id", None),
        tokenizer.eos_token_id,
    ):
        if value is not None:
            return [value] if isinstance(value, int) else list(value)
    return []


def _accepts(model: Any, argument: str) -> bool:
    return argument in inspect.signature(model.forward).parameters
