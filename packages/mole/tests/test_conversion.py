"""Conversion: the table form is the expert form, and a kill at any moment costs nothing."""

import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mole import DenseForCausalLM, MoleForCausalLM, convert, fingerprint, verify
from mole import conversion as module
from mole.lut import FORMATS, LutError, LutMeta


def table_bytes(folder):
    return {p.name: p.read_bytes() for p in sorted((folder / "lut").iterdir())}


def logits(model, ids, **options):
    with torch.no_grad():
        return model(ids, **options).logits


@pytest.mark.parametrize("store", ["mmap", "device"])
@pytest.mark.parametrize("changes", [{}, {"lookup_layers": [1], "num_lookup_experts": 3}])
def test_fp32_table_gives_the_logits_of_the_experts(make_mole, tokens, tmp_path, store, changes):
    model = make_mole(**changes)
    convert(model, tmp_path, "fp32", chunk=13, progress=False)
    table = MoleForCausalLM.from_pretrained(tmp_path, lut_store=store).eval()
    expected = logits(model, tokens)
    gap = (logits(table, tokens) - expected).abs().max() / expected.abs().max()
    assert gap <= 1e-5


@pytest.mark.parametrize(
    # Largest error of a stored value relative to its vector's largest, as test_lut bounds it;
    # three layers of four experts add up to a few times that in the logits.
    ("fmt", "bound"),
    [("fp16", 2**-11), ("bf16", 2**-8), ("int8", 2**-8), ("nf4", 0.16)],
)
def test_other_formats_stay_within_their_precision(make_mole, tokens, tmp_path, fmt, bound):
    model = make_mole()
    convert(model, tmp_path, fmt, progress=False)
    table = MoleForCausalLM.from_pretrained(tmp_path).eval()
    expected = logits(model, tokens)
    gap = (logits(table, tokens) - expected).abs().max() / expected.abs().max()
    assert 0 < gap <= 2 * bound


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False},
        {"num_beams": 3, "do_sample": False},
        {"do_sample": True, "top_k": 5},
        {"do_sample": False, "cache_implementation": "static", "disable_compile": True},
    ],
)
def test_both_forms_generate_the_same(make_mole, tokens, tmp_path, options):
    model = make_mole()
    convert(model, tmp_path, "fp32", progress=False)
    table = MoleForCausalLM.from_pretrained(tmp_path).eval()
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0  # left padding
    found = []
    for form in (model, table):
        torch.manual_seed(0)
        found.append(
            form.generate(tokens, attention_mask=mask, max_new_tokens=8, pad_token_id=0, **options)
        )
    assert torch.equal(*found)


def test_rows_can_be_fetched_beforehand(make_mole, tokens, tmp_path):
    convert(make_mole(), tmp_path, progress=False)
    table = MoleForCausalLM.from_pretrained(tmp_path).eval()
    expected = logits(table, tokens)
    rows, table.model.lut = table.lut.rows(tokens), None
    assert torch.equal(logits(table, tokens, lut_rows=rows), expected)
    with pytest.raises(ValueError, match="has no table yet"):
        table(tokens)
    with pytest.raises(ValueError, match="`lut_rows` needs a model whose `lookup_form` is 'table'"):
        make_mole()(tokens, lut_rows=rows)


def test_table_is_outside_the_state_dict(make_mole, tmp_path):
    model = make_mole(tie_word_embeddings=True)
    convert(model, tmp_path, progress=False)
    table = MoleForCausalLM.from_pretrained(tmp_path, lut_store="device")
    names = set(table.state_dict())
    lost = {n for n in model.state_dict() if ".lookup." in n and ".router." not in n}
    assert names == set(model.state_dict()) - lost
    assert table.lm_head.weight is table.model.embed_tokens.weight


@pytest.mark.parametrize("links", [True, False])
def test_a_saved_table_form_is_whole(make_mole, tokens, tmp_path, monkeypatch, links):
    def refuse(*paths):
        raise OSError(1, "Operation not permitted")

    if not links:
        monkeypatch.setattr(os, "link", refuse)
    convert(make_mole(seed=3), tmp_path / "again" / "part", progress=False)  # is replaced
    convert(make_mole(), tmp_path / "table", progress=False)
    table = MoleForCausalLM.from_pretrained(tmp_path / "table").eval()
    for _ in range(2):
        table.save_pretrained(tmp_path / "again" / "part")
    table.save_pretrained(tmp_path / "table")  # where it is already
    shutil.rmtree(tmp_path / "table" / "lut")
    again = MoleForCausalLM.from_pretrained(tmp_path / "again", subfolder="part").eval()
    assert verify(tmp_path / "again" / "part" / "lut") == table.lut.meta
    assert torch.equal(logits(again, tokens), logits(table, tokens))


