"""The attention interface of transformers: masks, cache, generation, training."""

import pytest
import torch

from adasplash import (
    adasplash,
    load_alpha,
    register_with_transformers,
    set_alpha,
    watch,
    watch_sparsity,
)

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


def _oracle(module, query, key, value, attention_mask, scaling=None, position_bias=0.0, **_):
    """Dense float64 attention by bisection under the mask that transformers makes for SDPA."""
    group = query.shape[1] // key.shape[1]
    key, value = (x.double().repeat_interleave(group, 1) for x in (key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    z = (query.double() @ key.mT * scale + position_bias) / 2
    z = z.masked_fill(~attention_mask[..., : key.shape[2]], -torch.inf)
    top = z.amax(-1, keepdim=True)
    high = top.masked_fill(top == -torch.inf, 0.0)
    low = high - 1
    for _ in range(100):
        middle = (low + high) / 2
        more = (z - middle).clamp_min(0).square().sum(-1, keepdim=True) >= 1
        low, high = torch.where(more, middle, low), torch.where(more, high, middle)
    output = (z - low).clamp_min(0).square() @ value
    return output.to(query.dtype).transpose(1, 2).contiguous(), None


def _whole_mask(*args, **kwargs):
    from transformers.masking_utils import sdpa_mask

    return sdpa_mask(
        *args, **{**kwargs, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    )


def _with_oracle(model):
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register("oracle", _oracle)
    AttentionMaskInterface.register("oracle", _whole_mask)
    model.set_attn_implementation("oracle")
    return model


SMALL = {
    "vocab_size": 40, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 3,
    "num_attention_heads": 4, "initializer_range": 0.6, "pad_token_id": 0,
    "attn_implementation": "adasplash",
}  # fmt: skip
CAUSAL = {**SMALL, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def _build(name, **changed):
    register_with_transformers()
    torch.manual_seed(0)
    t = transformers
    models = {
        "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**{**CAUSAL, **changed})),
        "qwen3": lambda: t.Qwen3ForCausalLM(t.Qwen3Config(**CAUSAL, head_dim=8)),
        "mistral": lambda: t.MistralForCausalLM(t.MistralConfig(**CAUSAL, sliding_window=4)),
        "gemma3": lambda: t.Gemma3ForCausalLM(
            t.Gemma3TextConfig(**CAUSAL, head_dim=8, sliding_window=4, query_pre_attn_scalar=8)
        ),
        "gpt2": lambda: t.GPT2LMHeadModel(
            t.GPT2Config(
                vocab_size=40,
                n_embd=32,
                n_layer=2,
                n_head=4,
                initializer_range=0.3,
                resid_pdrop=0.0,
                attn_pdrop=0.0,
                embd_pdrop=0.0,
                bos_token_id=1,
                eos_token_id=2,
                attn_implementation="adasplash",
            )
        ),
        "bert": lambda: t.BertForMaskedLM(t.BertConfig(**SMALL, **NO_DROPOUT)),
        "roberta": lambda: t.RobertaForMaskedLM(t.RobertaConfig(**SMALL, **NO_DROPOUT)),
        "modernbert": lambda: t.ModernBertForMaskedLM(
            t.ModernBertConfig(
                **SMALL,
                local_attention=6,
                global_attn_every_n_layers=2,
                bos_token_id=1,
                eos_token_id=2,
                cls_token_id=1,
                sep_token_id=2,
            )
        ),
        "t5": lambda: t.T5ForConditionalGeneration(
            t.T5Config(
                vocab_size=40, d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=4,
                relative_attention_num_buckets=8, initializer_factor=0.6, dropout_rate=0.0,
                attn_implementation="adasplash", pad_token_id=0, decoder_start_token_id=0,
            )
        ),
    }  # fmt: skip
    return models[name]().eval()


FAMILIES = ("llama", "qwen3", "mistral", "gemma3", "gpt2", "bert", "roberta", "modernbert", "t5")


def _inputs(name, side):
    """Return padded inputs of a model, and which of the logits are those of tokens."""
    ids, mask = torch.randint(3, 40, (2, 14)), torch.ones(2, 14, dtype=torch.long)
    if side != "none":
        mask[1, slice(0, 4) if side == "left" else slice(10, 14)] = 0
    inputs = {"input_ids": ids * mask, "attention_mask": None if side == "none" else mask}
    if name == "t5":
        inputs["decoder_input_ids"] = ids.flip(0)
    return inputs, mask.bool()


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("side", ["left", "right", "none"])
def test_logits_equal_those_of_dense_attention_in_float64(name, side):
    model = _build(name)
    inputs, shown = _inputs(name, side)
    with torch.no_grad():
        found = model(**inputs).logits
        want = _with_oracle(model)(**inputs).logits
    assert torch.allclose(found[shown], want[shown], atol=2e-4)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("side", ["left", "right", "none"])
def test_alpha_1_is_softmax_by_torch_alone(name, side, monkeypatch):

    def refuse(*_, **__):
        raise AssertionError("softmax needs no kernels of ours")

    model = set_softmax(_build(name))
    inputs, shown = _inputs(name, side)
    monkeypatch.setattr(watch, "adasplash", refuse)
    with torch.no_grad():
        found = model(**inputs).logits
        tokens = None
        if name in ("llama", "mistral"):
            options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
            tokens = model.generate(**inputs, **options)
        model.set_attn_implementation("sdpa")
        want = model(**inputs).logits
        if tokens is not None:
            assert torch.equal(tokens, model.generate(**inputs, **options))
    assert torch.allclose(found[shown], want[shown], atol=1e-5)


def set_softmax(model):
    assert set_alpha(model, 1.0) == []
    return model


def test_alpha_may_be_set_in_some_layers():
    model = _build("modernbert")
    local = [i for i, kind in enumerate(model.config.layer_types) if kind == "sliding_attention"]
    assert 0 < len(local) < len(model.config.layer_types)
    set_alpha(model, 1.0, lambda layer: layer.sliding_window is not None)
    alphas = set_alpha(model, "learned", lambda layer: layer.sliding_window is None)
    layers = [m for m in model.modules() if type(m).__name__ == "ModernBertAttention"]
    assert [layer.entmax_alpha == 1.0 for layer in layers] == [
        i in local for i in range(len(layers))
    ]
    assert len(alphas) == len(layers) - len(local)
    assert model(torch.randint(3, 40, (1, 40))).logits.isfinite().all()
    with pytest.raises(ValueError, match="`where` must hold for an attention layer"):
        set_alpha(model, 1.5, lambda layer: False)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3", "gpt2"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_with_a_cache_equals_that_of_dense_attention(name, cache):
    model = _build(name)
    if name == "gpt2" and cache == "static":
        pytest.skip("GPT-2 has no static cache")
    ids = torch.randint(3, 40, (2, 9))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    options = {
        "attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0,
        "cache_implementation": None if cache == "dynamic" else "static", "eos_token_id": None,
        "disable_compile": True,
    }  # fmt: skip
    found = model.generate(ids * mask, **options)
    assert found.shape == (2, 15)
    options |= {"cache_implementation": None, "use_cache": False}
    assert torch.equal(found, _with_oracle(model).generate(ids * mask, **options))


def test_packed_sequences_do_not_see_each_other(model):
    ids = torch.randint(3, 40, (1, 13))
    positions = torch.cat([torch.arange(5), torch.arange(8)])[None]
    bounds = torch.tensor([0, 5, 13], dtype=torch.int32)
    with torch.no_grad():
        want = torch.cat([model(ids[:, :5]).logits, model(ids[:, 5:]).logits], 1)
        masked = model(ids, position_ids=positions, use_cache=False).logits
        packed = model(
            ids, position_ids=positions, cu_seq_lens_q=bounds, cu_seq_lens_k=bounds,
            max_length_q=8, max_length_k=8,
        ).logits  # fmt: skip
    assert torch.allclose(masked, want, atol=1e-4)
    assert torch.allclose(packed, want, atol=1e-4)


def test_a_mask_of_ones_own(model):
    ids = torch.randint(3, 40, (1, 8))
    pattern = torch.ones(8, 8).tril().bool()
    pattern[6:, 2:4] = False
    bias = torch.zeros(8, 8).masked_fill(~pattern, -torch.inf)
    with torch.no_grad():
        first = model(ids, attention_mask=pattern[None, None]).logits
        second = model(ids, attention_mask=bias[None, None]).logits
        plain = model(ids).logits
    assert torch.allclose(first, second, atol=1e-5)
    assert torch.allclose(first[:, :6], plain[:, :6], atol=1e-4)
    assert not torch.allclose(first[:, 6:], plain[:, 6:], atol=1e-2)


def test_alpha_of_a_model_can_be_set_learned_saved_and_loaded(tmp_path):
    model = _build("llama")
    ids = torch.randint(3, 40, (1, 10))
    with torch.no_grad():
        plain = model(ids).logits
        assert set_alpha(model, 1.5) == []
        assert torch.equal(model(ids).logits, plain)
        set_alpha(model, 2.0)
        sparse = model(ids).logits
        assert not torch.allclose(sparse, plain)
        moving = torch.tensor(1.5)
        assert set_alpha(model, moving) == []
        assert torch.allclose(model(ids).logits, plain, atol=1e-5)
        moving.fill_(2.0)
        assert torch.allclose(model(ids).logits, sparse, atol=1e-5)
    alphas = set_alpha(model, "learned")
    assert [alpha.raw.shape[0] for alpha in alphas] == [4] * 3
    model(ids, labels=ids).loss.backward()
    assert all(alpha.raw.grad.abs().min() > 0 for alpha in alphas)
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    want = model(ids).logits
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, attn_implementation="adasplash")
    with pytest.raises(ValueError, match="the model's alphas were learned; call `load_alpha"):
        again(ids)
    load_alpha(again, tmp_path)
    assert torch.allclose(again(ids).logits, want, atol=1e-5)
    load_alpha(again, tmp_path)  # once more, where it has them
    deeper = _build("llama", num_hidden_layers=4)
    with pytest.raises(ValueError, match=r"`folder` .* holds no 'model.layers.3"):
        load_alpha(deeper, tmp_path)
    assert deeper(ids).logits.isfinite().all()  # as it was
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"`folder` .* holds no learned alpha"):
        load_alpha(again, tmp_path)
    for value, message in ((3.0, "between 1 and 2; got 3.0"), ("all", "or 'learned'; got 'all'")):
        with pytest.raises(ValueError, match=message):
            set_alpha(model, value)
    with pytest.raises(ValueError, match="must have attention layers"):
        set_alpha(torch.nn.Linear(2, 2), 1.5)


def test_a_number_is_saved_with_the_model(tmp_path):
    model = _build("gpt2")
    ids = torch.randint(3, 40, (1, 10))
    set_alpha(model, 1.9)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, attn_implementation="adasplash").eval()
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
        set_alpha(again, 1.5)
        assert not torch.allclose(again(ids).logits, model(ids).logits)
    set_alpha(again, torch.tensor(1.2))  # what fills it later nobody notes
    assert not hasattr(again.config, "entmax_alpha")


def test_learned_alphas_are_found_under_the_names_of_files(tmp_path):
    register_with_transformers()
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=11, num_attention_heads=2, intermediate_size=16,
        image_size=8, patch_size=4, attn_implementation="adasplash",
    )  # fmt: skip
    model = transformers.ViTModel(config)
    alphas = set_alpha(model, "learned")
    for place, alpha in enumerate(alphas):
        alpha.raw.data.fill_(place / 10)
    model.save_pretrained(tmp_path)
    again = transformers.ViTModel.from_pretrained(tmp_path)
    load_alpha(again, tmp_path)
    found = [p for name, p in again.named_parameters() if name.endswith("entmax_alpha.raw")]
    assert torch.equal(torch.stack(found), torch.stack([alpha.raw for alpha in alphas]))


