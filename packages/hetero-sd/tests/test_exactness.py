"""The law of the output, by enumeration in float64 through the real accept code."""

import itertools

import pytest
import torch

from hetero_sd.acceptance import verify, verify_greedy
from hetero_sd.processors import Processors
from hetero_sd.testing import total_variation

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
    return process(logits_for(history, 7, VOCAB))[0].softmax(-1)


def drafter_law(history, process):
    return process(logits_for(history, 11, len(KEPT)))[0].softmax(-1)


def outcomes_of_verify(p, proposed, q, kept):
    """Every result of `verify`, each with the share of the coins that gives it."""
    bounds = []
    for i, token in enumerate(proposed.tolist()):
        theirs = 1.0 if q is None else float(q[i, kept.tolist().index(token)])
        bounds.append(min(1.0, float(p[i, token]) / theirs))
    for pattern in itertools.product((True, False), repeat=len(bounds)):
        weight = 1.0
        coins = []
        for accept, bound in zip(pattern, bounds, strict=True):
            weight *= bound if accept else 1 - bound
            coins.append(bound / 2 if accept else (1 + bound) / 2)
        if weight > 0:
            yield weight, verify(p, proposed, torch.tensor(coins, dtype=torch.float64), q, kept)


def drafts(method, history, process):
    """Every draft with its probability: target tokens and, for TLI, the laws they came from."""
    if method == "tli":
        for columns in itertools.product(range(len(KEPT)), repeat=GAMMA):
            weight, seen, laws = 1.0, list(history), []
            for column in columns:
                law = drafter_law(seen, process)
                laws.append(law)
                weight *= float(law[column])
                seen.append(int(KEPT[column]))
            yield weight, seen[len(history) :], torch.stack(laws)
        return
    # SLEM: two drafter tokens, told apart by their text; the text becomes one or two target tokens.
    retokenised = {(0, 0): [1], (0, 1): [2, 0], (1, 0): [4], (1, 1): [3, 3]}
    first = torch.softmax(logits_for(history, 13, 2)[0], -1)
    for a, b in itertools.product(range(2), repeat=2):
        second = torch.softmax(logits_for([*history, a], 17, 2)[0], -1)
        yield float(first[a] * second[b]), retokenised[a, b], None


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
    for chance, tokens, q in drafts(method, history, process):
        if chance == 0:
            continue
        p = torch.stack([target_law(history + tokens[:i], process) for i in range(len(tokens) + 1)])
        told = q if spoil is None or q is None else spoil(q)
        kept = None if q is None else KEPT
        for share, (accepted, law) in outcomes_of_verify(p, torch.tensor(tokens), told, kept):
            law = law / law.sum()
            for token in law.nonzero().flatten().tolist():
                yield chance * share * float(law[token]), tokens[:accepted] + [token]


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
@pytest.mark.parametrize("method", ["tli", "slem"])
def test_output_has_the_targets_law(method, setting):
    process = Processors(do_sample=True, **SETTINGS[setting])
    assert distance(output_law(method, process), true_law(process)) < 1e-12


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda q: q.roll(1, dims=1), id="columns of q in another order"),
        pytest.param(lambda q: torch.full_like(q, 1 / q.shape[1]), id="q of another drafter"),
        pytest.param(lambda q: (q**2) / (q**2).sum(1, keepdim=True), id="another temperature"),
    ],
)
def test_negative_control_a_wrong_drafter_law_is_found(spoil):
    process = Processors(do_sample=True)
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
    choices = torch.tensor([4, 2, 9, 1])
    assert verify_greedy(choices, torch.tensor([4, 2, 8])) == (2, 9)
    assert verify_greedy(choices, torch.tensor([5, 2, 9])) == (0, 4)
    assert verify_greedy(choices, torch.tensor([4, 2, 9])) == (3, 1)
    assert verify_greedy(choices[:1], torch.tensor([], dtype=torch.long)) == (0, 4)


def test_shapes_that_do_not_belong_together_are_refused():
    p = torch.full((2, 3), 1 / 3)
    with pytest.raises(ValueError, match="`p` must have one row more than there are proposals, 3"):
        verify(p, torch.tensor([0, 1]), torch.tensor([0.1, 0.1]))
    with pytest.raises(ValueError, match=r"`coins` and `q` must have a row for each of the 1"):
        verify(p, torch.tensor([0]), torch.tensor([0.1, 0.2]))
