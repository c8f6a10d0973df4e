"""The model against an independent implementation of section 2 of the design, in float64."""

import math

import pytest
import torch


def rms(x, weight, eps):
    return weight * x / math.sqrt(float((x * x).mean()) + eps)


def gelu(x):
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def rotate(x, position, rotary_dim, base):
    x, half = x.clone(), rotary_dim // 2
    for i in range(half):
        angle = position * base ** (-2 * i / rotary_dim)
        a, b = float(x[i]), float(x[i + half])
        x[i] = a * math.cos(angle) - b * math.sin(angle)
        x[i + half] = b * math.cos(angle) + a * math.sin(angle)
    return x


def attention(w, prefix, normed, config):
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    size, rotary = config.hidden_size // heads, config.rotary_dim

    def split(name, count, turn):
        rows = []
        for position, x in enumerate(normed):
            parts = (w[f"{prefix}.{name}.weight"] @ x).view(count, size)
            turned = [rotate(p, position, rotary, config.rope_theta) if turn else p for p in parts]
            rows.append(torch.stack(turned))
        return rows

    q, k, v = split("q_proj", heads, True), split("k_proj", kv_heads, True), None
    v = split("v_proj", kv_heads, False)
    out = []
    for t in range(len(normed)):
        mixed = []
        for h in range(heads):
            g = h * kv_heads // heads
            scores = torch.stack([q[t][h] @ k[s][g] for s in range(t + 1)]) / math.sqrt(size)
            weights = torch.softmax(scores, 0)
            mixed.append(sum(weights[s] * v[s][g] for s in range(t + 1)))
        out.append(w[f"{prefix}.o_proj.weight"] @ torch.cat(mixed))
    return out


def mole_logits(model, ids):
    """Logits of one sequence, token by token and expert by expert."""
    config, w = model.config, {k: v.double() for k, v in model.state_dict().items()}
    eps, n = config.rms_norm_eps, config.num_lookup_experts
    embedded = [w["model.embed_tokens.weight"][i] for i in ids.tolist()]
    hidden = list(embedded)
    for layer in range(config.num_hidden_layers):
        p = f"model.layers.{layer}"
        normed = [rms(h, w[f"{p}.input_layernorm.weight"], eps) for h in hidden]
        attended = attention(w, f"{p}.self_attn", normed, config)
        for t, e in enumerate(embedded):
            a = hidden[t] + attended[t]
            x = rms(a, w[f"{p}.post_attention_layernorm.weight"], eps)
            shared = w[f"{p}.mlp.down_proj.weight"] @ gelu(w[f"{p}.mlp.up_proj.weight"] @ x)
            hidden[t] = a + shared
            if layer not in config.lookup_layers:
                continue
            gates = torch.softmax(w[f"{p}.lookup.router.weight"] @ x, 0)
            z = rms(e, w[f"{p}.lookup.norm.weight"], eps)
            ups = w[f"{p}.lookup.up"].chunk(n)
            downs = w[f"{p}.lookup.down_t"].chunk(n)
            for gate, up, down in zip(gates, ups, downs, strict=True):
                hidden[t] = hidden[t] + gate * (down.t() @ gelu(up @ z))
    final = [w["lm_head.weight"] @ rms(h, w["model.norm.weight"], eps) for h in hidden]
    return torch.stack(final)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_key_value_heads": 2, "partial_rotary_factor": 0.5},
        {"num_lookup_experts": 1, "lookup_layers": [0, 2], "lookup_intermediate_size": 16},
        {"partial_rotary_factor": 0.0, "tie_word_embeddings": True, "dedup": "micro"},
    ],
)
@pytest.mark.parametrize("attention_kind", ["sdpa", "eager"])
def test_logits_are_those_of_the_reference(make_mole, tokens, changes, attention_kind):
    model = make_mole(**changes).double()
    model.set_attn_implementation(attention_kind)
    with torch.no_grad():
        found = model(tokens).logits
    for row, ids in zip(found, tokens, strict=True):
        # Gates are a float32 softmax by definition of the method.
        torch.testing.assert_close(row, mole_logits(model, ids), rtol=1e-6, atol=1e-6)
