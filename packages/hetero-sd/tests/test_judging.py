"""Drawing and judging by the kernels, number for number as their PyTorch twins in float64."""

import pytest
import torch

from hetero_sd.kernels.judge import CERTAIN, COLUMNS, DENSE, Cut, Law, noise, pick_rules
from hetero_sd.verify import fits_law

pytest.importorskip("triton")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
RULES, TWIN = pick_rules(DEVICE, "triton"), pick_rules(DEVICE, "reference")
BOTH = ((RULES, torch.float32), (TWIN, torch.double))


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def new_state(seed=3, turn=5):
    return torch.tensor([seed * 2**33 + 12345, turn], device=DEVICE)


def test_philox_is_the_published_one():
    """The reference implementation's known answers, of counters and keys of one pattern."""
    state = torch.zeros(2, dtype=torch.long)
    assert noise.philox(state, 0, 1, 1).item() == 0x6627E8D5
    state = torch.tensor([-1, -1])
    bits = noise.philox(state, 0xFFFFFFFF, 1, 1)
    assert bits.shape == (1, 1)


@pytest.mark.parametrize(
    ("multiple", "columns", "alone"),
    [(0, 70, 8192), (1, 70, 0), (3, 70, 0), (3, 70, 8192), (2, 2500, 0), (0, 2500, 8192)],
)
def test_pick(multiple, columns, alone, monkeypatch):
    """By one program or several."""
    monkeypatch.setattr("hetero_sd.kernels.judge.kernel._ALONE", alone)
    rows, ids = 3, columns + 20
    logits = normal(rows, ids if multiple else columns) * 2
    draw = torch.Generator().manual_seed(1)
    among = None
    if multiple:
        among = torch.randperm(ids, generator=draw)[:columns, None].repeat(1, multiple).to(DEVICE)
        among[:, 1:] = -1
        among[:4, 1:] = torch.randint(-1, ids, (4, multiple - 1), generator=draw).to(DEVICE)
    forth = torch.randperm(columns, generator=draw)[:columns].to(DEVICE)
    for step in (None, 0, 2):
        found = []
        for rules, kind in BOTH:
            chosen = torch.zeros(rows, 4, dtype=torch.long, device=DEVICE)
            following = torch.zeros(rows, dtype=torch.long, device=DEVICE)
            scores = torch.zeros(rows, 4, columns, device=DEVICE)
            norms = torch.zeros(rows, 4, device=DEVICE)
            draws = None
            if step is not None:
                draws = scores[:, step], norms[:, step], new_state(), 0.5, step
            rules.pick(logits.to(kind), among, forth, chosen[:, 1], following, draws)
            found.append((chosen, following, scores, norms))
        for mine, wanted in zip(*found, strict=True):
            torch.testing.assert_close(mine, wanted, atol=1e-5, rtol=1e-5)
        assert bool((found[0][0][:, 1] >= 0).all())


def test_what_is_picked_has_the_law_of_its_scores():
    columns, rounds = 12, 300
    logits = normal(1, columns).expand(rounds, columns).contiguous()
    forth = torch.arange(columns, device=DEVICE)
    chosen = torch.zeros(rounds, dtype=torch.long, device=DEVICE)
    scores, norms = torch.zeros(rounds, columns, device=DEVICE), torch.zeros(rounds, device=DEVICE)
    RULES.pick(logits, None, forth, chosen, chosen.clone(), (scores, norms, new_state(), 1.3, 0))
    counts = torch.bincount(chosen.cpu(), minlength=columns).double()
    law = (scores[0] - norms[0]).exp().double().cpu()
    fits, detail = fits_law(counts, law)
    assert fits, detail
    assert not fits_law(counts.roll(1), law)[0]


def test_what_is_cut_is_never_picked():
    columns, rows = 8, 60
    logits = normal(1, columns).expand(rows, columns).contiguous()
    value = logits[:, 3].clone()
    left = Cut(value, torch.zeros(rows, dtype=torch.int32, device=DEVICE))
    forth = torch.arange(columns, device=DEVICE)
    laws = []
    for rules, _ in BOTH:
        chosen = torch.zeros(rows, dtype=torch.long, device=DEVICE)
        scores, norms = torch.zeros(rows, columns, device=DEVICE), torch.zeros(rows, device=DEVICE)
        draws = scores, norms, new_state(), 0.7, 0
        rules.pick(logits, None, forth, chosen, chosen.clone(), draws, left)
        stays = logits[0] >= value[0]
        assert set(chosen.tolist()) == set(stays.nonzero()[:, 0].tolist())
        laws.append((scores[0] - norms[0]).exp())
    torch.testing.assert_close(*laws)
    torch.testing.assert_close(laws[0], (left.apply(logits)[0] / 0.7).softmax(0))


