"""What a caller asks for: prompts as ids, and options as `generate` of transformers reads them."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .chance import Chance
from .devices import input_device
from .processors import Processors
from .rounds import Request, Row, stop_by

_OWN_CRITERIA = ("MaxLengthCriteria", "EosTokenCriteria")
_UNUSED_OUTPUTS = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")


@dataclass(frozen=True)
class Prepared:
    """A request as transformers' `generate` makes it out of its arguments.

    Attributes:
        input_ids: Prompts, padded on the left.
        attention_mask: Which of them are no padding; all if missing.
        processors: Logits processors, in their order.
        criteria: Stopping criteria.
        config: Its `GenerationConfig`, with every default filled in.
    """

    input_ids: Tensor
    attention_mask: Tensor | None
    processors: list[Any]
    criteria: list[Any]
    config: Any


def prompt_rows(
    prompts: str | Sequence[str] | Tensor | Mapping[str, Any] | None,
    input_ids: Tensor | Sequence[Sequence[int]] | None,
    attention_mask: Tensor | Sequence[Sequence[int]] | None,
    messages: Sequence[Any] | None,
    *,
    tokenizer: Any,
    size: int,
    drafter_tokenizer: Any = None,
) -> tuple[list[list[int]], list[list[int]] | None]:
    """Return the target's ids of each row, and of chats the drafter's, if it has a template.

    Args:
        prompts: As for `HeteroSpeculativeDecoder.generate`.
        input_ids: As there.
        attention_mask: As there.
        messages: As there.
        tokenizer: The target's.
        size: Size of the target's vocabulary.
        drafter_tokenizer: The drafter's, where it needs ids of its own.

    Raises:
        TypeError: Prompts are of no such kind.
        ValueError: Not exactly one kind of prompt, an empty one, or ids out of range.
    """
    if isinstance(prompts, Mapping) and input_ids is None:  # What a tokenizer returned.
        input_ids, attention_mask = prompts.get("input_ids"), prompts.get("attention_mask")
        prompts = None
    elif isinstance(prompts, Tensor) and input_ids is None:
        prompts, input_ids = None, prompts
    given = [x is not None for x in (prompts, input_ids, messages)]
    if sum(given) != 1:
        raise ValueError(
            f"give exactly one of `prompts`, `input_ids` and `messages`; got {sum(given)} of them."
        )
    if attention_mask is not None and input_ids is None:
        raise ValueError("`attention_mask` belongs to `input_ids`; got it without them.")
    own: list[list[int]] | None = None
    if input_ids is not None:
        rows = _id_rows(input_ids, attention_mask)
    elif messages is not None:
        if isinstance(messages, str):
            raise TypeError(
                "`messages` must be a list of chats or of a chat's messages; got a str."
            )
        chats = [messages] if messages and isinstance(messages[0], Mapping) else list(messages)
        rows = [_chat_ids(tokenizer, chat) for chat in chats]
        if getattr(drafter_tokenizer, "chat_template", None):
            own = [_chat_ids(drafter_tokenizer, chat) for chat in chats]
    else:
        texts = [prompts] if isinstance(prompts, str) else list(prompts or [])
        rows = [list(tokenizer(text)["input_ids"]) for text in texts]
    if not rows or not all(rows):
        raise ValueError("every prompt must have at least one token; got an empty one.")
    wrong = [i for row in rows for i in row if not 0 <= i < size]
    if wrong:
        raise ValueError(f"`input_ids` must be in [0, {size}); got {wrong[0]}.")
    return rows, own


def _id_rows(
    input_ids: Tensor | Sequence[Sequence[int]], mask: Tensor | Sequence[Sequence[int]] | None
) -> list[list[int]]:
    """Return the ids of each row that are no padding."""
    if not isinstance(input_ids, Tensor):
        rows = [list(map(int, row)) for row in input_ids]
        if mask is None:
            return rows
        input_ids = torch.tensor(rows)
    if input_ids.ndim != 2 or input_ids.is_floating_point():
        raise ValueError(
            "`input_ids` must be integers of shape (batch, length); got "
            f"{str(input_ids.dtype).removeprefix('torch.')} of shape {tuple(input_ids.shape)}."
        )
    held = torch.ones_like(input_ids) if mask is None else torch.as_tensor(mask)
    if held.shape != input_ids.shape:
        raise ValueError(
            f"`attention_mask` must have the shape of `input_ids`, {tuple(input_ids.shape)}; got "
            f"{tuple(held.shape)}."
        )
    return [ids[kept.bool()].tolist() for ids, kept in zip(input_ids, held, strict=True)]


def prepare(
    target: Any, tokenizer: Any, ends: Sequence[int], rows: list[list[int]], options: dict[str, Any]
) -> Prepared:
    """Let transformers' own `generate` read the options, and stop where it would decode.

    Args:
        target: The target.
        tokenizer: Its tokenizer.
        ends: Its end tokens.
        rows: Ids of each prompt.
        options: Arguments of `generate`; `max_new_tokens` is 128 where no length is given.

    Raises:
        ValueError: The length is below 1, or too long for the target.
    """
    options = dict(options)
    config = copy.deepcopy(options.get("generation_config"))
    if config is not None:
        options["generation_config"] = config
    lengths = "max_length", "max_new_tokens"
    given = [options.get(name, getattr(config, name, None)) for name in lengths]
    if given == [None, None]:
        _set_default(options, "max_new_tokens", 128)
    stop_strings = options.pop("stop_strings", None)
    if stop_strings is None and config is not None and config.stop_strings is not None:
        stop_strings, config.stop_strings = config.stop_strings, None
    if stop_strings is not None:
        from transformers import StopStringCriteria

        given = [stop_strings] if isinstance(stop_strings, str) else list(stop_strings)
        if not all(given):
            raise ValueError(f"`stop_strings` must hold no empty text; got {stop_strings!r}.")
        criterion = StopStringCriteria(tokenizer, stop_strings)
        options["stopping_criteria"] = [*(options.get("stopping_criteria") or []), criterion]
    for name in ("logits_processor", "stopping_criteria"):
        if options.get(name) is not None:
            from transformers import LogitsProcessorList, StoppingCriteriaList

            kinds = {
                "logits_processor": LogitsProcessorList,
                "stopping_criteria": StoppingCriteriaList,
            }
            options[name] = kinds[name](options[name])
    _check_length(target, max(map(len, rows)), options)
    width = max(map(len, rows))
    pad = tokenizer.pad_token_id
    pad = next((i for i in (pad, *ends) if i is not None), 0)
    _set_default(options, "pad_token_id", pad)
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    caught: list[Prepared] = []

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
            Prepared(input_ids, mask, logits_processor, stopping_criteria, generation_config)
        )
        return input_ids

    device = input_device(target)
    target.generate(
        ids.to(device), attention_mask=mask.to(device), custom_generate=catch, **options
    )
    return caught[0]


def _set_default(options: dict[str, Any], name: str, value: Any) -> None:
    """Set what the caller left open, in the configuration where there is one."""
    config = options.get("generation_config")
    if config is None:
        options.setdefault(name, value)
    elif name not in options and getattr(config, name, None) is None:
        setattr(config, name, value)


def _check_length(target: Any, prompt: int, options: dict[str, Any]) -> None:
    config = options.get("generation_config")
    new = options.get("max_new_tokens")
    if new is None:
        new = getattr(config, "max_new_tokens", None)
    if new is None:
        return
    if isinstance(new, bool) or new < 1:
        raise ValueError(f"`max_new_tokens` must be 1 or more; got {new!r}.")
    limit = getattr(target.config, "max_position_embeddings", None)
    if limit is not None and prompt + new > limit:
        raise ValueError(
            f"`max_new_tokens` must leave prompt and output within the target's {limit} "
            f"positions; got {new} after a prompt of {prompt} tokens."
        )


def _chat_ids(tokenizer: Any, messages: Sequence[dict[str, str]]) -> list[int]:
    ids = tokenizer.apply_chat_template(
        list(messages), add_generation_prompt=True, return_dict=True
    )["input_ids"]
    return list(ids)


def rows_of(prepared: Prepared) -> list[Row]:
    """Return the rows that a request begins with."""
    ids = prepared.input_ids
    mask = prepared.attention_mask
    held = torch.ones_like(ids) if mask is None else mask[:, : ids.shape[1]]
    rows = []
    for place, (line, kept) in enumerate(zip(ids.tolist(), held.tolist(), strict=True)):
        own = [token for token, real in zip(line, kept, strict=True) if real]
        rows.append(Row(place, line[: len(line) - len(own)], own, len(own)))
    return rows


def read_request(prepared: Prepared, device: torch.device, chance: Chance) -> Request:
    """Return what is to be done with the rows.

    Args:
        prepared: The request as transformers reads it.
        device: The target's device.
        chance: Source of randomness.

    Raises:
        ValueError: It asks for beams, or for outputs that are not kept.
    """
    config, ids = prepared.config, prepared.input_ids
    if (config.num_beams or 1) > 1:
        raise ValueError(f"`num_beams` must be 1; got {config.num_beams}.")
    for name in _UNUSED_OUTPUTS:
        if getattr(config, name, None):
            raise ValueError(f"`{name}` is not kept by speculative decoding; leave it out.")
    eos = getattr(config, "_eos_token_tensor", None)
    length = config.max_length - ids.shape[1]
    limits = [getattr(c, "max_length", length + ids.shape[1]) for c in prepared.criteria]
    length = min([length, *(limit - ids.shape[1] for limit in limits)])
    return Request(
        Processors(prepared.processors, not config.do_sample, len(ids)),
        [
            stop_by(criterion, device)
            for criterion in prepared.criteria
            if type(criterion).__name__ not in _OWN_CRITERIA
        ],
        frozenset(eos.tolist() if eos is not None else ()),
        max(length, 1),
        chance,
    )
