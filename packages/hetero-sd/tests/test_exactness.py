"""The law of the output, by enumeration in float64 through the real accept code."""

import itertools

import pytest
import torch

from hetero_sd.acceptance import (
    Choice,
    laws_of_runs,
    residual,
    settle,
    verify,
    verify_block,
    verify_greedy,
    verify_runs,
)
from hetero_sd.chance import Chance
from hetero_sd.drafts import Certain, Drawn, Runs, Weighed, judge_together
from hetero_sd.processors import Processors
from hetero_sd.testing import (
    outcomes_of_block,
    outcomes_of_runs,
    outcomes_of_verify,
    total_variation,
    warpers,
)

VOCAB, LENGTH, GAMMA = 5, 3, 2
KEPT = torch.tensor([3, 0, 4])  # The shared tokens, in an order of their own.
SETTINGS = {
    "plain": {},
    "temperature": {"temperature": 0.6},
    "top-k": {"top_k": 3},
    "top-p": {"top_p": 0.7},
    "all": {"temperature": 1.4, "top_k": 4, "top_p": 0.8},
}


def logits_for(history, salt, size):
    """Random logits that depend on the whole history."""
    seed = salt
    for token in history:
        seed = seed * 31 + token + 1
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, size, generator=generator, dtype=torch.float64) * 1.5


def target_law(history, process):
    return process.scores_only(logits_for(history, 7, VOCAB))[0].softmax(-1)


def drafter_law(history, process):
    return process.scores_only(logits_for(history, 11, len(KEPT)))[0].softmax(-1)


# What each of four drafter tokens is for the target, alone and after another one.
PUSH = torch.tensor([[1, -1], [2, 0], [2, -1], [2, 4]])
AFTER = {
    (a, b): run
    for a, runs in enumerate(
        [
            [[1, 3], [1, 2], [4], [1, 3, 3]],
            [[2, 0], [2, 4, 1], [3], [2, 0]],
            [[0], [2, 2], [2, 1], [2, 2, 2]],
            [[4, 4], [4], [4, 1], [0, 2]],
        ]
    )
    for b, run in enumerate(runs)
}


def own_law(history, drafted, process):
    return process.scores_only(logits_for([*history, *drafted], 13, 4))[0].softmax(-1)


def drafts(method, history, process):
    """Every draft with its probability: its target tokens and what the accept rule is told."""
    if method in ("tli", "block"):
        for columns in itertools.product(range(len(KEPT)), repeat=GAMMA):
            weight, seen, laws = 1.0, list(history), []
            for column in columns:
                law = drafter_law(seen, process)
                laws.append(law)
                weight *= float(law[column])
                seen.append(int(KEPT[column]))
            yield weight, seen[len(history) :], torch.stack(laws)
        return
    first = own_law(history, [], process)
    for a in range(4):
        second = own_law(history, [a], process)
        for b in range(4):
            weight = float(first[a] * second[b])
            if method == "slem":
                yield weight, AFTER[a, b], None
            elif method == "slrs":
                steps = [Choice(PUSH, first, a), Choice(PUSH, second, b)]
                yield weight, [int(t) for run in PUSH[[a, b]] for t in run if t >= 0], steps
            else:
                runs = torch.full((4, 3), -1)
                for other in range(4):
                    run = AFTER[a, other]
                    runs[other, : len(run)] = torch.tensor(run)
                yield weight, AFTER[a, b], [Choice(runs, second, b)]


def judge(method, p, tokens, told):
    if method in ("slrs", "c-slrs"):
        return outcomes_of_runs(p, told)
    if method == "block":
        return outcomes_of_block(p, tokens, told, KEPT)
    return outcomes_of_verify(p, tokens, told, None if told is None else KEPT)


