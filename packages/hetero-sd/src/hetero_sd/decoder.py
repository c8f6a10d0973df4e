"""Speculative decoding with a drafter whose vocabulary differs from the target's."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from ._bytes import ByteEncoder, unfinished_tail
from .chance import Chance
from .context import Context, DrafterContext, DrafterMemory, SameContext
from .control import LADDER, METHODS, Arm, Bandit, Fixed
from .drafting import ExactText, LastTokenRuns, Method, SharedTokens, Text, TokenRuns, find_head
from .graphs import MARGIN, GraphRunner, Runners
from .llama import why_not_llama
from .processors import Processors
from .rounds import Request, Rounds, Row, Stats, stop_by
from .runners import Runner, make_runner
from .vocab import map_vocabularies, same_vocabularies

_logger = logging.getLogger(__name__)
_logger.addHandler(logging.NullHandler())

_BACKENDS = ("auto", "eager", "cudagraph")
_OWN_CRITERIA = ("MaxLengthCriteria", "EosTokenCriteria")
_UNUSED_OUTPUTS = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")


@dataclass(frozen=True)
class Generation:
    """What `HeteroSpeculativeDecoder.generate` returns.

    Attributes:
        sequences: Prompts and new tokens as `generate` of transformers returns them, shape
            `(rows, length)`: prompts padded on the left, rows that ended early on the right.
        tokens: The new tokens of each row, the end token included.
        texts: Their text, without special tokens.
        stats: What it took.
    """

    sequences: Tensor
    tokens: list[list[int]]
    texts: list[str]
    stats: Stats

    @property
    def new_tokens(self) -> list[int]:
        """The new tokens, where there is one row."""
        return self.tokens[self._only()]

    @property
    def text(self) -> str:
        """Their text, where there is one row."""
        return self.texts[self._only()]

    def _only(self) -> int:
        if len(self.texts) != 1:
            raise ValueError(
                f"there are {len(self.texts)} rows; use `tokens` and `texts` for all of them."
            )
        return 0


@dataclass(frozen=True)
class _Prepared:
    """A request as transformers' `generate` makes it out of its arguments."""

    input_ids: Tensor
    attention_mask: Tensor | None
    processors: list[Any]
    criteria: list[Any]
    config: Any


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
        method: How to draft. `"tli"` uses the tokens that both vocabularies hold, and suits
            sampling; `"slem"` drafts text and turns it into target tokens, and suits greedy
            decoding; `"slrs"` uses the drafter's whole vocabulary with exact probabilities;
            `"c-slrs"` weighs the drafter's last token among its best; `"slrs-plain"` lets a drafter
            of bytes or characters spell; `"standard"` needs one vocabulary, and so `"tli"` then is
            the same. `"auto"` measures which is fastest, plain decoding among them.
        lookahead: Tokens drafted a round; 0 decodes without the drafter; `"auto"` measures.
        verification: `"block"` judges TLI's drafts as a whole and accepts more; `"token"` one by
            one.
        backend: `"auto"` runs Llama-shaped models in a forward pass of our own, on a CUDA device by
            graphs; `"eager"` runs every model's own; `"cudagraph"` insists on graphs, and on other
            devices takes the same steps without them.

    Raises:
        TypeError: A tokenizer is not a fast one.
        ValueError: A model is of an unsupported kind, in training mode or does not fit its
            tokenizer; or an argument is out of range; or the vocabularies do not allow the method.

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
        method: str = "auto",
        lookahead: int | str = "auto",
        verification: str = "block",
        backend: str = "auto",
    ) -> None:
        _check_choice("method", method, METHODS)
        _check_choice("verification", verification, ("block", "token"))
        _check_choice("backend", backend, _BACKENDS)
        if lookahead != "auto" and (
            isinstance(lookahead, bool) or not isinstance(lookahead, int) or lookahead < 0
        ):
            raise ValueError(
                f"`lookahead` must be 'auto' or an integer of 0 or more; got {lookahead!r}."
            )
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
        self.method, self.lookahead, self.backend = method, lookahead, backend
        self._block = verification == "block"
        self.target, self.drafter = target, drafter
        self.target_tokenizer, self.drafter_tokenizer = target_tokenizer, drafter_tokenizer
        self.target_eos = _end_tokens(target, target_tokenizer)
        self._drafter_eos = _end_tokens(drafter, drafter_tokenizer)
        self._sizes = _head_size(target), _head_size(drafter)
        self.mapping = map_vocabularies(
            target_tokenizer,
            drafter_tokenizer,
            target_eos=self.target_eos,
            drafter_eos=self._drafter_eos,
            target_size=self._sizes[0],
            drafter_size=self._sizes[1],
        )
        self._same = same_vocabularies(target_tokenizer, drafter_tokenizer)
        for name, size, table in (
            ("target", self._sizes[0], self.mapping.target_bytes),
            ("drafter", self._sizes[1], self.mapping.drafter_bytes),
        ):
            _check_size(name, size, table)
        if method == "tli" and len(self.mapping.keep) == 0:
            raise ValueError(
                "`drafter_tokenizer` shares no token with `target_tokenizer`, so TLI has nothing "
                "to draft with; use `method='slem'`."
            )
        if method == "standard" and not self._same:
            raise ValueError(
                "`method='standard'` needs one vocabulary for both models; use `method='tli'`, "
                "which does the same with the tokens that both have."
            )
        self._text = Text(
            ByteEncoder(target_tokenizer, self.mapping.target_bytes),
            ByteEncoder(drafter_tokenizer, self.mapping.drafter_bytes),
            self.target_eos,
            self._drafter_eos,
        )
        self._limit = getattr(drafter.config, "max_position_embeddings", None) or 1 << 30
        self._kept = Runners()
        self._graphs = self._use_graphs()
        self._policies: dict[bool, Fixed | Bandit] = {}
        if method == "slrs-plain":
            _ = self._spelled

    def _use_graphs(self) -> bool:
        """Return whether both models run by CUDA graphs; the reason why not is logged."""
        if self.backend == "eager":
            return False
        reason = ""
        for name, model in (("target", self.target), ("drafter", self.drafter)):
            if not reason and (why := why_not_llama(model)):
                reason = f"of the {name}, {why}"
        devices = self.target.device, self.drafter.device
        if not reason and self.backend != "cudagraph" and devices[0].type != "cuda":
            reason = f"the target is on the device {devices[0]}"
        if not reason and devices[0] != devices[1]:
            reason = f"the models are on {devices[0]} and {devices[1]}"
        if not reason and len(self.mapping.keep) == 0:
            reason = "the vocabularies share nothing"
        if reason and self.backend == "cudagraph":
            raise ValueError(f"`backend='cudagraph'` cannot run: {reason}.")
        if reason:
            _logger.debug("no CUDA graphs: %s", reason)
        return not reason

    # --------------------------------------------------------------------------- methods
    @cached_property
    def _shared(self) -> SharedTokens:
        mapping = self.mapping
        if self._same:
            mapping = mapping.identity(min(self._sizes))
        device = self.drafter.device
        method = SharedTokens(mapping, self.target_eos, self._sizes[0], device, self._block)
        weight = find_head(self.drafter, method.keep)
        if weight is None:
            _logger.debug("the drafter's logits are no plain product: its whole head is used")
        else:
            method.use_head(weight)
        return method

    @cached_property
    def _runs(self) -> TokenRuns:
        return TokenRuns(self._text, self.mapping, self._sizes[1], self.drafter.device)

    @cached_property
    def _spelled(self) -> Method:
        from .spelling import SpelledTokens

        return SpelledTokens(self._text, self.mapping, self._sizes[1], self.drafter.device)

    def _method(self, name: str) -> Method:
        makers: dict[str, Callable[[], Method]] = {
            "tli": lambda: self._shared,
            "standard": lambda: self._shared,
            "slem": lambda: ExactText(self._text),
            "slrs": lambda: self._runs,
            "c-slrs": lambda: LastTokenRuns(self._text),
            "slrs-plain": lambda: self._spelled,
        }
        return makers[name]()

    def _methods_to_try(self, greedy: bool) -> list[str]:
        if self.method != "auto":
            return [self.method]
        if self._same:
            return ["standard"]
        shared = ["tli"] if len(self.mapping.keep) else []
        # A greedy proposal needs no law: the whole vocabulary by SLEM, or shared tokens.
        return ["slem", *shared] if greedy else [*shared, "slrs", "slem"]

    def _policy(self, greedy: bool) -> Fixed | Bandit:
        """Return the choice of method and lookahead, which goes on learning between calls."""
        if greedy not in self._policies:
            methods = self._methods_to_try(greedy)
            if self.lookahead == 0:
                self._policies[greedy] = Fixed(Arm("plain", 0))
            elif self.method != "auto" and isinstance(self.lookahead, int):
                self._policies[greedy] = Fixed(Arm(self.method, self.lookahead))
            else:
                ladder = LADDER if self.lookahead == "auto" else (int(self.lookahead),)
                self._policies[greedy] = Bandit(methods, ladder)
        return self._policies[greedy]

    # ------------------------------------------------------------------------ generation
    def generate(
        self,
        prompts: str | Sequence[str] | None = None,
        *,
        input_ids: Int[Tensor, "batch length"] | None = None,
        attention_mask: Int[Tensor, "batch length"] | None = None,
        messages: Sequence[Any] | None = None,
        streamer: Any = None,
        generator: torch.Generator | None = None,
        **options: Any,
    ) -> Generation:
        """Return the target's continuation of each prompt.

        Takes every argument of transformers' `generate` that concerns decoding, with the same
        defaults, except that `max_new_tokens` is 128 where no length is given.

        Args:
            prompts: A text or several, tokenised as they stand.
            input_ids: Target ids instead, shape `(batch, length)`.
            attention_mask: Which of them are no padding, on either side; all if missing.
            messages: A chat instead, as a list of `{"role": ..., "content": ...}`, or a list of
                chats. The drafter sees it in its own template, if it has one.
            streamer: Gets the new tokens as `generate` would give them, and only when the bytes
                so far are whole characters; one row only.
            generator: Source of randomness; PyTorch's global one if missing.
            **options: `max_new_tokens`, `do_sample`, `temperature`, `top_k`, `top_p`, `min_p`,
                `repetition_penalty`, `no_repeat_ngram_size`, `bad_words_ids`, `min_new_tokens`,
                `eos_token_id`, `stop_strings`, `num_return_sequences`, `logits_processor`,
                `stopping_criteria`, `prefix_allowed_tokens_fn`, `generation_config` and the like.

        Raises:
            ValueError: Not exactly one kind of prompt, an empty one, ids out of range, too long
                for the target, an option that is not supported, or logits that are no numbers.
        """
        rounds, prepared = self._start(
            prompts, input_ids, attention_mask, messages, generator, options
        )
        rows = list(rounds.rows)
        _run(rounds, prepared, streamer, self.mapping.target_bytes)
        tokens = [row.new for row in rows]
        texts = [self.target_tokenizer.decode(new, skip_special_tokens=True) for new in tokens]
        return Generation(_sequences(prepared, rows), tokens, texts, rounds.stats)

    def stream(
        self,
        prompts: str | None = None,
        *,
        input_ids: Int[Tensor, "batch length"] | None = None,
        messages: Sequence[Any] | None = None,
        generator: torch.Generator | None = None,
        **options: Any,
    ) -> Iterator[str]:
        """Yield the target's continuation of one prompt piece by piece, in whole characters.

        Args:
            prompts: As for `generate`; one text.
            input_ids: As for `generate`; one row.
            messages: As for `generate`; one chat.
            generator: As for `generate`.
            **options: As for `generate`.

        Raises:
            ValueError: As for `generate`, or more than one row.
        """
        rounds, _ = self._start(prompts, input_ids, None, messages, generator, options)
        if len(rounds.rows) != 1:
            raise ValueError(f"`stream` writes one row at a time; got {len(rounds.rows)}.")
        return self._pieces(rounds)

    def _pieces(self, rounds: Rounds) -> Iterator[str]:
        row = rounds.rows[0]
        shown = ""
        for _ in rounds.run():
            text = self.text_of(row.new, row.ended)
            if text.startswith(shown) and len(text) > len(shown):
                yield text[len(shown) :]
                shown = text

    def text_of(self, tokens: list[int], ended: bool = True) -> str:
        """Return the text of target tokens without special ones.

        Args:
            tokens: New tokens of a row.
            ended: Whether no more will come; else the last tokens are left out where their bytes
                are no whole characters yet.
        """
        whole = tokens[: _whole(self.mapping.target_bytes, tokens, ended)]
        text: str = self.target_tokenizer.decode(whole, skip_special_tokens=True)
        return text

    def as_custom_generate(
        self, *, streamer: Any = None, generator: torch.Generator | None = None
    ) -> Callable[..., Tensor]:
        """Return a function for `target.generate(..., custom_generate=...)`.

        Everything that `generate` prepares is used: ids, masks, processors, criteria, lengths.

        Args:
            streamer: As for `generate`, which does not hand its own on.
            generator: As for `generate`.
        """

        def decode(
            model: Any,
            input_ids: Tensor,
            logits_processor: Any = None,
            stopping_criteria: Any = None,
            generation_config: Any = None,
            **model_kwargs: Any,
        ) -> Tensor:
            if model is not self.target:
                raise ValueError("`custom_generate` must be called by the decoder's own target.")
            mask = model_kwargs.get("attention_mask")
            prepared = _Prepared(
                input_ids, mask, logits_processor or [], stopping_criteria or [], generation_config
            )
            rounds = self._rounds(prepared, None, generator)
            rows = list(rounds.rows)
            _run(rounds, prepared, streamer, self.mapping.target_bytes)
            return _sequences(prepared, rows)

        return decode

    # ------------------------------------------------------------------------- requests
    def start(
        self,
        prompts: str | Sequence[str] | None = None,
        *,
        input_ids: Int[Tensor, "batch length"] | None = None,
        attention_mask: Int[Tensor, "batch length"] | None = None,
        messages: Sequence[Any] | None = None,
        generator: torch.Generator | None = None,
        **options: Any,
    ) -> Rounds:
        """Return a generation that waits to be run, round by round: `for _ in rounds.run()`.

        Its `rows` are in the order of the prompts. Several may take turns in one thread.

        Args:
            prompts: As for `generate`.
            input_ids: As for `generate`.
            attention_mask: As for `generate`.
            messages: As for `generate`.
            generator: As for `generate`.
            **options: As for `generate`.

        Raises:
            ValueError: As for `generate`.
        """
        return self._start(prompts, input_ids, attention_mask, messages, generator, options)[0]

    def _start(
        self,
        prompts: str | Sequence[str] | None,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        messages: Sequence[Any] | None,
        generator: torch.Generator | None,
        options: dict[str, Any],
    ) -> tuple[Rounds, _Prepared]:
        rows, chats = self._prompts(prompts, input_ids, attention_mask, messages)
        prepared = self._prepare(rows, options)
        return self._rounds(prepared, chats, generator), prepared

    def _prompts(
        self,
        prompts: str | Sequence[str] | None,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        messages: Sequence[Any] | None,
    ) -> tuple[list[list[int]], list[list[int]] | None]:
        """Return the target's ids of each row, and of chats the drafter's, if it has a template."""
        given = [x is not None for x in (prompts, input_ids, messages)]
        if sum(given) != 1:
            raise ValueError(
                "give exactly one of `prompts`, `input_ids` and `messages`; got "
                f"{sum(given)} of them."
            )
        own: list[list[int]] | None = None
        if input_ids is not None:
            if input_ids.ndim != 2:
                raise ValueError(
                    f"`input_ids` must have shape (batch, length); got {tuple(input_ids.shape)}."
                )
            mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            rows = [ids[held.bool()].tolist() for ids, held in zip(input_ids, mask, strict=True)]
        elif messages is not None:
            chats = [messages] if messages and isinstance(messages[0], dict) else list(messages)
            rows = [_chat_ids(self.target_tokenizer, chat) for chat in chats]
            if getattr(self.drafter_tokenizer, "chat_template", None) and not self._same:
                own = [_chat_ids(self.drafter_tokenizer, chat) for chat in chats]
        else:
            texts = [prompts] if isinstance(prompts, str) else list(prompts or [])
            rows = [list(self.target_tokenizer(text)["input_ids"]) for text in texts]
        if not rows or not all(rows):
            raise ValueError("every prompt must have at least one token; got an empty one.")
        wrong = [i for row in rows for i in row if not 0 <= i < self._sizes[0]]
        if wrong:
            raise ValueError(f"`input_ids` must be in [0, {self._sizes[0]}); got {wrong[0]}.")
        return rows, own

    def _prepare(self, rows: list[list[int]], options: dict[str, Any]) -> _Prepared:
        """Let transformers' own `generate` read the options, and stop where it would decode."""
        options = dict(options)
        config = options.get("generation_config")
        lengths = (
            options.get("max_length"),
            options.get("max_new_tokens"),
            getattr(config, "max_length", None),
            getattr(config, "max_new_tokens", None),
        )
        if all(length is None for length in lengths):
            options["max_new_tokens"] = 128
        stop_strings = options.pop("stop_strings", None)
        if stop_strings is None and config is not None and config.stop_strings is not None:
            stop_strings = config.stop_strings
            options["stop_strings"] = None
        if stop_strings is not None:
            from transformers import StopStringCriteria

            criterion = StopStringCriteria(self.target_tokenizer, stop_strings)
            options["stopping_criteria"] = [*(options.get("stopping_criteria") or []), criterion]
        for name in ("logits_processor", "stopping_criteria"):
            if options.get(name) is not None:
                from transformers import LogitsProcessorList, StoppingCriteriaList

                kinds = {
                    "logits_processor": LogitsProcessorList,
                    "stopping_criteria": StoppingCriteriaList,
                }
                options[name] = kinds[name](options[name])
        self._check_length(max(map(len, rows)), options)
        width = max(map(len, rows))
        pad = self.target_tokenizer.pad_token_id
        pad = next((i for i in (pad, *self.target_eos) if i is not None), 0)
        options.setdefault("pad_token_id", pad)
        ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        caught: list[_Prepared] = []

        def catch(
            model: Any,
            input_ids: Tensor,
            logits_processor: Any = None,
            stopping_criteria: Any = None,
            generation_config: Any = None,
            **model_kwargs: Any,
        ) -> Tensor:
            mask = model_kwargs.get("attention_mask")
            caught.append(
                _Prepared(input_ids, mask, logits_processor, stopping_criteria, generation_config)
            )
            return input_ids

        device = self.target.device
        self.target.generate(
            ids.to(device), attention_mask=mask.to(device), custom_generate=catch, **options
        )
        return caught[0]

    def _check_length(self, prompt: int, options: dict[str, Any]) -> None:
        config = options.get("generation_config")
        new = options.get("max_new_tokens")
        if new is None:
            new = getattr(config, "max_new_tokens", None)
        if new is None:
            return
        if isinstance(new, bool) or new < 1:
            raise ValueError(f"`max_new_tokens` must be 1 or more; got {new!r}.")
        limit = getattr(self.target.config, "max_position_embeddings", None)
        if limit is not None and prompt + new > limit:
            raise ValueError(
                f"`max_new_tokens` must leave prompt and output within the target's {limit} "
                f"positions; got {new} after a prompt of {prompt} tokens."
            )

    def _rounds(
        self,
        prepared: _Prepared,
        chats: list[list[int]] | None,
        generator: torch.Generator | None,
    ) -> Rounds:
        config = prepared.config
        if (config.num_beams or 1) > 1:
            raise ValueError(f"`num_beams` must be 1; got {config.num_beams}.")
        for name in _UNUSED_OUTPUTS:
            if getattr(config, name, None):
                raise ValueError(f"`{name}` is not kept by speculative decoding; leave it out.")
        greedy = not config.do_sample
        ids = prepared.input_ids
        mask = prepared.attention_mask
        held = torch.ones_like(ids) if mask is None else mask[:, : ids.shape[1]]
        rows = []
        for place, (line, kept) in enumerate(zip(ids.tolist(), held.tolist(), strict=True)):
            own = [token for token, real in zip(line, kept, strict=True) if real]
            rows.append(Row(place, line[: len(line) - len(own)], own, len(own)))
        repeats = len(rows) // len(chats) if chats else 0
        contexts: list[Context] = []
        for row in rows:
            chat = chats[row.place // repeats] if chats else []
            contexts.append(self._context(chat))
            row.told = len(row.ids) if chat else 0
        device = self.target.device
        eos = getattr(config, "_eos_token_tensor", None)
        length = config.max_length - ids.shape[1]
        limits = [getattr(c, "max_length", length + ids.shape[1]) for c in prepared.criteria]
        length = min([length, *(limit - ids.shape[1] for limit in limits)])
        request = Request(
            Processors(prepared.processors, greedy, len(rows)),
            [
                stop_by(criterion, device)
                for criterion in prepared.criteria
                if type(criterion).__name__ not in _OWN_CRITERIA
            ],
            frozenset(eos.tolist() if eos is not None else ()),
            max(length, 1),
            Chance(generator),
        )
        policy = self._policy(greedy)
        methods = {name: self._method(name) for name in self._methods_to_try(greedy)}
        longest = max(len(row.ids) for row in rows) + request.max_new_tokens
        target = self._runner(self.target, len(rows), longest)
        # The same text may be longer in the drafter's tokens, but for its own limit.
        drafter = self._runner(self.drafter, len(rows), min(4 * longest, self._limit))
        memory = DrafterMemory(drafter, contexts, self._limit)
        whole, at_end = None, None
        if isinstance(target, GraphRunner) and isinstance(drafter, GraphRunner):
            if request.processors.by_score and request.chance.serves(target.device):
                whole = self._kept.round(
                    target, drafter, self._shared, request.processors, self._block
                )

            def at_end() -> None:
                self._kept.give_back(self.target, target)
                self._kept.give_back(self.drafter, drafter)

        return Rounds(rows, target, memory, methods, policy, request, whole, at_end)

    def _runner(self, model: Any, rows: int, length: int) -> Runner:
        if self._graphs:
            return self._kept.take(model, rows, length + MARGIN)
        return make_runner(model, rows, self.backend)

    def _context(self, chat: list[int]) -> Context:
        if self._same:
            return SameContext()
        start = self.drafter_tokenizer.bos_token_id
        return DrafterContext(self._text.drafter, self.mapping, start, chat)


@torch.no_grad()
def _run(rounds: Rounds, prepared: _Prepared, streamer: Any, table: list[bytes | None]) -> None:
    """Run all rounds, handing whole characters to the streamer."""
    if streamer is None:
        for _ in rounds.run():
            pass
        return
    if len(rounds.rows) != 1:
        raise ValueError(f"`streamer` takes one row at a time; got {len(rounds.rows)}.")
    (row,) = rounds.rows
    streamer.put(prepared.input_ids.cpu())
    shown = 0
    for _ in rounds.run():
        whole = _whole(table, row.new, row.ended)
        if whole > shown:
            streamer.put(torch.tensor(row.new[shown:whole]))
            shown = whole
    streamer.end()


def _whole(table: list[bytes | None], tokens: list[int], ended: bool) -> int:
    """Return how many tokens from the first on make whole characters; all of them at the end."""
    if ended:
        return len(tokens)
    for count in range(len(tokens), max(len(tokens) - 4, 0), -1):
        last = tokens[max(count - 4, 0) : count]
        data = b"".join(table[i] or b"\n" for i in last if i < len(table))
        if not unfinished_tail(data):
            return count
    return max(len(tokens) - 4, 0)


def _sequences(prepared: _Prepared, rows: list[Row]) -> Tensor:
    """Return prompts and new tokens, padded as `generate` does."""
    width = max(len(row.new) for row in rows)
    pad = getattr(prepared.config, "_pad_token_tensor", None)
    fill = int(pad) if pad is not None else 0
    new = [row.new + [fill] * (width - len(row.new)) for row in rows]
    ids = prepared.input_ids
    return torch.cat([ids, torch.tensor(new, dtype=ids.dtype, device=ids.device)], dim=1)


def _chat_ids(tokenizer: Any, messages: Sequence[dict[str, str]]) -> list[int]:
    ids = tokenizer.apply_chat_template(
        list(messages), add_generation_prompt=True, return_dict=True
    )["input_ids"]
    return list(ids)


def _check_choice(name: str, value: Any, allowed: Sequence[str]) -> None:
    if value not in allowed:
        listed = ", ".join(map(repr, allowed[:-1]))
        raise ValueError(f"`{name}` must be {listed} or {allowed[-1]!r}; got {value!r}.")


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


def _head_size(model: Any) -> int:
    head = model.get_output_embeddings()
    return int(getattr(head, "out_features", None) or head.weight.shape[0])


def _check_size(name: str, rows: int, table: list[bytes | None]) -> None:
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
