"""What the target is asked when it writes the text that drafters learn from.

None of it is in the benchmarks' sets of prompts: problems come from the training part of GSM8K,
passages from books, speeches and the Declaration of Human Rights, code from Python's library.
"""

from __future__ import annotations

import gzip
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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
_QUESTIONS = """what is {}?|who discovered {}?|when did people first learn about {}?|
why is {} important?|where can you find {}?|how does {} work?|how many kinds of {} are there?|
what is {} made of?|who is the most famous person in the history of {}?|what causes {}?|
what is the origin of {}?|what do {} and bread have in common?|
where does the word {} come from?|name a book about {}."""
_ABOUT = """Who is {}?|What is {}?|What happened to {}?|What does this text say about {}?|
Where was {}?|Why is {} mentioned?"""
_LANGUAGES = {"deu": "German", "fra": "French", "spa": "Spanish", "ita": "Italian"}
_CODE = """Explain what this Python code does:\n\n{}|Complete this Python code:\n\n{}|
Write a test for this Python code:\n\n{}|Add comments to this Python code:\n\n{}"""


def _choices(packed: str) -> list[str]:
    return [entry.strip("\n") for entry in packed.replace("|\n", "|").split("|")]


def json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a gzipped file of JSON lines."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


class Prompts:
    """An endless, seeded mix of prompts: corpora, our own requests, and turns left to the model.

    Args:
        folder: Folder with `text/gsm8k_train.jsonl.gz`, `books_train`, `us_speeches`, `udhr` and
            `python_stdlib`.
        seed: Seed of the mix.

    Raises:
        FileNotFoundError: A corpus is missing.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        def corpus(name: str) -> list[dict[str, Any]]:
            return list(json_lines(folder / "text" / f"{name}.jsonl.gz"))

        self._draw = random.Random(seed)
        self._problems = corpus("gsm8k_train")
        paragraphs = [
            " ".join(p.split()) for row in corpus("books_train") for p in row["text"].split("\n\n")
        ]
        paragraphs += [p.strip() for row in corpus("us_speeches") for p in row["text"].split("\n")]
        self._passages = [p for p in paragraphs if 120 <= len(p) <= 700]
        self._foreign = [
            (_LANGUAGES[row["lang"][:3]], line.strip())
            for row in corpus("udhr")
            if row["lang"][:3] in _LANGUAGES
            for line in row["text"].split("\n")
            if 40 <= len(line.strip()) <= 400
        ]
        self._code = [
            chunk
            for row in corpus("python_stdlib")
            for chunk in row["text"].split("\n\n\n")
            if 80 <= len(chunk) <= 600
        ]

    def seed(self, seed: int) -> None:
        """Begin the mix of another seed."""
        self._draw = random.Random(seed)

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
        if kind < 0.24:
            return SYSTEM + USER, True
        if kind < 0.32:
            source = self._passages if draw.random() < 0.8 else self._code
            words = draw.choice(source).split(" ")
            return " ".join(words[: draw.randint(8, 40)]), False
        return f"{SYSTEM}{USER}{self._request(kind)}<|im_end|>\n{ASSISTANT}", False

    def _request(self, kind: float) -> str:
        """Return a user's turn; `kind` between 0.32 and 1 says of what kind."""
        draw = self._draw
        if kind < 0.45:
            return str(draw.choice(self._problems)["question"])
        if kind < 0.61:
            return draw.choice(_choices(_REQUESTS)).format(draw.choice(_choices(_TOPICS)))
        if kind < 0.70:
            return draw.choice(_choices(_QUESTIONS)).format(draw.choice(_choices(_TOPICS)))
        if kind < 0.78:
            return draw.choice(_choices(_TASKS)).format(draw.choice(self._passages))
        if kind < 0.92:
            return self._about_passages()
        if kind < 0.96 and self._foreign:
            language, line = draw.choice(self._foreign)
            return f"Translate {language} to English: {line}"
        return draw.choice(_choices(_CODE)).format(draw.choice(self._code))

    def _about_passages(self) -> str:
        """Return some passages that follow each other, to sum up or with a question on them."""
        first = self._draw.randrange(len(self._passages))
        chosen: list[str] = []
        for passage in self._passages[first : first + 4]:
            if chosen and sum(map(len, chosen)) + len(passage) > 900:
                break
            chosen.append(passage)
        text = "\n".join(chosen)
        names = re.findall(r"(?<=[a-z,] )[A-Z][a-z]{3,}", text)
        if not names or self._draw.random() < 0.5:
            return f"Summarize: {text}"
        return f"{text}\n{self._draw.choice(_choices(_ABOUT)).format(self._draw.choice(names))}"
