"""What clients may ask for: the requests of OpenAI's completions and chat API, checked.

What this server cannot do is refused by name rather than ignored.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

from .engine import Settings

# Names of the API that change what is written, each with the values that ask for nothing.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "function_call": ("none",),
    "functions": ([],),
    "logprobs": (False,),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (),
}
# Names that change nothing in what is written.
_NOTES = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key")


def _check_text(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("half of a surrogate pair is no character") from None
    return text


_Text = Annotated[str, AfterValidator(_check_text)]
_Stop = Annotated[_Text, Field(min_length=1)]


class StreamOptions(BaseModel):
    """Options of a stream."""

    model_config = ConfigDict(extra="ignore")
    include_usage: bool = False


class _Request(BaseModel):
    """What both kinds of requests share; `top_k`, `min_p` and `repetition_penalty` are extras."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
    model: str | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: dict[int, Annotated[float, Field(ge=-100, le=100)]] | None = None
    n: Annotated[int, Field(ge=1, le=128)] = 1
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: _Stop | Annotated[list[_Stop], Field(max_length=16)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        for name, idle in _UNSUPPORTED.items():
            if data.get(name) is not None and data[name] not in idle:
                raise ValueError(f"`{name}` is not supported; leave it out")
        return {k: v for k, v in data.items() if k not in _UNSUPPORTED and k not in _NOTES}

    @property
    def stops(self) -> tuple[str, ...]:
        """The strings that end a text."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with a count of tokens."""
        return self.stream_options is not None and self.stream_options.include_usage

    def settings(self) -> Settings:
        """Return how tokens are chosen; what is missing has OpenAI's defaults."""
        given = {
            name: value
            for name in Settings.__dataclass_fields__
            if name != "logit_bias" and (value := getattr(self, name)) is not None
        }
        bias = tuple(sorted((self.logit_bias or {}).items()))
        return Settings(**given, logit_bias=bias)


class CompletionRequest(_Request):
    """Body of `POST /v1/completions`."""

    prompt: _Text | list[_Text] | list[int] | list[list[int]]


class TextPart(BaseModel):
    """A part of a message."""

    model_config = ConfigDict(extra="forbid")
    type: Literal["text"]
    text: _Text


class Message(BaseModel):
    """A message of a chat."""

    model_config = ConfigDict(extra="forbid")
    role: Literal["system", "developer", "user", "assistant"]
    content: _Text | list[TextPart]
    name: str | None = None

    def plain(self) -> dict[str, str]:
        """Return the message as chat templates take it."""
        parts = self.content
        text = parts if isinstance(parts, str) else "".join(part.text for part in parts)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatRequest(_Request):
    """Body of `POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None

    @field_validator("messages")
    @classmethod
    def _asked(cls, messages: list[Message]) -> list[Message]:
        if all(message.role in ("system", "developer") for message in messages):
            raise ValueError("a chat needs a message of the user")
        return messages

    @property
    def limit(self) -> int | None:
        """Most new tokens, if the client set it."""
        return self.max_completion_tokens or self.max_tokens
