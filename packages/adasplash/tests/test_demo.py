"""The demonstration, its parts, and the command line."""

import json
import subprocess
import sys

import pytest
import torch
from click.testing import CliRunner

from adasplash.cli import main

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")


def test_sparsity_of_a_matrix_counted_by_hand():
    from adasplash.demo.run import measure_sparsity

    weights = torch.zeros(1, 5, 5)
    weights[0, :, 0] = 1.0  # five of fifteen causal weights, in the blocks (0, 0), (1, 0), (2, 0)
    weights[0, 0, 4] = 9.0  # above the diagonal: does not count
    (found,) = measure_sparsity(weights, block=2)
    assert found.zero_weights == pytest.approx(10 / 15)
    assert found.empty_blocks == pytest.approx(3 / 6)


def test_sparsity_wants_square_weights():
    from adasplash.demo.run import measure_sparsity

    with pytest.raises(ValueError, match="square; got 2 rows and 3 columns"):
        measure_sparsity(torch.zeros(1, 2, 3))


def test_recorded_maps_are_what_the_model_attends_with():
    from adasplash.demo.run import attention_maps, load

    model, tokenizer = load("entmax")
    ids = torch.tensor(tokenizer("The whale rose from the water.").input_ids)
    with torch.no_grad():
        before = model(ids[None]).logits
    maps = attention_maps("entmax", model, ids)
    assert model.config._attn_implementation == "adasplash"
    assert sorted(maps) == [0, 1, 2, 3, 4]
    for weights in maps.values():
        assert torch.allclose(weights.sum(-1), torch.ones(6, len(ids)), atol=1e-5)
        assert weights.triu(1).eq(0).all()
    with torch.no_grad():
        assert torch.equal(model(ids[None]).logits, before)


def test_the_demo_writes_pictures_and_figures(tmp_path, monkeypatch):
    from adasplash.demo import run as demo

    monkeypatch.setattr(demo, "_WINDOWS", 1)
    losses, zeros, texts = demo.run(tmp_path, new_tokens=3, progress=False)
    assert {case["provider"] for case in losses.cases} == {"entmax", "softmax"}
    assert len(zeros.cases) == 5 * 6 * 2
    assert all(0 <= case["median"] <= 100 for case in zeros.cases)
    assert all(text.startswith(demo.PROMPT) and text != demo.PROMPT for text in texts.values())
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [
        *(f"attention_layer_{i}.png" for i in range(5)),
        "losses.json",
        "sparsity.json",
    ]
    assert json.loads((tmp_path / "losses.json").read_text())["seed"] == 0


def test_the_shipped_figures_belong_to_the_shipped_models():
    from importlib.resources import files

    record = json.loads((files("adasplash.demo") / "assets" / "training.json").read_text())
    from adasplash.demo.run import load

    for kind, stored in record["models"].items():
        assert sum(p.numel() for p in load(kind)[0].parameters()) == stored["parameters"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "--prompt", " "], "Error: `prompt` must hold some text; got an empty one."),
        (["demo", "--prompt", "word " * 600], "must fit the context of 512 tokens"),
        (["demo", "--new-tokens", "0"], "Error: Invalid value for '--new-tokens'"),
        (["nothing"], "Error: No such command 'nothing'."),
    ],
)
def test_mistakes_are_one_line_and_status_2(arguments, message, tmp_path):
    options = ["--output", str(tmp_path)] if arguments[0] == "demo" else []
    done = CliRunner().invoke(main, [*arguments, *options])
    assert done.exit_code == 2
    lines = [line for line in done.stderr.splitlines() if "adasplash demo:" not in line]
    assert len(lines) == 1
    assert message in lines[0]


def test_env_says_where_the_package_is_from():
    done = CliRunner().invoke(main, ["env", "--json"])
    report = json.loads(done.stdout)
    assert report["origin"].startswith("independent implementation")
    assert report["packages"]["torch"] == torch.__version__
    assert "origin: independent" in CliRunner().invoke(main, ["env"]).stdout


def test_help_lists_the_commands():
    done = subprocess.run(
        [sys.executable, "-m", "adasplash", "--help"], capture_output=True, text=True, check=True
    )
    assert "demo" in done.stdout
    assert "env" in done.stdout


def test_an_unknown_model_is_refused():
    from adasplash.demo.run import load

    with pytest.raises(ValueError, match="`kind` must be 'entmax' or 'softmax'; got 'other'"):
        load("other")


def test_importing_the_package_loads_no_heavy_library():
    """Triton alone comes along, through the counter of FLOPs, which wants formulas early."""
    code = (
        "import sys, torch.utils.flop_counter; before = set(sys.modules); import adasplash; "
        "loaded = {name.partition('.')[0] for name in set(sys.modules) - before}; "
        "print(sorted(loaded & {'triton', 'transformers', 'matplotlib'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_failure_below_is_one_line(monkeypatch):
    def fail():
        raise RuntimeError("no driver\nfound")

    monkeypatch.setattr("fourfold_common.environment_report", fail)
    result = CliRunner().invoke(main, ["env"])
    assert result.exit_code == 1
    assert result.output == "Error: RuntimeError: no driver found (option -v shows where)\n"
