"""Models that come from elsewhere: Llama-type bases, and checkpoints in the authors' layout."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from transformers import (
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from mole import DenseForCausalLM, MoleForCausalLM, convert, from_upstream, to_upstream, upcycle
from mole.cli import main
from mole.upcycling import load_base


@pytest.fixture
def llama():
    def make(**changes):
        torch.manual_seed(0)
        sizes = {
            "vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
            "initializer_range": 0.2, "rope_theta": 500.0,
        }  # fmt: skip
        return LlamaForCausalLM(LlamaConfig(**(sizes | changes))).eval()

    return make


@pytest.mark.parametrize("tied", [True, False])
def test_an_upcycled_llama_has_the_llamas_logits(llama, tokens, tmp_path, tied):
    base = llama(tie_word_embeddings=tied)
    model = upcycle(base, experts=2, inner=16, layers=[0, 2])
    with torch.no_grad():
        expected = base(tokens).logits
        torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-4, atol=1e-5)
        model.save_pretrained(tmp_path / "experts")
        loaded = MoleForCausalLM.from_pretrained(tmp_path / "experts").eval()
        torch.testing.assert_close(loaded(tokens).logits, expected, rtol=1e-4, atol=1e-5)
        convert(model, tmp_path / "table", progress=False)
        table = MoleForCausalLM.from_pretrained(tmp_path / "table").eval()
        torch.testing.assert_close(table(tokens).logits, expected, rtol=1e-4, atol=1e-5)


def test_a_llama_from_a_gguf_file(llama, tokens, tmp_path):
    gguf = pytest.importorskip("gguf")
    base = llama(tie_word_embeddings=False, num_key_value_heads=4)
    path = tmp_path / "base.gguf"
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(3)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(500.0)
    writer.add_rope_dimension_count(8)
    writer.add_vocab_size(60)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*map(chr, range(65, 123)), "AB", "</s>"])
    writer.add_token_merges(["A B"])
    writer.add_eos_token_id(59)
    names = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
             "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
             "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
             "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
             "model.embed_tokens": "token_embd", "model.norm": "output_norm",
             "lm_head": "output"}  # fmt: skip
    for name, value in base.state_dict().items():
        key = name.removesuffix(".weight")
        array = value.clone()
        if key.endswith(("q_proj", "k_proj")):  # the file format interleaves rotary pairs
            array = array.view(4, 2, 4, 32).transpose(1, 2).reshape(32, 32)
        if key.startswith("model.layers."):
            _, _, layer, rest = key.split(".", 3)
            key = f"blk.{layer}.{names[rest]}"
        else:
            key = names[key]
        writer.add_tensor(f"{key}.weight", array.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    loaded = load_base(tmp_path, "base.gguf").eval()
    model = upcycle(loaded, experts=2)
    loaded.save_pretrained(tmp_path / "plain")
    again = load_base(tmp_path / "plain").eval()
    with torch.no_grad():
        expected = base(tokens).logits
        torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(again(tokens).logits, loaded(tokens).logits)
    for output, given in (("cli", [tmp_path, "--gguf", "base.gguf"]), ("file", [path])):
        command = ["upcycle", *given, tmp_path / output, "--experts", 2]
        done = CliRunner().invoke(main, [str(part) for part in command])
        assert done.exit_code == 0, done.output
        words = AutoTokenizer.from_pretrained(tmp_path / output)
        assert words("ABBA").input_ids == [58, 1, 0]
    one, two = (MoleForCausalLM.from_pretrained(tmp_path / name) for name in ("cli", "file"))
    assert all(map(torch.equal, one.state_dict().values(), two.state_dict().values()))


def test_an_upcycled_model_learns_with_its_backbone_frozen(make_config, tokens):
    torch.manual_seed(0)
    base = DenseForCausalLM(make_config("dense", initializer_range=0.05)).train()
    model = upcycle(base, experts=3, freeze_backbone=True)
    before = base.model.embed_tokens.weight.detach().clone()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 3 * 4
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    losses = []
    for _ in range(30):
        loss = model(tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1
    assert torch.equal(model.model.embed_tokens.weight, before)


def test_bases_that_do_not_fit_are_refused(llama):
    gpt = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_embd=8, n_layer=1, n_head=1))
    with pytest.raises(TypeError, match=r"`base` must be .* got GPT2LMHeadModel \(gpt2\)"):
        upcycle(gpt)
    with pytest.raises(ValueError, match="no biases; its `attention_bias` is true"):
        upcycle(llama(attention_bias=True))
    scaled = {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}
    with pytest.raises(ValueError, match="plain rotary positions; its `rope_type` is 'linear'"):
        upcycle(llama(rope_parameters=scaled))
    with pytest.raises(ValueError, match=r"heads of width 8, .* got 16"):
        upcycle(llama(head_dim=16))


@pytest.mark.parametrize("tied", [True, False])
def test_the_published_layout_round_trips(make_mole, tokens, tmp_path, tied):
    model = make_mole(tie_word_embeddings=tied, lookup_intermediate_size=24)
    to_upstream(model, tmp_path / "theirs")
    weights = load_file(tmp_path / "theirs" / "model.safetensors")
    assert weights["model.layers.2.experts.3.up_proj.weight"].shape == (24, 32)
    assert weights["model.layers.2.experts.3.down_proj.weight"].shape == (32, 24)
    assert weights["model.layers.0.expert_layernorm.weight"].shape == (32,)
    assert weights["model.layers.0.router.weight"].shape == (4, 32)
    assert not any("lookup" in name for name in weights)
    back = from_upstream(tmp_path / "theirs")
    with torch.no_grad():
        assert torch.equal(back(tokens).logits, model(tokens).logits)
    # The same numbers from the layout's definition: every expert apart.
    embedding = weights["model.embed_tokens.weight"][5]
    norm = weights["model.layers.1.expert_layernorm.weight"]
    normed = torch.nn.functional.rms_norm(embedding, (32,), norm, model.config.rms_norm_eps)
    inner = torch.nn.functional.gelu(weights["model.layers.1.experts.2.up_proj.weight"] @ normed)
    expected = weights["model.layers.1.experts.2.down_proj.weight"] @ inner
    found = back.model.layers[1].lookup.values(embedding)[2]
    torch.testing.assert_close(found, expected)


def test_checkpoints_that_do_not_fit_are_refused(make_mole, tmp_path):
    folder = to_upstream(make_mole(), tmp_path / "theirs")
    config = json.loads((folder / "config.json").read_text())
    weights = load_file(folder / "model.safetensors")

    def change(fields=None, **tensors):
        (folder / "config.json").write_text(json.dumps(config | (fields or {})))
        changed = {k: v for k, v in (weights | tensors).items() if v is not None}
        save_file(changed, folder / "model.safetensors")

    change({"num_experts": 5})
    with pytest.raises(ValueError, match=r"`num_experts` must be 4, .* got 5"):
        from_upstream(folder)
    change({"hidden_size": 64})
    with pytest.raises(ValueError, match=r"must have shape \(60, 64\); got \(60, 32\)"):
        from_upstream(folder)
    change(**{"model.norm.weight": None})
    with pytest.raises(ValueError, match=r"`model.norm.weight` must have shape \(32,\); got noth"):
        from_upstream(folder)
    change(**{"model.layers.1.experts.2.down_proj.weight": None})
    with pytest.raises(
        ValueError, match=r"must hold model\.layers\.1\.experts\.2\.down_proj\.weight"
    ):
        from_upstream(folder)
    change(**{"model.moe_table.weight": torch.zeros(2)})
    with pytest.raises(ValueError, match="is in table form, whose experts are gone"):
        from_upstream(folder)
    with pytest.raises(ValueError, match="must turn all channels"):
        to_upstream(make_mole(partial_rotary_factor=0.5), folder)


@pytest.mark.slow
def test_the_example_says_what_experts_add():
    path = Path(__file__).parents[1] / "examples/upcycle.py"
    done = subprocess.run(
        [sys.executable, str(path), "--steps", "30"],
        capture_output=True, text=True, check=True, timeout=300,
    )  # fmt: skip
    found = {}
    for line in done.stdout.splitlines():
        name, _, figure = line.partition(": ")
        found[name] = float(figure.split()[0])
    assert found["with experts, untrained"] == pytest.approx(found["base"], abs=1e-3)
    assert found["with experts, trained"] < found["base"] - 0.5
    assert found["from an nf4 table"] == pytest.approx(found["with experts, trained"], abs=0.05)
    assert found["base, trained on"] < found["base"] - 0.5