def test_a_name_on_the_hub_brings_its_table(make_mole, tokens, tmp_path):
    """A cache of the hub, filled by hand: files by links, as huggingface_hub lays them out."""
    experts = make_mole().eval()
    convert(experts, tmp_path / "table", "fp32", progress=False)
    home = tmp_path / "hub" / "models--someone--model"
    snapshot = home / "snapshots" / ("0" * 40)
    for file in filter(Path.is_file, (tmp_path / "table").rglob("*")):
        place = snapshot / file.relative_to(tmp_path / "table")
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(file)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text("0" * 40)
    where = {"cache_dir": str(tmp_path / "hub"), "local_files_only": True}
    table = MoleForCausalLM.from_pretrained("someone/model", lut_store="disk", lut_cache=7, **where)
    assert repr(table.lut) == "CachedStore(7 rows of DiskStore(60 ids, 1,536 bytes, fp32))"
    torch.testing.assert_close(table.eval()(tokens).logits, experts(tokens).logits)
    table.save_pretrained(tmp_path / "copy")
    assert verify(tmp_path / "copy" / "lut").format == "fp32"
    with pytest.raises(ValueError, match="`push_to_hub` must be a call of its own"):
        table.save_pretrained(tmp_path / "copy", push_to_hub=True)


def test_bfloat16_model_is_converted_in_float32(make_mole, tmp_path):
    model = make_mole().to(torch.bfloat16)
    convert(model, tmp_path / "half", "fp32", progress=False)
    convert(model.float(), tmp_path / "full", "fp32", progress=False)
    half, full = table_bytes(tmp_path / "half"), table_bytes(tmp_path / "full")
    assert half == full  # fingerprints included
    loaded = MoleForCausalLM.from_pretrained(tmp_path / "half")
    assert loaded.dtype == torch.bfloat16
    assert loaded(torch.tensor([[1, 2]])).logits.dtype == torch.bfloat16


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("after", [0, 1, 4, 8])
def test_resumed_conversion_gives_the_identical_file(make_mole, tmp_path, monkeypatch, fmt, after):
    model, computed = make_mole(), []
    convert(model, tmp_path / "whole", fmt, chunk=7, progress=False)
    values = module.expert_values

    def failing(model, ids):
        if len(computed) == after:
            raise Interrupted
        computed.append(ids)
        return values(model, ids)

    monkeypatch.setattr(module, "expert_values", failing)
    with pytest.raises(Interrupted):
        convert(model, tmp_path / "broken", fmt, chunk=7, progress=False)
    assert sorted(p.name for p in (tmp_path / "broken").iterdir()) == [".lut.partial"]
    monkeypatch.setattr(
        module, "expert_values", lambda model, ids: computed.append(ids) or values(model, ids)
    )
    convert(model, tmp_path / "broken", fmt, chunk=7, progress=False)
    assert len(computed) == 9  # no chunk twice
    assert table_bytes(tmp_path / "broken") == table_bytes(tmp_path / "whole")
    assert not (tmp_path / "broken" / ".lut.partial").exists()


@pytest.mark.parametrize("damage", ["torn journal", "torn data", "changed data", "no data"])
def test_what_the_journal_promises_is_checked(make_mole, tmp_path, monkeypatch, damage):
    model, values, computed = make_mole(), module.expert_values, []
    convert(model, tmp_path / "whole", chunk=7, progress=False)

    def counting(model, ids):
        if len(computed) == 5:
            raise Interrupted
        computed.append(ids.start)
        return values(model, ids)

    monkeypatch.setattr(module, "expert_values", counting)
    with pytest.raises(Interrupted):
        convert(model, tmp_path / "broken", chunk=7, progress=False)
    partial = tmp_path / "broken" / ".lut.partial"
    data, journal = partial / "lut.safetensors", partial / "journal"
    if damage == "torn journal":
        journal.write_text(journal.read_text()[:-4])
    elif damage == "torn data":
        data.write_bytes(data.read_bytes()[:-100])
    elif damage == "changed data":
        raw = bytearray(data.read_bytes())
        raw[4096 + 15 * 1024] ^= 1  # in the third chunk
        data.write_bytes(raw)
    else:
        data.unlink()
    computed.clear()
    monkeypatch.setattr(
        module, "expert_values", lambda model, ids: computed.append(ids.start) or values(model, ids)
    )
    convert(model, tmp_path / "broken", chunk=7, progress=False)
    first = {"torn journal": 28, "torn data": 28, "changed data": 14, "no data": 0}[damage]
    assert computed[0] == first
    assert table_bytes(tmp_path / "broken") == table_bytes(tmp_path / "whole")


