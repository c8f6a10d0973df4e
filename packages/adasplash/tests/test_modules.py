"""Modules: the same numbers as the functions, alpha inside its interval, saved with the model."""

import pytest
import torch

from adasplash import AlphaParam, AlphaSchedule, Entmax, EntmaxAttention, adasplash, entmax


def test_the_map_as_a_module():
    x = torch.randn(3, 4)
    mask = torch.tensor([True, True, False, True])
    assert torch.equal(Entmax(1.3, 0)(x), entmax(x, 1.3, 0))
    assert torch.equal(Entmax()(x, mask), entmax(x, mask=mask))
    assert "alpha=1.5" in repr(Entmax())


def test_alpha_stays_inside_its_interval_and_is_saved(tmp_path):
    alpha = AlphaParam(3, 1.7)
    assert alpha().tolist() == pytest.approx([1.7] * 3)
    search = torch.optim.SGD(alpha.parameters(), lr=100.0)
    for sign in (1, -1, -1):
        search.zero_grad()
        (sign * alpha().sum()).backward()
        search.step()
        assert ((alpha() >= 1) & (alpha() <= 2)).all()
    torch.save(alpha.state_dict(), tmp_path / "alpha.pt")
    again = AlphaParam(3)
    again.load_state_dict(torch.load(tmp_path / "alpha.pt"))
    assert torch.equal(again(), alpha())


def test_the_schedule_is_a_straight_line_between_its_ends():
    schedule = AlphaSchedule(1.0, 2.0, 10)
    assert [schedule(step) for step in (-1, 0, 5, 10, 99)] == [1.0, 1.0, 1.5, 2.0, 2.0]
    assert AlphaSchedule(steps=0)(0) == 1.5


def test_attention_is_projections_around_adasplash():
    torch.manual_seed(0)
    layer = EntmaxAttention(32, 4, 2, alpha=1.4, is_causal=False, bias=True)
    x, mask = torch.randn(2, 9, 32), torch.rand(2, 9) < 0.7
    q = layer.q_proj(x).view(2, 9, 4, 8).transpose(1, 2)
    k, v = (f(x).view(2, 9, 2, 8).transpose(1, 2) for f in (layer.k_proj, layer.v_proj))
    want = adasplash(q, k, v, 1.4, is_causal=False, key_padding_mask=mask)
    want = layer.o_proj(want.transpose(1, 2).reshape(2, 9, 32))
    assert torch.allclose(layer(x, mask), want, atol=1e-6)


def test_a_learned_alpha_learns_and_is_saved():
    torch.manual_seed(0)
    layer = EntmaxAttention(16, 2, alpha="learned")
    x = torch.randn(1, 12, 16)
    layer(x).square().sum().backward()
    assert layer.alpha.raw.grad.abs().min() > 0
    assert "alpha.raw" in layer.state_dict()
    layer = EntmaxAttention(16, 2)
    layer.alpha = AlphaSchedule(1.0, 2.0, 4)(2)
    assert layer(x).shape == x.shape


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: AlphaParam(0), "`n_heads` must be at least 1; got 0"),
        (lambda: AlphaParam(2, 2.0), "`initial` must be above 1 and below 2; got 2.0"),
        (lambda: AlphaSchedule(0.5), "`start` must be from 1 to 2; got 0.5"),
        (lambda: AlphaSchedule(steps=-1), "`steps` must be at least 0; got -1"),
        (lambda: EntmaxAttention(10, 3), "`n_heads` must divide `dim` 10; got 3"),
        (lambda: EntmaxAttention(12, 4, 3), "`n_heads_kv` must divide `n_heads` 4; got 3"),
        (lambda: EntmaxAttention(12, 4, alpha="best"), "a number or 'learned'; got 'best'"),
    ],
)
def test_errors(call, message, own_checks):
    with pytest.raises(ValueError, match=message):
        call()
