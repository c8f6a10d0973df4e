"""Bytes of tokens, the vocabularies' map and the drafter's context."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hetero_sd import inspect_vocab, map_vocabularies
from hetero_sd._bytes import ByteEncoder, token_bytes, unfinished_tail
from hetero_sd.context import DrafterContext, DrafterMemory, SameContext
from hetero_sd.demo.vocabularies import train_drafter_tokenizer
from hetero_sd.testing import make_tokenizer, sentences
from hetero_sd.texts import Text

KINDS = ("byte-level", "sentencepiece", "prefixed", "characters")


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_of_tokens_add_up_to_the_text(tokenizers, kind):
    tokenizer = tokenizers[kind]
    table = token_bytes(tokenizer)
    for text in sentences(20):
        spelled = b"".join(table[i] for i in tokenizer(text).input_ids)
        assert spelled == (b" " if kind == "prefixed" else b"") + text.encode()


@pytest.mark.parametrize(
    ("kind", "added", "spelled"),
    [
        ("sentencepiece", "▁▁▁", b"   "),  # As Gemma's runs of spaces.
        ("sentencepiece", "\n\n", b"\n\n"),
        ("byte-level", "   ", b"   "),  # As those of GPT-NeoX.
    ],
)
def test_added_tokens_spell_what_they_decode_to(kind, added, spelled):
    from tokenizers import AddedToken

    from hetero_sd.testing import make_tokenizer

    tokenizer = make_tokenizer(kind, 330)
    tokenizer.add_tokens([AddedToken(added, normalized=False)])
    index = tokenizer.convert_tokens_to_ids(added)
    assert token_bytes(tokenizer)[index] == spelled
    assert tokenizer.decode([index]).encode() == spelled


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_have_no_bytes(tokenizers, kind):
    table = token_bytes(tokenizers[kind])
    assert table[tokenizers[kind].bos_token_id] is None
    assert table[tokenizers[kind].eos_token_id] is None


@pytest.mark.parametrize("kind", KINDS)
def test_text_in_the_middle_gets_no_prefix_space(tokenizers, kind):
    encoder = ByteEncoder(tokenizers[kind], token_bytes(tokenizers[kind]))
    for text in ("cat sat", " cat", "at on\n", "42"):
        assert encoder.spell(encoder.encode(text.encode())) == text.encode()


@settings(max_examples=60, deadline=None)
@given(data=st.binary(max_size=24))
def test_any_bytes_survive_tokenizers_with_all_bytes(tokenizers, data):
    for kind in ("byte-level", "sentencepiece", "prefixed"):
        encoder = ByteEncoder(tokenizers[kind], token_bytes(tokenizers[kind]))
        # A literal mark is the one character that this kind of tokenizer cannot tell from a space.
        wanted = data if kind == "byte-level" else data.replace("▁".encode(), b" ")
        assert encoder.spell(encoder.encode(data)) == wanted


@given(text=st.text(min_size=1, max_size=12))
def test_unfinished_tail_completes_to_whole_characters(text):
    data = text.encode("utf-8", errors="ignore")
    assert unfinished_tail(data) == 0
    for cut in range(len(data)):
        part = data[:cut]
        whole = part[: len(part) - unfinished_tail(part)]
        assert text.startswith(whole.decode())
        assert len(part) - len(whole) < 4


@pytest.mark.parametrize("ours", KINDS)
@pytest.mark.parametrize("theirs", KINDS)
def test_drafts_go_on_with_the_tokens_that_text_is_written_with(tokenizers, ours, theirs):
    """And not with byte-fallback tokens, which a drafter hardly knows."""
    target, drafter = tokenizers[ours], tokenizers[theirs]
    mapping = map_vocabularies(target, drafter)
    encoder = ByteEncoder(drafter, mapping.drafter_bytes)
    assert set(mapping.to_drafter) == set(mapping.to_target.tolist())
    checked = 0
    for index in mapping.to_drafter.values():
        spelled = mapping.drafter_bytes[index]
        if spelled is not None and len(written := encoder.encode(spelled)) == 1:
            assert index == written[0]
            checked += 1
    assert checked > 10
    assert mapping.identity(5).to_drafter == {i: i for i in range(5)}


@pytest.mark.parametrize("ours", KINDS)
@pytest.mark.parametrize("theirs", KINDS)
def test_map_joins_equal_bytes_only_and_misses_none(tokenizers, ours, theirs):
    target, drafter = tokenizers[ours], tokenizers[theirs]
    mapping = map_vocabularies(
        target, drafter, target_eos=[target.eos_token_id], drafter_eos=[drafter.eos_token_id]
    )
    pairs = dict(zip(mapping.keep.tolist(), mapping.to_target.tolist(), strict=True))
    mine, other = token_bytes(target), token_bytes(drafter)
    known = {spelled for spelled in mine if spelled is not None}
    for index, spelled in enumerate(other):
        if spelled is None:
            continue
        assert (index in pairs) == (spelled in known)
        if index in pairs:
            assert mine[pairs[index]] == spelled
    assert pairs[drafter.eos_token_id] == target.eos_token_id
    assert mapping.keep.tolist() == sorted(mapping.keep.tolist())


def test_map_leaves_out_ids_beyond_the_heads(tokenizers):
    target, drafter = tokenizers["byte-level"], tokenizers["sentencepiece"]
    mapping = map_vocabularies(target, drafter, target_size=50, drafter_size=60)
    assert max(mapping.keep.tolist()) < 60
    assert max(mapping.to_target.tolist()) < 50


def _cut(ids, sizes):
    """Cut a list into pieces of the given sizes, repeated."""
    place = 0
    for turn in range(len(ids)):
        if place >= len(ids):
            return
        size = 1 + sizes[turn % len(sizes)]
        yield ids[place : place + size]
        place += size


@settings(max_examples=40, deadline=None)
@given(
    text=st.text(st.characters(exclude_characters="▁", exclude_categories=["Cs"]), max_size=30),
    sizes=st.lists(st.integers(0, 4), min_size=1, max_size=5),
)
def test_context_is_a_prefix_of_the_history_however_it_comes(tokenizers, text, sizes):
    target = tokenizers["byte-level"]
    mine = token_bytes(target)
    ids = target("the cat " + text).input_ids
    for kind in ("byte-level 2", "sentencepiece", "prefixed"):
        drafter = tokenizers[kind]
        mapping = map_vocabularies(target, drafter)
        encoder = ByteEncoder(drafter, mapping.drafter_bytes)
        context = DrafterContext(encoder, mapping, drafter.bos_token_id)
        history = b""
        for piece in _cut(ids, sizes):
            context.extend(piece)
            history += b"".join(mine[i] for i in piece)
            assert context.ids[0] == drafter.bos_token_id
            assert encoder.spell(context.ids) + context.pending == history
            assert unfinished_tail(history) == len(context.pending)


@pytest.mark.parametrize("kinds", [("byte-level", "sentencepiece"), ("prefixed", "byte-level 2")])
def test_many_ends_of_one_draft_are_tokenised_as_each_by_itself(tokenizers, kinds):
    """The same bytes always, and the same tokens but where one reaches far back."""
    ours, theirs = (ByteEncoder(tokenizers[k], token_bytes(tokenizers[k])) for k in kinds)
    text, same, total = Text(ours, theirs, [0], [0]), 0, 0
    for sentence in sentences(12):
        history, ids = ours.encode(sentence[:9].encode()), theirs.encode(sentence[9:].encode())
        for length in (0, 1, 3):
            drafted, choices = ids[:length], list(range(5, 300, 31))
            found = text.retokenise_each(history[-8:], drafted, choices)
            for choice, run in zip(choices, found, strict=True):
                alone = text.retokenise(history[-8:], [*drafted, choice])
                assert ours.spell(run) == ours.spell(alone)
                same, total = same + (run == alone), total + 1
    assert same > 0.9 * total


def test_context_passes_special_tokens_on_by_role(tokenizers):
    target, drafter = tokenizers["byte-level"], tokenizers["sentencepiece"]
    mapping = map_vocabularies(
        target, drafter, target_eos=[target.eos_token_id], drafter_eos=[drafter.eos_token_id]
    )
    encoder = ByteEncoder(drafter, mapping.drafter_bytes)
    for text in ("<s>the cat</s>\n<s>sat", "</s> on"):
        context = DrafterContext(encoder, mapping, drafter.bos_token_id)
        context.extend(target(text).input_ids)
        wanted = text if text.startswith("<s>") else "<s>" + text
        assert context.ids == drafter(wanted).input_ids


def test_context_stays_what_the_tokenizer_makes_of_whole_text(tokenizers):
    # The demo's kind of tokenizer, which splits words first: the last few tokens are enough.
    target = tokenizers["byte-level"]
    drafter = train_drafter_tokenizer(sentences(300), 400)
    mapping = map_vocabularies(target, drafter)
    for text in sentences(10, seed=3):
        context = DrafterContext(ByteEncoder(drafter, mapping.drafter_bytes), mapping, None)
        for token in target(text).input_ids:
            context.extend([token])
        assert context.ids == drafter(text).input_ids


class _Runner:
    def __init__(self):
        self.lengths = [0]

    def extend(self, feeds, keep, head=None):
        self.lengths[0] += len(feeds[0])
        return [torch.zeros(keep[0], 1)]

    def crop(self, lengths):
        self.lengths = list(lengths)

    def select(self, rows):
        raise NotImplementedError


def test_memory_keeps_what_agrees_and_slides():
    runner, context = _Runner(), SameContext()
    memory = DrafterMemory(runner, [context], limit=10)
    context.ids = [1, 2, 3, 9, 9]
    memory.feed(memory.missing([2]))
    context.ids = [1, 2, 3, 4]
    assert memory.missing([2]) == [[4]]
    assert memory.lengths == runner.lengths == [3]
    context.ids = [1, 2, 3]
    assert memory.missing([2]) == [[3]], "the last token is always fed"
    assert memory.missing([0]) == [[]]
    context.ids = list(range(9))
    assert memory.missing([2]) == [[4, 5, 6, 7, 8]]
    assert memory.lengths == [0]
    context.pending = b"\xc3"
    assert memory.missing([2]) == [[]], "in the middle of a character the drafter cannot help"


def test_report_on_two_tokenizers(tokenizers):
    report = inspect_vocab(tokenizers["byte-level"], tokenizers["sentencepiece"], sentences(30))
    assert (report.target_kind, report.drafter_kind) == ("byte-level", "sentencepiece")
    assert report.newline
    assert report.end
    assert report.space
    assert report.lossy == ()
    assert 0 < report.target_coverage < 0.5
    assert report.suggestion.startswith("slrs for sampling, slem for greedy decoding: only")
    assert "| shared | " in str(report)
    one = " ".join(sentences(30))
    assert inspect_vocab(tokenizers["byte-level"], tokenizers["sentencepiece"], one) == (
        inspect_vocab(tokenizers["byte-level"], tokenizers["sentencepiece"], [one])
    )
    same = inspect_vocab(tokenizers["characters"], tokenizers["characters"], sentences(30))
    assert same.suggestion.startswith("tli for sampling")
    assert same.fertility == same.target_coverage == same.drafter_coverage == 1


def test_report_names_a_lossy_tokenizer(tokenizers):
    report = inspect_vocab(tokenizers["byte-level"], tokenizers["characters"], ["the cat", "Ωμέγα"])
    assert report.lossy == ("the drafter's tokenizer changes 1 of 2 texts",)


def test_report_needs_a_corpus(tokenizers):
    with pytest.raises(ValueError, match="`corpus` must hold at least one text"):
        inspect_vocab(tokenizers["byte-level"], tokenizers["characters"], [])


def test_unknown_kind_of_tokenizer_is_refused():
    with pytest.raises(ValueError, match=r"`kind` must be 'byte-level'.*got 'unigram'"):
        make_tokenizer("unigram")


def test_processors_act_on_each_position_with_its_own_history():
    from transformers import LogitsProcessorList
    from transformers.generation import logits_process as library

    from hetero_sd.processors import Processors

    logits = torch.randn(4, 50) * 3
    ids = torch.randint(50, (9,))
    chain = [
        library.RepetitionPenaltyLogitsProcessor(1.3),
        library.TemperatureLogitsWarper(0.7),
        library.TopKLogitsWarper(12),
        library.TopPLogitsWarper(0.8),
    ]
    process = Processors(chain, greedy=False)
    assert not process.by_score
    mine = process(logits, ids.tolist())
    for i in range(4):
        wanted = LogitsProcessorList(chain)(
            ids[None, : len(ids) - 3 + i], logits[i : i + 1].clone()
        )
        torch.testing.assert_close(mine[i : i + 1], wanted)
    few = Processors(chain[1:], greedy=False)
    assert few.by_score
    torch.testing.assert_close(few.scores_only(logits), few(logits))
