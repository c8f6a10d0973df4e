"""Text written by the target in big batches: what the drafter learns from.

Run as `python -m hetero_sd.demo.sampling --gguf FILE --data FOLDER --output texts.jsonl.gz` on a
machine without a GPU, where it takes hours rather than minutes.
"""

from __future__ import annotations

import gzip
import json
import logging
import random
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor
from torch.nn import functional as F

from . import smollm2

_logger = logging.getLogger(__name__)
SYSTEM = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
    "<|im_end|>\n"
)
USER, ASSISTANT = "<|im_start|>user\n", "<|im_start|>assistant\n"
_TOPICS = """photosynthesis|the water cycle|black holes|volcanoes|the French Revolution|bicycles|
cooking rice|the human heart|vaccines|gravity|honey bees|the Roman Empire|electricity|the moon|
climate change|computer viruses|chess|jazz music|impressionist painting|the stock market|inflation|
sleep|coffee|the printing press|earthquakes|dinosaurs|the Silk Road|recycling|solar panels|whales|
prime numbers|fractions|the Pythagorean theorem|machine learning|databases|the internet|batteries|
healthy eating|running a marathon|learning a language|writing a letter|public speaking|gardening|
a lighthouse keeper|a lost dog|a young inventor|a rainy afternoon|an old clock|a robot|a dragon|
a journey by train|two friends|a secret garden|winter in the mountains|a small village|the sea|
time management|job interviews|saving money|friendship|courage|kindness|teamwork|patience|
Paris|Tokyo|Egypt|Brazil|Antarctica|the Amazon rainforest|the Great Wall of China|Shakespeare|
Marie Curie|Isaac Newton|Leonardo da Vinci|the Olympic Games|democracy|the United Nations|tea|
bread|elephants|penguins|oak trees|glaciers|rainbows|thunderstorms|the speed of light|atoms|DNA|
antibiotics|the steam engine|airplanes|bridges|poetry|the piano|photography|museums|libraries"""
_REQUESTS = """Explain {} in simple terms.|Write a short story about {}.|Tell me about {}.|
What are the most important facts about {}?|Write a poem about {}.|Give me three tips about {}.|
Why does {} matter?|Describe {} to a child.|What is the history of {}?|List five ideas about {}.|
Write an email to a friend about {}.|What are the advantages and disadvantages of {}?|
How would you teach a class about {}?|Write a paragraph about {}.|Ask me a question about {}.|
Write a dialogue between two people about {}.|What should I know about {}?|Summarize {}.|
Write a title and an introduction for an article about {}.|Compare {} with something similar."""
_TASKS = """Summarize this text:\n\n{}|Continue this text:\n\n{}|What is this text about?\n\n{}|
Rewrite this text in simple words:\n\n{}|Write three questions about this text:\n\n{}|
Who is mentioned in this text?\n\n{}|{}"""
_CODE = """Explain what this Python code does:\n\n{}|Complete this Python code:\n\n{}|
Write a test for this Python code:\n\n{}|Add comments to this Python code:\n\n{}"""


def _choices(packed: str) -> list[str]:
    return [entry.strip("\n") for entry in packed.replace("|\n", "|").split("|")]


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


class Prompts:
    """An endless, seeded mix of prompts: corpora, our own requests, and turns left to the model.

    Args:
        folder: Folder with `text/gsm8k_train.jsonl.gz`, `books_train`, `us_speeches` and
            `python_stdlib`.
        seed: Seed of the mix.

    Raises:
        FileNotFoundError: A corpus is missing.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        text = folder / "text"
        self._draw = random.Random(seed)
        self._problems = list(_rows(text / "gsm8k_train.jsonl.gz"))
        self._questions = [row["question"] for row in self._problems]
        prose = [row["text"] for row in _rows(text / "books_train.jsonl.gz")]
        speeches = [row["text"] for row in _rows(text / "us_speeches.jsonl.gz")]
        paragraphs = [" ".join(p.split()) for book in prose for p in book.split("\n\n")]
        paragraphs += [p.strip() for speech in speeches for p in speech.split("\n")]
        self._passages = [p for p in paragraphs if 120 <= len(p) <= 700]
        self._code = [
            chunk
            for row in _rows(text / "python_stdlib.jsonl.gz")
            for chunk in row["text"].split("\n\n\n")
            if 80 <= len(chunk) <= 600
        ]

    def corpora(self) -> list[str]:
        """Return all that the corpora hold, problems with their answers as chats."""
        chats = [
            f"<s>user\n{row['question']}</s>\n<s>assistant\n{row.get('answer', '')}</s>\n"
            for row in self._problems
        ]
        return [*chats, *self._passages, *self._code]

    def __call__(self) -> tuple[str, bool]:
        """Return the text to start from, and whether the user's turn comes next."""
        draw = self._draw
        kind = draw.random()
        if kind < 0.30:
            return SYSTEM + USER, True
        if kind < 0.38:
            source = self._passages if draw.random() < 0.8 else self._code
            words = draw.choice(source).split(" ")
            return " ".join(words[: draw.randint(8, 40)]), False
        if kind < 0.53:
            request = draw.choice(self._questions)
        elif kind < 0.75:
            request = draw.choice(_choices(_REQUESTS)).format(draw.choice(_choices(_TOPICS)))
        elif kind < 0.92:
            request = draw.choice(_choices(_TASKS)).format(draw.choice(self._passages))
        else:
            request = draw.choice(_choices(_CODE)).format(draw.choice(self._code))
        return f"{SYSTEM}{USER}{request}<|im_end|>\n{ASSISTANT}", False


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


