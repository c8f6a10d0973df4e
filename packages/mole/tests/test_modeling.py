"""The three models: loading, generating, training, and what they say about bad input."""

import subprocess
import sys

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from mole import (
    DenseConfig,
    DenseForCausalLM,
    MoeConfig,
    MoeForCausalLM,
    MoleConfig,
    MoleForCausalLM,
    register,
)

MODELS = {"dense": DenseForCausalLM, "moe": MoeForCausalLM, "mole": MoleForCausalLM}


@pytest.fixture(params=MODELS)
def model(request, make_config):
    torch.manual_seed(0)
    return MODELS[request.param](make_config(request.param)).eval()


def test_saved_model_is_loaded_by_the_auto_class(model, tokens, tmp_path):
    register()  # a second time is harmless
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    assert type(AutoConfig.from_pretrained(tmp_path)) is type(model.config)
    assert loaded.config.to_diff_dict() == model.config.to_diff_dict()
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, model(tokens).logits)


def test_generation_with_and_without_cache_is_the_same(model, tokens):
    options = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0}
    cached = model.generate(tokens, use_cache=True, **options)
    assert torch.equal(cached, model.generate(tokens, use_cache=False, **options))
    assert cached.shape == (2, 20)


def test_left_padding_changes_nothing(model, tokens):
    padded = torch.cat((torch.zeros(2, 4, dtype=torch.long), tokens), dim=1)
    mask = (torch.arange(15) >= 4).long().expand(2, -1)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    plain = model.generate(tokens, **options)
    left = model.generate(padded, attention_mask=mask, **options)
    assert torch.equal(left[:, 4:], plain)


def test_beams_are_likelier_and_a_static_cache_changes_nothing(model, tokens):
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    greedy, beams = (
        model.generate(tokens, **options),
        model.generate(tokens, num_beams=3, **options),
    )
    static = model.generate(tokens, cache_implementation="static", disable_compile=True, **options)
    assert torch.equal(static, greedy)

    def likelihood(ids):
        with torch.no_grad():
            chances = model(ids).logits.log_softmax(-1)[:, 10:-1]
        return chances.gather(2, ids[:, 11:, None]).sum((1, 2))

    assert (likelihood(beams) >= likelihood(greedy) - 1e-5).all()
    assert (likelihood(beams) > likelihood(greedy) + 1e-5).any()


def test_hidden_states_and_router_logits_are_returned(make_config, tokens):
    model = MoleForCausalLM(make_config(lookup_layers=[1], num_lookup_experts=5)).eval()
    with torch.no_grad():
        out = model(tokens, output_hidden_states=True)
    assert [h.shape for h in out.hidden_states] == [(2, 11, 32)] * 4
    assert [r.shape for r in out.router_logits] == [(2, 11, 5)]


def test_gradient_checkpointing_gives_the_same_gradients(make_mole, tokens):
    gradients = []
    for checkpointing in (False, True):
        model = make_mole().train()
        if checkpointing:
            # Renamed in later versions of transformers; the old name warns.
            new, old = "activation_checkpointing_enable", "gradient_checkpointing_enable"
            getattr(model, new if hasattr(model, new) else old)()
        model(tokens, labels=tokens, use_cache=False).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters()})
    assert all(g is not None for g in gradients[0].values())
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name])