@pytest.mark.parametrize("name", ["s_aux", "indices"])
def test_what_would_change_the_weights_is_refused(name):
    from adasplash.integration import attention_forward

    x = torch.randn(1, 2, 6, 8)
    with pytest.raises(NotImplementedError, match=f"does not compute `{name}`, which Identity has"):
        attention_forward(torch.nn.Identity(), x, x, x, None, **{name: torch.zeros(2)})
    bounds = torch.tensor([0, 6])
    with pytest.raises(NotImplementedError, match="`position_bias` cannot go with packed"):
        attention_forward(torch.nn.Identity(), x, x, x, bounds, position_bias=torch.zeros(1))


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


@pytest.mark.parametrize(("name", "alpha"), [("llama", 1.5), ("gpt2", 1.8), ("gemma3", 1.5)])
def test_generation_decodes_and_equals_the_full_forward(name, alpha, device, monkeypatch):
    from adasplash import adasplash_decode, integration

    calls = []

    def decode(q, k, *inputs, **options):
        calls.append((q.shape[2], k.shape[2]))
        return adasplash_decode(q, k, *inputs, **options, backend="triton")

    monkeypatch.setattr(integration, "_on_gpu", lambda x: True)
    monkeypatch.setattr(integration, "adasplash_decode", decode)
    model = _build(name).to(device)
    set_alpha(model, alpha)
    ids = torch.randint(3, 40, (2, 7), device=device)
    done = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False,
        eos_token_id=None, pad_token_id=0, output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    layers = model.config.num_hidden_layers
    kinds = getattr(model.config, "layer_types", None) or ["full_attention"] * layers
    whole = sum(kind == "full_attention" for kind in kinds)
    seen = [pair for pair in calls if pair[1] > 4]  # Gemma's other layers have a window of 4
    assert seen == [(1, 8 + step) for step in range(2) for _ in range(whole)]
    monkeypatch.setattr(integration, "_on_gpu", lambda x: False)
    with torch.no_grad():
        want = model(done.sequences[:, :-1], use_cache=False).logits[:, 6:]
    assert torch.allclose(torch.stack(done.logits, 1), want, atol=1e-3)


