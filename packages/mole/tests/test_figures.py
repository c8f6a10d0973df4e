"""The README's tables of decoding and of prompts are what the stored results say."""

import json
from pathlib import Path

import pytest

HOME = Path(__file__).parents[1]
DECODE = {
    "4 experts, nf4, pinned host memory": "MoLE-4E nf4 pinned",
    "4 experts, fp16, pinned host memory": "MoLE-4E fp16 pinned",
    "16 experts, fp16, pinned host memory": "MoLE-16E fp16 pinned",
    "4 experts, nf4, file in the page cache, 4,096 rows on the GPU": "MoLE-4E nf4 disk warm",
    "the same, page cache dropped, direct reads": "MoLE-4E nf4 disk cold",
    "4 experts, fp16, pageable host memory, as the authors' code has it": "MoLE-4E fp16 pageable",
    "mixture of 10 experts, top 2, all in GPU memory": "MoE-10E resident",
}
PREFILL = {
    "fp16, pinned host memory": "MoLE-4E fp16 pinned",
    "nf4, pinned host memory": "MoLE-4E nf4 pinned",
    "fp16, GPU memory": "MoLE-4E fp16 device",
    "fp16, pageable host memory, a row for every token, as the authors' code has it":
        "MoLE-4E fp16 pageable",
}  # fmt: skip


@pytest.mark.parametrize(
    ("file", "batches", "rows"),
    [("decode_h200", (1, 32), DECODE), ("prefill_h200", (1, 8), PREFILL)],
)
def test_tables_are_those_of_the_results(file, batches, rows):
    text = (HOME / "README.md").read_text(encoding="utf-8").replace("**", "")
    stored = json.loads((HOME / "benchmarks" / "results" / f"{file}.json").read_text("utf-8"))
    found = {
        (case["provider"], case["parameters"]["batch"]): case["median"]
        for case in stored["cases"]
        if case["metric"] == "over dense"
    }
    for name, provider in rows.items():
        (line,) = (line for line in text.splitlines() if line.startswith(f"| {name} |"))
        for batch, cell in zip(batches, line.split(" | ")[1:3], strict=True):
            cell = cell.removesuffix(" |")
            digits = len(cell.partition(".")[2])
            assert f"{found[provider, batch]:.{digits}f}" == cell, (name, batch)
