"""Speculative decoding with a drafter whose vocabulary differs from the target's."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from ._bytes import ByteEncoder
from .ahead import foretell
from .chance import Chance
from .checks import (
    check_choice,
    check_lookahead,
    check_model,
    check_size,
    check_tokenizer,
    end_tokens,
    head_size,
)
from .context import Context, DrafterContext, DrafterMemory, SameContext
from .control import LADDER, METHODS, Arm, Bandit, Fixed
from .devices import input_device
from .drafting import Method, Table
from .generation import Generation, run_all, sequences_of, whole_tokens
from .graphs import MARGIN, GraphRunner
from .kernels.judge import Spelling
from .llama import why_not_llama
from .requests import Prepared, prepare, prompt_rows, read_request, rows_of
from .rounds import Rounds
from .runners import Runner, make_runner
from .runs import TokenRuns
from .shared import SharedTokens, find_head
from .texts import ExactText, LastTokenRuns, Text
from .vocab import SAMPLE, map_vocabularies, same_vocabularies
from .warming import Tour
from .whole import Runners

_logger = logging.getLogger(__name__)
_logger.addHandler(logging.NullHandler())

_BACKENDS = ("auto", "eager", "cudagraph")
_PROMPT = 24  # Ids of a prompt that goes in one pass, as most do, and by no graph.


def _rows_captured(rows: int) -> int:
    """Return the rows of the graphs that serve so many: few sizes are captured for many batches."""
    return 1 << (rows - 1).bit_length() if rows <= 8 else -(-rows // 8) * 8


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
            sampling and GPUs; `"slem"` drafts text and turns it into target tokens, and suits
            greedy decoding on a CPU; `"slrs"` uses the drafter's whole vocabulary with exact probabilities;
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
        check_choice("method", method, METHODS)
        check_choice("verification", verification, ("block", "token"))
        check_choice("backend", backend, _BACKENDS)
        check_lookahead(lookahead)
        for name, model, tokenizer in (
            ("target", target, target_tokenizer),
            ("drafter", drafter, drafter_tokenizer),
        ):
            check_model(name, model)
            check_tokenizer(name, tokenizer)
        self.method, self.lookahead, self.backend = method, lookahead, backend
        self._block = verification == "block"
        self.target, self.drafter = target, drafter
        self._place, self._drafter_place = input_device(target), input_device(drafter)
        self.target_tokenizer, self.drafter_tokenizer = target_tokenizer, drafter_tokenizer
        self.target_eos = end_tokens(target, target_tokenizer)
        self._drafter_eos = end_tokens(drafter, drafter_tokenizer)
        self._sizes = head_size(target), head_size(drafter)
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
            check_size(name, size, table)
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
        self._policies: dict[tuple[bool, int], Fixed | Bandit] = {}
        if method == "slrs-plain":
            _ = self._spelled

    @classmethod
    def from_pretrained(
        cls,
        target: str | os.PathLike[str],
        drafter: str | os.PathLike[str],
        *,
        dtype: str = "auto",
        device: str = "auto",
        **settings: Any,
    ) -> HeteroSpeculativeDecoder:
        """Return a decoder of two models that are loaded with their tokenizers.

        Args:
            target: Folder as `save_pretrained` writes it, GGUF file, or name on the hub.
            drafter: The same.
            dtype: Type of the weights; `"auto"` is bfloat16 on CUDA devices, else float32.
            device: Where both go; `"auto"` is a CUDA device if there is one.
            **settings: As for `HeteroSpeculativeDecoder`.

        Raises:
            ValueError: A model cannot be read, type or device are not there, or as for the class.
        """
        from .pairs import find_place, load_pair

        places = [find_place(os.fspath(place)) for place in (target, drafter)]
        return cls(*load_pair(*places, dtype=dtype, device=device).parts, **settings)

    def __repr__(self) -> str:
        """Return what the decoder is made of."""
        sides = [
            f"{name}={type(model).__name__} of {sum(p.numel() for p in model.parameters()):,}"
            for name, model in (("target", self.target), ("drafter", self.drafter))
        ]
        return (
            f"{type(self).__name__}({', '.join(sides)}, method={self.method!r}, "
            f"lookahead={self.lookahead!r}, {len(self.mapping.keep):,} shared tokens)"
        )

    def _use_graphs(self) -> bool:
        """Return whether both models run by CUDA graphs; the reason why not is logged."""
        if self.backend == "eager":
            return False
        reason = ""
        for name, model in (("target", self.target), ("drafter", self.drafter)):
            if not reason and (why := why_not_llama(model)):
                reason = f"of the {name}, {why}"
        for name, device in (("target", self._place), ("drafter", self._drafter_place)):
            if not reason and self.backend != "cudagraph" and device.type != "cuda":
                reason = f"the {name} is on the device {device}"
        if not reason and self._place != self._drafter_place:
            reason = f"the models are on {self._place} and {self._drafter_place}"
        if not reason and len(self.mapping.keep) == 0:
            reason = "the vocabularies share nothing"
        if reason and self.backend == "cudagraph":
            raise ValueError(f"`backend='cudagraph'` cannot run: {reason}.")
        if reason:  # On a GPU that costs most of the speed.
            level = logging.WARNING if self._place.type == "cuda" else logging.DEBUG
            _logger.log(level, "no CUDA graphs: %s", reason)
        return not reason

    # --------------------------------------------------------------------------- methods
    @cached_property
    def _shared(self) -> SharedTokens:
        mapping = self.mapping
        if self._same:
            mapping = mapping.identity(min(self._sizes))
        device = self._drafter_place
        method = SharedTokens(mapping, self.target_eos, self._sizes[0], device, self._block)
        weight = find_head(self.drafter, method.keep)
        if weight is None:
            _logger.debug("the drafter's logits are no plain product: its whole head is used")
        else:
            method.use_head(weight)
        return method

    @cached_property
    def _runs(self) -> TokenRuns:
        return TokenRuns(self._text, self.mapping, self._sizes[1], self._drafter_place)

    @cached_property
    def _spelled(self) -> Method:
        from .spelling import SpelledTokens

        return SpelledTokens(self._text, self.mapping, self._sizes[1], self._drafter_place)

    @cached_property
    def _spelling(self) -> Spelling:
        """The drafter ids that target tokens are taken for until the host has looked."""
        encoder = None if self._same else self._text.drafter
        found = foretell(self.mapping, encoder, self._sizes)
        return Spelling(*(part.to(self._drafter_place) for part in found))

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

    def _table(self, name: str) -> Table | None:
        """Return what a device needs to draft by itself; None where the host is needed."""
        if name in ("tli", "standard"):
            return self._shared.table(self._sizes[0])
        return self._runs.table() if name == "slrs" else None

    def _methods_to_try(self, greedy: bool) -> list[str]:
        if self.method != "auto":
            return [self.method]
        if self._same:
            return ["standard"]
        shared = ["tli"] if len(self.mapping.keep) else []
        if not greedy:
            return [*shared, "slrs", "slem"]
        # A greedy proposal needs no law. On a GPU shared tokens are drafted while the host still
        # reads the last round; without one they save work only where they are few.
        most = 2 * len(self.mapping.keep) > self._sizes[1]
        if self._graphs and most:
            return [*shared, "slem"]
        return ["slem"] if most else ["slem", *shared]

    def _policy(self, greedy: bool, rows: int) -> Fixed | Bandit:
        """Return the choice of method and lookahead, which goes on learning between calls.

        Batches learn apart from single rows, by powers of two: what pays differs.
        """
        key = greedy, rows.bit_length()
        if key not in self._policies:
            methods = self._methods_to_try(greedy)
            if self.lookahead == 0:
                self._policies[key] = Fixed(Arm("plain", 0))
            elif self.method != "auto" and isinstance(self.lookahead, int):
                self._policies[key] = Fixed(Arm(self.method, self.lookahead))
            else:
                ladder = LADDER if self.lookahead == "auto" else (int(self.lookahead),)
                self._policies[key] = Bandit(methods, ladder, dear=self._graphs)
        return self._policies[key]

    # ------------------------------------------------------------------------ generation
    def generate(
        self,
        prompts: str | Sequence[str] | Tensor | Mapping[str, Any] | None = None,
        *,
        input_ids: Int[Tensor, "batch length"] | Sequence[Sequence[int]] | None = None,
        attention_mask: Int[Tensor, "batch length"] | Sequence[Sequence[int]] | None = None,
        messages: Sequence[Any] | None = None,
        streamer: Any = None,
        generator: torch.Generator | None = None,
        **options: Any,
    ) -> Generation:
        """Return the target's continuation of each prompt.

        Takes every argument of transformers' `generate` that concerns decoding, with the same
        defaults, except that `max_new_tokens` is 128 where no length is given.

        Args:
            prompts: A text or several, tokenised as they stand; or ids as transformers' `generate`
                takes them first, or what its tokenizer returned.
            input_ids: Target ids instead, shape `(batch, length)`, or lists of them.
            attention_mask: Which of them are no padding, on either side, of the same shape; all if
                missing.
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
        run_all(rounds, prepared, streamer, self.mapping.target_bytes)
        tokens = [row.new for row in rows]
        texts = [self.target_tokenizer.decode(new, skip_special_tokens=True) for new in tokens]
        return Generation(sequences_of(prepared, rows), tokens, texts, rounds.stats)

    def prepare(self, rows: int = 1, *, length: int = 512, **options: Any) -> float:
        """Get ready what texts would wait for, and return the seconds that it took.

        On a CUDA device these are kernels, and the graphs of each method at one lookahead; else,
        `"auto"` gets a method ready in the middle of a text, once it would have paid.

        Args:
            rows: Rows of a batch, 1 or more.
            length: Ids that a row will hold, its prompt included; longer rows need graphs anew.
            **options: Those of the generations to come, such as `do_sample` and `top_p`.

        Raises:
            ValueError: `rows` is below 1, or as for `generate`.
        """
        if rows < 1:
            raise ValueError(f"`rows` must be 1 or more; got {rows}.")
        begun = time.perf_counter()
        prompt = self.target_tokenizer(SAMPLE)["input_ids"][:_PROMPT]
        limit = getattr(self.target.config, "max_position_embeddings", None) or length
        room = max(min(length, limit) - len(prompt), 1)
        given = {**options, "max_new_tokens": room, "eos_token_id": []}
        prepared = self._prepare([prompt] * rows, given)
        greedy = not prepared.config.do_sample
        policy = self._policy(greedy, rows)
        methods = self._methods_to_try(greedy) if self.lookahead != 0 else []
        steps = LADDER[2] if self.lookahead == "auto" else int(self.lookahead)
        tour = Tour([Arm(method, steps) for method in methods], policy)
        chance = torch.Generator(self._place).manual_seed(0)  # The caller's is left alone.
        course: Any = self._rounds(prepared, None, chance, tour).run()
        for _ in course:
            if tour.over:
                break
        course.close()
        return time.perf_counter() - begun

    def stream(
        self,
        prompts: str | Sequence[str] | Tensor | Mapping[str, Any] | None = None,
        *,
        input_ids: Int[Tensor, "batch length"] | Sequence[Sequence[int]] | None = None,
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
        return self.pieces(rounds)

    def pieces(self, rounds: Rounds) -> Iterator[str]:
        """Run what `start` returned and yield its text as `stream` does; `rounds.stats` tells more.

        Args:
            rounds: A generation of one row.

        Raises:
            ValueError: There are more rows.
        """
        if len(rounds.rows) != 1:
            raise ValueError(f"a stream is of one row; got {len(rounds.rows)}.")
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
        whole = tokens[: whole_tokens(self.mapping.target_bytes, tokens, ended)]
        text: str = self.target_tokenizer.decode(whole, skip_special_tokens=True)
        return text

    def as_custom_generate(
        self, *, streamer: Any = None, generator: torch.Generator | None = None
    ) -> Callable[..., Any]:
        """Return a function for `target.generate(..., custom_generate=...)`.

        Everything that `generate` prepares is used: ids, masks, processors, criteria, lengths. It
        hands neither its `streamer` nor its `tokenizer` on: give the former here, and stop strings
        as `stopping_criteria=[StopStringCriteria(tokenizer, [...])]`.

        Args:
            streamer: As for `generate`.
            generator: As for `generate`.
        """

        def decode(
            model: Any,
            input_ids: Tensor,
            logits_processor: Any = None,
            stopping_criteria: Any = None,
            generation_config: Any = None,
            **model_kwargs: Any,
        ) -> Any:
            if model is not self.target:
                raise ValueError("`custom_generate` must be called by the decoder's own target.")
            mask = model_kwargs.get("attention_mask")
            prepared = Prepared(
                input_ids, mask, logits_processor or [], stopping_criteria or [], generation_config
            )
            rounds = self._rounds(prepared, None, generator)
            rows = list(rounds.rows)
            run_all(rounds, prepared, streamer, self.mapping.target_bytes)
            sequences = sequences_of(prepared, rows)
            if not generation_config.return_dict_in_generate:
                return sequences
            from transformers.generation import GenerateDecoderOnlyOutput

            return GenerateDecoderOnlyOutput(sequences=sequences)

        return decode

    # ------------------------------------------------------------------------- requests
    def start(
        self,
        prompts: str | Sequence[str] | Tensor | Mapping[str, Any] | None = None,
        *,
        input_ids: Int[Tensor, "batch length"] | Sequence[Sequence[int]] | None = None,
        attention_mask: Int[Tensor, "batch length"] | Sequence[Sequence[int]] | None = None,
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
        prompts: Any,
        input_ids: Any,
        attention_mask: Any,
        messages: Sequence[Any] | None,
        generator: torch.Generator | None,
        options: dict[str, Any],
    ) -> tuple[Rounds, Prepared]:
        rows, chats = prompt_rows(
            prompts,
            input_ids,
            attention_mask,
            messages,
            tokenizer=self.target_tokenizer,
            size=self._sizes[0],
            drafter_tokenizer=None if self._same else self.drafter_tokenizer,
        )
        prepared = self._prepare(rows, options)
        return self._rounds(prepared, chats, generator), prepared

    def _prepare(self, rows: list[list[int]], options: dict[str, Any]) -> Prepared:
        return prepare(self.target, self.target_tokenizer, self.target_eos, rows, options)

    def _rounds(
        self,
        prepared: Prepared,
        chats: list[list[int]] | None,
        generator: torch.Generator | None,
        policy: Fixed | Bandit | None = None,
    ) -> Rounds:
        request = read_request(prepared, self._place, Chance(generator))
        greedy = request.processors.greedy
        rows = rows_of(prepared)
        repeats = len(rows) // len(chats) if chats else 0
        contexts: list[Context] = []
        for row in rows:
            chat = chats[row.place // repeats] if chats else []
            contexts.append(self._context(chat))
            row.told = len(row.ids) if chat else 0
        policy = policy or self._policy(greedy, len(rows))
        methods = {name: self._method(name) for name in self._methods_to_try(greedy)}
        longest = max(len(row.ids) for row in rows) + request.max_new_tokens
        target = self._runner(self.target, len(rows), longest)
        # The same text may be longer in the drafter's tokens, but for its own limit.
        drafter = self._runner(self.drafter, len(rows), min(4 * longest, self._limit))
        memory = DrafterMemory(drafter, contexts, self._limit)
        whole, at_end = None, None
        if isinstance(target, GraphRunner) and isinstance(drafter, GraphRunner):
            together = target.device == drafter.device
            if together and request.processors.by_score:
                names = *sorted(methods), self._block
                whole = self._kept.round(
                    target,
                    drafter,
                    names,
                    self._table,
                    request.processors,
                    lambda: self._spelling,
                )
                whole.begin(request.chance)

            def at_end() -> None:
                if whole is not None:
                    whole.land()
                self._kept.give_back(self.target, target)
                self._kept.give_back(self.drafter, drafter)

        return Rounds(rows, target, memory, methods, policy, request, whole, at_end)

    def _runner(self, model: Any, rows: int, length: int) -> Runner:
        if self._graphs:
            runner = self._kept.take(model, _rows_captured(rows), length + MARGIN)
            runner.select(range(rows))
            return runner
        return make_runner(model, rows, self.backend)

    def _context(self, chat: list[int]) -> Context:
        if self._same:
            return SameContext()
        start = self.drafter_tokenizer.bos_token_id
        return DrafterContext(self._text.drafter, self.mapping, start, chat)
