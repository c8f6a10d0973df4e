"""Fast decoding gives what `generate` gives."""

import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from mole import DenseForCausalLM, MoeForCausalLM, MoleForCausalLM, convert
from mole.decode import Decoder
from mole.lut import FORMATS

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"


def plain(model, tokens, count):
    return model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=count,
        do_sample=False,
        pad_token_id=0,
    )


@pytest.mark.parametrize("changes", [{}, {"num_key_value_heads": 2}, {"mlp_type": "swiglu"}])
def test_dense_model(make_config, tokens, changes):
    torch.manual_seed(0)
    model = DenseForCausalLM(make_config("dense", **changes)).eval().to(DEVICE)
    tokens = tokens.to(DEVICE)
    decoder = Decoder(model, 2, 24)
    for _ in range(2):  # a decoder can be used again
        assert torch.equal(decoder.generate(tokens, 12), plain(model, tokens, 12))


@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("experts", [5, 8])  # two tokens: their own experts alone, or all
def test_mixture_of_experts(make_config, tokens, experts, top_k):
    torch.manual_seed(0)
    config = make_config("moe", num_experts=experts, num_experts_per_tok=top_k)
    model = MoeForCausalLM(config).eval().to(DEVICE)
    tokens = tokens.to(DEVICE)
    assert torch.equal(Decoder(model, 2, 24).generate(tokens, 12), plain(model, tokens, 12))


@pytest.mark.parametrize("fmt", ["fp32", "int8", "nf4", "nf3"])
@pytest.mark.parametrize("store", ["mmap", "device", "pinned", "disk"])
def test_table_model(make_mole, tokens, tmp_path, fmt, store):
    convert(make_mole(lookup_layers=[0, 2]), tmp_path, fmt, progress=False)
    model = MoleForCausalLM.from_pretrained(tmp_path, lut_store=store).eval()
    if CUDA:
        model = model.cuda()
        model.open_lut(tmp_path / "lut", store)
    tokens = tokens.to(DEVICE)
    expected = plain(model, tokens, 12)
    assert torch.equal(Decoder(model, 2, 24).generate(tokens, 12), expected)


@pytest.mark.parametrize("store", ["device", "pinned", "disk"])
def test_shorter_prompts_are_padded_on_the_left(make_mole, tokens, tmp_path, store):
    convert(make_mole(lookup_layers=[0, 2]), tmp_path, "fp32", progress=False)
    model = MoleForCausalLM.from_pretrained(tmp_path, lut_store=store).eval().to(DEVICE)
    model.open_lut(tmp_path / "lut", store)
    tokens = tokens.to(DEVICE)
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    decoder = Decoder(model, 2, 24)
    given = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(tokens, attention_mask=mask, **given)
    alone = plain(model, tokens[:1, 3:], 12)
    assert not torch.equal(expected, plain(model, tokens, 12))
    for _ in range(2):  # with and without padding, each with a graph of its own
        found = decoder.generate(tokens, 12, attention_mask=mask)
        assert torch.equal(found, expected)
        assert torch.equal(found[:1, 3:], alone)
        assert torch.equal(decoder.generate(tokens, 12), plain(model, tokens, 12))
        full = decoder.generate(tokens, 12, attention_mask=torch.ones_like(tokens))
        assert torch.equal(full, plain(model, tokens, 12))


@pytest.mark.usefixtures("our_checks_only")
def test_padding_that_is_not_on_the_left_is_refused(make_config, tokens):
    decoder = Decoder(DenseForCausalLM(make_config("dense")).eval(), 2, 24)
    wrong = [torch.ones(2, 3), torch.ones_like(tokens), torch.zeros_like(tokens)]
    wrong[1][0, 2] = 0
    for mask in wrong:
        with pytest.raises(ValueError, match="`attention_mask` must have the prompts' shape"):
            decoder.generate(tokens, 4, attention_mask=mask.long())