def test_what_decoding_does_not_cover_takes_the_usual_way(device, monkeypatch):
    from adasplash import integration

    def refuse(*_, **__):
        raise AssertionError("not for adasplash_decode")

    monkeypatch.setattr(integration, "_on_gpu", lambda x: True)
    monkeypatch.setattr(integration, "adasplash_decode", refuse)
    layer = torch.nn.Identity()
    q, k = torch.randn(2, 2, 1, 8, device=device), torch.randn(2, 2, 9, 8, device=device)
    for options in ({"softcap": 3.0}, {"dropout": 0.5}):
        integration.attention_forward(layer, q, k, k, None, **options)
    integration.attention_forward(layer, q, k, k, torch.zeros(2, 2, 1, 9, device=device))
    integration.attention_forward(layer, k, k, k, None)
    integration.attention_forward(layer, q.clone().requires_grad_(), k, k, None)
    layer.entmax_alpha = 1.0
    integration.attention_forward(layer, q, k, k, None)
    layer.entmax_alpha = torch.tensor(1.5, device=device, requires_grad=True)
    integration.attention_forward(layer, q, k, k, None)
    layer.entmax_alpha = 1.5
    with pytest.raises(AssertionError, match="not for adasplash_decode"):
        integration.attention_forward(layer, q, k, k, None, sliding_window=9)