def some_runs(columns, longest, vocab, seed=0):
    draw = torch.Generator().manual_seed(seed)
    runs = torch.randint(vocab, (columns, longest), generator=draw)
    lengths = torch.randint(1, longest + 1, (columns,), generator=draw)
    return runs.masked_fill(torch.arange(longest) >= lengths[:, None], -1).to(DEVICE)


def laid(rules, runs, columns, steps, room):
    rows = len(columns)
    tokens = torch.full((rows, room), 7, device=DEVICE)
    origin, total = torch.zeros_like(tokens), torch.zeros(rows, dtype=torch.long, device=DEVICE)
    for most in (2, room):
        limits = torch.full((rows, 2), most, device=DEVICE)[:, 1]
        rules.pack(columns, runs, tokens, origin, total, limits, steps)
        assert int(total.max()) <= most
    there = torch.arange(room, device=DEVICE) < total[:, None]
    return torch.where(there, tokens, -1), torch.where(there, origin, 0), total


@pytest.mark.parametrize(("longest", "steps", "room"), [(1, 3, 3), (3, 4, 7), (3, 2, 15)])
def test_runs_are_laid_and_their_laws_are_those_of_the_accept_rule(longest, steps, room):
    """The rule itself, `laws_of_runs`, is checked by enumeration elsewhere."""
    from hetero_sd.acceptance import Choice, laws_of_runs

    rows, size, vocab = 2, 40, 6
    runs = some_runs(size, longest, vocab)
    columns = torch.randint(size, (rows, 5), generator=torch.Generator().manual_seed(4)).to(DEVICE)
    mine, wanted = (laid(rules, runs, columns, steps, room) for rules, _ in BOTH)
    for a, b in zip(mine, wanted, strict=True):
        assert torch.equal(a, b)
    tokens, origin, total = mine
    scores = normal(rows, 5, size, seed=2)
    norms = scores.logsumexp(dim=2)
    found = []
    for rules, kind in BOTH:
        law = torch.full((rows, room, vocab), 9.0, dtype=kind, device=DEVICE)
        mass = torch.full((rows, room), 9.0, dtype=kind, device=DEVICE)
        rules.spread(scores.to(kind), norms.to(kind), columns, runs, origin, total, law, mass)
        found.append((law, mass))
    for row in range(rows):
        count = int(total[row])
        picked = columns[row, :steps].tolist()
        choices = [
            Choice(runs, scores[row, i].double().softmax(-1), column)
            for i, column in enumerate(picked)
        ]
        lengths = [int((runs[column] >= 0).sum()) for column in picked]
        rule = laws_of_runs(choices, lengths, scores.double()[0, :, :vocab])[:count]
        expected = [int(t) for column in picked for t in runs[column] if t >= 0]
        assert tokens[row, :count].tolist() == expected[:room]
        for law, mass in found:
            torch.testing.assert_close(
                (law[row, :count] / mass[row, :count, None]).double(), rule, atol=1e-6, rtol=1e-5
            )


def some_law(kind, rows, count, vocab, tokens):
    if kind == CERTAIN:
        return Law.certain(DEVICE)
    column_of = torch.full((vocab,), -1, dtype=torch.int32, device=DEVICE)
    if kind == COLUMNS:
        kept = torch.arange(0, vocab, 2, device=DEVICE)
        column_of[kept] = torch.arange(len(kept), dtype=torch.int32, device=DEVICE)
        scores = normal(rows, count + 1, len(kept), seed=8)
        tokens.copy_(kept[tokens % len(kept)])
        return Law(COLUMNS, scores, scores.logsumexp(dim=2), column_of)
    masses = normal(rows, count, vocab, seed=9).exp()
    return Law(DENSE, masses, masses.sum(dim=2), column_of)