def test_an_upcycled_llama(make_mole, tokens, tmp_path):
    changes = {"mlp_type": "swiglu", "hidden_act": "silu", "num_key_value_heads": 2,
               "tie_word_embeddings": True, "lookup_layers": [1]}  # fmt: skip
    convert(make_mole(**changes), tmp_path, "fp16", progress=False)
    model = MoleForCausalLM.from_pretrained(tmp_path).eval().to(DEVICE)
    tokens = tokens.to(DEVICE)
    expected = plain(model, tokens, 12)
    assert torch.equal(Decoder(model, 2, 24).generate(tokens, 12), expected)
    assert torch.equal(plain(model, tokens, 12), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("fmt", FORMATS)
def test_a_graph_decodes_every_format_and_waits_for_nothing(make_mole, tokens, tmp_path, fmt):
    convert(make_mole(), tmp_path, fmt, progress=False)
    model = MoleForCausalLM.from_pretrained(tmp_path, lut_store="pinned").eval().cuda()
    tokens = tokens.cuda()
    decoder = Decoder(model, 2, 24, compiled=False)
    assert torch.equal(decoder.generate(tokens, 12), plain(model, tokens, 12))
    decoder.prefill(tokens)
    try:
        torch.cuda.set_sync_debug_mode("error")
        for _ in range(3):
            decoder.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("cache", [1, 2, 3, 60])
def test_rows_come_from_a_cache(make_mole, tokens, tmp_path, cache):
    convert(make_mole(lookup_layers=[0, 2]), tmp_path, "nf4", progress=False)
    model = MoleForCausalLM.from_pretrained(tmp_path).eval().to(DEVICE)
    tokens = tokens.to(DEVICE)
    expected = plain(model, tokens, 30)
    model.open_lut(tmp_path / "lut", "disk", cache)
    decoder = Decoder(model, 2, 48)
    assert decoder.leased == (cache >= 2)  # a slot for every sequence, or rows fetched one by one
    for _ in range(2):
        assert torch.equal(decoder.generate(tokens, 30), expected)
    assert model.lut.misses > 0
    if cache == 60:
        distinct = len(expected[:, :-1].unique())
        assert model.lut.misses == distinct
    model.lut.close()


def sampled(model, tokens, count, generator, temperature, top_k=None, top_p=None):
    """The plain loop: whole sequences through the model, limits as transformers applies them."""
    ids = tokens
    for _ in range(count):
        with torch.no_grad():
            logits = model(ids).logits[:, -1]
        logits = TemperatureLogitsWarper(temperature)(ids, logits)
        if top_k is not None:
            logits = TopKLogitsWarper(top_k)(ids, logits)
        if top_p is not None:
            logits = TopPLogitsWarper(top_p)(ids, logits)
        noise = torch.empty_like(logits).exponential_(generator=generator)
        ids = torch.cat((ids, (logits.softmax(-1) / noise).argmax(-1, keepdim=True)), dim=1)
    return ids


WAYS = [{"temperature": 1.0}, {"temperature": 0.7, "top_k": 5}, {"temperature": 1.5, "top_p": 0.8},
        {"temperature": 2.0, "top_k": 20, "top_p": 0.5}]  # fmt: skip


def test_sampling_is_that_of_the_plain_loop(make_mole, tokens, tmp_path):
    convert(make_mole(lookup_layers=[0, 2]), tmp_path, "fp32", progress=False)
    model = MoleForCausalLM.from_pretrained(tmp_path, lut_store="device").eval().to(DEVICE)
    tokens = tokens.to(DEVICE)
    decoder = Decoder(model, 2, 24)
    greedy = plain(model, tokens, 12)
    found = []
    for way in WAYS:  # one decoder serves them all, in any order
        given, own = (torch.Generator(DEVICE).manual_seed(7) for _ in range(2))
        drawn = decoder.generate(tokens, 12, generator=given, **way)
        assert torch.equal(drawn, sampled(model, tokens, 12, own, **way))
        found.append(drawn)
        assert not torch.equal(drawn, greedy)
        assert torch.equal(decoder.generate(tokens, 12), greedy)
    assert not torch.equal(found[0], found[1])
    assert torch.equal(decoder.generate(tokens, 12, temperature=3.0, top_k=1), greedy)


@pytest.mark.parametrize("way", WAYS)
def test_ids_come_as_often_as_their_chance_says(make_config, tokens, way):
    torch.manual_seed(0)
    model = DenseForCausalLM(make_config("dense")).eval().to(DEVICE)
    count = 4000
    prompts = tokens[:1].to(DEVICE).repeat(count, 1)
    generator = torch.Generator(DEVICE).manual_seed(1)
    drawn = Decoder(model, count, 12).generate(prompts, 1, generator=generator, **way)[:, -1]
    with torch.no_grad():
        logits = model(prompts[:1]).logits[:, -1] / way["temperature"]
    if "top_k" in way:
        logits = TopKLogitsWarper(way["top_k"])(None, logits)
    if "top_p" in way:
        logits = TopPLogitsWarper(way["top_p"])(None, logits)
    chance = logits.softmax(-1)[0].cpu()
    often = drawn.cpu().bincount(minlength=60) / count
    assert not often[chance == 0].any()
    assert ((often - chance).abs() <= 4 * (chance * (1 - chance) / count).sqrt()).all()


def test_decoders_share_the_weights_of_their_model(make_mole, tokens, tmp_path):
    convert(make_mole(), tmp_path / "a", "fp32", progress=False)
    model = MoleForCausalLM.from_pretrained(tmp_path / "a").eval()
    model = model.to(DEVICE)
    tokens = tokens.to(DEVICE)
    expected = plain(model, tokens, 12)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first, second = Decoder(model, 2, 24), Decoder(model, 2, 30)
    for number, layer in enumerate(model.model.layers):
        one, two = first.layers[number], second.layers[number]
        assert one.qkv.data_ptr() == two.qkv.data_ptr() == layer.self_attn.q_proj.weight.data_ptr()
        assert one.up.data_ptr() == two.up.data_ptr() == layer.mlp.up_proj.weight.data_ptr()
        router, inner = layer.lookup.router.weight, len(layer.mlp.up_proj.weight)
        assert torch.equal(two.up[inner : inner + len(router)], router)
    for decoder in (first, second):
        assert torch.equal(decoder.generate(tokens, 12), expected)
    assert torch.equal(plain(model, tokens, 12), expected)
    model.save_pretrained(tmp_path / "b")
    model.config.lut["path"] = str(tmp_path / "a/lut")
    loaded = MoleForCausalLM.from_pretrained(tmp_path / "b", config=model.config)
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, before[name].cpu()), name


