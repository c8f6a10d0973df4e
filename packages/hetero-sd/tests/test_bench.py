"""The benchmark: who takes part, what is counted, and whether its verdicts can be bad."""

import dataclasses
import json

import pytest
import torch

from fourfold_common import Results
from hetero_sd.bench import Decoding, draw, report, run_bench
from hetero_sd.bench.contenders import (
    COMPILED,
    EAGER,
    PLAIN,
    Contender,
    Counts,
    Took,
    find_contenders,
)
from hetero_sd.bench.costs import Costs
from hetero_sd.bench.exactness import EXACT, NEAR, WRONG, judge_greedy, judge_sampled, openest
from hetero_sd.decoder import HeteroSpeculativeDecoder
from hetero_sd.demo.inflate import inflate, shape_for
from hetero_sd.pairs import Pair
from hetero_sd.rounds import Stats
from hetero_sd.speed import best_speedup, expected_tokens, speedup
from hetero_sd.testing import make_model

SHIPPED, IN_ORDER = (f"transformers, assisted tli, {how}" for how in ("as shipped", "in order"))


@pytest.fixture(scope="module")
def pair(tokenizers):
    kinds = "byte-level 2", "byte-level"
    # A sure drafter: judged by another token's probability, it is hardly ever refused.
    models = [make_model(tokenizers[k], s, sharpness=6.0 + 18 * s) for s, k in enumerate(kinds)]
    return Pair("tiny", *models, *(tokenizers[kind] for kind in kinds))


@pytest.fixture(scope="module")
def prompts(pair):
    texts = ("the cat sat on", "a dog", "über the hill and")
    return {"some": [torch.tensor([pair.target_tokenizer(text).input_ids]) for text in texts]}


