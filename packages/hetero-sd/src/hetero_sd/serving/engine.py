"""One thread that writes for many clients: rounds of several generations, turn by turn.

Requests with the same settings that arrive together share a batch; others take turns with it, a
round each, so that no client waits for another's text to end.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..decoder import HeteroSpeculativeDecoder
from ..rounds import Row, Stats
from .transcript import Transcript

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """How tokens are chosen. Requests with equal settings and no seed may share a batch.

    Attributes:
        temperature: 0 is greedy.
        top_p: In (0, 1]; 1 is all.
        top_k: 0 is all.
        min_p: In [0, 1]; 0 is all.
        repetition_penalty: Above 0; 1 is none.
        presence_penalty: Subtracted from the logits of tokens written so far.
        frequency_penalty: The same, once for each time.
        logit_bias: Pairs of a token and what is added to its logit.
        seed: Makes sampling repeatable.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int | None = None

    def options(self, prompt: int) -> dict[str, Any]:
        """Return the options of `generate`.

        Args:
            prompt: Length of the longest prompt of the batch, in tokens.
        """
        made: dict[str, Any] = {
            "do_sample": self.temperature > 0,
            "repetition_penalty": self.repetition_penalty,
        }
        if self.temperature > 0:
            made.update(
                temperature=self.temperature,
                top_p=self.top_p,
                top_k=self.top_k,
                min_p=self.min_p or None,
            )
        if self.logit_bias:
            made["sequence_bias"] = [[[token], bias] for token, bias in self.logit_bias]
        if self.presence_penalty or self.frequency_penalty:
            penalty = Penalty(self.presence_penalty, self.frequency_penalty, prompt)
            made["logits_processor"] = [penalty]
        return made