@pytest.mark.usefixtures("our_checks_only")
def test_bad_arguments_are_named(make_config, make_mole, tokens):
    with pytest.raises(TypeError, match="or MoeForCausalLM; got Linear"):
        Decoder(torch.nn.Linear(1, 1), 1, 8)
    with pytest.raises(ValueError, match="must be in table form with an open table"):
        Decoder(make_mole(), 1, 8)
    with pytest.raises(ValueError, match="`captured` needs a model on a GPU; this one is on cpu"):
        Decoder(DenseForCausalLM(make_config("dense")), 1, 8, captured=True)
    decoder = Decoder(DenseForCausalLM(make_config("dense")).to(DEVICE), 3, 12)
    with pytest.raises(ValueError, match="`prompts` must have 3 rows of 1 to 11 ids; got 2 of 11"):
        decoder.generate(tokens, 1)
    with pytest.raises(ValueError, match=r"`new_tokens` must be 1 to 1, .*; got 2"):
        decoder.generate(tokens, 2)
    for name, value in (("temperature", -1.0), ("temperature", float("inf")), ("top_k", 0),
                        ("top_p", 0.0), ("top_p", 1.5)):  # fmt: skip
        with pytest.raises(ValueError, match=f"`{name}` must be .*; got {value}"):
            decoder.generate(tokens, 1, **{"temperature": 1.0, name: value})