@pytest.fixture(scope="module")
def found(pair, prompts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    decodings = [Decoding(0.0), Decoding(1.0)]
    settings = {"decodings": decodings, "batches": (1, 3), "tokens": 6, "repeats": 1, "draws": 100}
    methods = {"methods": ("tli", "auto"), "lookaheads": (2,)}
    return folder, run_bench(pair, prompts, folder, **methods, **settings, progress=False)


def figures(results, metric, **where):
    return {
        case["provider"]: case["median"]
        for case in results.cases
        if case["metric"] == metric and where.items() <= case["parameters"].items()
    }


def test_everyone_takes_part(found):
    _, results = found
    ours = {EAGER, PLAIN, "tli 2", "auto"}
    lookup = {"transformers, prompt lookup"}
    greedy = {"decoding": "greedy", "batch": 1}
    sampled = {"decoding": "temperature 1", "batch": 1}
    assert set(figures(results, "speed", **greedy)) == {
        *ours,
        *lookup,
        "transformers, assisted slem",
    }
    assert set(figures(results, "speed", **sampled)) == {*ours, *lookup, SHIPPED, IN_ORDER}
    # Transformers drafts for one row at a time only.
    assert set(figures(results, "speed", decoding="greedy", batch=3)) == ours
    assert not figures(results, "note", **greedy)


def test_verdicts_tell_right_from_wrong(found):
    """The peer that is known to judge drafts by wrong probabilities is caught, nobody else."""
    _, results = found
    for batch in (1, 3):
        sampled = figures(results, "verdict", decoding="temperature 1", batch=batch)
        assert {who for who, verdict in sampled.items() if verdict != EXACT} == {SHIPPED} & set(
            sampled
        )
        greedy = figures(results, "verdict", decoding="greedy", batch=batch)
        assert set(greedy.values()) == {EXACT}
        assert PLAIN in greedy
        tested = figures(results, "tested", decoding="greedy", batch=batch)
        assert tested["tli 2"] == "3 of 3 texts identical"  # Each prompt once at every size.


def test_figures_hang_together(found):
    _, results = found
    where = {"decoding": "greedy", "batch": 1}
    speeds, over = figures(results, "speed", **where), figures(results, "over plain", **where)
    assert over["tli 2"] == pytest.approx(speeds["tli 2"] / speeds[PLAIN])
    get = {name: figures(results, name, **where)["tli 2"] for name in ("c", "v", "o")}
    efficiency = figures(results, "block efficiency", **where)["tli 2"]
    predicted = figures(results, "predicted over plain", **where)["tli 2"]
    assert get["c"] > 0
    assert get["v"] > 0
    # Fewer than two drafter steps a round where the text ends.
    assert efficiency / (2 * get["c"] + get["v"]) <= predicted <= efficiency / get["v"]
    assert figures(results, "overhead", **where).keys() >= {PLAIN, "tli 2"}
    share = figures(results, "of predicted", **where)["tli 2"]
    assert share == pytest.approx(over["tli 2"] / predicted)
    accepted = figures(results, "accepted", **where)["tli 2"]
    assert 0 <= accepted <= figures(results, "acceptance", **where)["tli 2"] <= 1
    assert figures(results, "first token", **where)[PLAIN] > 0


def test_texts_that_end_at_once_have_no_speed(pair, prompts, tmp_path):
    """Where the prompt's round brings the whole text, nothing is left to be timed."""
    some = {"some": prompts["some"][:1]}
    twin = dataclasses.replace(pair, drafter=pair.target, drafter_tokenizer=pair.target_tokenizer)
    settings = {"decodings": [Decoding(0.0)], "methods": ("standard",), "lookaheads": (4,)}
    results = run_bench(
        twin, some, tmp_path, **settings, tokens=3, repeats=1, peers=False, progress=False
    )
    assert set(figures(results, "speed")) == {EAGER, PLAIN}
    assert figures(results, "end to end")["standard 4"] > 0
    assert figures(results, "verdict")["standard 4"] == EXACT


def test_files_are_made_of_the_results(found, tmp_path):
    folder, results = found
    assert {path.name for path in folder.iterdir()} == {
        "bench.json",
        "bench.md",
        "bench.png",
        "speedup.png",
    }
    loaded = Results.load(folder / "bench.json")
    assert loaded.cases == json.loads(json.dumps(results.cases))
    assert (folder / "bench.md").read_text() == report(loaded)
    assert report(loaded).count("### tiny: some, ") == 4
    for path in draw(loaded, tmp_path / "again"):
        assert path.read_bytes() == (folder / path.name).read_bytes()


def test_proposals_that_were_judged_are_counted():
    first, last = Stats(), Stats()
    for stats, rounds in ((first, [(3, 1)]), (last, [(3, 1), (3, 0), (3, 3), (3, 2), (3, 0)])):
        for proposed, accepted in rounds:
            stats.count(proposed, accepted)
    counts = Counts.between(first, last)
    assert (counts.row_rounds, counts.proposed, counts.accepted) == (4, 12, 5)
    assert counts.judged == 1 + 3 + 3 + 1
    total = Counts()
    total.add(counts)
    total.add(counts)
    assert total == Counts(**{name: 2 * value for name, value in vars(counts).items()})


def test_counts_of_transformers_are_those_of_its_passes(pair, prompts):
    contenders = find_contenders(pair, ["tli"], [3], sampled=False, peers=True, compiled=False)
    (assisted,) = (c for c in contenders if "assisted" in c.name)
    ids = prompts["some"][0]
    passes = []
    hook = pair.target.register_forward_hook(lambda *_: passes.append(1))
    took = assisted.run(ids, torch.ones_like(ids), {"do_sample": False, "max_new_tokens": 12})
    hook.remove()
    assert len(took.rows[0]) == took.first_tokens + took.counts.generated
    assert took.counts.rounds == len(passes) - 1
    assert took.counts.accepted == took.counts.generated - took.counts.rounds
    assert took.counts.accepted <= took.counts.judged <= took.counts.proposed
    assert not pair.target._forward_hooks


def test_peers_change_nothing(pair, prompts, tmp_path):
    """Assisted generation replaces its drafter's head, but that of a copy."""
    before = {k: v.clone() for k, v in pair.drafter.state_dict().items()}
    head, penalty = pair.drafter.lm_head, pair.drafter.generation_config.repetition_penalty
    some = {"some": prompts["some"][:1]}
    settings = {"decodings": [Decoding(1.0)], "methods": (), "tokens": 4, "repeats": 1}
    run_bench(pair, some, tmp_path, **settings, progress=False)
    assert pair.drafter.lm_head is head
    assert pair.drafter.generation_config.repetition_penalty == penalty
    for name, tensor in pair.drafter.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_a_peer_that_cannot_run_is_a_note(tokenizers, tmp_path):
    """Assisted TLI, as shipped, does not run where the target has all the drafter's tokens."""
    kinds = "sentencepiece", "characters"
    models = [make_model(tokenizers[kind], seed) for seed, kind in enumerate(kinds)]
    pair = Pair("two", *models, *(tokenizers[kind] for kind in kinds))
    ids = {"some": [torch.tensor([tokenizers[kinds[0]]("the cat").input_ids])]}
    settings = {"decodings": [Decoding(1.0)], "methods": ("tli",), "lookaheads": (2,)}
    results = run_bench(pair, ids, tmp_path, **settings, tokens=4, repeats=1, progress=False)
    assert figures(results, "note")[SHIPPED].startswith("AttributeError")
    assert SHIPPED not in figures(results, "speed")
    assert {"tli 2", IN_ORDER} < set(figures(results, "speed"))


def test_greedy_verdicts(pair, prompts):
    ids = prompts["some"][0]
    wanted = pair.target.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False
    )[0, ids.shape[1] :].tolist()
    wrong = [*wanted[:2], (wanted[2] + 1) % 300, *wanted[3:]]
    assert judge_greedy(pair.target, [ids], [wanted], [wanted]) == (EXACT, 1)
    assert judge_greedy(pair.target, [ids], [wrong], [wanted]) == (WRONG, 0)
    assert judge_greedy(pair.target, [ids], [wanted[:3]], [wanted]) == (WRONG, 0)
    blind = make_model(pair.target_tokenizer, sharpness=0.0)  # To which all tokens are alike.
    blind.lm_head.weight.data[5] += 1e-9
    assert judge_greedy(blind, [ids], [wrong], [wanted])[0] == NEAR