class Penalty:
    """Lowers the logits of tokens written so far, prompt excluded, as OpenAI's API defines it.

    Args:
        presence: Subtracted once.
        frequency: Subtracted for each time.
        prompt: Length of the prompt, padding included.
    """

    def __init__(self, presence: float, frequency: float, prompt: int) -> None:
        self.presence, self.frequency, self.prompt = presence, frequency, prompt

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the scores, shape `(1, vocab)`, after what `input_ids` say."""
        written = input_ids[:, self.prompt :]
        counts = torch.zeros_like(scores).scatter_add_(
            1, written, torch.ones_like(written, dtype=scores.dtype)
        )
        return scores - self.presence * (counts > 0) - self.frequency * counts


@dataclass(frozen=True)
class Piece:
    """What has been added to one choice.

    Attributes:
        choice: Its number.
        text: New text, in whole characters.
        tokens: Tokens of the choice so far.
        finish: `"stop"` or `"length"` with the last piece, else None.
    """

    choice: int
    text: str
    tokens: int
    finish: str | None


@dataclass(frozen=True)
class Failure:
    """Why a request ended without its text.

    Attributes:
        message: For the client.
        theirs: Whether the request is at fault.
    """

    message: str
    theirs: bool


@dataclass(eq=False)
class Job:
    """A request.

    Attributes:
        rows: Target ids of each choice's prompt.
        chats: Or the chat of each choice; then `rows` only tells their lengths.
        limit: Most new tokens of a choice.
        settings: How tokens are chosen.
        deliver: Called in the engine's thread with each `Piece`, or one `Failure`. After it has
            returned the last piece of every choice, nothing follows.
        stops: Strings that end a text.
        cancelled: Set when nobody waits any more.
    """

    rows: list[list[int]]
    chats: list[Any] | None
    limit: int
    settings: Settings
    deliver: Callable[[Piece | Failure], None]
    stops: tuple[str, ...] = ()
    cancelled: threading.Event = field(default_factory=threading.Event)

    def shares(self, other: Job) -> bool:
        """Return whether both may be rows of one batch, as far as their settings go."""
        return (
            self.settings == other.settings
            and self.settings.seed is None
            and (self.chats is None) == (other.chats is None)
        )

    @property
    def longest(self) -> int:
        """Length of its longest prompt, in target tokens."""
        return max(map(len, self.rows))


@dataclass
class _Member:
    job: Job
    choice: int
    row: Row
    transcript: Transcript

    @property
    def done(self) -> bool:
        return self.transcript.finish is not None or self.job.cancelled.is_set()


@dataclass
class _Batch:
    rounds: Iterator[Any]
    stats: Stats
    members: list[_Member]


class Engine:
    """Writes for many clients with one decoder, in a thread of its own.

    Args:
        decoder: The decoder; nobody else may use it at the same time.
        rows: Most rows in work, 1 or more; a request with more choices gets them all the same,
            alone.
        window: Seconds to wait for company when an idle engine gets a request, 0 or more.
        queue: Most requests that wait, 1 or more.

    Raises:
        ValueError: An argument is out of range.
    """

    def __init__(
        self,
        decoder: HeteroSpeculativeDecoder,
        *,
        rows: int = 8,
        window: float = 0.005,
        queue: int = 256,
    ) -> None:
        for name, value in (("rows", rows), ("queue", queue)):
            if value < 1:
                raise ValueError(f"`{name}` must be 1 or more; got {value!r}.")
        if window < 0:
            raise ValueError(f"`window` must be 0 or more seconds; got {window!r}.")
        self.decoder = decoder
        self._rows, self._window, self._queue = rows, window, queue
        self._waiting: deque[Job] = deque()
        self._batches: list[_Batch] = []
        self._changed = threading.Condition()
        self._closed = False
        self._totals = {"requests": 0, "cancelled": 0, "failed": 0}
        self._ended = Stats()
        self._thread = threading.Thread(target=self._work, name="hetero-sd engine", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> bool:
        """Queue a request; return whether there was room for it.

        Args:
            job: The request.

        Raises:
            RuntimeError: The engine has been closed.
        """
        with self._changed:
            if self._closed:
                raise RuntimeError("the engine has been closed.")
            if len(self._waiting) >= self._queue:
                return False
            self._waiting.append(job)
            self._totals["requests"] += 1
            self._changed.notify()
        return True

    def cancel(self, job: Job) -> None:
        """Let a request go; its rows end with the round in work. Harmless when it has ended."""
        with self._changed:
            job.cancelled.set()
            if job in self._waiting:
                self._waiting.remove(job)
                self._totals["cancelled"] += 1

    def close(self) -> None:
        """End the thread; requests in work fail."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def state(self) -> dict[str, Any]:
        """Return counts: requests so far, rows in work, and what the ended batches did."""
        with self._changed:
            batches, waiting = list(self._batches), len(self._waiting)
        return {
            **self._totals,
            "waiting": waiting,
            "rows": sum(not member.done for batch in batches for member in batch.members),
            "tokens": self._ended.generated,
            "tokens_per_second": self._ended.tokens_per_second,
            "acceptance": self._ended.acceptance,
            "block_efficiency": self._ended.block_efficiency,
            "arms": dict(self._ended.arms),
        }

    # ------------------------------------------------------------------- the engine's thread
    def _work(self) -> None:
        while True:
            with self._changed:
                while not (self._waiting or self._batches or self._closed):
                    self._changed.wait()
                idle = not self._batches
            if idle and self._window and not self._closed:
                time.sleep(self._window)
            if self._closed:
                break
            for jobs in self._admit():
                self._begin(jobs)
            for batch in list(self._batches):
                self._turn(batch)
        with self._changed:
            left = [*self._waiting]
            self._waiting.clear()
        for batch in self._batches:
            batch.rounds.close()  # type: ignore[attr-defined]
            left += dict.fromkeys(member.job for member in batch.members if not member.done)
        for job in left:
            job.deliver(Failure("the server is shutting down", theirs=False))

    def _admit(self) -> list[list[Job]]:
        """Take requests off the queue while there is room, those that share a batch together."""
        taken: list[list[Job]] = []
        with self._changed:
            used = sum(not member.done for batch in self._batches for member in batch.members)
            while self._waiting:
                size = len(self._waiting[0].rows)
                if used and used + size > self._rows:
                    break
                job = self._waiting.popleft()
                used += size
                for jobs in taken:
                    if job.shares(jobs[0]) and self._fit([*jobs, job]):
                        jobs.append(job)
                        break
                else:
                    taken.append([job])
        return taken

    def _fit(self, jobs: list[Job]) -> bool:
        """Return whether the longest prompt leaves room for the longest text."""
        limit = getattr(self.decoder.target.config, "max_position_embeddings", None)
        needed = max(job.longest for job in jobs) + max(job.limit for job in jobs)
        return limit is None or needed <= limit

    def _begin(self, jobs: list[Job]) -> None:
        """Start a batch."""
        settings = jobs[0].settings
        rows = [row for job in jobs for row in job.rows]
        width = max(map(len, rows))
        options = settings.options(width) | {"max_new_tokens": max(job.limit for job in jobs)}
        generator = None
        if settings.seed is not None:
            generator = torch.Generator(self.decoder.target.device).manual_seed(settings.seed)
        try:
            if jobs[0].chats is not None:
                chats = [chat for job in jobs for chat in job.chats or ()]
                rounds = self.decoder.start(messages=chats, generator=generator, **options)
            else:
                ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
                mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
                rounds = self.decoder.start(
                    input_ids=ids, attention_mask=mask, generator=generator, **options
                )
        except Exception as error:
            self._fail(jobs, error, theirs=isinstance(error, ValueError))
            return
        ends = frozenset(self.decoder.target_eos)
        places = [(job, choice) for job in jobs for choice in range(len(job.rows))]
        members = [
            _Member(job, choice, row, Transcript(self.decoder.text_of, ends, job.limit, job.stops))
            for (job, choice), row in zip(places, rounds.rows, strict=True)
        ]
        with self._changed:
            self._batches.append(_Batch(rounds.run(), rounds.stats, members))

    def _turn(self, batch: _Batch) -> None:
        """Do one round of a batch and hand out what is new."""
        try:
            going = next(batch.rounds, None) is not None
        except Exception as error:
            self._fail(list(dict.fromkeys(m.job for m in batch.members if not m.done)), error)
            self._end(batch)
            return
        for member in batch.members:
            if member.done:
                continue
            text = member.transcript.update(member.row.new, member.row.ended or not going)
            if text or member.transcript.finish:
                made = member.transcript
                member.job.deliver(Piece(member.choice, text, made.count, made.finish))
        for member in batch.members:
            member.row.ended = member.row.ended or member.done
        if not going or all(member.done for member in batch.members):
            self._end(batch)

    def _end(self, batch: _Batch) -> None:
        batch.rounds.close()  # type: ignore[attr-defined]
        with self._changed:
            self._batches.remove(batch)
            # A job is let go at its end, too.
            gone = {member.job for member in batch.members if member.transcript.finish is None}
            self._totals["cancelled"] += len(gone)
            self._ended.add(batch.stats)

    def _fail(self, jobs: Sequence[Job], error: Exception, *, theirs: bool = False) -> None:
        if not theirs:
            _logger.error("a batch failed: %s", error, exc_info=error)
        with self._changed:
            self._totals["failed"] += len(jobs)
        for job in jobs:
            job.deliver(Failure(str(error), theirs))
