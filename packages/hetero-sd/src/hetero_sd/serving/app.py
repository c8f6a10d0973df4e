"""The routes of the server, an ASGI application."""

from __future__ import annotations

import asyncio
import hmac
import itertools
import json
import re
import time
import uuid
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from .engine import Engine, Failure, Job, Piece
from .protocol import ChatRequest, CompletionRequest

_LARGEST_BODY = 16 << 20
_UNBUFFERED = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # by proxies in between
_GONE = 499  # for the log alone: the client has gone
_NO_FIELD = re.compile(r"\W|^(str|int|float|list)$")
_Body = TypeVar("_Body", bound=BaseModel)


class _Refused(Exception):
    """An answer in the form of OpenAI's errors."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        kind = "invalid_request_error" if status < 500 else "server_error"
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


def create_app(
    engine: Engine, *, name: str, api_key: str | None = None, origins: Sequence[str] = ()
) -> Starlette:
    """Return an ASGI application that speaks OpenAI's completions and chat API.

    `POST /v1/completions`, `POST /v1/chat/completions`, both with server-sent events where
    `stream` is true, `GET /v1/models`, `GET /v1/models/{model}`, `GET /health`, `GET /stats` and
    the latter's figures for Prometheus, `GET /metrics`.

    Args:
        engine: What writes; closed when the application shuts down.
        name: What clients call the model.
        api_key: The key that clients must send, `Authorization: Bearer ...`; none if missing.
        origins: Web pages whose scripts may call the server; `"*"` is any.
    """
    started = int(time.time())
    model = {"id": name, "object": "model", "created": started, "owned_by": "hetero-sd"}

    async def completions(request: Request) -> Response:
        body = await _read(request, CompletionRequest, name)
        rows = _prompt_rows(engine, body.prompt)
        limit = _check_room(engine, rows, body.max_tokens or 16, "prompt")
        answer = _Answer(name, "cmpl", "text_completion", body.wants_usage)
        return await _answer(request, engine, body, rows, None, limit, answer)

    async def chat(request: Request) -> Response:
        body = await _read(request, ChatRequest, name)
        messages = [message.plain() for message in body.messages]
        row = _chat_row(engine, messages)
        limit = _check_room(engine, [row], body.limit, "messages")
        answer = _Answer(name, "chatcmpl", "chat.completion", body.wants_usage)
        return await _answer(request, engine, body, [row], [messages], limit, answer)

    async def models(request: Request) -> Response:
        _check_key(request)
        return JSONResponse({"object": "list", "data": [model]})

    async def one_model(request: Request) -> Response:
        _check_key(request)
        _check_name(request.path_params["model"], name)
        return JSONResponse(model)

    async def health(request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def stats(request: Request) -> Response:
        _check_key(request)
        return JSONResponse(engine.state())

    async def metrics(request: Request) -> Response:
        _check_key(request)
        return PlainTextResponse(_metrics(engine.state()), media_type="text/plain; version=0.0.4")

    def _check_key(request: Request) -> None:
        sent = request.headers.get("authorization", "")
        if api_key is not None and not hmac.compare_digest(
            sent.encode(), f"Bearer {api_key}".encode()
        ):
            raise _Refused(401, "the API key is missing or wrong", code="invalid_api_key")

    async def _read(request: Request, kind: type[_Body], name: str) -> _Body:
        _check_key(request)
        body = _parse(await _bytes(request), kind)
        _check_name(body.model, name)  # type: ignore[attr-defined]
        return body

    async def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, _Refused)
        return JSONResponse(error.body, error.status)

    async def not_found(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        what = f"{request.method} {request.url.path}: {error.detail}"
        return JSONResponse(_Refused(error.status_code, what).body, error.status_code)

    async def broken(request: Request, error: Exception) -> Response:
        return JSONResponse(_Refused(500, "the server made a mistake; see its log").body, 500)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(engine.close)

    return Starlette(
        routes=[
            Route("/v1/completions", completions, methods=["POST"]),
            Route("/v1/chat/completions", chat, methods=["POST"]),
            Route("/v1/models", models),
            Route("/v1/models/{model:path}", one_model),
            Route("/health", health),
            Route("/stats", stats),
            Route("/metrics", metrics),
        ],
        middleware=[
            Middleware(
                CORSMiddleware,
                allow_origins=list(origins),
                allow_methods=["GET", "POST"],
                allow_headers=["Authorization", "Content-Type"],
            )
        ]
        if origins
        else [],
        exception_handlers={_Refused: refused, HTTPException: not_found, Exception: broken},
        lifespan=lifespan,
    )


_GAUGES = ("waiting", "rows", "tokens_per_second", "acceptance", "block_efficiency")


def _metrics(state: dict[str, Any]) -> str:
    """Return the engine's state in the text format of Prometheus."""
    lines = []
    for key, value in state.items():
        if key == "arms":
            lines.append("# TYPE hetero_sd_rounds_total counter")
            lines += [f'hetero_sd_rounds_total{{arm="{arm}"}} {n}' for arm, n in value.items()]
            continue
        kind, name = ("gauge", key) if key in _GAUGES else ("counter", f"{key}_total")
        lines += [f"# TYPE hetero_sd_{name} {kind}", f"hetero_sd_{name} {value}"]
    return "\n".join(lines) + "\n"


