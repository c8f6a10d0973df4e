"""Runners over rows of unequal length give what the model gives for each row alone."""

import logging
import random

import pytest
import torch

from hetero_sd import linear, llama
from hetero_sd.graphs import GraphRunner
from hetero_sd.llama import LlamaRunner, why_not_llama
from hetero_sd.runners import (
    EagerRunner,
    OneByOneRunner,
    best_of,
    make_runner,
    why_not_one_cache,
)
from hetero_sd.testing import make_model

SIZE = 60


def random_model(kind="Llama", **options):
    import transformers

    fields = {
        "vocab_size": SIZE,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 256,
        "initializer_range": 0.3,
        "pad_token_id": 0,
    }
    if kind == "Mistral":
        fields["sliding_window"] = None
    if kind == "GPTNeoX":
        del fields["num_key_value_heads"], fields["head_dim"]
    config = getattr(transformers, f"{kind}Config")(**{**fields, **options})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return getattr(transformers, f"{kind}ForCausalLM")(config).eval()


def wander(runner, model, rows, seed):
    """Extend, crop and select at random; compare every answer with the model's own."""
    draw = random.Random(seed)
    held = [[] for _ in range(rows)]
    for step in range(14):
        feeds = [[draw.randrange(SIZE) for _ in range(draw.randint(1, 6))] for _ in held]
        if step and len(held) > 1 and draw.random() < 0.5:
            feeds[draw.randrange(len(held))] = []
        keep = [min(len(feed), draw.randint(0, 3)) for feed in feeds]
        found = runner.extend(feeds, keep)
        for row, (feed, k) in enumerate(zip(feeds, keep, strict=True)):
            held[row] += feed
            if k:
                wanted = model(torch.tensor([held[row]]), use_cache=False).logits[0, -k:]
                torch.testing.assert_close(found[row], wanted, atol=2e-5, rtol=1e-4)
        assert list(runner.lengths) == [len(ids) for ids in held]
        lengths = [max(1, len(ids) - draw.randint(0, 4)) for ids in held]
        runner.crop(lengths)
        held = [ids[:n] for ids, n in zip(held, lengths, strict=True)]
        if len(held) > 1 and draw.random() < 0.15:
            rows = sorted(draw.sample(range(len(held)), len(held) - 1))
            runner.select(rows)
            held = [held[row] for row in rows]


def graph_runner(model, rows):
    return GraphRunner(model, rows, 128)


@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize("kind", [EagerRunner, LlamaRunner, OneByOneRunner, graph_runner])
@torch.no_grad()
def test_rows_are_independent(kind, rows):
    model = random_model()
    for seed in range(3):
        wander(kind(model, rows), model, rows, seed)


@pytest.mark.parametrize("among", [None, torch.arange(1, SIZE, 3)])
@torch.no_grad()
def test_likeliest_ids_are_taken_on_the_device(among):
    """As the same runner's logits say, for rows of unequal length and prompts of any."""
    model, draw = random_model(), random.Random(0)
    runner, plain = graph_runner(model, 3), graph_runner(model, 3)
    for length in (30, 3, 1):
        feeds = [[draw.randrange(SIZE) for _ in range(draw.randint(1, length))] for _ in range(3)]
        feeds[1] = [] if length == 3 else feeds[1]
        counts = [4, 3, 1]
        written = runner.write(feeds, counts, among)()
        wanted = [[], [], []]
        for step in range(4):
            going = [feed if step < n else [] for feed, n in zip(feeds, counts, strict=True)]
            said = plain.extend(going, [int(bool(feed)) for feed in going])
            for row, logits in enumerate(said):
                if going[row]:
                    logits = logits[0] if among is None else logits[0, among]
                    best = int(logits.argmax())
                    wanted[row].append(best if among is None else int(among[best]))
            feeds = [ids[-1:] if step < len(ids) else [] for ids in wanted]
        assert written == wanted
        assert runner.lengths == plain.lengths
    assert best_of([torch.tensor([[0.0, 2.0], [1.0, torch.nan]]), torch.ones(0, 2)]) == [
        [1, -1],
        [],
    ]


@torch.no_grad()
def test_rows_that_have_ended_leave_nothing_behind():
    """The graph of a shorter draft would look for the place where a longer one of theirs ended."""
    runner = GraphRunner(random_model(), 2, 128)
    runner.write([[5, 6, 7, 8, 9], [4]], [2, 2])()
    runner.select([1])
    alone = GraphRunner(random_model(), 1, 128)
    alone.write([[4]], [2])()
    assert runner.write([[7]], [2])() == alone.write([[7]], [2])()


