"""Models that accelerate spreads or puts away: only their `forward` is used."""

import copy

import pytest
import torch

from hetero_sd import HeteroSpeculativeDecoder
from hetero_sd.chance import Chance
from hetero_sd.devices import input_device, is_spread
from hetero_sd.llama import why_not_llama
from hetero_sd.testing import distance, law_of_output, law_of_target, make_model, state_hash

accelerate = pytest.importorskip("accelerate")


def put_away(model, folder):
    """Return a copy whose parts lie on a disk and come to the CPU when they are run."""
    parts = {"model.embed_tokens": "disk", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    parts |= {f"model.layers.{i}": "disk" for i in range(len(model.model.layers))}
    parts["lm_head"] = "disk"
    model = copy.deepcopy(model)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    return accelerate.dispatch_model(
        model, parts, main_device="cpu", offload_dir=folder, force_hooks=True
    )


@pytest.fixture
def pair(tokenizers, tmp_path):
    """Target and drafter as they are, and both put away."""
    both = tokenizers["characters"], tokenizers["byte-level"]
    models = [make_model(tokenizer, seed) for seed, tokenizer in enumerate(both)]
    away = [put_away(model, tmp_path / str(i)) for i, model in enumerate(models)]
    return (*models, *both), (*away, *both)


def test_where_a_model_runs(pair):
    (target, *_), (away, *_) = pair
    assert input_device(target) == target.device == torch.device("cpu")
    assert away.device == torch.device("meta")
    assert input_device(away) == torch.device("cpu")
    assert is_spread(away)
    assert not is_spread(target)
    assert why_not_llama(target) == ""
    assert why_not_llama(away) != ""


@pytest.mark.parametrize("method", ["tli", "slem", "slrs", "auto"])
def test_greedy_is_the_targets_own(pair, method):
    (target, _, tokenizer, _), away = pair
    before = state_hash(*pair[0])
    decoder = HeteroSpeculativeDecoder(*away, method=method)
    texts = ["the cat sat", "a dog"]
    for prompts in (texts[:1], texts):
        rows = [tokenizer(text, add_special_tokens=False).input_ids for text in prompts]
        width = max(map(len, rows))
        ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        wanted = target.generate(ids, attention_mask=mask, max_new_tokens=10, do_sample=False)
        made = decoder.generate(input_ids=ids, attention_mask=mask, max_new_tokens=10)
        assert made.sequences[:, width:].tolist() == wanted[:, width:].tolist()
    assert state_hash(*pair[0]) == before


def test_law_is_the_targets_own(pair):
    whole, away = pair
    options = {"temperature": 0.8, "top_k": 2}
    decoder = HeteroSpeculativeDecoder(*away, method="tli", lookahead=2)
    prompt = whole[2]("the cat").input_ids
    alone = HeteroSpeculativeDecoder(*whole, method="tli", lookahead=2, backend="eager")
    wanted = law_of_target(alone, prompt, options)
    assert distance(law_of_output(decoder, prompt, options), wanted) < 1e-5  # In float32.


def test_a_generator_serves_its_own_device():
    chance = Chance(torch.Generator())
    assert chance.serves(torch.device("cpu"))
    assert not chance.serves(torch.device("cuda", 1))
    assert Chance().serves(torch.device("cuda", 1))


class LinearInt8(torch.nn.Module):
    """A product with rows of 8-bit weights, whose `weight` is a method as in PyTorch's own."""

    def __init__(self, linear):
        super().__init__()
        self.out_features = linear.out_features
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("rows", (linear.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)

    def weight(self):
        return self.rows

    def forward(self, x):
        return torch.nn.functional.linear(x, self.rows * self.scale)


def quantised(model):
    """Return a copy with 8-bit linear layers, the head among them."""
    model = copy.deepcopy(model)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is torch.nn.Linear:
                setattr(module, name, LinearInt8(child))
    return model


@pytest.mark.parametrize("method", ["tli", "slem", "slrs", "auto"])
@pytest.mark.parametrize("who", ["target", "drafter", "both"])
def test_quantised_models_run_by_their_own_forward(pair, who, method):
    target, drafter, *tokenizers = pair[0]
    target = target if who == "drafter" else quantised(target)
    drafter = drafter if who == "target" else quantised(drafter)
    decoder = HeteroSpeculativeDecoder(target, drafter, *tokenizers, method=method)
    ids = tokenizers[0]("the cat sat", return_tensors="pt", add_special_tokens=False).input_ids
    wanted = target.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False
    )
    made = decoder.generate(input_ids=ids, max_new_tokens=12)
    assert made.sequences.tolist() == wanted.tolist()
    assert why_not_llama(drafter if who == "drafter" else target) != ""
