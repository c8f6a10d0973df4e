"""The models that come with the package, and the target that the demo takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from . import smollm2

ASSETS = Path(__file__).parent / "assets"

# The form of SmolLM2's chats in the small target's own marks.
_CHAT_TEMPLATE = (
    "{% if messages[0].role != 'system' %}<s>system\nYou are a helpful AI assistant named SmolLM, "
    "trained by Hugging Face</s>\n{% endif %}{% for message in messages %}<s>{{ message.role }}\n"
    "{{ message.content }}</s>\n{% endfor %}{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


def load_model(name: str) -> tuple[Any, Any]:
    """Return one of the shipped models, `"target"` or `"drafter"`, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as transformers_logging

    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        folder = ASSETS / name
        if not (folder / "model.safetensors").is_file():
            raise FileNotFoundError(f"the package's {name} is missing: no weights in {folder}")
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        if name == "target":
            tokenizer.chat_template = _CHAT_TEMPLATE
        return model.eval(), tokenizer
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def load_target(embedded: bool = False) -> tuple[str, Any, Any, list[str]]:
    """Return the target's name, model, tokenizer, and what the user should know about it.

    Args:
        embedded: Use the small target of the package even where SmolLM2 is installed.
    """
    path = None if embedded else smollm2.find_gguf()
    if path is not None:
        try:
            return ("SmolLM2-135M-Instruct", *smollm2.load(path), [])
        except ImportError as error:
            notes = [f"{error}; the small target of this package is used."]
    elif embedded:
        notes = []
    else:
        notes = [
            "SmolLM2-135M-Instruct is not installed; the small target of this package is used. "
            f"To get it: {smollm2.HOW_TO_GET}"
        ]
    notes.append(
        "The small target (1.6 M parameters) is smaller than the drafter: it shows exactness, "
        "and no speed."
    )
    return ("small target", *load_model("target"), notes)


def chat_ids(tokenizer: Any, question: str) -> torch.Tensor:
    """Return the ids of a chat with one question, shape `(1, length)`."""
    messages = [{"role": "user", "content": question}]
    chat = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
    return torch.tensor([list(chat["input_ids"])])
