"""An HTTP server that speaks OpenAI's completions and chat API."""

from .app import create_app
from .engine import Engine

__all__ = ["Engine", "create_app"]
