"""The benchmarks run from end to end on the CPU, and their checks can fail."""

import importlib
import importlib.util
import re
from pathlib import Path

import pytest
import torch

from adasplash import adasplash
from adasplash.testing import oracle_attention, oracle_weights, random_inputs
from fourfold_common import Results

FOLDER = Path(__file__).parents[1] / "benchmarks"


def load(name):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def script():
    return load("bench_attention")


def test_the_grid_is_measured_once_and_drawn(script, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    tiny = [
        "--output", str(tmp_path), "--lengths", "256", "--dims", "16", "--densities", "0.5", "1",
        "--tokens", "256", "--rep", "1", "--device", "cpu",
    ]  # fmt: skip
    script.main([*tiny, "--budget", "0.001"])
    assert not (tmp_path / "attention_grid.json").exists()
    script.main(tiny)
    cases = Results.load(tmp_path / "attention_grid.json").cases
    ours = [c for c in cases if c["provider"] == "adasplash"]
    assert len(ours) == 2 * 2 * 2  # gains, causal or not, forward and with backward
    assert {c["metric"] for c in ours} == {"forward", "forward + backward"}
    assert all(0 < c["error"] < 1e-2 for c in cases)
    density = {(c["parameters"]["causal"], c["parameters"]["asked"]): c["parameters"]["density"]
               for c in ours}  # fmt: skip
    assert density[True, 0.5] < density[True, 1.0] == 1
    assert all(c["parameters"]["weights"] < c["parameters"]["density"] for c in ours)
    assert (tmp_path / "attention_crossover.png").stat().st_size > 10_000
    capsys.readouterr()
    script.main(tiny)
    assert "adasplash, {" not in capsys.readouterr().out  # nothing was measured again
    assert Results.load(tmp_path / "attention_grid.json").cases == cases


@pytest.mark.parametrize("causal", [True, False])
def test_sampled_rows_check_output_and_all_gradients(script, causal):
    q, k, v = random_inputs(1, 2, 2, 150, 150, 16)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    grad = script.sampled_grad(v)
    output = adasplash(*leaves, is_causal=causal, backend="reference")
    found = [output.detach(), *torch.autograd.grad(output, leaves, grad)]
    assert script.worst_error(q, k, v, grad, found, causal, oracle_attention) < 1e-4
    for place in range(4):
        wrong = [x.clone() for x in found]
        wrong[place][0, 0, 0] += 1
        assert script.worst_error(q, k, v, grad, wrong, causal, oracle_attention) > 1e-2
        wrong[place][0, 0, 0] = torch.nan
        assert not script.worst_error(q, k, v, grad, wrong, causal, oracle_attention) < 1


def test_shares_count_what_causality_leaves(script):
    q, k, v = random_inputs(1, 2, 2, 150, 150, 16)
    assert script.share(script.blocks_of(q, k, v, True), True) == 1
    k[:, :, 64:128] = 0
    q[:, :, 64:], k[:, :, :64] = 20.0, 20.0  # later queries look at the first block only
    weights = oracle_weights(q, k, True)
    assert weights[:, :, 64:, 64:128].abs().max() == 0
    holds = [weights[:, h : h + 1, i : i + 64, j : j + 64].any()
             for h in range(2) for i in (0, 64, 128) for j in range(0, i + 1, 64)]  # fmt: skip
    active = script.blocks_of(q, k, v, True)
    assert script.share(active, True) == pytest.approx(sum(map(int, holds)) / 12)
    assert script.share(active, True, 2) == pytest.approx(2 / 3)  # all but the last on the diagonal
    assert script.share(active, False) == pytest.approx(sum(map(int, holds)) / 18)
    rows = torch.cat([torch.arange(part.start, part.stop) for part in script.runs_of(150)])
    want = (weights[0, 0, rows] > 0).sum() / (rows + 1).sum()
    assert script.weights_above_zero(q, k, True) == pytest.approx(float(want))


def test_blocks_of_the_kernels_are_those_that_hold_weight(script):
    q, k, v = script.clustered_inputs(1, 1, 700, 16, 8.0, dtype=torch.float16, device="cpu")
    found, want = (blocks(q, k, v, True) for blocks in (script.recorded_blocks, script.blocks_of))
    assert found.shape == want.shape == (1, 1, 11, 11)
    assert (found | ~want).float().mean() > 0.98  # what rounds may leave a weight of 1e-8
    assert 0 < found.float().mean() < 1.05 * want.float().mean()


def test_inputs_are_searched_for_a_density(script, tmp_path):
    options = script.argparse.Namespace(
        budget=None, output=tmp_path, name="x", tokens=512, inputs="topics"
    )
    bench = script.Bench(options, torch.device("cpu"))
    grid = script.Grid(16, 512, True)
    gains = [bench.gain(grid, density) for density in (0.01, 0.7, 1.0)]
    assert gains == sorted(gains, reverse=True)
    assert (gains[0], gains[-1]) == (script.GAIN[1], 0.0)
    found = [script.share(script.blocks_of(*bench.inputs(grid, gain), True), True)
             for gain in gains[1:]]  # fmt: skip
    assert found == pytest.approx([0.7, 1.0], abs=0.05)


def test_local_heads_hold_the_diagonal_and_the_first_block(script):
    shape = (1, 2, 512, 16)
    q, k, _ = script.local_inputs(*shape, 8.0, dtype=torch.float32, device="cpu", reach=32)
    active = script.blocks_of(q, k, k, True)[0].double()
    assert active.diagonal(dim1=1, dim2=2).all()
    assert active[:, :, 0].mean() > 0.8
    assert active[:, 4:, 1:3].mean() < 0.2
    loose = script.local_inputs(*shape, 0.1, dtype=torch.float32, device="cpu", reach=32)
    assert script.share(script.blocks_of(*loose, True), True) == 1


def test_crossover_is_interpolated_in_the_logarithms(script):
    assert script.crossover([(0.01, 4.0), (0.1, 2.0), (0.4, 0.5)]) == pytest.approx(0.2)
    assert script.crossover([(0.1, 0.9), (1.0, 0.5)]) is None


def test_options_are_checked_and_timed(tmp_path, capsys, monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    script = load("bench_options")
    tiny = ["--output", str(tmp_path), "--length", "64", "--tokens", "128", "--device", "cpu"]
    names = ["none", "dropout", "packed", "padding", "shared keys"]
    script.main([*tiny, "--rep", "0.1", "--options", *names])
    cases = Results.load(tmp_path / "options.json").cases
    ours = {c["parameters"]["option"] for c in cases if c["provider"] == "adasplash"}
    assert ours == set(names)
    assert all(c["error"] < 1e-2 for c in cases if c["parameters"]["option"] != "dropout")
    assert "FlexAttention" in capsys.readouterr().out
    # The same by a process for every option, as on a GPU.
    bench = script.Bench(
        script.argparse.Namespace(output=tmp_path / "more", options=["none"]), "cpu"
    )
    few = [*tiny[2:], "--rep", "0.1"]
    assert script.side_by_side(bench, few, 60.0) == []
    assert len(bench.results.cases) == len(Results.load(tmp_path / "more/options.json").cases) == 4
    # A softmax output of another option is told apart, and so is a wrong head of ours.
    bench = script.Bench(
        script.argparse.Namespace(
            budget=None, output=tmp_path, tokens=128, length=64, dim=64, gain=1.0, rep=1
        ),
        torch.device("cpu"),
    )
    (_, ours, chosen, heads, _), (_, math, *_), *_ = bench.cases("alibi")
    plain = next(bench.cases("none"))[2]
    assert script.soft_error(chosen, *heads, math(*heads)) < 1e-2
    assert script.soft_error(plain, *heads, math(*heads)) > 1e-2
    leaves = [x.requires_grad_() for x in heads]
    output = ours(*leaves)
    found = [output, *torch.autograd.grad(output.sum(), leaves)]
    grad = torch.ones_like(output)
    assert script.our_error(chosen, leaves, grad, found) < 1e-2
    found[2] = 2 * found[2]
    assert script.our_error(chosen, leaves, grad, found) > 0.5


def test_errors_are_measured_and_those_too_large_are_named(tmp_path, monkeypatch):
    script = load("bench_errors")
    name = "1 x 77, size 80"
    one = ["--output", str(tmp_path), "--workers", "1", "--cases", name, "--dtypes", "float32"]
    script.main([*one, "--device", "cpu"])
    ours, plain, ratio = Results.load(tmp_path / "errors.json").cases
    assert 0 < ours["median"] < 1e-6
    parts = {what: plain["parameters"][what] for what in ("output", "dq", "dk", "dv")}
    assert plain["median"] == max(parts.values()) < 1e-6
    assert ratio["median"] == max(ours["parameters"][what] / x for what, x in parts.items())
    real = script.errors

    def wrong(*arguments):
        found = real(*arguments)
        found["adasplash"]["dk"] = float("nan")
        return found

    monkeypatch.setattr(script, "errors", wrong)
    with pytest.raises(SystemExit, match="over what is allowed"):
        script.main([*one, "--device", "cpu"])


def test_decoding_is_checked_and_timed(tmp_path):
    script = load("bench_decode")
    script.main(["--output", str(tmp_path), "--keys", "128", "--dim", "16", "--rep", "0.1",
                 "--device", "cpu"])  # fmt: skip
    cases = Results.load(tmp_path / "decode.json").cases
    assert len(cases) == len(script.KEYS) * (7 + 2)
    assert all(c["error"] < 5e-3 for c in cases)
    by_noise = {c["parameters"]["noise"]: c["parameters"]["near_blocks"] for c in cases}
    assert 0 < by_noise[0.1] <= 1


@pytest.fixture
def pages(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module("pages")


def test_the_pages_show_what_is_stored(pages, monkeypatch):
    tables, sentences = (importlib.import_module(name) for name in ("tables", "sentences"))
    texts = {page: page.read_text(encoding="utf-8") for page in pages.PAGES}
    shown = [found[1] for text in texts.values() for found in pages.MARKED.findall(text)]
    assert sorted(shown) == sorted(tables.TABLES)
    together = "\n".join(texts.values())
    for sentence, _ in sentences.SENTENCES:
        assert sentences.pattern_of(sentence).search(together), sentence
    for page, text in texts.items():
        assert pages.filled(text) == text, page
    monkeypatch.setattr(tables, "cases", lambda *_, **__: [])
    assert tables.densities(0.1).count("\n") == 1  # nothing stored, nothing shown


def test_figures_of_sentences_are_written_over_line_breaks(pages, monkeypatch):
    sentences = importlib.import_module("sentences")
    monkeypatch.setattr(sentences, "SENTENCES", [("takes {} ms, of {}.", lambda: ["2.5", "7"])])
    assert sentences.said("It\ntakes 1,000.1\nms, of 8.") == "It\ntakes 2.5\nms, of 7."
    assert sentences.said("It takes no ms, of 8.") == "It takes no ms, of 8."


# Figures of settings, goals, names and versions; all others are measured.
SETTINGS = (
    r"alpha\s\d\.\d+|\d\.\d-entmax|adasplash 0\.2\.2|package, 0\.2\.2|torch 2\.11|Triton 3\.6"
    r"|entmax 1\.3|goal.{0,20}\b\d+(\.\d+)?|density of (about )?0\.\d+|At about 0\.1"
    r"|from 1\.01 to 1\.5|2\.6 M|256 MiB at most"
)


@pytest.mark.parametrize(
    ("page", "begin", "end"),
    [
        ("packages/adasplash/benchmarks/README.md", "# Measurements", "the end"),
        ("packages/adasplash/README.md", "## Limits", "## Differences"),
        ("docs/adasplash/index.md", "## What to expect", "## Limits"),
    ],
)
def test_no_figure_stands_outside_of_what_is_written_from_results(pages, page, begin, end):
    sentences = importlib.import_module("sentences")
    text = (pages.ROOT / page).read_text(encoding="utf-8")
    text = text[text.index(begin) :].split(end)[0]
    text = pages.MARKED.sub("", text)
    for sentence, _ in sentences.SENTENCES:
        text = sentences.pattern_of(sentence).sub("", text)
    text = re.sub(SETTINGS, "", text.replace("\n", " "))
    left = re.findall(r".{30}\d+\.\d+.{20}|.{30}\d (?:ms|s|MiB|x)\b", text)
    assert not left