# ------------------------------------------------------------------------------- requests
async def _bytes(request: Request) -> bytes:
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > _LARGEST_BODY:
            raise _Refused(413, f"the body must be at most {_LARGEST_BODY >> 20} MiB")
    return bytes(data)


def _parse(data: bytes, kind: type[_Body]) -> _Body:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise _Refused(400, f"the body is no JSON: {error}") from None
    if not isinstance(value, dict):
        raise _Refused(400, f"the body must be a JSON object; got {type(value).__name__}")
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        found = error.errors()
        # Of a union's types, the one that went wrong deepest is the one that was meant.
        same = [e for e in found if e["loc"][:1] == found[0]["loc"][:1]]
        first = max(same, key=lambda e: len(e["loc"]))
        # What pydantic says of a union ends with the names of its types.
        parts = itertools.takewhile(lambda part: not _NO_FIELD.search(str(part)), first["loc"])
        place = ".".join(map(str, parts))
        what = first["msg"].removeprefix("Value error, ")
        message = f"`{place}`: {what}" if place else what
        raise _Refused(400, message, param=place or None) from None


def _check_name(asked: str | None, name: str) -> None:
    if asked not in (None, name):
        message = f"the model {asked!r} does not exist; this server has {name!r}"
        raise _Refused(404, message, param="model", code="model_not_found")


def _prompt_rows(engine: Engine, prompt: Any) -> list[list[int]]:
    """Return the ids of each prompt of a completion."""
    tokenizer = engine.decoder.target_tokenizer
    if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)):
        prompt = [prompt]
    rows = [list(tokenizer(p)["input_ids"]) if isinstance(p, str) else list(p) for p in prompt]
    if not rows or not all(rows):
        raise _Refused(400, "`prompt` must hold at least one token", param="prompt")
    _check_tokens(engine, (token for row in rows for token in row), "prompt")
    return rows


def _check_tokens(engine: Engine, tokens: Iterable[int], param: str) -> None:
    size = engine.decoder.target.get_output_embeddings().weight.shape[0]
    wrong = next((token for token in tokens if not 0 <= token < size), None)
    if wrong is not None:
        message = f"`{param}`: tokens must be in [0, {size}); got {wrong}"
        raise _Refused(400, message, param=param)


def _chat_row(engine: Engine, messages: list[dict[str, str]]) -> list[int]:
    tokenizer = engine.decoder.target_tokenizer
    if not tokenizer.chat_template:
        raise _Refused(400, "the model has no chat template; use /v1/completions")
    try:
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
    except Exception as error:  # templates raise what they like where a chat is not to theirs
        message = f"the model's chat template refuses `messages`: {error}"
        raise _Refused(400, message, param="messages") from None
    return list(ids["input_ids"])


def _check_room(engine: Engine, rows: list[list[int]], limit: int | None, param: str) -> int:
    """Return the limit of new tokens, which is all that there is room for where none is set."""
    most = getattr(engine.decoder.target.config, "max_position_embeddings", None) or 1 << 20
    longest = max(map(len, rows))
    room = most - longest
    if room < (limit or 1):
        asked = "" if limit is None else f" and `max_tokens` is {limit}"
        message = f"the model has {most} positions; `{param}` takes {longest} of them{asked}"
        raise _Refused(400, message, param=param, code="context_length_exceeded")
    return limit or room


