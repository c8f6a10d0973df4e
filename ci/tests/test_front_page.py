"""The front page's figures are those of the stored results."""

import front_page
import pytest


def test_the_table_is_what_the_results_say() -> None:
    text = (front_page.ROOT / "README.md").read_text(encoding="utf-8")
    assert front_page.filled(text) == text, "run `make figures`"


def test_a_figure_that_was_edited_by_hand_is_noticed() -> None:
    text = (front_page.ROOT / "README.md").read_text(encoding="utf-8")
    assert front_page.filled(text.replace(" on two GPUs at ", " on two GPUs at 9")) == text


def test_a_page_without_a_place_is_refused() -> None:
    with pytest.raises(ValueError, match="must hold `<!-- table: figures -->`"):
        front_page.filled("# fourfold")


def test_a_result_that_is_missing_or_double_is_an_error() -> None:
    with pytest.raises(LookupError, match="0 of nobody"):
        front_page.median("mole", "decode_h200", "nobody", "over dense")
    with pytest.raises(LookupError, match="2 of MoE-10E resident"):
        front_page.median("mole", "decode_h200", "MoE-10E resident", "over dense")