def test_holes_are_closed():
    model = random_model()
    runner = EagerRunner(model, 2)
    runner.extend([[1, 2, 3], [4]], [1, 1])
    for _ in range(40):
        runner.extend([[5, 6, 7], [8, 9, 10, 11]], [1, 1])
        runner.crop([4, 2])
    assert runner._filled < 80
    logits = runner.extend([[20], [21]], [1, 1])
    wanted = model(torch.tensor([[4, 8, 21]])).logits[0, -1:]
    torch.testing.assert_close(logits[1], wanted, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("Llama", {"attention_bias": True, "mlp_bias": True}),
        ("Llama", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
        (
            "Llama",
            {
                "rope_parameters": {
                    "rope_type": "llama3",
                    "rope_theta": 1e4,
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 32,
                }
            },
        ),
        ("Mistral", {}),
        ("Qwen2", {}),
        ("Qwen3", {"head_dim": 16}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value) or "usual",
)
@torch.no_grad()
def test_own_forward_is_the_models(kind, options):
    model = random_model(kind, **options)
    assert why_not_llama(model) == ""
    wander(make_runner(model, 2), model, 2, 0)


@torch.no_grad()
def test_long_prompts_go_in_stretches(monkeypatch):
    monkeypatch.setattr(llama, "_CHUNK", 16)
    model = random_model()
    ids = [[i % SIZE for i in range(90)], [7] * 20]
    found = LlamaRunner(model, 2).extend(ids, [2, 1])
    for row, feed in enumerate(ids):
        wanted = model(torch.tensor([feed])).logits[0, -len(found[row]) :]
        torch.testing.assert_close(found[row], wanted, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("kind", "options", "reason"),
    [
        ("GPTNeoX", {}, "GPTNeoXForCausalLM is not among LlamaForCausalLM"),
        ("Mistral", {"sliding_window": 8}, "its attention has a sliding window"),
        ("Llama", {"hidden_act": "gelu"}, "its activation is 'gelu'"),
    ],
)
def test_other_models_run_by_their_own_forward_and_the_log_says_why(kind, options, reason, caplog):
    model = random_model(kind, **options)
    with caplog.at_level(logging.DEBUG, logger="hetero_sd.runners"), torch.no_grad():
        runner = make_runner(model, 1)
        assert isinstance(runner, EagerRunner)
        wander(runner, model, 1, 0)
    assert reason in caplog.text


def test_weights_that_are_not_what_they_seem_are_noticed():
    hooked = random_model()
    hooked.model.layers[0].mlp.register_forward_hook(lambda *_: None)
    assert why_not_llama(hooked) == "it has hooks"
    scaled = random_model()
    forward = scaled.forward

    def louder(*arguments, **options):
        out = forward(*arguments, **options)
        out.logits = out.logits * 2
        return out

    scaled.forward = louder
    assert why_not_llama(scaled).startswith("its logits differ by")


@pytest.mark.parametrize(("change", "reason"), [("one", ""), ("all", "its logits differ by")])
def test_half_precision_is_judged_by_all_logits(caplog, change, reason):
    """One that is far off may be rounding; all that are off a little are not."""
    model = random_model().to(torch.bfloat16)
    forward = model.forward

    def other(*arguments, **options):
        out = forward(*arguments, **options)
        if change == "one":
            out.logits[0, 0, 0] += 0.2 * out.logits.abs().max()
        else:
            out.logits = out.logits + out.logits.std() * torch.randn_like(out.logits) / 4
        return out

    model.forward = other
    assert why_not_llama(model).startswith(reason)
    assert bool(why_not_llama(model)) == bool(reason)
    assert ("runs by its own forward, slower" in caplog.text) == bool(reason)


@torch.no_grad()
def test_a_sliding_window_is_exact_in_a_batch():
    model = random_model("Mistral", sliding_window=6)
    assert why_not_one_cache(model) == "its attention has a sliding window"
    runner = make_runner(model, 3)
    assert isinstance(runner, OneByOneRunner)
    wander(runner, model, 3, 1)


@pytest.mark.parametrize("turning", [True, False])
@pytest.mark.parametrize("rows", range(10))
def test_products_of_few_rows(monkeypatch, rows, turning):
    monkeypatch.setattr(linear, "_turning_pays", lambda rows: turning)
    weight, x = torch.randn(33, 17), torch.randn(rows, 17)
    torch.testing.assert_close(linear.few_rows_linear(x, weight), x @ weight.T)


def test_turning_is_measured_once(monkeypatch):
    assert linear._turning_pays(2) == linear._turning_pays(2)
    assert linear._turning_pays.cache_info().hits >= 1


def test_half_precision_runs(tokenizers):
    model = make_model(tokenizers["characters"]).to(torch.bfloat16)
    assert why_not_llama(model) == ""
    with torch.no_grad():
        (logits,) = make_runner(model, 1).extend([[1, 2, 3]], [2])
    assert logits.dtype == torch.float32