def test_sampled_verdict_notices_another_temperature(pair, prompts):
    ids = prompts["some"][0]
    (plain,) = (
        c
        for c in find_contenders(pair, [], [], sampled=True, peers=False, compiled=False)
        if c.name == PLAIN
    )
    torch.manual_seed(0)
    options = Decoding(1.0).options
    assert judge_sampled(pair.target, plain, ids, options, 200, False)[0] == EXACT

    def colder(ids, mask, options) -> Took:
        return plain.run(ids, mask, {**options, "temperature": 0.2})

    verdict, detail = judge_sampled(
        pair.target, Contender("colder", colder), ids, options, 200, False
    )
    assert verdict == WRONG, detail
    assert "200 draws" in detail


@torch.no_grad()
def test_samples_are_drawn_where_the_next_token_is_open(pair, prompts):
    ids, options = prompts["some"][0], Decoding(0.3).options
    new = pair.target.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False
    )[0, ids.shape[1] :].tolist()
    place = openest(pair.target, ids, new, options)
    taken = place.shape[1] - ids.shape[1]
    assert place[0].tolist() == [*ids[0].tolist(), *new[:taken]]
    best = []
    for count in range(len(new)):
        text = torch.cat([ids, torch.tensor([new[:count]], dtype=torch.long)], dim=1)
        law = (pair.target(text).logits[0, -1].double() / 0.3).softmax(-1)
        best.append(float(torch.special.entr(law).sum()))
    assert taken == best.index(max(best))


