"""Z-Image, whose only stream holds the picture first: against the stock model under a mask."""

import pytest
import torch
import torch.nn.functional as F

from conceptattention import ConceptAttention
from conceptattention.adapters import Call, adapter_for
from conceptattention.testing import ORACLE_ERROR
from conceptattention.tiny import FAMILIES, TEXT, normal

WORDS = ["a", "b", "c"]
EMBEDS = normal(3, TEXT, seed=5)
FAMILY = FAMILIES["z-image"]
PATCHES, FILLED = 6, 32


@pytest.fixture
def model_and_arguments():
    """The stock model and a batch of two, whose texts take 32 and 64 tokens."""
    model = FAMILY.build().transformer
    latents = [normal(4, 1, 4, 6, seed=seed) for seed in (1, 2)]
    arguments = {"x": latents, "t": torch.tensor([0.3, 0.3]), **{
        "cap_feats": FAMILY.texts()["prompt_embeds"], "return_dict": False,
    }}  # fmt: skip
    return model, arguments


def attentions(monkeypatch, mask=None):
    """Record queries, keys and outputs of every attention; `mask` may change the given one."""
    seen = []
    real = F.scaled_dot_product_attention

    def attend(query, key, value, attn_mask=None, **kwargs):
        if mask is not None:
            attn_mask = mask(query.shape[2], attn_mask)
        out = real(query, key, value, attn_mask=attn_mask, **kwargs)
        seen.append((query, key, out))
        return out

    monkeypatch.setattr(F, "scaled_dot_product_attention", attend)
    return seen


def test_concept_outputs_equal_the_masked_stock_model(model_and_arguments, monkeypatch):
    model, arguments = model_and_arguments
    pipe = FAMILY.build()
    pipe._guidance_scale, pipe._cfg_truncation = 0.0, 1.0
    with ConceptAttention(
        pipe, WORDS, concept_embeds=EMBEDS, layers="all", vectors=["concept_output"]
    ) as observer, torch.no_grad():  # fmt: skip
        pipe.transformer(**arguments)
    adapter = adapter_for(model)
    starts = adapter.start(model, Call(arguments, model.config), EMBEDS.expand(2, -1, -1))
    build = model._build_unified_sequence
    total = FILLED + 64

    def with_concepts(*args):
        states, turns, mask, noise = build(*args)
        place = turns[:, FILLED : FILLED + 1].expand(-1, 3, -1)  # of the first text token
        mask = torch.cat([mask, mask.new_ones(2, 3)], 1)
        return torch.cat([states, starts], 1), torch.cat([turns, place], 1), mask, noise

    def masked(tokens, given):
        if tokens != total + 3:
            return given
        mask = given.expand(-1, -1, tokens, -1).clone()
        mask[..., total:] = False
        mask[..., total:, :] = False
        mask[..., total:, :PATCHES] = True
        mask[..., total:, total:] = True
        return mask

    monkeypatch.setattr(model, "_build_unified_sequence", with_concepts)
    seen = attentions(monkeypatch, masked)
    with torch.no_grad():
        model(**arguments)
    dense = [out for _, _, out in seen if out.shape[2] == total + 3]
    assert len(dense) == 3
    for layer, out in enumerate(dense):
        ours = observer.vectors("concept_output", layer=layer)
        assert (ours - out[:, :, total:].transpose(1, 2).flatten(2)).abs().max() < ORACLE_ERROR


def test_prompt_attention_is_what_the_model_computed(model_and_arguments, monkeypatch):
    model, arguments = model_and_arguments
    pipe = FAMILY.build()
    pipe._guidance_scale, pipe._cfg_truncation = 0.0, 1.0
    spots = [[0], [1, 2], [4]]
    with ConceptAttention(
        pipe, WORDS, concept_embeds=EMBEDS, layers="all", store="layers",
        space="prompt_attention", prompt_tokens=spots,
    ) as observer, torch.no_grad():  # fmt: skip
        pipe.transformer(**arguments)
    seen = attentions(monkeypatch)
    with torch.no_grad():
        model(**arguments)
    joint = [pair for pair in seen if pair[0].shape[2] == FILLED + 64]
    maps = observer.heatmaps().with_reduce("raw")
    for layer, (query, key, _) in enumerate(joint):
        logits = (query[:, :, FILLED:] @ key[:, :, :PATCHES].mT).mean(1) / query.shape[-1] ** 0.5
        expected = torch.stack([logits[:, rows].mean(1) for rows in spots], 1)
        ours = maps.select(layers=[layer]).values.flatten(2)
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-4)


def test_guidance_that_stops_early_leaves_the_conditional_rows():
    pipe = FAMILY.build()
    settings = {"num_inference_steps": 4, "cfg_truncation": 0.3}
    plain = FAMILY.run(pipe, guided=True, **settings)
    rows = []
    handle = pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(args[0])), with_kwargs=True
    )
    with ConceptAttention(pipe, WORDS, concept_embeds=EMBEDS, store="steps") as observer:
        seen = FAMILY.run(pipe, guided=True, **settings)
    handle.remove()
    assert torch.equal(plain, seen)
    assert set(rows) == {2, 4}  # guided at first, then not
    assert observer.heatmaps().values.shape == (2, 3, 2, 3)
    assert observer.heatmaps().coverage == {1: 1.0, 2: 1.0}


def test_the_first_half_of_a_guided_batch_is_read():
    pipe = FAMILY.build()
    with ConceptAttention(pipe, WORDS, concept_embeds=EMBEDS, steps=[0]) as observer:
        FAMILY.run(pipe, guided=True)
        FAMILY.run(pipe, guided=False)
    # In step 0 guidance has changed nothing yet: the conditional half is the plain run.
    first, second = observer.heatmaps(run=0), observer.heatmaps(run=1)
    torch.testing.assert_close(first.values, second.values)


def test_words_are_read_behind_the_template():
    from types import SimpleNamespace

    pipe = FAMILY.build()
    states = torch.arange(12.0)[:, None].expand(-1, TEXT)
    pipe.tokenizer = lambda word, **_: SimpleNamespace(input_ids=list(range(len(word.split("-")))))
    pipe.encode_prompt = lambda words, device, guided: ([states] * len(words), [])
    encoded = adapter_for(pipe.transformer).encode(pipe, ["cat", "fire-truck"], "auto")
    assert encoded.embeds[:, 0].tolist() == [3.0, 4.0]  # the last token of each word


def test_the_omni_form_is_refused():
    with pytest.raises(ValueError, match="no adapter knows"):
        adapter_for(FAMILY.build(siglip_feat_dim=8).transformer)
