"""Every refusal names the argument, its value and what is allowed."""

import pytest
import torch

from adasplash import (
    Entmax,
    EntmaxAttention,
    EntmaxLoss,
    adasplash,
    adasplash_decode,
    entmax,
    entmax15,
)

pytestmark = pytest.mark.usefixtures("own_checks")


def _inputs():
    return [torch.randn(2, 4, 6, 8), torch.randn(2, 2, 6, 8), torch.randn(2, 2, 6, 8)]


@pytest.mark.parametrize(
    ("index", "value", "message"),
    [
        (0, torch.randn(2, 4, 6, 8).int(), r"`q` must be one of float16, .*; got torch.int32"),
        (1, torch.randn(2, 2, 6, 8).half(), r"`k` must be torch.float32 as `q` is; got torch.fl"),
        (1, torch.randn(3, 2, 6, 8), r"`k` must have `batch` 2 as `q` does; got 3"),
        (1, torch.randn(2, 2, 6, 9), r"`k` must have `dim_head` 8 as `q` does; got 9"),
        (2, torch.randn(2, 2, 5, 8), r"`v` must have `heads_kv` and `seq_k` \(2, 6\) .* \(2, 5\)"),
        (2, torch.randn(2, 2, 6, 300), r"`v` must have a last size of 1 to 256; got 300"),
    ],
)
def test_tensors_that_do_not_fit(index, value, message):
    inputs = _inputs()
    inputs[index] = value
    with pytest.raises((TypeError, ValueError), match=message):
        adasplash(*inputs)


def test_heads_must_divide_in_every_call():
    q, k, v = torch.randn(1, 4, 6, 8), torch.randn(1, 3, 6, 8), torch.randn(1, 3, 6, 8)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"divides 4, the heads of `q`; got 3"):
            adasplash(q, k, v)


def test_there_must_be_a_key():
    q, k = torch.randn(1, 1, 6, 8), torch.randn(1, 1, 0, 8)
    with pytest.raises(ValueError, match=r"at least one key; got `seq_k` 0"):
        adasplash(q, k, k)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"alpha": 2.5}, ValueError, r"`alpha` must be between 1 and 2; got 2.5"),
        ({"alpha": torch.ones(4)}, ValueError, r"`alpha` must be above 1 and at most 2; got \[1"),
        ({"alpha": torch.full((3,), 1.5)}, ValueError, r"`alpha` must have shape \(\), \(4,\) or"),
        ({"window": (-2, 0)}, ValueError, r"`window` must be two whole numbers.*got \(-2, 0\)"),
        ({"alibi_slopes": torch.ones(3)}, ValueError, r"`alibi_slopes` must have shape \(4,\) or"),
        ({"attn_bias": torch.ones(5, 6)}, ValueError, r"`attn_bias` must broadcast to \(2, 4, 6"),
        ({"attn_bias": torch.ones(6).bool()}, TypeError, r"`attn_bias` must be floating point"),
        ({"softcap": 0.0}, ValueError, r"`softcap` must be positive and finite; got 0.0"),
        ({"dropout_p": 1.0}, ValueError, r"`dropout_p` must be at least 0 and below 1; got 1.0"),
        ({"cu_seqlens_k": torch.tensor([0, 6])}, ValueError, r"needs `cu_seqlens_q`; got None"),
        ({"cu_seqlens_q": torch.tensor([0, 6])}, ValueError, r"`q` must have 3 dimensions with"),
        ({"scale": float("nan")}, ValueError, r"`scale` must be finite; got nan"),
        (
            {"key_padding_mask": torch.ones(2, 5, dtype=torch.bool)},
            ValueError,
            r"`key_padding_mask` must have shape \(2, 6\).*got \(2, 5\)",
        ),
    ],
)
def test_options_that_are_not_allowed(options, error, message):
    with pytest.raises(error, match=message):
        adasplash(*_inputs(), **options)


def test_the_kernels_need_a_gpu_or_the_interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match=r"`backend` 'triton' cannot run here: .* on cpu; use"):
        adasplash(*_inputs(), backend="triton")


def test_the_kernels_do_not_compute_float64(device):
    with pytest.raises(ValueError, match=r"the kernels do not compute torch.float64"):
        adasplash(*(x.to(device).double() for x in _inputs()), backend="triton")


def test_the_kernels_do_not_compute_softmax(device):
    with pytest.raises(ValueError, match=r"the kernels compute no softmax, `alpha` 1; use 'ref"):
        adasplash(*(x.to(device) for x in _inputs()), alpha=1.0, backend="triton")


def test_packed_bounds_must_fit():
    x = torch.randn(6, 2, 8)
    with pytest.raises(ValueError, match=r"`cu_seqlens_q` must rise from 0 to 6.*got \[0, 5\]"):
        adasplash(x, x, x, cu_seqlens_q=torch.tensor([0, 5]))
    bounds = torch.tensor([0, 2, 6])
    with pytest.raises(ValueError, match=r"`cu_seqlens_k` must hold 2 sequences .* got 1"):
        adasplash(x, x, x, cu_seqlens_q=bounds, cu_seqlens_k=torch.tensor([0, 6]))
    with pytest.raises(ValueError, match=r"`max_seqlen_q` must be at least the longest.*got 3 for"):
        adasplash(x, x, x, cu_seqlens_q=bounds, max_seqlen_q=3)
    with pytest.raises(ValueError, match=r"`cu_seqlens_q` must have shape .* got \(1,\)"):
        adasplash(x, x, x, cu_seqlens_q=bounds[:1])
    with pytest.raises(ValueError, match=r"`attn_bias` cannot go with `cu_seqlens_q`"):
        adasplash(x, x, x, cu_seqlens_q=bounds, attn_bias=torch.zeros(6))