def output_law(method, process, spoil=None):
    """The exact law of the first LENGTH tokens that rounds of draft and verify emit."""
    weights_of = {(): 1.0}
    for length in range(LENGTH):
        for history in [h for h in weights_of if len(h) == length]:
            weight = weights_of.pop(history)
            for share, new in round_outcomes(method, list(history), process, spoil):
                key = (*history, *new)[:LENGTH]
                weights_of[key] = weights_of.get(key, 0.0) + weight * share
    return weights_of


def round_outcomes(method, history, process, spoil):
    """Every list of tokens that one round may emit after a history, with its probability."""
    for chance, tokens, told in drafts(method, history, process):
        if chance == 0:
            continue
        p = torch.stack([target_law(history + tokens[:i], process) for i in range(len(tokens) + 1)])
        if spoil is not None and isinstance(told, list):
            told = [Choice(step.runs, spoil(step.mass), step.chosen) for step in told]
        elif spoil is not None and told is not None:
            told = spoil(told)
        for share, (accepted, law) in judge(method, p, torch.tensor(tokens), told):
            law = law / law.sum()
            for token in law.nonzero().flatten().tolist():
                yield chance * share * float(law[token]), [*tokens[:accepted], token]


def true_law(process):
    law = {}
    for tokens in itertools.product(range(VOCAB), repeat=LENGTH):
        weight = 1.0
        for i, token in enumerate(tokens):
            weight *= float(target_law(list(tokens[:i]), process)[token])
        law[tokens] = weight
    return law


def distance(found, wanted):
    keys = sorted(set(found) | set(wanted))
    return total_variation([found.get(k, 0.0) for k in keys], [wanted.get(k, 0.0) for k in keys])


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("method", ["tli", "slem", "block", "slrs", "c-slrs"])
def test_output_has_the_targets_law(method, setting):
    process = Processors(warpers(**SETTINGS[setting]), greedy=False)
    assert distance(output_law(method, process), true_law(process)) < 1e-12


def test_more_is_accepted_as_theory_says():
    """Block verification is no worse than token by token; SLRS than C-SLRS than SLEM."""
    process = Processors(greedy=False)

    def mean(method):
        return sum(weight * len(new) for weight, new in round_outcomes(method, [2], process, None))

    assert mean("block") > mean("tli") + 1e-3
    assert mean("c-slrs") > mean("slem") + 1e-3


@pytest.mark.parametrize("method", ["block", "slrs", "c-slrs"])
def test_negative_control_of_the_newer_methods(method):
    process = Processors(greedy=False)
    found = output_law(method, process, lambda q: q.roll(1, dims=-1))
    assert distance(found, true_law(process)) > 1e-2


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda q: q.roll(1, dims=1), id="columns of q in another order"),
        pytest.param(lambda q: torch.full_like(q, 1 / q.shape[1]), id="q of another drafter"),
        pytest.param(lambda q: (q**2) / (q**2).sum(1, keepdim=True), id="another temperature"),
    ],
)
def test_negative_control_a_wrong_drafter_law_is_found(spoil):
    process = Processors(greedy=False)
    assert distance(output_law("tli", process, spoil), true_law(process)) > 1e-2


def test_equal_laws_always_accept_and_leave_no_residual():
    p = torch.softmax(torch.randn(3, 6, dtype=torch.float64), -1)
    coins = torch.tensor([0.999999, 0.999999], dtype=torch.float64)
    accepted, law = verify(p, torch.tensor([1, 4]), coins, p[:2])
    assert accepted == 2
    torch.testing.assert_close(law, p[2])


def test_residual_that_rounds_to_nothing_falls_back_to_p():
    p = torch.tensor([[0.25, 0.75], [0.5, 0.5]])
    q = torch.tensor([[0.25 + 1e-7, 0.75]])
    accepted, law = verify(p, torch.tensor([0]), torch.tensor([1.0]), q)
    assert accepted == 0
    torch.testing.assert_close(law, p[0])


def test_forbidden_proposal_is_never_accepted():
    p = torch.tensor([[0.0, 1.0], [0.5, 0.5]])
    for q in (torch.tensor([[1.0, 0.0]]), None):
        accepted, law = verify(p, torch.tensor([0]), torch.tensor([0.0]), q)
        assert accepted == 0
        assert law.argmax() == 1