def sample_text(
    model: Any,
    tokenizer: Any,
    prompts: Prompts,
    *,
    seconds: float,
    rows: int,
    length: int,
    seed: int,
) -> tuple[list[str], Tensor]:
    """Return the texts, and the token ids of the last batch, whose texts are held out."""
    device = model.device
    sampler = BatchSampler(model, rows, length, compiled=device.type == "cuda")
    turns = [tokenizer(text).input_ids for text in ("\n" + ASSISTANT, "\n" + USER)]
    draw = random.Random(seed)
    started, tokens = time.perf_counter(), 0
    futures: list[Future[list[str]]] = []
    held = torch.empty(0)
    slowest = 0.0
    with ThreadPoolExecutor(1) as pool:
        while True:
            begun = time.perf_counter()
            chosen = [prompts() for _ in range(rows)]
            ids = [e.ids for e in tokenizer.backend_tokenizer.encode_batch([c[0] for c in chosen])]
            heat = torch.tensor([draw.choice((0.0, 0.0, 0.7, 1.0, 1.0)) for _ in range(rows)])
            out = sampler.sample(ids, torch.tensor([c[1] for c in chosen]), heat, turns).cpu()
            tokens += out.numel()
            elapsed = time.perf_counter() - started
            if len(futures) > 0:  # The first batch includes compilation.
                slowest = max(slowest, time.perf_counter() - begun)
            _logger.info("sampled %.1f M tokens, %.0f/s", tokens / 1e6, tokens / elapsed)
            last = elapsed + slowest > seconds
            if not (last and futures):
                futures.append(pool.submit(as_text, tokenizer, out))
            if last:
                held = out
                break
        texts = [text for future in futures for text in future.result()]
    return texts, held


def write_texts(path: Path, texts: Iterable[str]) -> None:
    """Append texts to a gzipped file of JSON lines, one object with `text` a line."""
    with gzip.open(path, "at", encoding="utf-8") as file:
        for text in texts:
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")


def read_texts(paths: Iterable[Path]) -> list[str]:
    """Return the texts of files that `write_texts` wrote."""
    return [row["text"] for path in paths for row in _rows(path)]


def split(texts: list[str], seed: int) -> tuple[list[str], list[str]]:
    """Return texts to learn from, and a twentieth that is held out."""
    shuffled = list(texts)
    random.Random(seed).shuffle(shuffled)
    count = max(len(shuffled) // 20, 1)
    return shuffled[count:], shuffled[:count]


def as_ids(tokenizer: Any, text: str) -> list[int]:
    """Return the target's tokens of a text that `as_text` returned."""
    marked = text.replace("<s>", "<|im_start|>").replace("</s>", "<|im_end|>")
    ids: list[int] = tokenizer.backend_tokenizer.encode(marked).ids
    return ids


@click.command()
@click.option("--gguf", type=click.Path(dir_okay=False, path_type=Path), required=True)
@click.option("--data", type=click.Path(file_okay=False, path_type=Path), required=True)
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), required=True)
@click.option("--minutes", type=float, default=60.0, help="Time in all, about.")
@click.option("--rows", type=int, default=192, help="Rows sampled at once.")
@click.option("--length", type=int, default=384, help="Tokens a row.")
@click.option("--seed", type=int, default=0)
def main(
    gguf: Path, data: Path, output: Path, minutes: float, rows: int, length: int, seed: int
) -> None:
    """Let SmolLM2 write chats, and append them to a file, batch by batch."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    torch.manual_seed(seed)
    target, tokenizer = smollm2.load(gguf, torch.bfloat16)
    target.to("cuda" if torch.cuda.is_available() else "cpu")
    begun, batch = time.perf_counter(), 0
    prompts = Prompts(data, seed)
    while time.perf_counter() - begun < 60 * minutes:
        _, ids = sample_text(
            target, tokenizer, prompts, seconds=0, rows=rows, length=length, seed=seed + batch
        )
        write_texts(output, as_text(tokenizer, ids))
        batch += 1


if __name__ == "__main__":
    main()
