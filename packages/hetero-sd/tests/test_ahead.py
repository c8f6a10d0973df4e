"""Drafts that begin before the host has read the last round change nothing but the time."""

import itertools
import random

import pytest
import torch

from hetero_sd import HeteroSpeculativeDecoder
from hetero_sd.ahead import Foresight, foretell
from hetero_sd.control import PLAIN, Arm, Bandit
from hetero_sd.graphs import DRAFT_LINE, Answer, GraphRunner
from hetero_sd.kernels.judge import Line, Spelling, pick_rules
from hetero_sd.kernels.judge.reference import bucket_of
from hetero_sd.testing import make_model
from hetero_sd.whole import GraphRound

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
WHOLE = "tli", "slrs", "standard"
PROMPTS = ["the cat sat on", "a dog", "42"]


@pytest.fixture(scope="module")
def pairs(tokenizers, models):
    kinds = "sentencepiece", "byte-level"
    ours, target = tokenizers["characters"], models["characters"]
    return {
        "others": [models[k] for k in kinds] + [tokenizers[k] for k in kinds],
        "same": [target, make_model(ours, 9, padding=9), ours, ours],
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

    def steady(self, arm):
        return True

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

        again = GraphRunner.go_on_ahead

        def counted_again(runner, said, begin):
            self.begun += begin
            again(runner, said, begin)

        judge = GraphRound.judge

        def counted_judge(whole, *args):
            self.rounds.add(whole)
            return judge(whole, *args)

        monkeypatch.setattr(GraphRunner, "go_on_ahead", counted_again)
        monkeypatch.setattr(GraphRound, "judge", counted_judge)
        monkeypatch.setattr(Answer, "read", counted_read)
        monkeypatch.setattr(GraphRound, "play", counted_play)
        monkeypatch.setattr(Foresight, "pays", lambda _, seconds: ahead)

    @property
    def foresights(self):
        return {f for whole in self.rounds for f in (whole.foresight, whole._drafter.foresight)}

    @property
    def hits(self):
        return sum(foresight.foreseen for foresight in self.foresights)

    @property
    def misses(self):
        return sum(foresight.missed for foresight in self.foresights)


def written(pairs, method, ahead, options, prompts=PROMPTS):
    """Return the texts, and what was counted."""
    with pytest.MonkeyPatch.context() as patch:
        counted = Counted(patch, ahead)
        dec = HeteroSpeculativeDecoder(
            *pairs["same" if method == "standard" else "others"],
            method=method,
            lookahead="auto" if method == "auto" else 3,
            backend="cudagraph",
        )
        if method == "auto":
            dec._methods_to_try = lambda greedy: ["tli", "slrs", "slem"]
            policy = Wandering()
            dec._policy = lambda greedy, rows: policy
        made = dec.generate(prompts, generator=torch.Generator().manual_seed(0), **options)
    if method != "auto":
        reads = {"slem": 2, "c-slrs": 3}  # Of a draft that is weighed, two after one wait.
        assert counted.waits <= made.stats.rounds * reads.get(method, 1)
    assert ahead or not counted.begun
    return made.tokens, counted


@pytest.mark.parametrize("method", [*WHOLE, "slem", "c-slrs", "auto"])
@pytest.mark.parametrize("sampled", [False, True])
def test_texts_stay_the_same(pairs, method, sampled):
    """With rows that end at many places: by their length, an end token, or a stop string."""
    tokenizer = pairs["same" if method == "standard" else "others"][2]
    options = {"max_new_tokens": 24}
    if sampled:
        options |= {"do_sample": True, "top_k": 0, "temperature": 0.7}
    first, _ = written(pairs, method, False, {**options, "eos_token_id": []})
    text = tokenizer.decode(first[0])
    hits = misses = begun = 0
    for end in (
        {"eos_token_id": []},
        {"eos_token_id": sorted({first[0][7], first[1][11]})},
        {"eos_token_id": [], "stop_strings": [text[9:11]], "max_new_tokens": 17},
        {"max_new_tokens": 2},
    ):
        asked = {**options, **end}
        wanted, _ = written(pairs, method, False, asked)
        found, counted = written(pairs, method, True, asked)
        assert found == wanted
        hits, misses = hits + counted.hits, misses + counted.misses
        begun += counted.begun
    assert begun
    if method == "standard":
        assert hits > 12
        assert misses == 0
    elif method != "auto":
        assert hits
        assert misses


@pytest.mark.parametrize("method", ["tli", "slrs", "slem", "c-slrs"])
def test_both_happen(pairs, method):
    """Rounds that begin as was foreseen, and others, in one text."""
    options = {"max_new_tokens": 40, "eos_token_id": [], "do_sample": True, "top_k": 0}
    _, counted = written(pairs, method, True, options, PROMPTS[0])
    assert counted.hits > 3
    assert counted.misses > 3


def test_methods_in_turn_on_the_same_runners(pairs, monkeypatch):
    """A batch of eight whose rows end one by one; what one method left behind harms no other."""
    monkeypatch.setattr(Foresight, "pays", lambda *_: True)
    tokenizer = pairs["others"][2]
    prompts = [f"{text} {place}" for place in range(4) for text in PROMPTS[:2]]
    ends = {"max_new_tokens": 20, "eos_token_id": list(range(0, len(tokenizer), 9))}
    plain = HeteroSpeculativeDecoder(*pairs["others"], lookahead=0, backend="eager")
    wanted = plain.generate(prompts, **ends).tokens
    assert len({len(row) for row in wanted}) > 3
    kept, texts = None, []
    for _ in range(2):
        for sampled in (False, True):
            for method, steps in (("tli", 4), ("slem", 3), ("slrs", 2), ("c-slrs", 4), ("tli", 1)):
                dec = HeteroSpeculativeDecoder(
                    *pairs["others"], method=method, lookahead=steps, backend="cudagraph"
                )
                dec._kept = kept = kept or dec._kept
                options = {"do_sample": True, "top_k": 0, "top_p": 0.9} if sampled else {}
                draws = torch.Generator().manual_seed(0)
                made = dec.generate(prompts, generator=draws, **options, **ends)
                texts.append(made.tokens)
                assert sampled or made.tokens == wanted
    assert texts[:10] == texts[10:]


def test_a_wrong_guess_is_noticed(pairs, monkeypatch):
    """What the host is told of the guess is what the device went by."""
    options = {"max_new_tokens": 30, "eos_token_id": []}
    wanted, _ = written(pairs, "tli", False, options, PROMPTS[0])
    found, counted = written(pairs, "tli", True, options, PROMPTS[0])
    assert found == wanted
    assert counted.misses
    sampled = {**options, "do_sample": True, "top_k": 0}
    wanted, _ = written(pairs, "tli", False, sampled, PROMPTS[0])
    monkeypatch.setattr(GraphRound, "_row_foreseen", lambda *_: True)
    found, _ = written(pairs, "tli", True, sampled, PROMPTS[0])
    assert found != wanted, "guesses that are never checked must show"


def test_the_capture_of_a_draft_ahead_is_one(pairs):
    """What it has overwritten in the cache is not taken to be there."""
    model = pairs["others"][1].to(DEVICE)
    runner, fresh = (GraphRunner(model, 1, 64) for _ in range(2))
    first = runner.write([[1, 2, 3]], [4])()[0][0]
    assert runner.lengths == [6]
    said = torch.zeros(1, DRAFT_LINE, dtype=torch.long)
    runner.tell(said.numpy()[0], 4, [5])
    on_device = said.to(DEVICE)
    runner.go_on_ahead(on_device, begin=False)
    runner.expect(said.tolist())
    assert runner.lengths == [4]
    assert runner.write([[5]], [4])() == fresh.write([[1, 2, 3, first, 5]], [4])()
    assert runner.foresight.foreseen == 1


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


def test_each_target_token_in_the_drafters_ids(pairs):
    dec = HeteroSpeculativeDecoder(*pairs["others"], method="tli", lookahead=3)
    encoder, mapping = dec._text.drafter, dec.mapping
    spelling = foretell(mapping, encoder, dec._sizes)
    spelled = spelling.each.tolist()
    for data, found in zip(mapping.target_bytes, spelled, strict=False):
        ids = [index for index in found if index >= 0]
        if data is not None and ids:
            assert ids == encoder.encode(data)
    assert sum(row[0] >= 0 for row in spelled) > len(spelled) // 2
    assert all(spelled[token][0] == index for token, index in mapping.special.items())
    entries = spelling.joins[spelling.joins[:, :, 0] >= 0]
    assert len(entries) > 20
    for left, right, joined in entries.tolist():
        assert encoder.spell([left, right]) == encoder.spell([joined])
    where = bucket_of(entries[:, 0].long(), entries[:, 1].long(), len(spelling.joins))
    assert (spelling.joins[where] == entries[:, None]).all(dim=2).any(dim=1).all()
    same = foretell(mapping, None, (3, 3))
    assert same.each.tolist() == [[0], [1], [2]]
    assert bool((same.joins < 0).all())


@pytest.mark.parametrize(
    ("longest", "steps", "pieces", "most"),
    [(1, 4, 4, 4), (3, 4, 4, 2), (3, 1, 2, 4), (8, 15, 4, 4), (1, 1, 1, 2), (0, 15, 4, 4)],
)
def test_advance_is_its_twin(longest, steps, pieces, most):
    """Number for number, counts below 0 and tokens out of range included."""
    pytest.importorskip("triton")
    at = 0, 1, 17, 33, 48, 49, 65, 80, 81, 82, 83, 98, 16
    line = Line(*at)
    draw = torch.Generator().manual_seed(0)
    count, vocab, rows = 30, 25, 3

    def some(high, *shape):
        return torch.randint(high, shape, generator=draw)

    def ragged(high, least, *shape):
        lengths = least + some(shape[1] + 1 - least, shape[0], 1)
        return some(high, *shape).masked_fill(torch.arange(shape[1]) >= lengths, -1)

    for turn in range(12):
        runs, forth = (
            ragged(vocab, 1, count, max(longest, 1)),
            torch.randperm(count, generator=draw),
        )
        joins = torch.full((16, 4, 3), -1, dtype=torch.int32)
        for left, right in itertools.product(range(count), repeat=2):
            if (left + right) % 3 and turn:
                where = bucket_of(torch.tensor(left), torch.tensor(right), 16)
                joins[where, right % 4] = torch.tensor([left, right, left ^ right])
        spelling = Spelling(ragged(count, 0, vocab, pieces).int().to(DEVICE), joins.to(DEVICE))
        board = some(20, rows, 113)
        board[:, line.last] = some(4, rows)
        board[:, line.columns : line.reach] = some(count, rows, 15)
        board[:, line.reach :] = some(9, rows, 15).sort(dim=1).values
        total = (runs[board[:, line.columns : line.columns + steps]] >= 0).sum(dim=(1, 2))
        total = total.clamp(max=15) if longest else some(9, rows)
        board[:, line.accepted] = (
            total if turn % 3 == 0 else (torch.rand(rows) * (total + 1)).long()
        )
        if turn == 5:
            board[0, line.accepted], board[0, line.following] = -1, 2**31 - 1
        known = (forth.to(DEVICE), runs.to(DEVICE)) if longest else None
        found = []
        for backend in ("triton", "reference"):
            changed = board.to(DEVICE, copy=True)
            advance = pick_rules(DEVICE, backend).advance
            advance(changed, line, known, spelling, steps, most, (30, 40))
            found.append(changed)
        assert torch.equal(*found)
        assert int(found[0][:, line.last].max()) < most
        assert not torch.equal(found[0].cpu(), board)
