"""The upcycling script, end to end on the small model that ships with the package."""

import csv
import json

import pytest
import torch
from click.testing import CliRunner
from transformers import AutoTokenizer

from mole import DenseForCausalLM, MoleForCausalLM
from mole.bench.upcycle import held_out, main
from mole.demo import ASSETS
from mole.evaluation import window_losses
from mole.training import load_tokens

TEXT = ASSETS / "snippet.txt"
ARMS = ["continued", "experts", "experts-only"]


def invoke(output, *more):
    arguments = ["--base", ASSETS / "dense", "--tokenizer", ASSETS / "tokenizer", "--train", TEXT,
                 "--valid", TEXT, "--output", output, "--context", 32, "--windows", 12,
                 "--batch", 4, "--micro-batch", 2, "--lr", 1e-3, *more]  # fmt: skip
    return CliRunner().invoke(main, [str(a) for a in arguments], catch_exceptions=False)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    output = tmp_path_factory.mktemp("upcycling")
    done = invoke(
        output,
        "--steps",
        6,
        "--inner",
        64,
        "--every",
        3,
        "--formats",
        "fp32,nf3",
        "--expert-lr",
        3e-3,
        "--base-lr",
        5e-4,
    )
    assert done.exit_code == 0, done.output
    return output


@pytest.fixture(scope="module")
def base():
    return DenseForCausalLM.from_pretrained(ASSETS / "dense", dtype=torch.float32).eval()


def test_figures_are_those_of_the_weights(trained, base):
    report = json.loads((trained / "upcycling.json").read_text())
    assert list(report["models"]) == ["base", *ARMS]
    assert report["seen_tokens"] == 6 * 4 * 32
    settings = report["settings"]
    assert [settings[name] for name in ("lr", "base_lr", "expert_lr")] == [1e-3, 5e-4, 3e-3]
    assert report["experts"] == {"number": 2, "inner": 64, "layers": [0, 3]}
    assert report["untrained_difference"] < 1e-4
    vocab = base.config.vocab_size
    text = held_out(
        load_tokens([TEXT], vocab, AutoTokenizer.from_pretrained(ASSETS / "tokenizer")), 32, 12
    )
    models = {
        "base": base,
        "continued": DenseForCausalLM.from_pretrained(trained / "continued").eval(),
        "experts": MoleForCausalLM.from_pretrained(trained / "experts").eval(),
    }
    nats = {}
    for name, model in models.items():
        nats[name] = window_losses(model, text, 32).double().mean().item()
        found = report["models"][name]["validation"]
        assert found["nats"] == pytest.approx(nats[name], rel=1e-6), name
        assert found["tokens"] == 12 * 31
    with open(trained / "upcycling_windows.csv", encoding="utf-8") as file:
        windows = [{name: float(x) for name, x in row.items()} for row in csv.DictReader(file)]
    assert len(windows) == 12
    for name in nats:
        mean = sum(window[name] for window in windows) / 12
        assert mean == pytest.approx(nats[name], abs=1e-6), name
    gap = report["paired_differences"]["experts - continued"]["nats"]
    assert gap == pytest.approx(nats["experts"] - nats["continued"], abs=1e-6)
    for arm in ARMS[1:]:
        table = report["tables"][arm]
        assert table["fp32"]["over_experts"]["nats"] == pytest.approx(0, abs=1e-5)
        assert table["nf3"]["largest_logit_difference"] > 1e-4
    assert "continued" not in report["tables"]
    assert (trained / "upcycling.png").read_bytes()[:4] == b"\x89PNG"


def test_the_base_may_learn_more_slowly_beside_experts(trained):
    with open(trained / "upcycling_log.csv", encoding="utf-8") as file:
        rates = {row["arm"]: float(row["lr"]) for row in csv.DictReader(file) if row["step"] == "1"}
    assert rates["continued"] == pytest.approx(2 * rates["experts"])


def test_arms_begin_alike_and_part(trained):
    with open(trained / "upcycling_log.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    losses = {arm: [float(r["loss"]) for r in rows if r["arm"] == arm] for arm in ARMS}
    assert {len(found) for found in losses.values()} == {6}
    for arm in ARMS[1:]:
        assert losses[arm][0] == pytest.approx(losses["continued"][0], abs=1e-5)
        assert losses[arm][-1] != losses["continued"][-1]


def test_experts_alone_leave_the_backbone_as_it_was(trained, base):
    before = base.state_dict()
    frozen = MoleForCausalLM.from_pretrained(trained / "experts-only").state_dict()
    free = MoleForCausalLM.from_pretrained(trained / "experts").state_dict()
    assert all(torch.equal(frozen[name], value) for name, value in before.items())
    assert not any(torch.equal(free[name], value) for name, value in before.items())
    for state in (frozen, free):
        added = [value for name, value in state.items() if name.endswith("lookup.down_t")]
        assert [tuple(value.shape) for value in added] == [(2 * 64, 128)] * 2
        assert all(value.any() for value in added)


def test_minutes_lower_the_steps(tmp_path):
    done = invoke(tmp_path, "--arms", "experts", "--minutes", 0.01, "--steps", 10_000)
    assert done.exit_code == 0, done.output
    steps = json.loads((tmp_path / "upcycling.json").read_text())["settings"]["steps"]
    assert 1 <= steps < 500


def test_held_out_windows_are_spread_evenly():
    tokens = torch.arange(105)
    assert held_out(tokens, 10, None).tolist() == list(range(100))
    assert held_out(tokens, 10, 20).tolist() == list(range(100))
    some = held_out(tokens, 10, 4).view(4, 10)
    assert some[:, 0].tolist() == [0, 20, 50, 70]
    assert (some - some[:, :1]).tolist() == [list(range(10))] * 4


@pytest.mark.parametrize("arms", ["base", "experts,experts", "continued,frozen"])
def test_unknown_arms_are_refused(tmp_path, arms):
    done = invoke(tmp_path, "--arms", arms)
    assert done.exit_code == 1
    assert f"must be among continued, experts, experts-only; got '{arms}'" in done.output