@pytest.mark.parametrize("whole", [False, True])
def test_one_new_token_is_decoded_under_any_mask_window_and_alpha(whole, device, monkeypatch):
    from adasplash import adasplash_decode, integration

    calls = []

    def decode(*inputs, **options):
        calls.append(1)
        return adasplash_decode(*inputs, **options, backend="triton")

    monkeypatch.setattr(integration, "adasplash_decode", decode)
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, 4, n, 8, generator=generator).to(device) for n in (1, 70))
    mask = torch.rand(2, 70, generator=generator).to(device) > 0.3
    mask[0, :20] = False
    for alpha in (1.5, torch.tensor([1.2, 1.5, 1.8, 2.0], device=device)):
        for window in (None, 40):
            layer = torch.nn.Identity()
            layer.entmax_alpha = alpha
            seen = mask
            if whole and window:  # the pattern is in the mask
                seen = mask & (torch.arange(70, device=device) >= 30)
            given = seen[:, None, None] if whole else seen
            options = {"scaling": 2.0, "sliding_window": window}
            monkeypatch.setattr(integration, "_on_gpu", lambda x: True)
            found = integration.attention_forward(layer, q, k, k, given, **options)[0]
            monkeypatch.setattr(integration, "_on_gpu", lambda x: False)
            want = adasplash(
                q, k, k, alpha, scale=2.0, key_padding_mask=seen, backend="reference",
                window=(39, 0) if window else None,
            )  # fmt: skip
            assert torch.allclose(found, want.transpose(1, 2), atol=1e-5)
    assert len(calls) == 4


