"""Tiny models and tokenizers for tests and benchmarks, made on the spot."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from .acceptance import Choice, verify, verify_block, verify_runs
from .chance import Chance

WORDS = ["the", "cat", "dog", "sat", "on", "a", "mat", "and", "ran", "over", "hill", "café", "über"]


def sentences(count: int, seed: int = 0) -> list[str]:
    """Return nonsense sentences with digits, newlines and letters beyond ASCII.

    Args:
        count: How many, 1 or more.
        seed: Seed of the draw.
    """
    draw = random.Random(seed)
    return [
        " ".join(draw.choice(WORDS) for _ in range(draw.randint(3, 9)))
        + draw.choice([".", "!\n", " 42.", " 🙂", ",\n\n"])
        for _ in range(count)
    ]


def make_tokenizer(kind: str, vocab: int = 300, seed: int = 0) -> Any:
    """Return a tokenizer of some kind, trained on `sentences`, its ids shuffled.

    Args:
        kind: `"byte-level"`, `"sentencepiece"` (byte fallback, `▁`), `"prefixed"` (the same, with
            a space put before every text) or `"characters"`.
        vocab: Tokens wanted, above 260 for the first three.
        seed: Seed of the text and of the order of ids.

    Raises:
        ValueError: The kind is unknown.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<s>", "</s>"]
    if kind == "byte-level":
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        first = special
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    elif kind in ("sentencepiece", "prefixed"):
        backend = Tokenizer(models.BPE(byte_fallback=True))
        steps: list[Any] = [normalizers.Replace(" ", "▁")]
        if kind == "prefixed":
            steps.insert(0, normalizers.Prepend("▁"))
        backend.normalizer = normalizers.Sequence(steps)
        backend.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        )
        first = special + [f"<0x{byte:02X}>" for byte in range(256)]
        alphabet = list("▁abcdefghijklmnopqrstuvwxyz")
    elif kind == "characters":
        backend = Tokenizer(models.BPE())
        backend.decoder = decoders.Fuse()
        first = special
        alphabet = sorted(set("".join(sentences(200))))
        vocab = len(alphabet) + 2
    else:
        raise ValueError(
            "`kind` must be 'byte-level', 'sentencepiece', 'prefixed' or 'characters'; got "
            f"{kind!r}."
        )
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=first,
        initial_alphabet=alphabet,
        limit_alphabet=max(len(alphabet), 40),
        show_progress=False,
    )
    backend.train_from_iterator(sentences(400, seed), trainer)
    state = json.loads(backend.to_str())
    order = list(range(len(state["model"]["vocab"])))
    random.Random(seed).shuffle(order)
    state["model"]["vocab"] = {t: order[i] for t, i in state["model"]["vocab"].items()}
    state["added_tokens"] = [
        {**entry, "id": order[entry["id"]]}
        for entry in state["added_tokens"]
        if entry["content"] in special
    ]
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)), bos_token="<s>", eos_token="</s>"
    )


def make_model(
    tokenizer: Any, seed: int = 0, *, padding: int = 0, layers: int = 1, sharpness: float = 6.0
) -> Any:
    """Return a tiny Llama with random weights, in evaluation mode.

    Args:
        tokenizer: Its tokenizer.
        seed: Seed of the weights.
        padding: Rows of its head beyond the tokenizer's, 0 or more.
        layers: Layers, 1 or more.
        sharpness: Factor on the head's random weights; the larger, the surer the model.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer) + padding,
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=layers,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=256,
                initializer_range=0.3,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.eos_token_id,
            )
        )
        with torch.no_grad():
            model.lm_head.weight.mul_(sharpness / 6.0)
    return model.eval()


def state_hash(*parts: Any) -> str:
    """Return a digest of models and tokenizers: weights, configurations and all settings."""
    digest = hashlib.sha256()
    for part in parts:
        if hasattr(part, "state_dict"):
            for name, value in sorted(part.state_dict().items()):
                digest.update(name.encode() + value.numpy().tobytes())
            digest.update(part.config.to_json_string().encode())
            digest.update(part.generation_config.to_json_string().encode())
        else:
            digest.update(part.backend_tokenizer.to_str().encode())
            digest.update(json.dumps(part.init_kwargs, default=str).encode())
    return digest.hexdigest()


def total_variation(p: Sequence[float] | torch.Tensor, q: Sequence[float] | torch.Tensor) -> float:
    """Return half the sum of |p − q|, in [0, 1]."""
    difference = torch.as_tensor(p, dtype=torch.float64) - torch.as_tensor(q, dtype=torch.float64)
    return float(difference.abs().sum()) / 2


def warpers(**options: Any) -> list[Any]:
    """Return the processors that transformers' `generate` makes out of sampling options."""
    from transformers import GenerationConfig
    from transformers.generation.utils import GenerationMixin

    config = GenerationConfig(do_sample=True, **{"top_k": 0, **options})
    holder = type("Holder", (GenerationMixin,), {})()
    return list(holder._get_logits_processor(config, input_ids_seq_length=1))


