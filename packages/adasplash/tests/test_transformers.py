"""The attention interface of transformers: masks, cache, generation, training."""

import pytest
import torch

from adasplash import adasplash, register_with_transformers
from adasplash.testing import oracle_weights

transformers = pytest.importorskip("transformers")


@pytest.fixture
def model():
    register_with_transformers()
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.6,
        attn_implementation="adasplash", bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def _oracle(module, query, key, value, attention_mask, scaling, **_):
    """Dense float64 attention under the same mask as ours."""
    weights = oracle_weights(query, key, True, attention_mask, scaling)
    values = value.double().repeat_interleave(query.shape[1] // key.shape[1], 1)
    return (weights @ values).to(query.dtype).transpose(1, 2).contiguous(), None


def _with_oracle(model):
    from transformers import AttentionInterface, AttentionMaskInterface

    from adasplash.integration import padding_mask

    AttentionInterface.register("oracle", _oracle)
    AttentionMaskInterface.register("oracle", padding_mask)
    model.set_attn_implementation("oracle")
    return model


def test_logits_equal_those_of_dense_attention(model):
    ids = torch.randint(3, 40, (2, 20))
    with torch.no_grad():
        found = model(ids).logits
        want = _with_oracle(model)(ids).logits
    assert torch.allclose(found, want, atol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_change_the_tokens(model, side):
    ids = torch.randint(3, 40, (1, 12))
    pad, mask = torch.zeros(1, 5, dtype=torch.long), torch.ones(1, 12, dtype=torch.long)
    parts = (pad, ids) if side == "left" else (ids, pad)
    masks = (pad, mask) if side == "left" else (mask, pad)
    padded, mask = torch.cat(parts, 1), torch.cat(masks, 1)
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    with torch.no_grad():
        want = model(ids).logits
        found = model(padded, attention_mask=mask, position_ids=positions).logits
    assert torch.allclose(found[mask.bool()], want[0], atol=1e-4)


def test_generation_with_the_cache_equals_generation_without(model):
    ids = torch.randint(3, 40, (2, 7))
    options = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    cached = model.generate(ids, use_cache=True, **options)
    assert torch.equal(cached, model.generate(ids, use_cache=False, **options))
    assert cached.shape[1] > 7


def test_training_gives_every_weight_a_gradient(model):
    ids = torch.randint(3, 40, (2, 16))
    model.train()(ids, labels=ids).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_a_bidirectional_model_sees_the_future():
    register_with_transformers()
    config = transformers.BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        attn_implementation="adasplash",
    )  # fmt: skip
    model = transformers.BertModel(config).eval()
    ids = torch.randint(1, 30, (1, 6))
    changed = ids.clone()
    changed[0, 5] = (ids[0, 5] + 1) % 29 + 1
    with torch.no_grad():
        first, second = (model(x).last_hidden_state[0, 0] for x in (ids, changed))
    assert not torch.allclose(first, second)


def test_what_is_not_computed_is_refused():
    from transformers.masking_utils import causal_mask_function, sliding_window_causal_mask_function

    from adasplash.integration import attention_forward, padding_mask

    x = torch.randn(1, 1, 4, 8)
    with pytest.raises(ValueError, match=r"`sliding_window` must be None with attn_impl.*got 3"):
        attention_forward(torch.nn.Identity(), x, x, x, None, sliding_window=3)
    with pytest.raises(ValueError, match="another mask"):
        padding_mask(1, 4, 4, mask_function=sliding_window_causal_mask_function(2))
    with pytest.raises(ValueError, match="unused places"):
        padding_mask(1, 4, 9, mask_function=causal_mask_function)


def test_dropout_and_softcap_reach_the_attention():
    from adasplash.integration import attention_forward

    x = torch.randn(1, 2, 6, 8)
    layer = torch.nn.Identity()
    capped = attention_forward(layer, x, x, x, None, softcap=0.5)[0]
    assert torch.equal(capped, adasplash(x, x, x, softcap=0.5).transpose(1, 2))
    torch.manual_seed(0)
    dropped = attention_forward(layer, x, x, x, None, dropout=0.5)[0]
    torch.manual_seed(0)
    assert torch.equal(dropped, adasplash(x, x, x, dropout_p=0.5).transpose(1, 2))


def test_the_layer_decides_whether_it_is_causal():
    from adasplash.integration import attention_forward

    layer = torch.nn.Identity()
    x = torch.randn(1, 2, 5, 8)
    for causal in (True, False):
        layer.is_causal = causal
        output, weights = attention_forward(layer, x, x, x, None, scaling=0.5)
        assert weights is None
        want = adasplash(x, x, x, is_causal=causal, scale=0.5).transpose(1, 2)
        assert torch.equal(output, want)
