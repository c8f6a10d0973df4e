"""The tables of the README and the documentation are what the stored figures say."""

import importlib.util
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "tables.py"


@pytest.fixture(scope="module")
def tables():
    spec = importlib.util.spec_from_file_location("tables", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_pages_hold_what_the_stored_figures_say(tables):
    for page in tables.PAGES:
        text = page.read_text("utf-8")
        assert "<!-- table: " in text
        assert tables.filled(text) == text, f"run `python {SCRIPT.name} write`"


def test_a_table_that_was_edited_by_hand_is_noticed(tables):
    text = tables.PAGES[0].read_text("utf-8")
    wrong = text.replace("| `tli`, lookahead 4 |", "| `tli`, lookahead 4 | 9", 1)
    assert tables.filled(wrong) == text
