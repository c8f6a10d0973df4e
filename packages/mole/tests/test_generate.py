"""The ways of generating: the table form gives what the expert form gives."""

import pytest
import torch

from mole import DenseForCausalLM, MoleForCausalLM, convert


@pytest.fixture
def forms(make_mole, tmp_path):
    experts = make_mole()
    convert(experts, tmp_path, "fp32", progress=False)
    return experts, MoleForCausalLM.from_pretrained(tmp_path).eval()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"do_sample": True, "temperature": 0.9, "top_p": 0.9},
        {"num_beams": 3},
        {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.5},
        {"cache_implementation": "static", "disable_compile": True},
        {"prompt_lookup_num_tokens": 3},
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    ],
    ids=["greedy", "sampling", "beams", "more beams", "static cache", "prompt lookup", "penalty"],
)
def test_the_table_gives_what_the_experts_give(forms, tokens, options):
    one = options.get("prompt_lookup_num_tokens") is not None  # batches of one only
    ids = torch.tensor([[5, 6, 7, 8, 5, 6]]) if one else tokens
    found = []
    for model in forms:
        torch.manual_seed(0)
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=10,
            pad_token_id=0,
            **({"do_sample": False} | options),
        )
        found.append(out)
    assert torch.equal(*found)
    assert found[0].shape[1] == ids.shape[1] + 10


def test_an_assistant_changes_speed_not_text(forms, make_config):
    torch.manual_seed(1)
    assistant = DenseForCausalLM(make_config("dense")).eval()
    ids = torch.tensor([[5, 6, 7, 8]])
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "do_sample": False}
    for model in forms:
        plain = model.generate(ids, pad_token_id=0, **options)
        assisted = model.generate(ids, pad_token_id=0, assistant_model=assistant, **options)
        assert torch.equal(assisted, plain)


def test_left_padded_prompts_of_different_lengths(forms):
    prompts = [[5, 6, 7], [9, 8, 7, 6, 5, 4]]
    table = forms[1]
    padded = torch.tensor([[0] * 3 + prompts[0], prompts[1]])
    mask = torch.tensor([[0] * 3 + [1] * 3, [1] * 6])
    together = table.generate(
        padded, attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0
    )
    for prompt, row in zip(prompts, together, strict=True):
        ids = torch.tensor([prompt])
        alone = table.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=8,
            do_sample=False,
            pad_token_id=0,
        )
        assert row[-8:].tolist() == alone[0, -8:].tolist()


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"use_cache": False}])
def test_embeddings_as_prompt_come_with_their_ids(forms, tokens, options):
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0} | options
    for model in forms:
        embeddings = model.get_input_embeddings()(tokens)
        expected = model.generate(tokens, **options)[:, tokens.shape[1] :]
        found = model.generate(inputs_embeds=embeddings, lookup_ids=tokens, **options)
        assert torch.equal(found, expected)
        for one in ({"inputs_embeds": embeddings}, {"inputs": tokens, "lookup_ids": tokens}):
            with pytest.raises(ValueError, match="`lookup_ids` and `inputs_embeds` must be given"):
                model.generate(**one, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("store", ["pinned", "mmap"])
def test_a_static_cache_is_compiled_on_the_gpu(make_mole, tmp_path, store):
    convert(make_mole(max_position_embeddings=512), tmp_path, "nf4", progress=False)
    table = MoleForCausalLM.from_pretrained(tmp_path, lut_store=store).eval().cuda()
    ids = torch.randint(1, 60, (1, 300), generator=torch.Generator().manual_seed(0)).cuda()
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "do_sample": False}
    expected = table.generate(ids, pad_token_id=0, **options)
    found = table.generate(ids, pad_token_id=0, cache_implementation="static", **options)
    assert torch.equal(found, expected)
