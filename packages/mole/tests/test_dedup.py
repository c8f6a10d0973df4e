"""Experts run once for every distinct id: same values, same gradients."""

from contextlib import nullcontext

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mole.lookup import Repeats, StepBank, distinct_ids


@given(st.lists(st.lists(st.integers(0, 19), min_size=3, max_size=3), min_size=1, max_size=12))
def test_every_token_finds_its_id(rows):
    ids = torch.tensor(rows)
    distinct, inverse = distinct_ids(ids, 20)
    assert torch.equal(distinct[inverse], ids)
    assert distinct.tolist() == sorted(set(distinct.tolist()))
    if ids.numel() < 20:
        assert set(distinct.tolist()) == set(ids.flatten().tolist())


@pytest.mark.parametrize("length", [5, 80])  # fewer and more tokens than the vocabulary has ids
def test_values_and_gradients_are_those_of_the_naive_loop(make_mole, length):
    ids = torch.randint(0, 60, (2, length), generator=torch.Generator().manual_seed(3))
    ids[:, 2:4] = ids[:, :2]  # repeated for certain
    found = {}
    for dedup in ("off", "micro"):
        model = make_mole(dedup=dedup, max_position_embeddings=128).double().train()
        loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        found[dedup] = {n: p.grad for n, p in model.named_parameters()} | {"loss": loss.detach()}
    for name, expected in found["off"].items():
        torch.testing.assert_close(found["micro"][name], expected, rtol=1e-7, atol=1e-9)


def test_experts_run_on_distinct_ids_only(make_mole, monkeypatch):
    model = make_mole(dedup="micro")
    seen = []
    for layer in model.model.layers:
        values = layer.lookup.values
        monkeypatch.setattr(
            layer.lookup, "values", lambda e, values=values: seen.append(len(e)) or values(e)
        )
    with torch.no_grad():
        model(torch.tensor([[7, 7, 9, 7, 7]]))
    assert seen == [2, 2, 2]


def test_expert_values_pass_gradcheck(make_mole):
    lookup = make_mole(hidden_size=8, intermediate_size=6, num_lookup_experts=2).double()
    lookup = lookup.model.layers[0].lookup
    embeddings = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    logits = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    repeats = Repeats.of(torch.tensor([[0, 2, 0, 1]]), 3)
    residual = torch.zeros(4, 8, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda e, r: lookup.mixed(r, residual, lookup.values(e), repeats), (embeddings, logits)
    )


@pytest.mark.parametrize("layers", [[0, 1, 2], [1]])
@pytest.mark.parametrize("chunk", [5, 8192])
def test_a_step_gives_the_gradients_of_its_batches(make_mole, layers, chunk):
    ids = torch.randint(0, 60, (3, 2, 9), generator=torch.Generator().manual_seed(3))
    found = {}
    for dedup in ("off", "step"):
        model = make_mole(dedup=dedup, lookup_layers=layers).double().train()
        with StepBank(model, ids, chunk) if dedup == "step" else nullcontext():
            for batch in ids:
                model(batch, labels=batch, use_cache=False).loss.backward()
        assert model.model.bank is None
        found[dedup] = {n: p.grad for n, p in model.named_parameters()}
    for name, expected in found["off"].items():
        torch.testing.assert_close(found["step"][name], expected, rtol=1e-7, atol=1e-9)


def test_a_step_under_autocast_trains_every_weight(make_mole, tokens):
    model = make_mole(dedup="step").train()
    with torch.autocast("cpu", torch.bfloat16), StepBank(model, tokens, chunk=4):
        model(tokens, labels=tokens, use_cache=False).loss.backward()
    plain = make_mole().train()
    plain(tokens, labels=tokens, use_cache=False).loss.backward()
    for (name, found), expected in zip(model.named_parameters(), plain.parameters(), strict=True):
        gap = (found.grad - expected.grad).norm() / expected.grad.norm()
        assert gap < 0.05, name


def test_a_failed_step_leaves_no_bank(make_mole, tokens):
    model = make_mole(dedup="step")
    with pytest.raises(RuntimeError, match="stop"), StepBank(model, tokens):
        raise RuntimeError("stop")
    assert model.model.bank is None
    assert model.model.layers[0].lookup.up.grad is None


def test_distinct_ids_may_come_with_the_batch(make_mole, tokens):
    model = make_mole()
    with torch.no_grad():
        given = model(tokens, distinct=distinct_ids(tokens, 60, multiple=32)).logits
        torch.testing.assert_close(given, model(tokens).logits)
    assert len(distinct_ids(tokens, 60, multiple=32)[0]) == 32