def test_a_batch_is_learned_by_heart(make_config, tokens):
    torch.manual_seed(0)
    model = MoleForCausalLM(make_config(initializer_range=0.05, dedup="micro")).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(150):
        loss = model(tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.1


def test_initial_weights_have_the_configured_spread():
    config = MoleConfig(
        vocab_size=500, hidden_size=64, intermediate_size=128, num_hidden_layers=8,
        num_attention_heads=4, initializer_range=0.02,
    )  # fmt: skip
    weights = dict(MoleForCausalLM(config).named_parameters())
    small = 0.02 / 4  # 1 / sqrt(2 * 8)
    for name, expected in {
        "model.embed_tokens.weight": 0.02,
        "model.layers.0.self_attn.q_proj.weight": 0.02,
        "model.layers.0.self_attn.o_proj.weight": small,
        "model.layers.0.mlp.down_proj.weight": small,
        "model.layers.0.lookup.up": 0.02,
        "model.layers.0.lookup.down_t": small,
    }.items():
        assert weights[name].std().item() == pytest.approx(expected, rel=0.06), name
    assert torch.equal(weights["model.layers.0.lookup.norm.weight"], torch.ones(64))


def test_moe_output_is_a_loop_over_the_chosen_experts(make_config):
    torch.manual_seed(0)
    model = MoeForCausalLM(make_config("moe", num_experts=5)).double().eval()
    mlp = model.model.layers[0].mlp
    x = torch.randn(2, 7, 32, dtype=torch.float64)
    with torch.no_grad():
        many, logits = mlp(x)
        one = torch.stack(
            [mlp(x[b : b + 1, t : t + 1])[0][0, 0] for b in range(2) for t in range(7)]
        )
        for b in range(2):
            for t in range(7):
                best = sorted(range(5), key=lambda j: -float(logits[b, t, j]))[:2]
                gates = torch.softmax(logits[b, t, best], 0).double()
                expected = 0
                for gate, j in zip(gates, best, strict=True):
                    up, down = mlp.up.chunk(5)[j], mlp.down_t.chunk(5)[j]
                    inner = torch.nn.functional.gelu(up @ x[b, t])
                    expected = expected + gate * (down.t() @ inner)
                torch.testing.assert_close(many[b, t], expected)
                torch.testing.assert_close(one[7 * b + t], expected)


def test_moe_auxiliary_loss_is_added_in_training_only(make_config, tokens):
    config = make_config("moe", num_experts=4, router_aux_loss_coef=0.3, router_z_loss_coef=0.2)
    torch.manual_seed(0)
    model = MoeForCausalLM(config)
    trained = model.train()(tokens, labels=tokens, use_cache=False)
    plain = model.eval()(tokens, labels=tokens, use_cache=False)
    expected = 0.0
    for logits in plain.router_logits:
        flat = logits.flatten(0, 1).detach().double()
        counts, shares = [0.0] * 4, [0.0] * 4
        for row in flat:
            for j in row.topk(2).indices.tolist():
                counts[j] += 1 / (2 * len(flat))
            for j, share in enumerate(torch.softmax(row, 0).tolist()):
                shares[j] += share / len(flat)
        balance = 4 * sum(c * s for c, s in zip(counts, shares, strict=True))
        z = sum(float(torch.logsumexp(row, 0)) ** 2 for row in flat) / len(flat)
        expected += (0.3 * balance + 0.2 * z) / 3
    assert plain.aux_loss is None
    assert trained.aux_loss.item() == pytest.approx(expected, rel=1e-5)
    assert (trained.loss - plain.loss).item() == pytest.approx(expected, rel=1e-4)


def test_lookup_model_has_no_auxiliary_loss(make_mole, tokens):
    model = make_mole().train()
    assert model(tokens, labels=tokens, use_cache=False).aux_loss is None


def test_embeddings_need_ids_to_look_up(make_mole, tokens):
    model = make_mole()
    embeds = model.get_input_embeddings()(tokens)
    with torch.no_grad():
        plain = model(tokens).logits
        given = model(inputs_embeds=embeds, lookup_ids=tokens).logits
    assert torch.equal(given, plain)
    with pytest.raises(ValueError, match="`lookup_ids` must be given along with `inputs_embeds`"):
        model(inputs_embeds=embeds)
    with pytest.raises(ValueError, match="Exactly one of `input_ids` and `inputs_embeds`"):
        model()


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        (DenseConfig, {"hidden_size": 30}, "`hidden_size` must be a multiple of .* 4; got 30"),
        (DenseConfig, {"num_key_value_heads": 3}, "`num_key_value_heads` must divide .*got 3"),
        (DenseConfig, {"partial_rotary_factor": 1.5}, "`partial_rotary_factor` must .*got 1.5"),
        (MoeConfig, {"num_experts": 1}, "`num_experts_per_tok` must be between 1 and .*got 2"),
        (MoleConfig, {"num_lookup_experts": 0}, "`num_lookup_experts` must be at least 1; got 0"),
        (MoleConfig, {"lookup_layers": [2, 1]}, r"`lookup_layers` must be ascending.*\[2, 1\]"),
        (MoleConfig, {"lookup_layers": [3]}, r"between 0 and 2; got \[3\]"),
        (MoleConfig, {"lookup_form": "tables"}, "`lookup_form` must be one of .*got 'tables'"),
        (MoleConfig, {"dedup": "all"}, "`dedup` must be one of 'off', 'micro', 'step'; got 'all'"),
    ],
)
def test_configurations_that_do_not_fit_are_refused(kind, changes, message):
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 3}
    with pytest.raises(Exception, match=message) as caught:
        kind(**(sizes | changes))
    assert isinstance(caught.value, ValueError) or isinstance(caught.value.__cause__, ValueError)


def test_compiled_model_is_one_graph(make_mole, tmp_path):
    """In a process of its own: the suite's type checker cannot be compiled."""
    make_mole().save_pretrained(tmp_path)
    script = """
import sys, torch
from mole import MoleForCausalLM
model = MoleForCausalLM.from_pretrained(sys.argv[1]).eval()
graphs = []
def backend(graph, inputs):
    graphs.append(graph)
    return graph.forward
compiled = torch.compile(model, backend=backend, fullgraph=True)
ids = torch.arange(12).view(2, 6)
with torch.no_grad():
    gap = compiled(input_ids=ids, use_cache=False).logits - model(ids, use_cache=False).logits
assert gap.abs().max() < 1e-5
assert len(graphs) == 1
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
