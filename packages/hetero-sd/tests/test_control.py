"""The choice of method and lookahead, on a clock of our own."""

import functools
import itertools
import random

import pytest
import torch

from hetero_sd import HeteroSpeculativeDecoder, requests, rounds
from hetero_sd.control import LADDER, PLAIN, Arm, Bandit, Outcome
from hetero_sd.decoder import _rows_captured
from hetero_sd.testing import make_model


class World:
    """A target whose pass takes 1 s and a drafter with some cost and acceptance."""

    def __init__(self, cost, acceptance, seed=0, noise=0.1):
        self.cost, self.acceptance, self.noise = cost, acceptance, noise
        self.draw = random.Random(seed)
        self.now = self.tokens = 0.0

    def play(self, bandit, rounds):
        for _ in range(rounds):
            self.round(bandit, bandit.choose())
        return self.tokens / self.now

    def round(self, bandit, arm):
        taken = 0
        while taken < arm.lookahead and self.draw.random() < self.acceptance[arm.method]:
            taken += 1
        tokens, judged = taken + 1, min(taken + 1, arm.lookahead)
        seconds = (1 + self.cost * arm.lookahead) * self.draw.lognormvariate(0, self.noise)
        bandit.learn(arm, Outcome(1, tokens, arm.lookahead, judged, taken, seconds))
        self.now += seconds
        self.tokens += tokens

    def rate(self, arm):
        a = self.acceptance[arm.method]
        return (1 - a ** (arm.lookahead + 1)) / (1 - a) / (1 + self.cost * arm.lookahead)


@pytest.mark.parametrize("seed", range(3))
def test_a_useless_drafter_costs_at_most_three_hundredths(seed):
    world = World(0.5, {"plain": 0.0, "tli": 0.02, "slem": 0.05}, seed, noise=0.05)
    bandit = Bandit(["tli", "slem"])
    assert world.play(bandit, 1000) > 0.97
    assert set(bandit.history) != {PLAIN}, "it must have tried"


@pytest.mark.parametrize(("cost", "acceptance"), [(0.05, 0.8), (0.1, 0.6), (0.2, 0.9)])
def test_a_good_drafter_is_found_with_its_lookahead(cost, acceptance):
    chances = {"plain": 0.0, "slem": 0.5 * acceptance, "tli": acceptance}
    world = World(cost, chances, seed=1)
    best = max(world.rate(Arm("tli", step)) for step in LADDER)
    world.play(bandit := Bandit(["slem", "tli"]), 300)
    world.now = world.tokens = 0
    assert world.play(bandit, 500) > 0.75 * best > 1.2


def test_it_notices_when_the_text_changes():
    world = World(0.2, {"plain": 0.0, "tli": 0.9})
    bandit = Bandit(["tli"])
    world.play(bandit, 200)
    assert bandit.history[-50:].count(PLAIN) < 15
    world.acceptance["tli"] = 0.0
    world.play(bandit, 200)
    assert bandit.history[-50:].count(PLAIN) > 40
    world.acceptance["tli"] = 0.9
    world.play(bandit, 400)
    assert bandit.history[-50:].count(PLAIN) < 15


def test_plain_decoding_comes_first_and_is_measured_again():
    bandit = Bandit(["tli"], [2])
    world = World(0.01, {"plain": 0.0, "tli": 0.9}, noise=0.0)
    world.play(bandit, 300)
    assert bandit.history[0] == PLAIN
    assert set(bandit.history) == {PLAIN, Arm("tli", 2)}
    later = [i for i, arm in enumerate(bandit.history) if arm == PLAIN]
    assert len(later) < 30
    assert max(b - a for a, b in itertools.pairwise(later)) < 200


def test_a_new_text_may_be_of_another_kind():
    """Texts that suit the drafter are noticed among others that do not, as each begins."""
    world = World(0.3, {"plain": 0.0, "slem": 0.0}, noise=0.02)
    bandit = Bandit(["slem"])
    drafted = {0.7: [], 0.05: []}
    for place in range(20):
        acceptance = (0.7, 0.05)[place % 2]
        world.acceptance["slem"] = acceptance
        bandit.begin()
        world.play(bandit, 47)
        drafted[acceptance].append(sum(arm != PLAIN for arm in bandit.history[-47:]))
    assert sum(drafted[0.7][3:]) > 0.6 * 7 * 47
    assert sum(drafted[0.05][3:]) < 0.35 * 7 * 47