def test_killed_process_is_resumed(make_mole, tmp_path):
    model = make_mole()
    model.save_pretrained(tmp_path / "experts")
    convert(model, tmp_path / "whole", chunk=7, progress=False)
    script = """
import os, signal, sys, torch
from mole import MoleForCausalLM, conversion
values, calls = conversion.expert_values, []
def killing(model, ids):
    calls.append(ids)
    if len(calls) == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return values(model, ids)
conversion.expert_values = killing
torch.set_num_threads(1)  # as this suite does: products are added up in the same order
model = MoleForCausalLM.from_pretrained(sys.argv[1])
conversion.convert(model, sys.argv[2], chunk=7, progress=False)
"""
    target = tmp_path / "killed"
    command = [sys.executable, "-c", script, str(tmp_path / "experts"), str(target)]
    done = subprocess.run(command, capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert os.listdir(target) == [".lut.partial"]
    convert(model, target, chunk=7, progress=False)
    assert table_bytes(target) == table_bytes(tmp_path / "whole")


@pytest.mark.parametrize("step", range(3))
def test_a_kill_at_the_very_end_costs_nothing(make_mole, tmp_path, monkeypatch, step):
    model, path = make_mole(), type(tmp_path)
    convert(model, tmp_path / "whole", chunk=7, progress=False)
    convert(make_mole(seed=3), tmp_path / "new", progress=False)  # is replaced
    with monkeypatch.context() as patch:
        # Unlinking the journal, moving the old table away, giving the new one its name.
        called, real = [], {"unlink": path.unlink, "rename": path.rename}

        def dying(name):
            def call(self, *rest, **options):
                if ".lut" in str(self) or self.name == "lut":
                    called.append(name)
                    if len(called) > step:
                        raise Interrupted
                return real[name](self, *rest, **options)

            return call

        for name in real:
            patch.setattr(path, name, dying(name))
        with pytest.raises(Interrupted):
            convert(model, tmp_path / "new", chunk=7, progress=False)
        assert called == ["unlink", "rename", "rename"][: step + 1]
    monkeypatch.setattr(module, "expert_values", None)  # nothing is computed again
    convert(model, tmp_path / "new", chunk=7, progress=False)
    assert table_bytes(tmp_path / "new") == table_bytes(tmp_path / "whole")
    assert not list((tmp_path / "new").glob(".*"))


def test_an_old_table_does_not_stay_behind(make_mole, tmp_path):
    model = make_mole()
    convert(model, tmp_path, progress=False)
    shutil.copytree(tmp_path / "lut", tmp_path / ".lut.old")  # killed before it was removed
    convert(model, tmp_path, progress=False)
    assert not list(tmp_path.glob(".*"))


def test_the_same_weights_in_other_experts_are_another_table(make_mole, tmp_path):
    four, two = make_mole(), make_mole(num_lookup_experts=2, lookup_intermediate_size=96)
    ours = {name: value for name, value in four.state_dict().items() if "router" not in name}
    two.load_state_dict(ours, strict=False)
    for model in (four, two):
        convert(model, tmp_path, progress=False)
        assert verify(tmp_path / "lut", model).experts == model.config.num_lookup_experts


def test_changed_weights_begin_anew_and_replace_the_table(make_mole, tmp_path, monkeypatch):
    convert(make_mole(), tmp_path, progress=False)
    before = table_bytes(tmp_path)
    other = make_mole(seed=3)
    convert(other, tmp_path, progress=False)
    assert table_bytes(tmp_path) != before
    assert verify(tmp_path / "lut", other)
    # A complete table of the same weights is kept.
    monkeypatch.setattr(module, "expert_values", None)
    convert(other, tmp_path, progress=False)
    with pytest.raises(TypeError):
        convert(other, tmp_path, resume=False, progress=False)


@pytest.mark.parametrize("part", ["model.embed_tokens.weight", "model.layers.1.lookup.up"])
def test_fingerprint_depends_on_embeddings_and_experts_only(make_mole, part):
    model = make_mole()
    before = fingerprint(model)
    weights = model.state_dict()
    weights["model.layers.0.mlp.up_proj.weight"][0, 0] += 1
    weights["model.layers.0.lookup.router.weight"][0, 0] += 1
    assert fingerprint(model) == before
    weights[part][0, 0] += 1
    assert fingerprint(model) != before


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from the system")
def test_memory_is_that_of_a_few_chunks(make_mole, tmp_path):
    model = make_mole(vocab_size=30_000, hidden_size=64)
    convert(model, tmp_path / "warm", "fp32", chunk=500, progress=False)
    Path("/proc/self/clear_refs").write_text("5")  # the peak of what ran before does not count
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    convert(model, tmp_path / "table", "fp32", chunk=500, progress=False)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    size = LutMeta.load(tmp_path / "table/lut").file_bytes
    assert grown <= size / 4, (grown, size)


def test_progress_bar_counts_ids(make_mole, tmp_path, capsys):
    convert(make_mole(), tmp_path, chunk=7)
    assert "60/60" in capsys.readouterr().err


def test_bad_arguments_are_named(make_mole, make_config, tmp_path, our_checks_only):
    model = make_mole()
    with pytest.raises(ValueError, match=r"`fmt` must be one of fp32, .*; got 'nf2'"):
        convert(model, tmp_path / "a", "nf2")
    with pytest.raises(ValueError, match="`chunk` must be at least 1; got 0"):
        convert(model, tmp_path / "a", chunk=0)
    with pytest.raises(TypeError, match="`model` must be a MoleForCausalLM; got DenseForCausalLM"):
        convert(DenseForCausalLM(make_config("dense")), tmp_path / "a")
    with pytest.raises(ValueError, match="'nf4' needs an even `hidden_size`; got 9"):
        convert(make_mole(hidden_size=9, num_attention_heads=1), tmp_path / "a", "nf4")
    assert not (tmp_path / "a").exists()
    convert(model, tmp_path / "table", progress=False)
    table = MoleForCausalLM.from_pretrained(tmp_path / "table")
    with pytest.raises(ValueError, match="must have lookup experts in at least one layer"):
        convert(make_mole(lookup_layers=[]), tmp_path / "b")
    adapted = make_mole()
    adapted._hf_peft_config_loaded = True  # as transformers marks it
    with pytest.raises(ValueError, match="must have no adapters beside its weights"):
        convert(adapted, tmp_path / "b")
    with pytest.raises(ValueError, match="this one is in table form already"):
        convert(table, tmp_path / "b")
    with pytest.raises(ValueError, match="`open_lut` needs a model with `lookup_form` 'table'"):
        model.open_lut(tmp_path / "table" / "lut")
    model.model.embed_tokens = torch.nn.Embedding(61, 32)
    with pytest.raises(ValueError, match=r"`model` must have 60 embeddings .*; got 61"):
        convert(model, tmp_path / "c")


def test_a_model_in_expert_form_is_not_overwritten(make_mole, tmp_path):
    model = make_mole()
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds a model of type 'mole' that would be lost"):
        convert(model, tmp_path)


def test_values_too_large_leave_no_table(make_mole, tmp_path):
    model = make_mole()
    with torch.no_grad():
        model.model.layers[1].lookup.down_t.mul_(1e6)
    with pytest.raises(LutError, match="Use 'bf16'"):
        convert(model, tmp_path, "fp16", progress=False)
    assert not (tmp_path / "lut").exists()
    convert(model, tmp_path, "bf16", progress=False)
    assert verify(tmp_path / "lut").format == "bf16"


def test_a_full_disk_is_said_before_writing(make_mole, tmp_path, monkeypatch):
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10}))
    with pytest.raises(OSError, match=r"the table needs [\d,]+ more bytes .*; 10 are free"):
        convert(make_mole(), tmp_path, progress=False)


def test_a_disk_that_fills_up_leaves_what_can_be_resumed(make_mole, tmp_path):
    resource = pytest.importorskip("resource")
    model = make_mole()
    convert(model, tmp_path / "whole", "fp32", chunk=7, progress=False)
    stride = LutMeta.load(tmp_path / "whole/lut").row_stride
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096 + 24 * stride, before[1]))
        with pytest.raises(OSError, match="File too large"):
            convert(model, tmp_path / "parts", "fp32", chunk=7, progress=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    journal = (tmp_path / "parts/.lut.partial/journal").read_text().splitlines()
    assert len(journal) == 1 + 3  # 24 rows have room for three chunks of 7
    convert(model, tmp_path / "parts", "fp32", chunk=7, progress=False)
    assert table_bytes(tmp_path / "parts") == table_bytes(tmp_path / "whole")