Outcome = tuple[int, Tensor]


def coin_regions(bounds: Sequence[float]) -> Iterator[tuple[float, Tensor]]:
    """Yield a point of every region that independent coins may fall into, with its probability.

    Args:
        bounds: Where each coin's effect changes, in [0, 1].
    """
    for pattern in itertools.product((True, False), repeat=len(bounds)):
        weight, coins = 1.0, []
        for below, bound in zip(pattern, bounds, strict=True):
            weight *= bound if below else 1 - bound
            coins.append(bound / 2 if below else (1 + bound) / 2)
        if weight > 0:
            yield weight, torch.tensor(coins, dtype=torch.float64)


def outcomes_of_verify(
    p: Tensor, proposed: Tensor, q: Tensor | None = None, kept: Tensor | None = None
) -> Iterator[tuple[float, Outcome]]:
    """Yield every result of `verify`, each with the share of the coins that gives it."""
    bounds = []
    for i, token in enumerate(proposed.tolist()):
        column = token if kept is None else kept.tolist().index(token) if q is not None else 0
        theirs = 1.0 if q is None else float(q[i, column])
        bounds.append(min(1.0, float(p[i, token]) / theirs))
    for weight, coins in coin_regions(bounds):
        yield weight, verify(p, proposed, coins, q, kept)


def outcomes_of_block(
    p: Tensor, proposed: Tensor, q: Tensor, kept: Tensor
) -> Iterator[tuple[float, Outcome]]:
    """The same for `verify_block`, its bounds worked out here once more in plain numbers."""
    full = torch.zeros_like(p[:-1])
    full[:, kept] = q
    share, bounds = 1.0, []
    for i, token in enumerate(proposed.tolist()):
        share = min(1.0, share * float(p[i, token] / full[i, token]))
        if i + 1 < len(proposed):
            rest = float((share * p[i + 1] - full[i + 1]).clamp(min=0.0).sum())
            bounds.append(rest / (rest + 1 - share) if rest > 0 else float(share >= 1))
        else:
            bounds.append(share)
    for weight, coins in coin_regions(bounds):
        yield weight, verify_block(p, proposed, coins, q, kept)


def outcomes_of_runs(p: Tensor, steps: Sequence[Choice]) -> Iterator[tuple[float, Outcome]]:
    """The same for `verify_runs`; a bound is the target's share over that of all like runs."""
    bounds: list[float] = []
    for step in steps:
        possible = step.mass.nonzero()[:, 0].tolist()
        weights = dict(zip(possible, step.mass[possible].tolist(), strict=True))
        runs = {i: [t for t in step.runs[i].tolist() if t >= 0] for i in possible}
        chosen = runs[step.chosen]
        for depth, token in enumerate(chosen):
            if len(bounds) == len(p) - 1:
                break
            longer = [
                (run, weights[i])
                for i, run in runs.items()
                if run[:depth] == chosen[:depth] and len(run) > depth
            ]
            law = sum(m for run, m in longer if run[depth] == token) / sum(m for _, m in longer)
            bounds.append(min(1.0, float(p[len(bounds), token]) / law))
    for weight, coins in coin_regions(bounds):
        yield weight, verify_runs(p, steps, coins)


class EveryChance(Chance):
    """Randomness that takes every course in turn; see `every_course`.

    Attributes:
        weight: Probability of the course so far.
    """

    def __init__(self, script: list[int]) -> None:
        super().__init__()
        self.weight = 1.0
        self._script = script  # Which branch to take at each turn; grows where it ends.
        self._turn = 0
        self._open: list[list[int]] = []

    def branch(self, options: Sequence[tuple[float, Any]]) -> Any:
        """Return one of several results, given as (probability, result)."""
        options = [option for option in options if option[0] > 0]
        if self._turn == len(self._script):
            self._script.append(0)
        taken = self._script[self._turn]
        for other in range(taken + 1, len(options)) if self._turn >= self._fixed else ():
            self._open.append([*self._script[: self._turn], other])
        self._turn += 1
        self.weight *= options[taken][0]
        return options[taken][1]

    _fixed = 0

    def draw(self, weights: Tensor) -> list[int]:
        """See `Chance`."""
        laws = (weights.double() / weights.double().sum(dim=1, keepdim=True)).tolist()
        return [self.branch([(share, i) for i, share in enumerate(law)]) for law in laws]

    def pick(self, weights: Sequence[float]) -> int:
        """See `Chance`."""
        return self.draw(torch.tensor([weights], dtype=torch.double))[0]


