"""Fast decoding gives what `generate` gives."""

import pytest
import torch

from mole import DenseForCausalLM, MoeForCausalLM, MoleForCausalLM, convert
from mole.decode import Decoder

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


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_dense_model(make_config, tokens, kv_heads):
    torch.manual_seed(0)
    model = DenseForCausalLM(make_config("dense", num_key_value_heads=kv_heads)).eval().to(DEVICE)
    tokens = tokens.to(DEVICE)
    decoder = Decoder(model, 2, 24)
    for _ in range(2):  # a decoder can be used again
        assert torch.equal(decoder.generate(tokens, 12), plain(model, tokens, 12))


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


@pytest.mark.usefixtures("our_checks_only")
def test_bad_arguments_are_named(make_config, make_mole, tokens):
    with pytest.raises(TypeError, match="got MoeForCausalLM"):
        Decoder(MoeForCausalLM(make_config("moe")), 1, 8)
    with pytest.raises(ValueError, match="must be in table form with an open table"):
        Decoder(make_mole(), 1, 8)
    decoder = Decoder(DenseForCausalLM(make_config("dense")).to(DEVICE), 3, 12)
    with pytest.raises(ValueError, match="`prompts` must have 3 rows of 1 to 11 ids; got 2 of 11"):
        decoder.generate(tokens, 1)
    with pytest.raises(ValueError, match=r"`new_tokens` must be 1 to 1, .*; got 2"):
        decoder.generate(tokens, 2)
