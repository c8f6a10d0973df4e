"""A web page: a prompt and some concepts in, the picture and a map of every concept out."""

from __future__ import annotations

import socket
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch

from .adapters import adapter_for
from .observer import ConceptAttention

if TYPE_CHECKING:
    from PIL.Image import Image

SIDE = 512  # small pictures are shown at least this large
_ABOUT = """# Concept maps
Where in the picture is each concept? The words need not stand in the prompt. A map compares the
given words with each other, so name the background too."""


def draw(
    pipe: Any, prompt: str, concepts: str, seed: int = 0, steps: int = 12, guidance: float = 3.0
) -> tuple[Image, list[tuple[Image, str]]]:
    """Generate a picture and return it with named overlays of its concepts.

    Args:
        pipe: A diffusers pipeline that makes pictures.
        prompt: What to generate.
        concepts: Words, separated by commas.
        seed: Seed of the noise, drawn on the CPU.
        steps: Denoising steps.
        guidance: Strength of classifier-free guidance; only the embedded model takes it.

    Raises:
        ValueError: A field is empty, or a word is unknown to the embedded model.
    """
    from .demo.model import READING, DemoPipeline
    from .demo.run import check_words, generate

    words = [word.strip() for word in concepts.split(",") if word.strip()]
    if not prompt.strip() or not words:
        raise ValueError("Type a prompt, and at least one concept.")
    embedded = isinstance(pipe, DemoPipeline)
    if embedded:
        check_words(words)
    settings = READING if embedded else {}
    with ConceptAttention(pipe, words, **settings) as observer:
        if embedded:
            picture = generate(pipe, prompt, int(seed), int(steps), guidance)
        else:
            noise = torch.Generator().manual_seed(int(seed))
            picture = pipe(prompt, num_inference_steps=int(steps), generator=noise).images[0]
    maps = observer.heatmaps()
    scale = max(1, SIDE // max(picture.size))
    shown = picture.resize((picture.width * scale, picture.height * scale), 0)
    return shown, [(maps[word].overlay(shown), word) for word in words]


def build(pipe: Any) -> Any:
    """Return the page for a pipeline, a `gradio.Blocks`.

    Raises:
        ValueError: The pipeline cannot be observed, or gradio is not installed.
    """
    adapter_for(getattr(pipe, "transformer", None))
    if find_spec("gradio") is None:
        raise ValueError("the page needs gradio: pip install 'conceptattention[app]'.")
    gradio: Any = import_module("gradio")
    from .demo.model import DemoPipeline
    from .demo.run import PROMPT, content_words

    embedded = isinstance(pipe, DemoPipeline)
    prompt = PROMPT if embedded else "a cat on a wooden table by a window"
    concepts = content_words(PROMPT) if embedded else ["cat", "table", "window"]

    def run(prompt: str, concepts: str, seed: float, steps: float) -> Any:
        try:
            return draw(pipe, prompt, concepts, int(seed), int(steps))
        except (ValueError, RuntimeError) as error:
            raise gradio.Error(str(error)) from error

    with gradio.Blocks(title="Concept maps", analytics_enabled=False) as page:
        gradio.Markdown(_ABOUT)
        with gradio.Row():
            with gradio.Column(scale=1):
                fields = [
                    gradio.Textbox(prompt, label="Prompt", lines=2),
                    gradio.Textbox(", ".join(concepts), label="Concepts, separated by commas"),
                    gradio.Number(0, label="Seed", precision=0),
                    gradio.Slider(1, 50, 12, step=1, label="Steps"),
                ]
                button = gradio.Button("Run", variant="primary")
                picture = gradio.Image(label="Picture", format="png", interactive=False)
            with gradio.Column(scale=2):
                gallery = gradio.Gallery(
                    label="Maps", format="png", columns=2, height=820, object_fit="contain"
                )
        # One run at a time: hooks of two observers on one model would hear each other.
        click = {"fn": run, "inputs": fields, "outputs": [picture, gallery]}
        button.click(**click, api_name="draw", concurrency_limit=1, concurrency_id="model")
        fields[0].submit(**click, api_name=False, concurrency_limit=1, concurrency_id="model")
    return page


def serve(pipe: Any, host: str, port: int, say: Callable[[str], None]) -> None:
    """Serve the page until it is interrupted.

    Args:
        pipe: The pipeline.
        host: Address to listen on.
        port: Port; 0 for any that is free.
        say: Receives the page's address.

    Raises:
        ValueError: As in `build`.
        OSError: The port is taken.
    """
    page = build(pipe)
    with socket.socket() as probe:  # gradio would look on through a hundred ports
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((host, port))
        port = probe.getsockname()[1]
    _, address, _ = page.launch(
        server_name=host, server_port=port, prevent_thread_lock=True, quiet=True, share=False,
        ssr_mode=False,
    )  # fmt: skip
    say(f"The page is at {address} (interrupt to stop).")
    page.block_thread()