@contextmanager
def _every_coin(chance: EveryChance) -> Iterator[None]:
    """Let the accept rules' coins take every course too, through the rules' own code."""

    def judge(outcomes: Callable[..., Any]) -> Callable[..., Any]:
        def rule(p: Tensor, told: Any, *rest: Any) -> Any:
            if isinstance(told, list):  # Runs: the coins come third.
                return chance.branch(list(outcomes(p, told)))
            return chance.branch(list(outcomes(p, told, *rest[1:])))

        return rule

    def accepts(coin: float, p: float, q: float) -> bool:
        bound = min(1.0, p / q)
        return bool(chance.branch([(bound, True), (1 - bound, False)]))

    def residual(p: Tensor, weigh: Callable[[int], float], _: Chance) -> Tensor:
        law = torch.tensor([weigh(t) for t in range(len(p))], dtype=p.dtype)
        return (p - law).clamp(min=0.0)

    with (
        mock.patch("hetero_sd.drafts.verify", judge(outcomes_of_verify)),
        mock.patch("hetero_sd.drafts.verify_block", judge(outcomes_of_block)),
        mock.patch("hetero_sd.drafts.verify_runs", judge(outcomes_of_runs)),
        mock.patch("hetero_sd.spelling.accepts", accepts),
        mock.patch("hetero_sd.spelling.residual", residual),
    ):
        yield


def every_course(run: Callable[[Chance], Any]) -> Iterator[tuple[float, Any]]:
    """Yield every result of a random function, with its probability.

    Args:
        run: Takes all its randomness from what it is given, and the rules' coins.
    """
    waiting: list[list[int]] = [[]]
    while waiting:
        script = waiting.pop()
        chance = EveryChance(script)
        chance._fixed = len(script)
        with _every_coin(chance):
            result = run(chance)
        waiting += chance._open
        yield chance.weight, result


def one_round(dec: Any, history: list[int], options: dict[str, Any]) -> Callable[[Chance], Any]:
    """Return a function of chance: the tokens of one round after a history.

    Args:
        dec: A decoder of `hetero_sd`, its backend `"eager"`.
        history: Target ids.
        options: Options of `generate`.
    """
    options = {"max_new_tokens": 6, "do_sample": True, **options}
    prepared = dec._prepare([history], options)

    def run(chance: Chance) -> tuple[int, ...]:
        rounds = dec._rounds(prepared, None, None)
        rounds._request = dataclasses.replace(rounds._request, chance=chance)
        with torch.no_grad():
            return tuple(next(iter(rounds.run()))[0][1])

    return run


def law_of_output(
    dec: Any, prompt: list[int], options: dict[str, Any], length: int = 2
) -> dict[tuple[int, ...], float]:
    """Return the law of the first tokens that the decoder's rounds emit, by taking every course.

    Args:
        dec: A decoder of `hetero_sd`, its backend `"eager"`.
        prompt: Target ids.
        options: Options of `generate`.
        length: Tokens to look at, 1 or more.
    """
    ends = dec.target_eos[:1]  # None where the target has no end token.
    weights: dict[tuple[int, ...], float] = {(): 1.0}
    for count in range(length):
        for before in [key for key in weights if len(key) == count and not {*key} & {*ends}]:
            weight = weights.pop(before)
            history = [*prompt, *before]
            for share, new in every_course(one_round(dec, history, options)):
                key = (*before, *new)[:length]
                weights[key] = weights.get(key, 0.0) + weight * share
    return weights


def law_of_target(
    dec: Any, prompt: list[int], options: dict[str, Any], length: int = 2
) -> dict[tuple[int, ...], float]:
    """Return the same by the target alone, with transformers' own processors."""
    from .processors import Processors

    prepared = dec._prepare([prompt], {"max_new_tokens": 6, "do_sample": True, **options})
    process = Processors(prepared.processors, False)
    weights: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(length):
        for before in [k for k in weights if not k or k[-1] not in dec.target_eos[:1]]:
            if len(before) == length:
                continue
            weight = weights.pop(before)
            history = [*prompt, *before]
            with torch.no_grad():
                ids = torch.tensor([history], device=dec.target.device)
                logits = dec.target(ids).logits[0, -1:]
            for token, share in enumerate(process(logits, history)[0].softmax(-1).tolist()):
                if share > 0:
                    weights[(*before, token)] = weight * share
    return weights


def distance(found: dict[Any, float], wanted: dict[Any, float]) -> float:
    """Return the total variation distance of two laws, given as probabilities of what is drawn."""
    keys = sorted(set(found) | set(wanted))
    return total_variation([found.get(k, 0.0) for k in keys], [wanted.get(k, 0.0) for k in keys])