def test_static_caches_and_packing_are_left_to_the_kernels(model, monkeypatch):
    """No whole mask is made: not for the prompt, nor for packed positions."""
    from adasplash import integration

    seen = []
    forward = integration.attention_forward

    def spy(module, query, key, value, mask, *rest, **options):
        seen.append((query.shape[2], None if mask is None else mask.ndim))
        return forward(module, query, key, value, mask, *rest, **options)

    transformers.AttentionInterface.register("adasplash", spy)
    ids = torch.randint(3, 40, (2, 9))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    for given in (torch.ones_like(ids), mask):
        model.generate(
            ids * given, attention_mask=given, max_new_tokens=2, do_sample=False,
            cache_implementation="static", disable_compile=True, eos_token_id=None,
        )  # fmt: skip
    positions = torch.cat([torch.arange(5), torch.arange(4)]).expand(2, -1)
    with torch.no_grad():
        packed = model(ids, position_ids=positions, use_cache=False).logits
        alone = torch.cat([model(x).logits for x in (ids[:, :5], ids[:, 5:])], 1)
    integration.register_with_transformers()
    assert {ndim for length, ndim in seen if length == 9} == {1, 2}
    assert torch.allclose(packed, alone, atol=1e-4)


def test_a_trace_does_not_look_at_the_mask():
    from adasplash.integration import make_mask

    mask = torch.ones(2, 14, dtype=torch.long)
    compiled = torch.compile(make_mask, backend="eager", fullgraph=True)
    assert torch.equal(compiled(2, 14, 14, attention_mask=mask), mask.bool())
    assert make_mask(2, 14, 14, attention_mask=mask) is None


def test_training_gives_every_weight_a_gradient(model):
    ids = torch.randint(3, 40, (2, 16))
    model.train()(ids, labels=ids).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("kind", ["GPT2", "Roberta"])
def test_training_with_attention_dropout_runs_in_the_kernels(kind, device, monkeypatch):
    from functools import partial

    register_with_transformers()
    if kind == "GPT2":
        config = transformers.GPT2Config(
            vocab_size=40, n_embd=32, n_layer=1, n_head=2, n_positions=32, attn_pdrop=0.1,
            embd_pdrop=0.0, resid_pdrop=0.0, initializer_range=0.6,
        )  # fmt: skip
        model = transformers.GPT2LMHeadModel(config)
    else:
        config = transformers.RobertaConfig(
            vocab_size=40, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=32, hidden_dropout_prob=0.0, initializer_range=0.6, pad_token_id=0,
        )  # fmt: skip
        assert config.attention_probs_dropout_prob == 0.1
        model = transformers.RobertaForMaskedLM(config)
    model = model.to(device).train()
    model.set_attn_implementation("adasplash")
    ids = torch.randint(3, 40, (2, 12), device=device)
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    found = []
    for backend, seed in (("triton", 0), ("reference", 0), ("reference", 1)):
        monkeypatch.setattr(watch, "adasplash", partial(adasplash, backend=backend))
        model.zero_grad()
        torch.manual_seed(seed)
        model(ids, attention_mask=mask, labels=ids).loss.backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        found.append(torch.cat([x.flatten() for x in grads]))
    assert (found[0] - found[1]).norm() < 1e-4 * found[1].norm()
    assert (found[0] - found[2]).norm() > 1e-2 * found[1].norm()  # another mask


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


def test_the_sparsity_of_every_layer_can_be_watched(model):
    ids = torch.arange(3, 33)[None].repeat(2, 1)
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    set_alpha(model, 1.0, where=lambda layer: layer.layer_idx == 1)
    with watch_sparsity(model) as layers:
        model(ids, attention_mask=mask)
        with pytest.raises(RuntimeError, match="watches a model already"), watch_sparsity(model):
            pass
    assert list(layers) == ["model.layers.0.self_attn"]  # softmax has no threshold
    (aux,) = layers.values()
    assert aux.tau.shape == aux.support_size.shape == (2, 4, 30)
    assert aux.support_size[1, :, 0].eq(1).all()
    assert aux.support_size[0, :, :7].eq(0).all()
    assert aux.block_density.eq(1).all()
    model(ids[:, :5])
    assert aux is layers["model.layers.0.self_attn"]  # nobody watches any more
    with watch_sparsity(model) as layers:
        model(ids[:, :5], position_ids=torch.tensor([[0, 1, 0, 1, 2]] * 2), use_cache=False)
    assert layers["model.layers.0.self_attn"].tau.shape == (10, 4)  # packed