def test_entmax_names_what_is_wrong():
    with pytest.raises(TypeError, match=r"`x` must be a floating point tensor; got torch.int64"):
        entmax15(torch.arange(3))
    with pytest.raises(ValueError, match=r"`dim` must be between -1 and 0; got 1"):
        entmax15(torch.randn(3), dim=1)
    with pytest.raises(ValueError, match=r"at least one element along `dim` -1; got none"):
        entmax15(torch.randn(3, 0))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"alpha": "1.5"}, TypeError, "`alpha` must be a number; got '1.5'"),
        ({"alpha": None}, TypeError, "`alpha` must be a number; got None"),
        ({"scale": "a"}, TypeError, "`scale` must be a number; got 'a'"),
        ({"softcap": "x"}, TypeError, "`softcap` must be a number; got 'x'"),
        ({"alpha": True}, TypeError, "`alpha` must be a number; got True"),
        ({"scale": torch.ones(2)}, TypeError, r"`scale` must be a number; got a tensor .*\(2,\)"),
        ({"dropout_p": torch.tensor(0.1)}, TypeError, "`dropout_p` must be a number; got a ten"),
        ({"is_causal": "no"}, TypeError, "`is_causal` must be True or False; got 'no'"),
        ({"max_seqlen_k": 3}, ValueError, "`max_seqlen_q` and `max_seqlen_k` need `cu_seqlens_q`"),
        ({"varlen": [6, 6]}, TypeError, "`varlen` must be a tensor; got list"),
        ({"varlen": torch.ones(2)}, TypeError, "`varlen` must hold integers; got torch.float32"),
        ({"cu_seqlens_q": [0, 6]}, TypeError, "`cu_seqlens_q` must be a tensor; got list"),
        ({"attn_bias": 0.1}, TypeError, "`attn_bias` must be a tensor; got float"),
        ({"alibi_slopes": [1.0]}, TypeError, "`alibi_slopes` must be a tensor; got list"),
        ({"key_padding_mask": [True]}, TypeError, "`key_padding_mask` must be a tensor; got list"),
        ({"window": 3}, ValueError, "`window` must be two whole numbers.*got 3"),
        ({"window": (1.5, 0)}, ValueError, r"`window` must be two whole numbers.*got \(1.5, 0\)"),
    ],
)
def test_options_of_a_wrong_type(options, error, message):
    with pytest.raises(error, match=message):
        adasplash(*_inputs(), **options)


def test_what_is_no_tensor_is_named():
    q, k, v = _inputs()
    with pytest.raises(TypeError, match="`k` must be a tensor; got ndarray"):
        adasplash(q, k.numpy(), v)
    with pytest.raises(TypeError, match="`x` must be a floating point tensor; got list"):
        entmax([1.0, 2.0])
    with pytest.raises(TypeError, match=r"`mask` must be a bool tensor.* got list"):
        entmax(q, mask=[True])
    with pytest.raises(ValueError, match=r"`mask` must broadcast to .*got \(3,\)"):
        entmax(q, mask=torch.ones(3, dtype=torch.bool))
    for alpha in ("1.5", None):
        with pytest.raises(TypeError, match="`alpha` must be a number; got"):
            entmax(q, alpha)
    with pytest.raises(TypeError, match="`dim` must be a whole number; got 'x'"):
        entmax(q, 1.5, "x")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"cache_seqlens": [6, 6]}, TypeError, "`cache_seqlens` must be a tensor; got list"),
        ({"cache_seqlens": torch.ones(2)}, TypeError, "`cache_seqlens` must hold integers"),
        ({"q": torch.ones(2, 4, 8)}, ValueError, r"`q` must have 4 dim.*got shape \(2, 4, 8\)"),
        ({"v_cache": torch.ones(2, 2, 6, 8).half()}, TypeError, "`v_cache` must be torch.float32"),
        ({"alpha": "1.5"}, TypeError, "`alpha` must be a number; got '1.5'"),
        ({"alpha": 1.0}, ValueError, "`alpha` must be above 1, up to 2; got 1.0"),
        ({"window": 3}, ValueError, "`window` must be two whole numbers.*got 3"),
        ({"page_stats": (1, 2)}, TypeError, "`page_stats` must be what .*; got tuple"),
        ({"block_table": torch.ones(2, 1)}, TypeError, "`block_table` must hold integers"),
    ],
)
def test_decoding_names_what_is_wrong(options, error, message):
    q, k, v = _inputs()
    given = {"q": q[:, :, -1:], "k_cache": k, "v_cache": v, "cache_seqlens": torch.tensor([6, 6])}
    with pytest.raises(error, match=message):
        adasplash_decode(**given | options)


def test_layers_refuse_what_they_could_not_run():
    for make in (
        lambda: Entmax(0.5),
        lambda: EntmaxLoss(0.5),
        lambda: EntmaxAttention(8, 2, alpha=3.0),
    ):
        with pytest.raises(ValueError, match=r"`alpha` must be .*; got (0.5|3.0)"):
            make()
    with pytest.raises(ValueError, match=r"`reduction` must be .*; got 'x'"):
        EntmaxLoss(reduction="x")
