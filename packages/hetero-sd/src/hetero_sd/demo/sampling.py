"""Text written by the target in big batches: what drafters learn from.

Run as `python -m hetero_sd.demo.sampling --gguf FILE --data FOLDER --output FOLDER`: millions of
tokens in two minutes on a GPU; on a CPU, with `--rows 64`, in hours. Run again, it goes on.
"""

from __future__ import annotations

import gzip
import json
import logging
import random
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor
from torch.nn import functional as F

from .._files import write_atomically
from . import smollm2
from .prompts import ASSISTANT, USER, Prompts, json_lines

_logger = logging.getLogger(__name__)


class BatchSampler:
    """The target's forward pass for many rows at once, one token a step, with a fixed cache.

    Rows never wait for one another: a row whose prompt is not over is fed the prompt's next token.
    When an answer ends, the row goes on with a user turn that the model writes itself, and so on.

    Args:
        model: A `LlamaForCausalLM`.
        rows: Rows a batch.
        length: Tokens a row, prompt included.
        compiled: Whether to compile the parts of a layer.
    """

    def __init__(self, model: Any, rows: int, length: int, compiled: bool) -> None:
        settings = model.config
        self.rows, self.length = rows, length
        self.heads, self.kv_heads = settings.num_attention_heads, settings.num_key_value_heads
        self.width = settings.head_dim
        self.eps = settings.rms_norm_eps
        self.embedding = model.model.embed_tokens.weight.detach()
        self.head = model.lm_head.weight.detach()
        self.norm = model.model.norm.weight.detach()
        self.layers = [_fused(layer) for layer in model.model.layers]
        device = self.embedding.device
        inverse = model.model.rotary_emb.inv_freq.float().to(device)
        angles = torch.arange(length, device=device).float()[:, None] * inverse
        self.cos, self.sin = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)
        shape = (len(self.layers), rows, self.kv_heads, length, self.width)
        self.keys = torch.zeros(shape, dtype=self.embedding.dtype, device=device)
        self.values = torch.zeros_like(self.keys)
        wrap: Callable[[Any], Any] = torch.compile if compiled else lambda function: function
        self._before, self._after = wrap(self._before_attention), wrap(self._after_attention)
        self._pick = wrap(_pick)

    def _before_attention(
        self, hidden: Tensor, weights: dict[str, Tensor], cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        normed = F.rms_norm(hidden, hidden.shape[-1:], weights["norm_1"], self.eps)
        mixed = F.linear(normed, weights["qkv"]).view(hidden.shape[0], -1, self.width)
        query, key, value = mixed.split([self.heads, self.kv_heads, self.kv_heads], dim=1)
        return _rotate(query, cos, sin), _rotate(key, cos, sin), value

    def _after_attention(
        self, hidden: Tensor, attended: Tensor, weights: dict[str, Tensor]
    ) -> Tensor:
        hidden = hidden + F.linear(attended, weights["out"])
        normed = F.rms_norm(hidden, hidden.shape[-1:], weights["norm_2"], self.eps)
        gate, up = F.linear(normed, weights["gate_up"]).chunk(2, dim=-1)
        return hidden + F.linear(F.silu(gate) * up, weights["down"])

    def step(self, tokens: Tensor, place: int) -> Tensor:
        """Return the logits after one more token a row.

        Args:
            tokens: Shape `(rows,)`.
            place: Position of the tokens.
        """
        hidden = self.embedding[tokens]
        cos, sin = self.cos[place], self.sin[place]
        for layer, weights in enumerate(self.layers):
            query, key, value = self._before(hidden, weights, cos, sin)
            self.keys[layer, :, :, place] = key
            self.values[layer, :, :, place] = value
            # The heads that share a key are the "queries" of one head: no mask, no repetition.
            attended = F.scaled_dot_product_attention(
                query.view(self.rows, self.kv_heads, -1, self.width),
                self.keys[layer, :, :, : place + 1],
                self.values[layer, :, :, : place + 1],
            )
            hidden = self._after(hidden, attended.reshape(self.rows, -1), weights)
        hidden = F.rms_norm(hidden, hidden.shape[-1:], self.norm, self.eps)
        return F.linear(hidden, self.head)

    @torch.no_grad()
    def sample(
        self,
        prompts: list[list[int]],
        users_turn: Tensor,
        temperature: Tensor,
        turns: list[list[int]],
    ) -> Tensor:
        """Return whole rows of token ids, prompts included.

        Args:
            prompts: One list of ids a row; what exceeds `length` is cut.
            users_turn: Shape `(rows,)`, whether the row goes on with a user's turn.
            temperature: Shape `(rows,)`, of the answers; 0 is greedy. User turns have 1.
            turns: What follows the end-of-turn token before an answer, and before a user's turn.
        """
        device = self.embedding.device
        rows, length = self.rows, self.length
        slack = max(map(len, turns)) + 1
        forced = torch.full((rows, length + slack), -1, dtype=torch.long)
        for row, prompt in enumerate(prompts):
            forced[row, : min(len(prompt), length)] = torch.tensor(prompt[:length])
        forced, temperature = forced.to(device), temperature.to(device)
        users_turn = users_turn.to(device)
        padded = [torch.tensor(t + [-1] * (slack - 1 - len(t)), device=device) for t in turns]
        out = torch.empty(rows, length, dtype=torch.int32, device=device)
        tokens = forced[:, 0]
        out[:, 0] = tokens
        for place in range(length - 1):
            logits = self.step(tokens, place)
            heat = torch.where(users_turn, torch.ones_like(temperature), temperature)
            drawn = self._pick(logits, heat)
            given = forced[:, place + 1]
            free = given < 0
            tokens = torch.where(free, drawn, given)
            out[:, place + 1] = tokens
            # 2 ends a turn: force the header of the next one and hand the turn over.
            ended = free & (tokens == 2)
            header = torch.where(users_turn[:, None], padded[0], padded[1])
            ahead = forced[:, place + 2 : place + 2 + header.shape[1]]
            ahead.copy_(torch.where(ended[:, None], header[:, : ahead.shape[1]], ahead))
            users_turn = users_turn ^ ended
        return out


def _fused(layer: Any) -> dict[str, Tensor]:
    attention, mlp = layer.self_attn, layer.mlp
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    return {
        "norm_1": layer.input_layernorm.weight.detach(),
        "qkv": torch.cat([p.weight.detach() for p in projections]),
        "out": attention.o_proj.weight.detach(),
        "norm_2": layer.post_attention_layernorm.weight.detach(),
        "gate_up": torch.cat([mlp.gate_proj.weight.detach(), mlp.up_proj.weight.detach()]),
        "down": mlp.down_proj.weight.detach(),
    }


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.float().chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return (x.float() * cos + turned * sin).to(x.dtype)


def _pick(logits: Tensor, temperature: Tensor) -> Tensor:
    """Return a token a row: Gumbel noise scaled by the temperature, then argmax."""
    uniform = torch.rand_like(logits, dtype=torch.float32).clamp_(1e-20, 1 - 1e-7)
    noise = -torch.log(-torch.log(uniform))
    return (logits.float() + noise * temperature[:, None]).argmax(dim=-1)


# ------------------------------------------------------------------------------- texts
def as_text(tokenizer: Any, rows: Tensor | list[list[int]]) -> list[str]:
    """Return a batch of sampled rows as text, with `<s>` and `</s>` for the turn marks."""
    lines = rows.tolist() if isinstance(rows, Tensor) else rows
    texts = tokenizer.backend_tokenizer.decode_batch(lines, skip_special_tokens=False)
    cleaned = []
    for text in texts:
        text = text.split("<|endoftext|>")[0].rstrip("\ufffd")
        text = text.replace("<|im_start|>", "<s>").replace("<|im_end|>", "</s>")
        cleaned.append(text if text.startswith("<s>") else "<s>" + text)
    return cleaned


def read_texts(paths: Iterable[Path]) -> list[str]:
    """Return the texts of files of JSON lines, and of all such files in folders."""
    files = [f for p in paths for f in (sorted(p.glob("*.jsonl.gz")) if p.is_dir() else [p])]
    return [row["text"] for file in files for row in json_lines(file)]


def write_texts(path: Path, texts: Iterable[str]) -> None:
    """Write texts to a gzipped file of JSON lines, one object with `text` a line."""

    def write(temporary: str) -> None:
        with gzip.open(temporary, "wt", encoding="utf-8", compresslevel=6) as file:
            for text in texts:
                file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")

    write_atomically(path, write)


def sample_texts(
    model: Any,
    tokenizer: Any,
    prompts: Prompts,
    folder: Path,
    *,
    seconds: float,
    rows: int,
    length: int,
    seed: int,
) -> int:
    """Let the target write until the time is over, at least one batch; return the batches there.

    Each batch is a file of its own, drawn with a seed of its own: a call that finds files goes on
    after them, and writes what one longer call would have written.

    Args:
        model: The target, a `LlamaForCausalLM`.
        tokenizer: Its tokenizer, with ChatML's turn marks as tokens 1 and 2.
        prompts: What to ask it.
        folder: Where the files go; it is made if missing.
        seconds: Time to use.
        rows: Texts a batch.
        length: Tokens a text, prompt included.
        seed: Seed of all.
    """
    folder.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    device = model.device
    sampler = BatchSampler(model, rows, length, compiled=device.type == "cuda")
    turns = [tokenizer(text).input_ids for text in ("\n" + ASSISTANT, "\n" + USER)]
    number = first = len(list(folder.glob("batch-*.jsonl.gz")))
    longest = 0.0
    futures: list[Future[None]] = []

    def store(path: Path, ids: Tensor) -> None:
        write_texts(path, as_text(tokenizer, ids))

    with ThreadPoolExecutor(1) as pool:
        while not futures or time.perf_counter() - started + longest < seconds:
            begun = time.perf_counter()
            own = 10_000 * seed + number
            prompts.seed(own)
            torch.manual_seed(own)
            draw = random.Random(own)
            chosen = [prompts() for _ in range(rows)]
            ids = [e.ids for e in tokenizer.backend_tokenizer.encode_batch([c[0] for c in chosen])]
            heat = torch.tensor([draw.choice((0.0, 0.0, 0.7, 1.0, 1.0)) for _ in range(rows)])
            out = sampler.sample(ids, torch.tensor([c[1] for c in chosen]), heat, turns).cpu()
            futures.append(pool.submit(store, folder / f"batch-{number:04d}.jsonl.gz", out))
            number += 1
            ended = time.perf_counter()
            if len(futures) > 1:  # The first batch includes compilation.
                longest = max(longest, ended - begun)
            tokens = (number - first) * rows * length
            _logger.info("sampled %.1f M tokens, %.0f/s", tokens / 1e6, tokens / (ended - started))
        for future in futures:
            future.result()
    return number


def split(texts: list[str], seed: int) -> tuple[list[str], list[str]]:
    """Return texts to learn from, and those that are held out: a twentieth, at most 1,024."""
    shuffled = list(texts)
    random.Random(seed).shuffle(shuffled)
    count = min(max(len(shuffled) // 20, 1), 1024)
    return shuffled[count:], shuffled[:count]


def marked(text: str) -> str:
    """Return a text that `as_text` returned, with the target's own marks of turns."""
    return text.replace("<s>", "<|im_start|>").replace("</s>", "<|im_end|>")


def as_ids(tokenizer: Any, text: str) -> list[int]:
    """Return the target's tokens of a text that `as_text` returned."""
    ids: list[int] = tokenizer.backend_tokenizer.encode(marked(text)).ids
    return ids


@click.command()
@click.option(
    "--gguf",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    required=True,
    help="SmolLM2's GGUF file.",
)
@click.option(
    "--data",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    required=True,
    help="Folder of the corpora that prompts are made of.",
)
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    required=True,
    help="Folder of the texts; sampling goes on after those that are there.",
)
@click.option("--minutes", type=float, default=2.0, show_default=True, help="Time, about.")
@click.option(
    "--rows", type=click.IntRange(1), default=4096, show_default=True, help="Texts a batch."
)
@click.option(
    "--length", type=click.IntRange(2), default=448, show_default=True, help="Tokens a text."
)
@click.option("--seed", type=int, default=0, show_default=True)
def main(
    gguf: Path, data: Path, output: Path, minutes: float, rows: int, length: int, seed: int
) -> None:
    """Let SmolLM2 write chats, batch by batch, each to a file of its own."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    target, tokenizer = smollm2.load(gguf, torch.bfloat16)
    target.to("cuda" if torch.cuda.is_available() else "cpu")
    sample_texts(
        target,
        tokenizer,
        Prompts(data, seed),
        output,
        seconds=60 * minutes,
        rows=rows,
        length=length,
        seed=seed,
    )


if __name__ == "__main__":
    main()