class Clock:
    """A clock that each pass of a model moves on."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def _tick(model, clock, seconds):
    forward = model.forward

    def slow(*arguments, **options):
        clock.now += seconds
        return forward(*arguments, **options)

    model.forward = slow


@pytest.mark.parametrize(("drafter_seconds", "drafts"), [(0.01, True), (2.0, False)])
def test_the_decoder_drafts_only_where_that_is_faster(
    tokenizers, monkeypatch, drafter_seconds, drafts
):
    tokenizer = tokenizers["characters"]
    target, drafter = make_model(tokenizer, 3), make_model(tokenizer, 3)
    clock = Clock()
    monkeypatch.setattr(requests, "Request", functools.partial(rounds.Request, clock=clock))
    dec = HeteroSpeculativeDecoder(target, drafter, tokenizer, tokenizer, backend="eager")
    _ = dec._shared
    _tick(target, clock, 1.0)
    _tick(drafter.model, clock, drafter_seconds)
    made = dec.generate("the cat sat", max_new_tokens=150, min_new_tokens=150)
    share = 1 - made.stats.arms["plain 0"] / made.stats.rounds
    assert (share > 0.5) == drafts
    assert made.stats.tokens_per_second > (2 if drafts else 0.93)
    alone = HeteroSpeculativeDecoder(target, drafter, tokenizer, tokenizer, lookahead=0)
    assert (
        alone.generate("the cat sat", max_new_tokens=150, min_new_tokens=150).tokens == made.tokens
    )


def test_what_was_learned_lasts_from_call_to_call(tokenizers):
    tokenizer = tokenizers["characters"]
    model = make_model(tokenizer, 3)
    dec = HeteroSpeculativeDecoder(model, model, tokenizer, tokenizer)
    dec.generate("the cat", max_new_tokens=20)
    policy = dec._policy(True, 1)
    known = len(policy.history)
    dec.generate("the cat", max_new_tokens=20)
    assert dec._policy(True, 1) is policy
    assert len(policy.history) > known
    assert dec._policy(False, 1) is not policy


# ------------------------------------------------------------- arms that have to be prepared
class Dear(World):
    """A world where the first round of each drafting arm takes so many seconds more."""

    def __init__(self, *args, price, **kwargs):
        super().__init__(*args, **kwargs)
        self.price, self.ready = price, set()

    def round(self, bandit, arm):
        if arm != PLAIN and arm not in self.ready:
            self.ready.add(arm)
            bandit.prepared(arm, self.price)
            self.now += self.price
        super().round(bandit, arm)


@pytest.mark.parametrize("acceptance", [0.02, 0.15])
def test_little_is_prepared_for_a_weak_drafter(acceptance):
    """Beside the first arm, which has to be tried."""
    world = Dear(0.3, dict.fromkeys(("plain", "tli", "slrs", "slem"), acceptance), price=40.0)
    bandit = Bandit(["tli", "slrs", "slem"])
    world.play(bandit, 40)
    world.now = world.tokens = 0.0
    assert world.play(bandit, 1500) > 0.97
    assert len(world.ready) == 1


@pytest.mark.parametrize("seed", range(3))
def test_a_long_lookahead_is_prepared_once_it_would_have_paid(seed):
    world = Dear(0.02, dict.fromkeys(("plain", "tli"), 0.95), seed, price=40.0)
    bandit = Bandit(["tli"])
    world.play(bandit, 20)
    assert world.ready == {Arm("tli", 3)}, "nothing is missed yet"
    world.play(bandit, 400)
    assert len(world.ready) <= 4
    world.now = world.tokens = 0.0
    assert world.play(bandit, 200) > 0.8 * world.rate(Arm("tli", 12))


def test_what_costs_nothing_to_prepare_is_played_at_once():
    world = World(0.02, dict.fromkeys(("plain", "tli"), 0.95))
    bandit = Bandit(["tli"], dear=False)
    world.play(bandit, 60)
    assert max(arm.lookahead for arm in bandit.history) >= 8


def test_trials_lose_a_few_rounds_at_once_whatever_went_before():
    """Long plain decoding is no credit for a spell of bad drafts."""
    world = World(0.5, {"plain": 0.0, "tli": 0.0}, noise=0.0)
    bandit = Bandit(["tli"])
    world.play(bandit, 3000)
    bandit.begin()
    world.now = world.tokens = 0.0
    assert world.play(bandit, 100) > 0.95


def test_a_batch_is_judged_by_its_slowest_row():
    """Drafts that please most rows and hold up the last one lose against plain decoding."""

    class Batch(World):
        rows = 8

        def run(self, bandit, texts, length=48):
            bandit.begin()
            for _ in range(texts):
                bandit.begin()
                chances = [min(max(self.draw.gauss(0.5, 0.2), 0), 0.95) for _ in range(self.rows)]
                written = [0] * self.rows
                while any(n < length for n in written):
                    self.rounds(bandit, bandit.choose(), chances, written, length)
            return self.tokens / self.now

        def rounds(self, bandit, arm, chances, written, length):
            alive = [row for row, n in enumerate(written) if n < length]
            before, judged, accepted = min(written[row] for row in alive), 0, 0
            for row in alive:
                taken = 0
                while taken < arm.lookahead and self.draw.random() < chances[row]:
                    taken += 1
                judged += min(taken + 1, arm.lookahead)
                accepted += taken
                written[row] = min(written[row] + taken + 1, length)
            least = min((written[row] for row in alive if written[row] < length), default=length)
            seconds = 1.5 + 0.02 * arm.lookahead if arm != PLAIN else 1.0
            proposed = arm.lookahead * len(alive)
            tokens = max(least - before, 1)
            bandit.learn(arm, Outcome(len(alive), tokens, proposed, judged, accepted, seconds))
            self.now += seconds
            self.tokens += tokens

    world = Batch(0.0, {})
    bandit = Bandit(["slem"], dear=False)
    assert world.run(bandit, 30) > 0.97
    assert set(bandit.history) != {PLAIN}, "it must have tried"


@pytest.mark.parametrize(("method", "lookahead"), [("auto", "auto"), ("slem", 2), ("tli", 0)])
def test_what_was_prepared_is_ready(tokenizers, models, monkeypatch, method, lookahead):
    """Captures take time here as they do on a CUDA device."""
    from hetero_sd.graphs import GraphRunner

    captured, capture = [], GraphRunner.capture

    def slow(runner, run):
        captured.append(run)
        runner.setup_seconds += 1.0
        return capture(runner, run)

    monkeypatch.setattr(GraphRunner, "capture", slow)
    kinds = "byte-level", "sentencepiece"
    parts = [models[k] for k in kinds] + [tokenizers[k] for k in kinds]
    settings = {"method": method, "lookahead": lookahead, "backend": "cudagraph"}
    fresh, dec = (HeteroSpeculativeDecoder(*parts, **settings) for _ in range(2))
    options = {"do_sample": True, "top_k": 0}
    with pytest.raises(ValueError, match="`rows` must be 1 or more; got 0"):
        dec.prepare(0)
    state = torch.get_rng_state()
    assert dec.prepare(2, **options) > 0
    assert torch.equal(torch.get_rng_state(), state)
    policy = dec._policies[False, 2]
    if method == "auto":
        assert policy._ready == {Arm(name, 3) for name in ("tli", "slrs", "slem")}
        assert not policy.rates()  # It has learnt nothing else.
    count = len(captured)
    assert count > 0
    text = "the cat sat on the mat and ran over a hill. " * 2
    if lookahead == 0:
        dec.generate([text, text], max_new_tokens=9, **options)
        assert len(captured) == count
    assert (
        dec.generate(text, max_new_tokens=9).tokens == fresh.generate(text, max_new_tokens=9).tokens
    )


def test_batches_of_like_sizes_share_their_graphs(tokenizers, models, monkeypatch):
    from hetero_sd.graphs import GraphRunner

    captured, capture = [], GraphRunner.capture
    monkeypatch.setattr(
        GraphRunner, "capture", lambda *args: captured.append(args) or capture(*args)
    )
    kinds = "byte-level", "sentencepiece"
    parts = [models[k] for k in kinds] + [tokenizers[k] for k in kinds]
    settings = {"method": "tli", "lookahead": 2}
    dec = HeteroSpeculativeDecoder(*parts, **settings, backend="cudagraph")
    alone = HeteroSpeculativeDecoder(*parts, **settings, backend="eager")
    texts = [f"the {word} sat on the mat and ran over a hill." for word in ["cat", "dog", "hill"]]
    counts = []
    for batch in ([*texts, texts[0]], texts):
        made = dec.generate(batch, max_new_tokens=12)
        assert made.tokens == [alone.generate(t, max_new_tokens=12).new_tokens for t in batch]
        counts.append(len(captured))
    assert counts[0] == counts[1] > 0
    assert [_rows_captured(n) for n in (1, 2, 3, 5, 8, 9, 17)] == [1, 2, 4, 8, 8, 16, 24]
