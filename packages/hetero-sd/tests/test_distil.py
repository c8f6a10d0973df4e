"""Training on the target's laws: where they hold, what they teach, and how a drafter begins."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from hetero_sd.demo import distil, smollm2
from hetero_sd.demo.held_out import held_out_acceptance
from hetero_sd.demo.sampling import as_ids
from hetero_sd.demo.train import Shape, build
from hetero_sd.demo.vocabularies import train_drafter_tokenizer
from hetero_sd.testing import sentences

TEXTS = [f"<s>user\n{text}</s>\n<s>assistant\n{text}</s>\n" for text in sentences(24)]


@pytest.fixture(scope="module")
def target_tokenizer():
    """A byte-level tokenizer with the marks of SmolLM2."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=290,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
    )


@pytest.fixture(scope="module")
def drafter_tokenizer():
    """A sentencepiece-style tokenizer with other merges."""
    return train_drafter_tokenizer(TEXTS, 520)


@pytest.fixture
def target(target_tokenizer):
    """A target of the demo's shape, tiny, that is sure of what comes next."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "head_dim": 16, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    config = smollm2.config(vocab_size=len(target_tokenizer), **sizes, **heads)
    model = LlamaForCausalLM(config).eval()
    model.model.embed_tokens.weight.data.mul_(8)
    return model


def drafter_of(tokenizer):
    torch.manual_seed(1)
    shape = Shape(vocab=len(tokenizer), hidden=32, inner=48, layers=1, heads=2, kv_heads=1)
    return build(shape, tokenizer).eval()


def test_laws_hold_where_tokens_of_both_end(target, target_tokenizer, drafter_tokenizer):
    """Counted there, TLI's acceptance is what the judge finds text by text."""
    drafter = drafter_of(drafter_tokenizer)
    teacher = distil.Teacher(target, target_tokenizer, drafter_tokenizer, len(drafter_tokenizer))
    texts = [TEXTS[0], TEXTS[1] + TEXTS[2], "<s>user\nNaïve ☕ 42</s>\n"]
    rows = distil.as_rows(target_tokenizer, drafter_tokenizer, texts)
    laws, common = teacher(rows.at(torch.arange(3), torch.device("cpu")))
    ids = [as_ids(target_tokenizer, text) for text in texts]
    found = held_out_acceptance(target, target_tokenizer, drafter, drafter_tokenizer, ids)
    assert int(common.sum()) == found["places"]
    assert 0.3 < found["common_boundaries"] < 1
    letter = drafter_tokenizer.convert_tokens_to_ids("a")
    assert teacher.mask[letter] == 0  # And not its byte token, which texts do not have.
    # A law at a place is the target's own after the same bytes.
    place = int(common[1].nonzero()[-1])
    text = drafter_tokenizer.decode(rows.drafter[1, : place + 1], skip_special_tokens=False)
    own = target(torch.tensor([as_ids(target_tokenizer, text)])).logits[0, -1]
    by_bytes = {
        spelled: own[index]
        for index, spelled in enumerate(
            distil.map_vocabularies(target_tokenizer, drafter_tokenizer).target_bytes
        )
    }
    shared = 0
    table = distil.map_vocabularies(target_tokenizer, drafter_tokenizer).drafter_bytes
    for index in (teacher.mask == 0).nonzero().flatten().tolist():
        if table[index] is not None:
            torch.testing.assert_close(laws[1, place, index], by_bytes[table[index]])
            shared += 1
    assert shared > 100


def test_a_drafter_learns_the_laws(target, target_tokenizer, drafter_tokenizer):
    drafter = drafter_of(drafter_tokenizer)
    teacher = distil.Teacher(target, target_tokenizer, drafter_tokenizer, len(drafter_tokenizer))
    rows = distil.as_rows(target_tokenizer, drafter_tokenizer, TEXTS[:12])
    before = distil.accepted(drafter, teacher, rows, batch=5)
    log = []
    seen = distil.distil(
        drafter, teacher, rows, rows, seconds=1.5, batch=4, rate=1e-2, seed=0, log=log
    )
    after = distil.accepted(drafter, teacher, rows, batch=12)
    assert seen > 0
    assert after > before + 0.05
    assert after == pytest.approx(max(entry["held"] for entry in log), abs=0.02)


def test_all_layers_behind_the_same_vocabulary_are_the_target(target, target_tokenizer):
    same = distil.pruned(target, target_tokenizer, target_tokenizer, 3)
    ids = torch.tensor([as_ids(target_tokenizer, TEXTS[0])])
    torch.testing.assert_close(same(ids).logits, target(ids).logits)
    fewer = distil.pruned(target, target_tokenizer, target_tokenizer, 2)
    last = fewer.model.layers[1].mlp.up_proj.weight
    assert torch.equal(last, target.model.layers[2].mlp.up_proj.weight)


def test_other_tokens_begin_as_the_mean_of_their_pieces(
    target, target_tokenizer, drafter_tokenizer
):
    drafter = distil.pruned(target, target_tokenizer, drafter_tokenizer, 2)
    table, mine = target.model.embed_tokens.weight, drafter.model.embed_tokens.weight
    mapping = distil.map_vocabularies(target_tokenizer, drafter_tokenizer)
    shared = set(mapping.keep.tolist())
    own = next(
        index
        for index, spelled in enumerate(mapping.drafter_bytes)
        if spelled and len(spelled) > 1 and index not in shared
    )
    pieces = target_tokenizer(mapping.drafter_bytes[own].decode()).input_ids
    assert len(pieces) > 1
    torch.testing.assert_close(mine[own], table[pieces].mean(0))
    assert drafter.config.eos_token_id == drafter_tokenizer.eos_token_id


@pytest.mark.parametrize("layers", [1, 4])
def test_layers_that_the_target_lacks_are_refused(target, target_tokenizer, layers):
    with pytest.raises(ValueError, match=f"`layers` must be 2 to 3; got {layers}"):
        distil.pruned(target, target_tokenizer, target_tokenizer, layers)