def test_costs_are_times_of_passes(pair, monkeypatch):
    decoder = HeteroSpeculativeDecoder(*pair.parts, method="tli")
    costs = Costs(decoder, 2, 10)
    asked = []

    def timed(decoder, model, rows, width, context, head):
        asked.append((model is decoder.target, rows, width, context, head is not None))
        return float(width)

    with monkeypatch.context() as patched:
        patched.setattr("hetero_sd.bench.costs._time_pass", timed)
        assert costs.target(1) == 1.0
        assert costs.target(7.5) == pytest.approx(7.5)
        assert costs.target(40) == 16.0
        assert costs.drafter(True) == costs.drafter(False) == 1.0
    assert asked == [
        *((True, 2, width, 10, False) for width in (1, 6, 8, 16)),
        (False, 2, 1, 10, True),
        (False, 2, 1, 10, False),
    ]
    graphs = HeteroSpeculativeDecoder(*pair.parts, method="tli", backend="cudagraph")
    for some in (decoder, graphs):
        costs = Costs(some, 2, 200)
        assert 0 < costs.target(4) < 1
        assert 0 < costs.drafter(True) < 1


def test_bad_requests_are_refused(pair, prompts, tmp_path):
    for wrong in ({"repeats": 0}, {"tokens": 1}):
        with pytest.raises(
            ValueError, match="`peer_repeats` must be 1 or more, `tokens` 2 or more"
        ):
            run_bench(pair, prompts, tmp_path, **wrong)
    with pytest.raises(ValueError, match="hold at least one of each set"):
        run_bench(pair, {"none": []}, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_transformers_compiled_writes_the_same(pair, prompts, tmp_path):
    some = {"some": prompts["some"][:1]}
    settings = {"decodings": [Decoding(0.0)], "methods": (), "tokens": 6, "repeats": 1}
    results = run_bench(pair, some, tmp_path, compiled=True, peers=False, **settings)
    assert figures(results, "verdict")[COMPILED] == EXACT


# ------------------------------------------------------------------------ the model of the speed
@pytest.mark.parametrize(
    ("c", "overhead", "acceptance", "wanted"),
    [
        (0.01, 0.0, 0.5, (1.88, 5)),
        (0.05, 0.0, 0.8, (3.09, 8)),
        (0.1, 0.0, 0.9, (3.43, 10)),
        (0.2, 0.0, 0.6, (1.40, 2)),
        (0.05, 0.3, 0.7, (1.91, 6)),
    ],
)
def test_best_speedup(c, overhead, acceptance, wanted):
    best, lookahead = best_speedup(acceptance, c, overhead)
    assert (round(best, 2), lookahead) == wanted
    assert best == speedup(acceptance, lookahead, c, overhead=overhead)


def test_expected_tokens_by_simulation():
    draw = torch.Generator().manual_seed(0)
    coins = torch.rand(20_000, 4, generator=draw) < 0.6
    brought = 1 + coins.long().cumprod(1).sum(1).double().mean()
    assert expected_tokens(0.6, 4) == pytest.approx(float(brought), rel=0.02)
    assert expected_tokens(1.0, 3) == 4
    assert expected_tokens(0.0, 3) == expected_tokens(0.5, 0) == 1
    for wrong in ((1.1, 2), (0.5, -1)):
        with pytest.raises(ValueError, match=r"`acceptance` must be in \[0, 1\]"):
            expected_tokens(*wrong)


# ------------------------------------------------------------------------------------ inflation
def test_a_shape_for_a_size(pair):
    model = pair.target
    small = sum(p.numel() for p in model.parameters())
    factor, layers = shape_for(model, 30 * small)
    assert factor > 1
    large = sum(p.numel() for p in inflate(model, factor, layers).parameters())
    assert 0.85 < large / (30 * small) < 1.15
    with pytest.raises(ValueError, match="parameters, more than 10"):
        shape_for(model, 10)
    with pytest.raises(ValueError, match="only a `LlamaForCausalLM` can be inflated; got Linear"):
        shape_for(torch.nn.Linear(1, 1), 10)


def test_contenders_are_plain_data():
    """Each has counts of its own."""
    one, other = (Contender("a", lambda *_: None) for _ in range(2))
    one.counts.rounds += 1
    assert dataclasses.astuple(other.counts) == (0, 0, 0, 0, 0, 0, 0.0)
