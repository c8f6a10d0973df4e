"""Drafts that begin before the host has read the last round change nothing but the time."""

import random

import pytest
import torch

from hetero_sd import HeteroSpeculativeDecoder
from hetero_sd.ahead import Foresight, spell_each
from hetero_sd.control import PLAIN, Arm, Bandit
from hetero_sd.graphs import Answer
from hetero_sd.kernels.judge import Line, pick_rules
from hetero_sd.testing import make_model, make_tokenizer
from hetero_sd.whole import GraphRound

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PROMPTS = ["the cat sat on", "a dog", "42"]


@pytest.fixture(scope="module")
def letters():
    """Characters for the target, words for the drafter; the second is a tokenizer's own pair."""
    ours, theirs = make_tokenizer("characters", seed=4), make_tokenizer("sentencepiece", 330, 5)
    return {
        "others": (make_model(ours, 7), make_model(theirs, 8), ours, theirs),
        "same": (make_model(ours, 7), make_model(ours, 9), ours, ours),
    }


class Wandering(Bandit):
    """Chooses at random, whatever the rounds bring."""

    def __init__(self):
        super().__init__(["tli", "slrs", "slem"])
        self.draw, self.arm = random.Random(0), PLAIN

    def choose(self):
        if self.draw.random() < 0.3:
            methods = "tli", "tli", "slrs", "slem"
            arms = [PLAIN, *(Arm(method, self.draw.randint(1, 5)) for method in methods)]
            self.arm = self.draw.choice(arms)
        return self.arm

    def learn(self, arm, outcome):
        assert outcome.accepted <= outcome.judged <= outcome.proposed


class Counted:
    """What happens in the rounds of a decoder."""

    def __init__(self, monkeypatch, ahead):
        self.waits, self.begun, self.rounds = 0, 0, set()
        read, play = Answer.read, GraphRound.play

        def counted_read(answer):
            self.waits += 1
            return read(answer)

        def counted_play(whole, *args, **options):
            self.rounds.add(whole)
            found = play(whole, *args, **options)
            self.begun += whole._begun is not None
            return found

        monkeypatch.setattr(Answer, "read", counted_read)
        monkeypatch.setattr(GraphRound, "play", counted_play)
        monkeypatch.setattr(Foresight, "pays", lambda _, seconds: ahead)

    @property
    def hits(self):
        return sum(whole.foresight.foreseen for whole in self.rounds)

    @property
    def misses(self):
        return sum(whole.foresight.missed for whole in self.rounds)


def written(letters, method, ahead, options, prompts=PROMPTS):
    """Return the texts of several calls of one decoder, and what was counted."""
    with pytest.MonkeyPatch.context() as patch:
        counted = Counted(patch, ahead)
        dec = HeteroSpeculativeDecoder(
            *letters["same" if method == "standard" else "others"],
            method=method,
            lookahead="auto" if method == "auto" else 3,
            backend="cudagraph",
        )
        if method == "auto":
            dec._methods_to_try = lambda greedy: ["tli", "slrs", "slem"]
            dec._policy = lambda greedy, rows, policy=Wandering(): policy
        tokens, rounds = [], 0
        for seed in range(2):
            made = dec.generate(prompts, generator=torch.Generator().manual_seed(seed), **options)
            tokens.append(made.tokens)
            rounds += made.stats.rounds
    if method != "auto":
        assert counted.waits <= rounds
    assert counted.begun > 0 if ahead else counted.begun == 0
    return tokens, counted


@pytest.mark.parametrize("method", ["tli", "slrs", "standard", "auto"])
@pytest.mark.parametrize("sampled", [False, True])
def test_texts_stay_the_same(letters, method, sampled):
    """With rows that end at many places: by their length, an end token, or a stop string."""
    tokenizer = letters["others"][2]
    options = {"max_new_tokens": 30, "do_sample": sampled, "top_k": 0, "temperature": 0.7}
    if not sampled:
        options = {"max_new_tokens": 30}
    first, counted = written(letters, method, False, {**options, "eos_token_id": []})
    assert counted.hits + counted.misses > 5
    text = tokenizer.decode(first[0][0])
    ends = [
        {"eos_token_id": []},
        {"eos_token_id": sorted({first[0][0][7], first[0][1][11]})},
        {"eos_token_id": [], "stop_strings": [text[9:11]], "max_new_tokens": 17},
        {"max_new_tokens": 2},
    ]
    hits = misses = 0
    for end in ends[: 2 if method == "auto" else None]:
        asked = {**options, **end}
        wanted, _ = written(letters, method, False, asked)
        found, counted = written(letters, method, True, asked)
        assert found == wanted
        hits, misses = hits + counted.hits, misses + counted.misses
    if method == "standard":
        assert hits > 20
        assert misses == 0