def test_greedy_stops_at_the_first_difference():
    choices = [4, 2, 9, 1]
    assert verify_greedy(choices, [4, 2, 8]) == (2, 9)
    assert verify_greedy(choices, [5, 2, 9]) == (0, 4)
    assert verify_greedy(choices, [4, 2, 9]) == (3, 1)
    assert verify_greedy(choices[:1], []) == (0, 4)


def test_shapes_that_do_not_belong_together_are_refused():
    p = torch.full((2, 3), 1 / 3)
    with pytest.raises(ValueError, match="`p` must have one row more than there are proposals, 3"):
        verify(p, torch.tensor([0, 1]), torch.tensor([0.1, 0.1]))
    with pytest.raises(ValueError, match=r"`coins` and `q` must have a row for each of the 1"):
        verify(p, torch.tensor([0]), torch.tensor([0.1, 0.2]))


def test_residual_by_rejection_has_its_law():
    p = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
    psi = [0.2, 0.6, 0.0, 0.1]
    chance = Chance(torch.Generator().manual_seed(0))
    counts = sum(residual(p, lambda t: psi[t], chance) for _ in range(4000))
    wanted = (p - torch.tensor(psi, dtype=torch.float64)).clamp(min=0)
    assert total_variation(counts / 4000, wanted / wanted.sum()) < 0.03


def test_residual_of_equal_laws_ends():
    p = torch.tensor([0.25, 0.75])
    drawn = residual(p, lambda t: float(p[t]), Chance(torch.Generator().manual_seed(0)))
    assert float(drawn.sum()) == 1


@pytest.mark.parametrize("block", [False, True])
def test_settling_many_rows_is_the_same_rule(block):
    """With like coins, as many are accepted as row by row, and the next token's law is the same."""
    generator = torch.Generator().manual_seed(0)
    rows, count, vocab = 200, 4, 6
    kept = torch.tensor([4, 0, 3])
    p = torch.randn(rows, count + 1, vocab, generator=generator, dtype=torch.float64).softmax(-1)
    q = torch.randn(rows, count, 3, generator=generator, dtype=torch.float64).softmax(-1)
    p[0, :, 1] = 0.0
    p[1, :, kept] = q[1, 0]  # Where both laws agree.
    columns = torch.randint(3, (rows, count), generator=generator)
    proposed = kept[columns]
    limits = torch.randint(count + 1, (rows,), generator=generator)
    coins = torch.rand(rows, count, generator=generator, dtype=torch.float64)
    accepted, left = settle(p, proposed, limits, coins, q, columns, kept, block)
    rule = verify_block if block else verify
    for row in range(rows):
        n = int(limits[row])
        taken, law = rule(p[row, : n + 1], proposed[row, :n], coins[row, :n], q[row, :n], kept)
        assert int(accepted[row]) == taken
        assert total_variation(left[row] / left[row].sum(), law / law.sum()) < 1e-12
    assert len(set(accepted.tolist())) == count + 1


