"""What top-k, top-p and min-p leave: as transformers has it, and by the kernels."""

import math

import pytest
import torch
from transformers.generation import logits_process as theirs

from hetero_sd.kernels.judge import Warp, pick_rules
from hetero_sd.processors import Processors

pytest.importorskip("triton")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
RULES, TWIN = pick_rules(DEVICE, "triton"), pick_rules(DEVICE, "reference")
WARPS = [
    Warp(top_k=5),
    Warp(1.3, 50, 0.8),
    Warp(0.7, 0, 0.9),
    Warp(0.05, 0, 0.99),
    Warp(3.0, 0, 1e-9),
    Warp(top_k=10**6, top_p=0.95),
    Warp(0.5, min_p=0.1),
    Warp(1.0, 3, 0.47, 0.2),
    Warp(2.0, 0, 0.0),
]


def lines(size, seed=0):
    """Ordinary ones, one with many like numbers, one of bans, one below zero, one of one number."""
    z = torch.randn(5, size, generator=torch.Generator().manual_seed(seed)) * 3
    z[1] = (z[1] * 2).round() / 2
    z[2, ::3] = -torch.inf
    z[3] = -z[3].abs() - 1
    z[4] = 1.0
    return z.bfloat16().float().to(DEVICE)


def chain_of(warp):
    chain = []
    if warp.temperature != 1:
        chain.append(theirs.TemperatureLogitsWarper(warp.temperature))
    if warp.top_k:
        chain.append(theirs.TopKLogitsWarper(warp.top_k))
    if warp.top_p < 1:
        chain.append(theirs.TopPLogitsWarper(warp.top_p))
    if warp.min_p:
        chain.append(theirs.MinPLogitsWarper(warp.min_p))
    return chain


def allowed(cut, z):
    return cut.apply(z) > -torch.inf


@pytest.mark.parametrize("warp", WARPS)
def test_the_twin_leaves_what_transformers_leaves(warp, monkeypatch):
    z = lines(300).double()
    sort = torch.sort  # Which of like tokens go is left to the sort; the twin's is a stable one.
    monkeypatch.setattr(torch, "sort", lambda x, **options: sort(x, stable=True, **options))
    chain = chain_of(warp)
    wanted = z
    for processor in chain:
        wanted = processor(None, wanted)
    found = TWIN.cut(z, None, z.shape[1], warp)
    assert torch.equal(allowed(found, z), wanted > -torch.inf)
    assert Processors(chain, greedy=False).warp == warp


@pytest.mark.parametrize(
    ("kind", "warp"),
    [(torch.bfloat16, warp) for warp in WARPS]
    + [(torch.float16, WARPS[2]), (torch.float16, WARPS[7])]
    + [(torch.float32, WARPS[1]), (torch.float32, WARPS[2])],
)
def test_the_kernels_leave_what_the_twin_leaves(kind, warp):
    wide = lines(150, seed=1).to(kind)
    if kind == torch.float32:  # Numbers that differ in their last bits.
        wide = wide * (1 + 1e-6 * torch.arange(150, device=DEVICE))
    z = wide[:, 3:147]  # Neither contiguous nor of a round size.
    found, wanted = (
        rules.cut(z if rules is RULES else z.double(), None, z.shape[1], warp)
        for rules in (RULES, TWIN)
    )
    assert torch.equal(allowed(found, z.float()), allowed(wanted, z.double()))


def test_slices_are_joined_and_like_tokens_found_among_them():
    size = 2500  # Three slices.
    z = torch.randn(2, size, generator=torch.Generator().manual_seed(3)).to(DEVICE).bfloat16()
    z[1] = 0.25
    for warp in (Warp(0.8, 900, 0.8301), Warp(1.0, 0, 0.3701)):
        found = RULES.cut(z, None, size, warp)
        wanted = TWIN.cut(z.double(), None, size, warp)
        assert torch.equal(allowed(found, z.float()), allowed(wanted, z.double()))
    kept = int(allowed(found, z.float())[1].sum())
    assert kept == math.ceil(0.3701 * size)


def test_columns_of_several_ids_are_cut_by_their_sums():
    logits = lines(60).to(torch.float32)[:2]
    among = torch.arange(60, device=DEVICE).view(30, 2)
    among[3:, 1] = -1
    warp = Warp(0.9, 12, 0.8)
    found = RULES.cut(logits, among, 30, warp)
    wanted = TWIN.cut(logits.double(), among, 30, warp)
    from hetero_sd.kernels.judge.reference import combine

    assert torch.equal(
        allowed(found, combine(logits, among)), allowed(wanted, combine(logits.double(), among))
    )
    rough = allowed(RULES.cut(logits, among, 30, warp, exact=False), combine(logits, among))
    exact = allowed(found, combine(logits, among))
    assert bool((rough | ~exact).all())  # Where last bits do not matter none goes that may stay,
    assert int(rough.sum()) <= int(exact.sum()) + 2  # and next to none stays that may go.


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("warp", WARPS)
def test_short_lines_are_cut_by_one_program(kind, warp):
    """Of numbers that agree in 16 bits all stay, so that none goes that may stay."""
    z = (lines(150, seed=2)[:, 3:147] * 2).to(kind)
    rough = allowed(RULES.cut(z, None, z.shape[1], warp, exact=False), z.float())
    exact = allowed(TWIN.cut(z.double(), None, z.shape[1], warp), z.double())
    assert bool((rough | ~exact).all())
    least = z.float().masked_fill(~exact, math.inf).amin(dim=1, keepdim=True)
    near = z.float() >= least - least.abs() / 128
    assert bool((near | ~rough).all())


@pytest.mark.parametrize(
    "chain",
    [
        [theirs.TopPLogitsWarper(0.9), theirs.TopKLogitsWarper(5)],
        [theirs.TopKLogitsWarper(5, filter_value=-9.0)],
        [theirs.TopPLogitsWarper(0.9, min_tokens_to_keep=2)],
        [theirs.TopKLogitsWarper(5), theirs.TypicalLogitsWarper(0.9)],
        [theirs.TemperatureLogitsWarper(0.9), theirs.RepetitionPenaltyLogitsProcessor(1.1)],
        [theirs.TopKLogitsWarper(5), theirs.TopKLogitsWarper(3)],
    ],
)
def test_other_chains_are_left_to_transformers(chain):
    assert Processors(chain, greedy=False).warp is None
    assert Processors([theirs.TopPLogitsWarper(0.9)]).warp is None
    assert Processors().warp == Processors(greedy=False).warp == Warp()