@pytest.mark.parametrize("method", ["tli", "slrs"])
def test_both_happen(letters, method):
    """Rounds that begin as was foreseen, and others, in one text."""
    options = {"max_new_tokens": 60, "eos_token_id": [], "do_sample": True, "top_k": 0}
    _, counted = written(letters, method, True, options, PROMPTS[0])
    assert counted.hits > 3
    assert counted.misses > 3


def test_a_wrong_guess_is_noticed(letters, monkeypatch):
    """What the host is told of the guess is what the device went by."""
    options = {"max_new_tokens": 30, "eos_token_id": []}
    wanted, _ = written(letters, "tli", False, options, PROMPTS[0])
    honest = GraphRound._row_foreseen
    found, counted = written(letters, "tli", True, options, PROMPTS[0])
    assert found == wanted
    assert counted.misses > 0
    sampled = {**options, "do_sample": True, "top_k": 0}
    wanted, _ = written(letters, "tli", False, sampled, PROMPTS[0])
    monkeypatch.setattr(GraphRound, "_row_foreseen", lambda *_: True)
    found, _ = written(letters, "tli", True, sampled, PROMPTS[0])
    assert found != wanted, "guesses that are never checked must show"
    monkeypatch.setattr(GraphRound, "_row_foreseen", honest)


def test_foresight_pays_where_what_is_lost_is_less_than_what_is_hidden():
    now = [0.0]
    foresight = Foresight(lambda: now[0])
    assert foresight.pays(1.0)
    for place in range(200):
        foresight.read()
        now[0] += 0.2
        foresight.see(place % 2 == 0)
    assert foresight.pays(0.3)
    assert not foresight.pays(0.5)
    for _ in range(100):
        foresight.see(True)
    assert foresight.pays(10.0)
    assert (foresight.foreseen, foresight.missed) == (200, 100)


def test_each_target_token_in_the_drafters_ids(letters):
    dec = HeteroSpeculativeDecoder(*letters["others"], method="tli", lookahead=3)
    encoder, mapping = dec._text.drafter, dec.mapping
    spelled = spell_each(mapping, encoder, len(mapping.target_bytes)).tolist()
    for data, found in zip(mapping.target_bytes, spelled, strict=True):
        ids = [index for index in found if index >= 0]
        if data is not None and ids:
            assert ids == encoder.encode(data)
    assert sum(row[0] >= 0 for row in spelled) > len(spelled) // 2
    assert all(spelled[token][0] == index for token, index in mapping.special.items())
    assert spell_each(mapping, None, 3).tolist() == [[0], [1], [2]]


@pytest.mark.parametrize(
    ("longest", "steps", "pieces"), [(1, 4, 4), (3, 4, 4), (3, 1, 2), (8, 15, 4), (1, 1, 1)]
)
def test_advance_is_its_twin(longest, steps, pieces):
    """Number for number, negative counts and tokens out of range included."""
    pytest.importorskip("triton")
    line = Line(0, 1, 17, 33, 48, 64, 80, 81, 82, 84, 16)
    draw = torch.Generator().manual_seed(0)
    count, vocab, rows = 30, 25, 3
    for turn in range(12):
        runs = torch.randint(vocab, (count, longest), generator=draw)
        lengths = torch.randint(1, longest + 1, (count, 1), generator=draw)
        runs[torch.arange(longest) >= lengths] = -1
        forth = torch.randperm(count, generator=draw)
        spelled = torch.randint(count, (vocab, pieces), generator=draw).int()
        lengths = torch.randint(pieces + 1, (vocab, 1), generator=draw)
        spelled[torch.arange(pieces) >= lengths] = -1
        board = torch.randint(20, (rows, 100), generator=draw)
        board[:, 84:] = torch.randint(count, (rows, 16), generator=draw)
        total = (runs[board[:, 84 : 84 + steps]] >= 0).sum(dim=(1, 2))
        board[:, 81] = (
            (torch.rand(rows, generator=draw) * (total + 1)).long() if turn % 3 else total
        )
        if turn == 5:
            board[0, 81], board[0, 82] = -1, 2**31 - 1
        known = [tensor.to(DEVICE) for tensor in (forth, runs, spelled)]
        found = []
        for backend in ("triton", "reference"):
            changed = board.to(DEVICE, copy=True)
            pick_rules(DEVICE, backend).advance(changed, line, *known, steps, (30, 40))
            found.append(changed)
        assert torch.equal(*found)
        assert not torch.equal(found[0].cpu(), board)