@pytest.mark.parametrize("kind", [CERTAIN, COLUMNS, DENSE])
@pytest.mark.parametrize("way", ["greedy", "tokens", "block", "cut"])
@pytest.mark.parametrize(("count", "vocab"), [(0, 90), (1, 2500), (5, 90)])
def test_judging(kind, way, count, vocab):
    rows = 4
    draw = torch.Generator().manual_seed(count)
    logits = normal(rows * (count + 1), vocab, seed=7)
    tokens = torch.randint(vocab, (rows, count), generator=draw).to(DEVICE)
    law = some_law(kind, rows, count, vocab, tokens) if count else Law.certain(DEVICE)
    if count:  # Likely proposals, so that some are accepted.
        logits.view(rows, count + 1, vocab)[:, :count].scatter_add_(
            2, tokens[:, :, None], torch.full((rows, count, 1), 5.0, device=DEVICE)
        )
    limits = torch.tensor([count, max(count - 2, 0), count, 0], device=DEVICE)
    logits[-1, 3] = float("nan")
    left = None
    if way == "cut":  # Of what equals it, some go.
        value = logits[:, 20].clone()
        logits[:, 30:60] = value[:, None]
        left = Cut(value, torch.full_like(value, 41, dtype=torch.int32))
    taken, after = set(), set()
    for turn in range(4):
        found = []
        for rules, dtype in BOTH:
            state = new_state(turn=turn)
            out = torch.full((rows, 3), -7, device=DEVICE)
            draws = None if way == "greedy" else (state, 0.5)
            exact = Law(law.kind, law.weights.to(dtype), law.norms.to(dtype), law.column_of)
            rules.judge(
                logits.to(dtype),
                tokens,
                limits,
                exact,
                out[:, 1],
                out[:, 2],
                draws,
                way in ("block", "cut"),
                None if left is None else Cut(left.value.to(dtype), left.first),
            )
            assert int(state[1]) == turn + (way != "greedy")
            found.append(out)
        assert torch.equal(found[0][:3], found[1][:3])
        assert found[0][3, 1] == found[1][3, 1] == -1
        taken |= set(found[0][:3, 1].tolist())
        after |= set(found[0][:3, 2].tolist())
    assert count == 0 or len(taken) > 1 or way == "greedy"
    assert left is None or not after & {20, *range(30, 41)}


@pytest.mark.parametrize("kind", [CERTAIN, COLUMNS, DENSE])
def test_where_both_laws_agree_the_next_token_is_drawn_from_the_targets(kind):
    """No residual is left to rounding: whatever is refused, something that p allows follows."""
    rows, vocab = 1, 8
    logits = torch.full((2, vocab), float("-inf"), device=DEVICE)
    logits[:, 4] = 0.0
    tokens = torch.full((rows, 1), 4 if kind else 2, device=DEVICE)
    column_of = torch.arange(vocab, dtype=torch.int32, device=DEVICE)
    weights = logits[:1, None].clone()
    if kind == DENSE:
        weights = weights.exp()
    law = Law(kind, weights, torch.full((1, 1), float(kind == DENSE), device=DEVICE), column_of)
    for turn in range(5):
        out = torch.zeros(1, 2, dtype=torch.long, device=DEVICE)
        limits = torch.ones(1, dtype=torch.long, device=DEVICE)
        RULES.judge(
            logits, tokens, limits, law, out[:, 0], out[:, 1], (new_state(turn=turn), 1.0), True
        )
        assert out.tolist() == [[1 if kind else 0, 4]]


@pytest.mark.parametrize("block", [False, True])
def test_limits_beyond_the_proposals_are_their_number(block):
    """As when a graph of few proposals is captured in a round of many: nothing else is read."""
    rows, vocab, count = 2, 8, 1
    logits = torch.full((rows * 2, vocab), float("-inf"), device=DEVICE)
    logits[:, 4] = 0.0
    tokens = torch.full((rows, count), 4, device=DEVICE)
    law = Law.certain(DEVICE)
    if block:
        column_of = torch.arange(vocab, dtype=torch.int32, device=DEVICE)
        law = Law(
            COLUMNS, logits.view(rows, 2, vocab), torch.zeros(rows, 2, device=DEVICE), column_of
        )
    for rules, _ in BOTH:
        out = torch.zeros(rows, 2, dtype=torch.long, device=DEVICE)
        limits = torch.tensor([7, 3], device=DEVICE)
        state = new_state(), 1.0
        rules.judge(logits, tokens, limits, law, out[:, 0], out[:, 1], state, block)
        assert out.tolist() == [[1, 4]] * 2