# -------------------------------------------------------------------------------- answers
class _Answer:
    """Puts pieces into the shape of the API."""

    def __init__(self, model: str, prefix: str, kind: str, usage: bool) -> None:
        self._chat = prefix == "chatcmpl"
        self._kind = kind
        self._usage = usage
        self._head = {
            "id": f"{prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, texts: list[str], ends: list[str | None], usage: dict[str, int]) -> Any:
        """Return the answer of a request that does not stream."""
        choices: list[dict[str, Any]] = []
        for index, (text, end) in enumerate(zip(texts, ends, strict=True)):
            said = {"message": {"role": "assistant", "content": text}}
            choices.append(
                {"index": index, **(said if self._chat else {"text": text})}
                | {"finish_reason": end, "logprobs": None}
            )
        return {**self._head, "object": self._kind, "choices": choices, "usage": usage}

    def begin(self, count: int) -> list[Any]:
        """Return the first events of a stream."""
        first = {"delta": {"role": "assistant", "content": ""}}
        return [self._event(i, first, None) for i in range(count)] if self._chat else []

    def piece(self, piece: Piece) -> list[Any]:
        """Return the events of a piece."""
        if not self._chat:
            return [self._event(piece.choice, {"text": piece.text}, piece.finish)]
        events = []
        if piece.text:
            events.append(self._event(piece.choice, {"delta": {"content": piece.text}}, None))
        if piece.finish:
            events.append(self._event(piece.choice, {"delta": {}}, piece.finish))
        return events

    def end(self, usage: dict[str, int]) -> list[Any]:
        """Return the last event of a stream."""
        if not self._usage:
            return []
        return [{**self._head, "object": self._object, "choices": [], "usage": usage}]

    @property
    def _object(self) -> str:
        return "chat.completion.chunk" if self._chat else self._kind

    def _event(self, index: int, what: dict[str, Any], end: str | None) -> Any:
        choice = {"index": index, **what, "finish_reason": end, "logprobs": None}
        return {**self._head, "object": self._object, "choices": [choice]}


async def _answer(
    request: Request,
    engine: Engine,
    body: CompletionRequest | ChatRequest,
    rows: list[list[int]],
    chats: list[Any] | None,
    limit: int,
    answer: _Answer,
) -> Response:
    """Have a request written, and send it whole or piece by piece."""
    loop = asyncio.get_running_loop()
    arrived: asyncio.Queue[Piece | Failure] = asyncio.Queue()

    def deliver(event: Piece | Failure) -> None:
        try:
            loop.call_soon_threadsafe(arrived.put_nowait, event)
        except RuntimeError:  # the loop has been closed: nobody waits any more
            job.cancelled.set()

    _check_tokens(engine, body.logit_bias or (), "logit_bias")
    spread = [row for row in rows for _ in range(body.n)]
    talks = None if chats is None else [chat for chat in chats for _ in range(body.n)]
    job = Job(spread, talks, limit, body.settings(), deliver, body.stops)
    if not engine.submit(job):
        raise _Refused(429, "too many requests are waiting; try again later", code="busy")
    pieces = _pieces(request, engine, job, arrived)
    prompt = sum(map(len, rows))
    if body.stream:
        try:
            # Before the first piece, an error still has a status of its own.
            first = await anext(pieces)
        except StopAsyncIteration:
            return Response(status_code=_GONE)
        events = _stream(first, pieces, answer, len(spread), prompt)
        return StreamingResponse(events, media_type="text/event-stream", headers=_UNBUFFERED)
    texts = [""] * len(spread)
    last: dict[int, Piece] = {}
    async for piece in pieces:
        texts[piece.choice] += piece.text
        last[piece.choice] = piece
    ends = [last[i].finish if i in last else None for i in range(len(spread))]
    if not all(ends):
        return Response(status_code=_GONE)
    written = sum(piece.tokens for piece in last.values())
    return JSONResponse(answer.whole(texts, ends, _usage(prompt, written)))


async def _pieces(
    request: Request, engine: Engine, job: Job, arrived: asyncio.Queue[Piece | Failure]
) -> AsyncIterator[Piece]:
    """Yield the pieces of a request to the last; stop early when the client goes away."""
    gone = asyncio.create_task(_until_gone(request))
    left = len(job.rows)
    try:
        while left:
            event = asyncio.create_task(arrived.get())
            await asyncio.wait({event, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not event.done():
                event.cancel()
                return
            piece = event.result()
            if isinstance(piece, Failure):
                raise _Refused(400 if piece.theirs else 500, piece.message)
            left -= piece.finish is not None
            yield piece
    finally:
        gone.cancel()
        engine.cancel(job)


async def _until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _stream(
    first: Piece, pieces: AsyncIterator[Piece], answer: _Answer, count: int, prompt: int
) -> AsyncIterator[str]:
    """Yield server-sent events."""
    counts = [0] * count
    for event in answer.begin(count):
        yield _event(event)
    try:
        piece: Piece | None = first
        while piece is not None:
            counts[piece.choice] = piece.tokens
            for event in answer.piece(piece):
                yield _event(event)
            piece = await anext(pieces, None)
    except _Refused as error:
        yield _event(error.body)
        return
    finally:
        await pieces.aclose()  # type: ignore[attr-defined]
    for event in answer.end(_usage(prompt, sum(counts))):
        yield _event(event)
    yield "data: [DONE]\n\n"


def _event(value: Any) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


def _usage(prompt: int, written: int) -> dict[str, int]:
    return {
        "prompt_tokens": prompt,
        "completion_tokens": written,
        "total_tokens": prompt + written,
    }