def test_laws_of_runs_are_those_that_each_run_is_judged_by():
    """A coin below p/ψ is the same for both; ψ is found out by trying coins."""
    generator = torch.Generator().manual_seed(0)
    runs = torch.tensor([[1, 2, -1], [1, 3, 4], [1, -1, -1], [0, -1, -1], [2, 2, 2]])
    other = torch.tensor([[3, 0], [3, -1]])
    masses = torch.rand(3, 5, generator=generator, dtype=torch.float64)
    masses = masses / masses.sum(dim=1, keepdim=True)
    steps = [Choice(runs, masses[0], 1), Choice(other, torch.tensor([0.4, 0.6]).double(), 0)]
    steps += [Choice(runs, masses[1], 0), Choice(runs, masses[2], 4)]
    tokens, lengths = [1, 3, 4, 3, 0, 1, 2, 2, 2, 2], [3, 2, 2, 3]
    p = torch.full((len(tokens) + 1, 5), 0.2, dtype=torch.float64)
    laws = laws_of_runs(steps, lengths, p)
    assert laws.shape == (len(tokens), 5)
    assert torch.allclose(laws.sum(dim=1), torch.ones(len(tokens)).double())
    bounds = p[:-1, 0] / laws[torch.arange(len(tokens)), torch.tensor(tokens)]
    for place, bound in enumerate(bounds.tolist()):
        coins = torch.zeros(len(tokens), dtype=torch.float64)
        coins[place] = min(bound, 1) - 1e-9
        assert verify_runs(p, steps, coins)[0] == len(tokens)
        if bound < 1:
            coins[place] = bound + 1e-9
            taken, rest = verify_runs(p, steps, coins)
            assert taken == place
            assert torch.allclose(rest, (p[place] - laws[place]).clamp(min=0))


def test_judging_rows_together_is_judging_each():
    """Drafts of every kind and length: the same law of what is accepted and of what follows."""
    draw = torch.Generator().manual_seed(0)
    runs = torch.tensor([[1, 2], [1, -1], [0, -1], [3, 3]])
    mass = torch.tensor([0.3, 0.2, 0.4, 0.1])
    kept = torch.tensor([3, 0, 1])
    laws = torch.rand(2, 3, generator=draw).softmax(dim=1)
    drafts = [
        Certain([2, 1]),
        Certain(),
        Runs([1, 2, 0], [Choice(runs, mass, 0), Choice(runs, mass.roll(1), 2)], [2, 1]),
        Runs([1], [Choice(runs, mass, 0)], [2]),
        Drawn([3, 1], laws, kept, False),
    ]
    sizes = [len(draft.tokens) + 1 for draft in drafts]
    p = torch.randn(sum(sizes), 4, generator=draw).softmax(dim=1)
    count = 4000
    together, alone = torch.zeros(2, 5, 4, 4)
    chance = Chance(torch.Generator().manual_seed(1))
    for _ in range(count):
        for row, (taken, token) in enumerate(judge_together(drafts, p, chance)):
            together[row, taken, token] += 1 / count
        for row, (draft, law) in enumerate(zip(drafts, p.split(sizes), strict=True)):
            taken, weights = draft.judge(law, chance)
            alone[row, taken] += weights / weights.sum() / count
    for row in range(5):
        assert total_variation(together[row].flatten(), alone[row].flatten()) < 0.03
    p[3, 1] = torch.nan
    assert all(taken == -1 for taken, _ in judge_together(drafts, p, chance))


def test_laws_that_the_host_knows_are_those_of_the_accept_rule():
    draw = torch.Generator().manual_seed(0)
    for _ in range(20):
        lengths = torch.randint(1, 5, (6,), generator=draw)
        runs = torch.randint(3, (6, 4), generator=draw)
        runs = runs.masked_fill(torch.arange(4) >= lengths[:, None], -1)
        mass = torch.rand(6, generator=draw, dtype=torch.float64)
        for chosen, length in enumerate(lengths.tolist()):
            like = torch.zeros(1, 3, dtype=torch.float64)
            rule = laws_of_runs([Choice(runs, mass / mass.sum(), chosen)], [length], like)
            lists = [[t for t in run if t >= 0] for run in runs.tolist()]
            draft = Weighed.among(lists, mass.tolist(), chosen)
            assert draft.tokens == lists[chosen]
            torch.testing.assert_close(draft.dense(like), rule, atol=1e-15, rtol=1e-13)


def test_host_draws_by_weights():
    chance, counts = Chance(torch.Generator().manual_seed(1)), [0, 0, 0]
    for _ in range(4000):
        counts[chance.pick([0.5, 0.0, 1.5])] += 1
    assert counts[1] == 0
    assert abs(counts[0] / 4000 - 0.25) < 0.03
