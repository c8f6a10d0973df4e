"""`return_aux` against dense float64 weights: thresholds, supports and the density of blocks."""

import pytest
import torch

from adasplash import AttentionAux, adasplash, entmax_attention
from adasplash.testing import clustered_inputs, oracle_weights, random_inputs

HOLES = torch.ones(2, 150, dtype=torch.bool)
HOLES[0, 20:110] = False  # a hidden block and parts of others
HOLES[1, :64] = False  # early causal rows see nothing


def _share(weights, visible):
    """Return the share of visible blocks with weight, block by block."""
    found = torch.zeros(weights.shape[:2])
    for plane in torch.cartesian_prod(*(torch.arange(n) for n in weights.shape[:2])).tolist():
        seen, p = visible[tuple(plane)], weights[tuple(plane)]
        cuts = [
            (slice(i, i + 64), slice(j, j + 64))
            for i in range(0, p.shape[0], 64)
            for j in range(0, p.shape[1], 64)
        ]
        shown = [cut for cut in cuts if seen[cut].any()]
        heavy = sum(bool(p[cut].any()) for cut in shown)
        found[tuple(plane)] = heavy / len(shown) if shown else 0.0
    return found


def _expect(aux, q, k, causal, mask=None, alpha=1.5):
    """Compare with the oracle, tau taken from the largest weight of every row."""
    weights = oracle_weights(q, k, causal, mask, alpha=alpha)
    scores = q.double() @ k.double().repeat_interleave(q.shape[1] // k.shape[1], 1).mT
    hidden = torch.zeros(scores.shape, dtype=torch.bool)
    if causal:
        hidden |= ~torch.ones(scores.shape[2:], dtype=torch.bool).tril(k.shape[2] - q.shape[2])
    if mask is not None:
        hidden |= ~mask[:, None, None]
    scores = (scores * q.shape[-1] ** -0.5).masked_fill(hidden, -torch.inf)
    tau = (alpha - 1) * scores.amax(-1) - weights.amax(-1) ** (alpha - 1)
    tau[hidden.all(-1)] = torch.inf
    torch.testing.assert_close(aux.tau, tau, rtol=0, atol=1e-9)
    assert torch.equal(aux.support_size, (weights > 0).sum(-1))
    torch.testing.assert_close(aux.block_density, _share(weights, ~hidden))


@pytest.mark.parametrize("alpha", [1.2, 1.5, 2.0])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("mask", [None, HOLES])
def test_thresholds_supports_and_blocks(alpha, causal, mask):
    q, k, v = random_inputs(2, 4, 2, 140, 150, 8, scale=4.0, dtype=torch.float64)
    output, aux = adasplash(q, k, v, alpha, causal, key_padding_mask=mask, return_aux=True)
    assert torch.equal(output, adasplash(q, k, v, alpha, causal, key_padding_mask=mask))
    _expect(aux, q, k, causal, mask, alpha)
    if mask is not None and causal:
        assert aux.tau[1, :, :54].eq(torch.inf).all()
        assert aux.support_size[1, :, :54].eq(0).all()


def test_blocks_that_hold_no_weight_are_seen():
    q, k, v = clustered_inputs(1, 2, 500, 16, 8.0, dtype=torch.float64, device="cpu")
    _, aux = adasplash(q, k, v, return_aux=True)
    assert aux.block_density.max() < 0.9
    _expect(aux, q, k, True)


def test_alpha_of_every_head():
    q, k, v = random_inputs(2, 3, 1, 9, 9, 8, dtype=torch.float64)
    alpha = torch.tensor([1.2, 1.5, 2.0], dtype=torch.float64)
    _, aux = entmax_attention(q, k, v, alpha, return_aux=True)
    for head in range(3):
        one = AttentionAux(*(x[:, head : head + 1] for x in aux))
        _expect(one, q[:, head : head + 1], k, False, alpha=alpha[head].item())


def test_a_window_and_a_bias_that_hides_the_same_agree():
    q, k, v = random_inputs(1, 2, 1, 200, 200, 8)
    distance = torch.arange(200) - torch.arange(200)[:, None]
    bias = torch.zeros(200, 200).masked_fill((distance < -30) | (distance > 0), -torch.inf)
    _, aux = adasplash(q, k, v, window=(30, 0), return_aux=True)
    _, want = adasplash(q, k, v, is_causal=False, attn_bias=bias, return_aux=True)
    assert all(torch.equal(x, y) for x, y in zip(aux, want, strict=True))
    assert aux.block_density.eq(1).all()  # the blocks of the diagonal and beside it, no others


def test_padding_of_varlen_has_neither_keys_nor_blocks():
    q, k, v = random_inputs(2, 2, 1, 90, 90, 8, dtype=torch.float64)
    _, aux = adasplash(q, k, v, varlen=torch.tensor([5, 90]), return_aux=True)
    _expect(
        AttentionAux(*(x[:1, :, :5] for x in aux[:2]), aux[2][:1]), q[:1, :, :5], k[:1, :, :5], True
    )
    assert aux.tau[0, :, 5:].eq(torch.inf).all()
    assert aux.support_size[0, :, 5:].eq(0).all()
    _expect(AttentionAux(*(x[1:] for x in aux)), q[1:], k[1:], True)


def test_packed_sequences_have_the_layout_of_the_output():
    q, k, v = (torch.randn(12, heads, 8, dtype=torch.float64) for heads in (4, 2, 2))
    bounds_q, bounds_k = torch.tensor([0, 5, 5, 9, 12]), torch.tensor([0, 5, 8, 12, 12])
    _, aux = adasplash(q, k, v, cu_seqlens_q=bounds_q, cu_seqlens_k=bounds_k, return_aux=True)
    assert aux.tau.shape == aux.support_size.shape == (12, 4)
    assert aux.block_density.tolist() == [[1.0] * 4, [0.0] * 4, [1.0] * 4, [0.0] * 4]
    one = (x[None, 5:9].transpose(1, 2) for x in (aux.tau[..., None], aux.support_size[..., None]))
    mine = AttentionAux(*(x[..., 0] for x in one), aux.block_density[2:3])
    _expect(mine, q[None, 5:9].transpose(1, 2), k[None, 8:12].transpose(1, 2), True)
    assert aux.tau[9:].eq(torch.inf).all()
    assert aux.support_size[9:].eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_dtypes_and_no_gradients(dtype):
    q, k, v = (x.requires_grad_() for x in random_inputs(1, 2, 1, 3, 5, 8, dtype=dtype))
    output, aux = adasplash(q, k, v, dropout_p=0.5, return_aux=True)
    assert output.requires_grad
    assert not any(x.requires_grad for x in aux)
    assert [x.dtype for x in aux] == [torch.float32, torch.int64, torch.float32]
    _, want = adasplash(*(x.float() for x in (q, k, v)), return_aux=True)
    assert all(torch.equal(x, y) for x, y in zip(aux, want, strict=True))


def test_autocast_decides_what_is_rounded_and_no_more():
    q, k, v = random_inputs(1, 2, 1, 6, 6, 8)
    with torch.autocast("cpu", torch.bfloat16):
        _, aux = adasplash(q, k, v, return_aux=True)
    _, want = adasplash(*(x.bfloat16() for x in (q, k, v)), return_aux=True)
    assert all(torch.equal(x, y) for x, y in zip(aux, want, strict=True))


def test_no_rows():
    q, k, v = random_inputs(2, 2, 1, 0, 5, 8)
    output, aux = adasplash(q, k, v, return_aux=True)
    assert output.shape == (2, 2, 0, 8)
    assert aux.tau.shape == aux.support_size.shape == (2, 2, 0)
    assert torch.equal(aux.block_density, torch.zeros(2, 2))


def test_a_nan_stays_in_the_rows_that_see_it():
    q, k, v = random_inputs(1, 1, 1, 4, 4, 8)
    k[0, 0, 2] = torch.nan
    for alpha in (1.3, 1.5):
        _, aux = adasplash(q, k, v, alpha, return_aux=True)
        assert aux.tau.isnan().tolist() == [[[False, False, True, True]]]
        assert aux.support_size[0, 0, 2:].tolist() == [0, 0]


def test_softmax_has_no_threshold():
    q, k, v = random_inputs(1, 1, 1, 3, 3, 8)
    with pytest.raises(ValueError, match=r"`return_aux` needs an `alpha` above 1.*; got 1.0"):
        adasplash(q, k, v, 1.0, return_aux=True)
