"""Training: exact whatever the deduplication, the processes, or an interruption."""

import json
import os
import subprocess
import sys

import numpy
import pytest
import torch
from transformers import Trainer, TrainingArguments

from mole import MoleForCausalLM
from mole.training import TrainSettings, load_tokens, loop, train

SETTINGS = {"steps": 4, "batch": 4, "micro_batch": 2, "context": 8, "lr": 1e-2}


@pytest.fixture
def text():
    return torch.randint(0, 60, (400,), generator=torch.Generator().manual_seed(0))


def weights(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def assert_same(found, expected, **tolerance):
    for name, value in weights(expected).items():
        torch.testing.assert_close(weights(found)[name], value, **tolerance)


def run(make_mole, text, output, dedup="off", **options):
    settings = TrainSettings(**SETTINGS)
    return train(make_mole(dedup=dedup), text, output, settings, progress=False, **options)


@pytest.mark.parametrize("dedup", ["micro", "step"])
def test_deduplication_changes_nothing(make_mole, text, tmp_path, dedup):
    plain = run(make_mole, text, tmp_path / "a")
    assert_same(run(make_mole, text, tmp_path / "b", dedup), plain, rtol=1e-3, atol=2e-4)
    saved = MoleForCausalLM.from_pretrained(tmp_path / "a")
    assert_same(saved, plain, rtol=0, atol=0)
    lines = [json.loads(x) for x in (tmp_path / "a" / "training_log.jsonl").open()]
    assert lines[-1]["step"] == 4
    assert lines[-1]["tokens"] == 4 * 4 * 8


def test_layers_are_compiled_while_they_are_trained_only(make_mole, text, tmp_path, monkeypatch):
    calls = []

    def compile_(layer, **options):
        def run(*arguments, **more):
            calls.append(options)
            return layer._call_impl(*arguments, **more)

        layer._compiled_call_impl = run

    monkeypatch.setattr(torch.nn.Module, "compile", compile_)
    model = run(make_mole, text, tmp_path, "micro", compiled=True)
    assert len(calls) == 4 * 2 * 3  # steps, micro-batches, layers
    model(text[None, :11].long())  # other shapes, which would be compiled again and again
    assert len(calls) == 24


def test_an_interrupted_run_goes_on_as_if_it_had_not_been(make_mole, text, tmp_path):
    whole = run(make_mole, text, tmp_path / "whole")
    run(make_mole, text, tmp_path / "parts", stop_after=2)
    assert not (tmp_path / "parts" / "config.json").exists()
    resumed = run(make_mole, text, tmp_path / "parts")
    assert_same(resumed, whole, rtol=0, atol=0)
    assert not (tmp_path / "parts" / "checkpoint").exists()


def test_dropout_is_the_same_after_an_interruption(make_mole, text, tmp_path):
    settings, found = TrainSettings(**SETTINGS), []
    for folder, stops in (("whole", [None]), ("parts", [2, None])):
        for stop in stops:
            torch.manual_seed(len(found) + 7)  # what happened before does not matter
            model = make_mole(attention_dropout=0.5)
            train(model, text, tmp_path / folder, settings, stop_after=stop, progress=False)
        found.append(model)
    assert_same(found[1], found[0], rtol=0, atol=0)
    plain = run(make_mole, text, tmp_path / "plain")
    assert not torch.equal(plain.lm_head.weight, found[0].lm_head.weight)


class Killed(Exception):
    pass


@pytest.mark.parametrize("moment", ["computing", "writing", "naming"])
def test_a_kill_costs_no_more_than_the_steps_since_the_checkpoint(
    make_mole, text, tmp_path, monkeypatch, moment
):
    whole = run(make_mole, text, tmp_path / "whole", save_every=2, log_every=1)
    target = {
        "computing": (loop, "_step"),
        "writing": (torch, "save"),
        "naming": (type(tmp_path), "replace"),
    }[moment]
    real, calls = getattr(*target), []

    def dying(*arguments, **options):
        calls.append(arguments)
        if len(calls) == (4 if moment == "computing" else 2):
            raise Killed
        return real(*arguments, **options)

    monkeypatch.setattr(*target, dying)
    every = 2 if moment == "computing" else 1
    with pytest.raises(Killed):
        run(make_mole, text, tmp_path / "parts", save_every=every, log_every=1)
    with open(tmp_path / "parts" / "training_log.jsonl", "a") as log:
        log.write('{"step": 9, "lo')  # torn
    monkeypatch.setattr(*target, real)
    state = torch.load(tmp_path / "parts" / "checkpoint" / "training_state.pt")
    assert state["step"] == (2 if moment == "computing" else 1)
    resumed = run(make_mole, text, tmp_path / "parts", save_every=2, log_every=1)
    assert_same(resumed, whole, rtol=0, atol=0)
    for folder in ("whole", "parts"):
        lines = [json.loads(x) for x in (tmp_path / folder / "training_log.jsonl").open()]
        assert [line["step"] for line in lines] == [1, 2, 3, 4]


def test_a_run_from_the_beginning_has_a_log_of_its_own(make_mole, text, tmp_path):
    for _ in range(2):
        run(make_mole, text, tmp_path, log_every=2, resume=False)
    assert len((tmp_path / "training_log.jsonl").read_text().splitlines()) == 2


def test_a_finished_model_is_not_replaced_unasked(make_mole, text, tmp_path):
    run(make_mole, text, tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="holds a finished model"):
        run(make_mole, text, tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    run(make_mole, text, tmp_path, stop_after=2, resume=False)  # once begun, it may be resumed
    resumed = run(make_mole, text, tmp_path)
    assert_same(MoleForCausalLM.from_pretrained(tmp_path), resumed, rtol=0, atol=0)


def test_a_broken_model_does_not_replace_the_checkpoint(make_mole, text, tmp_path):
    settings = TrainSettings(**(SETTINGS | {"lr": 1e30, "warmup": 1.0, "clip": 1e30}))
    with pytest.raises(ValueError, match="the loss is nan at step 3; lower `lr`"):
        train(make_mole(), text, tmp_path, settings, save_every=1, log_every=99, progress=False)
    assert torch.load(tmp_path / "checkpoint" / "training_state.pt")["step"] == 2


def test_other_settings_do_not_resume(make_mole, text, tmp_path):
    run(make_mole, text, tmp_path, stop_after=2)
    with pytest.raises(ValueError, match=r"other settings \(text\)"):
        train(make_mole(), text.flip(0), tmp_path, TrainSettings(**SETTINGS))
    with pytest.raises(ValueError, match=r"other settings \(lr\)"):
        train(make_mole(), text, tmp_path, TrainSettings(**(SETTINGS | {"lr": 1.0})))
    frozen = make_mole()
    frozen.lm_head.weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"other settings \(trained weights\)"):
        train(frozen, text, tmp_path, TrainSettings(**SETTINGS))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"context": 500}, "at least one sequence .* got 400 tokens and context 500"),
        ({"micro_batch": 0}, "`micro_batch` must be at least 1 and finite; got 0"),
        ({"context": 1}, "`context` must be at least 2 and finite; got 1"),
        ({"lr": -1.0}, "`lr` must be at least 0 and finite; got -1"),
        ({"expert_lr": float("nan")}, "`expert_lr` must be at least 0 and finite; got nan"),
        ({"warmup": 2.0}, "`warmup` must be a share of the steps, 0 to 1; got 2"),
        ({"clip": 0.0}, "`clip` must be more than 0"),
    ],
)
def test_bad_settings_are_named(make_mole, text, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        train(make_mole(), text, tmp_path, TrainSettings(**(SETTINGS | changes)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"save_every": 0}, "must be at least 1; got 0, 10 and None"),
        ({"log_every": 0}, "must be at least 1; got 500, 0 and None"),
        ({"stop_after": 0}, "must be at least 1; got 500, 10 and 0"),
        ({"mixed_precision": "fp16"}, "`mixed_precision` must be 'no' or 'bf16'; got 'fp16'"),
    ],
)
def test_bad_options_are_named(make_mole, text, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        run(make_mole, text, tmp_path, **options)


def test_experts_may_learn_at_a_rate_of_their_own(make_mole, text, tmp_path):
    first = weights(make_mole())

    def trained(folder, expert_lr, **options):
        settings = TrainSettings(**SETTINGS, expert_lr=expert_lr)
        return train(make_mole(), text, tmp_path / folder, settings, progress=False, **options)

    assert_same(trained("same", SETTINGS["lr"]), run(make_mole, text, tmp_path / "one"))
    for name, value in weights(trained("still", 0.0)).items():
        assert torch.equal(value, first[name]) == (".lookup." in name), name
    trained("parts", 1e-3, stop_after=2)
    assert_same(trained("parts", 1e-3), trained("whole", 1e-3), rtol=0, atol=0)


def test_a_table_is_not_trained(make_mole, text, tmp_path):
    with pytest.raises(ValueError, match="`model` must be in expert form"):
        train(make_mole(lookup_form="table"), text, tmp_path, TrainSettings(**SETTINGS))


_TWO = """
import sys, torch
from accelerate import PartialState
from mole import MoleConfig, MoleForCausalLM
from mole.training import TrainSettings, train
output, dedup, processes, stop, sharded, tied = sys.argv[1:]
torch.manual_seed(0)
config = MoleConfig(vocab_size=60, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                    num_attention_heads=2, initializer_range=0.2, dedup=dedup,
                    tie_word_embeddings=tied == "tied")
text = torch.randint(0, 60, (400,), generator=torch.Generator().manual_seed(0))
settings = TrainSettings(steps=3, batch=4, micro_batch=1, context=8, lr=1e-3)
model = train(MoleForCausalLM(config), text, output, settings, stop_after=int(stop) or None,
              sharded=sharded == "sharded", mixed_precision="no", progress=False)
assert PartialState().num_processes == int(processes)
whole, kept = (sum(p.numel() for p in ps) for ps in (
    model.parameters(), (getattr(p, "_local_tensor", p) for p in model.parameters())))
assert (kept <= 0.6 * whole) == (sharded == "sharded"), (kept, whole)
"""


def in_processes(
    tmp_path, output, processes, *, dedup="micro", stop=0, sharded="", tied="", gpus=False
):
    script = tmp_path / "two.py"
    script.write_text(_TWO)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    done = subprocess.run(
        [sys.executable, *(launch if processes > 1 else []), str(script), str(tmp_path / output),
         dedup, str(processes), str(stop), sharded, tied],
        capture_output=True, text=True, check=False, timeout=300,
        env=os.environ | {"ACCELERATE_USE_CPU": str(not gpus).lower()},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return tmp_path / output


@pytest.mark.slow
@pytest.mark.parametrize("dedup", ["micro", "step"])
def test_two_processes_train_as_one(tmp_path, dedup):
    one, two = (
        MoleForCausalLM.from_pretrained(in_processes(tmp_path, str(n), n, dedup=dedup))
        for n in (1, 2)
    )
    assert_same(two, one, rtol=1e-3, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("tied", ["tied", ""])
def test_two_processes_with_a_share_of_the_weights_each_train_as_one(tmp_path, tied):
    one = MoleForCausalLM.from_pretrained(in_processes(tmp_path, "one", 1, tied=tied))
    folder = in_processes(tmp_path, "two", 2, sharded="sharded", tied=tied)
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["MoleForCausalLM"]
    assert_same(MoleForCausalLM.from_pretrained(folder), one, rtol=1e-3, atol=2e-5)


@pytest.fixture(scope="module")
def trained_on_one_gpu(tmp_path_factory):
    folder = in_processes(tmp_path_factory.mktemp("one"), "one", 1, gpus=True)
    return MoleForCausalLM.from_pretrained(folder)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("sharded", ["sharded", ""])
def test_two_gpus_train_as_one(trained_on_one_gpu, tmp_path, sharded):
    folder = in_processes(tmp_path, "two", 2, sharded=sharded, gpus=True)
    two = MoleForCausalLM.from_pretrained(folder)
    assert_same(two, trained_on_one_gpu, rtol=1e-3, atol=2e-5)


@pytest.mark.slow
def test_a_checkpoint_fits_any_number_of_processes(tmp_path):
    one = MoleForCausalLM.from_pretrained(in_processes(tmp_path, "one", 1))
    for first, second in ((2, 1), (1, 2)):
        parts = {2: {"sharded": "sharded"}, 1: {}}
        folder = in_processes(tmp_path, f"from{first}", first, stop=2, **parts[first])
        assert (folder / "checkpoint").exists()
        in_processes(tmp_path, f"from{first}", second, **parts[second])
        assert_same(MoleForCausalLM.from_pretrained(folder), one, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("dedup", ["micro", "step"])
def test_one_process_has_nothing_to_share(make_mole, text, tmp_path, dedup):
    with pytest.raises(ValueError, match=rf"at least two processes .* got 1 and '{dedup}'"):
        run(make_mole, text, tmp_path, dedup, sharded=True)


def test_a_tied_model_resumes(make_mole, text, tmp_path):
    settings = TrainSettings(**SETTINGS)
    found = []
    for folder, stops in (("whole", [None]), ("parts", [1, 3, None])):
        for stop in stops:
            model = make_mole(tie_word_embeddings=True, dedup="micro")
            train(model, text, tmp_path / folder, settings, stop_after=stop, progress=False)
        found.append(model)
    assert_same(found[1], found[0], rtol=0, atol=0)


def test_hugging_face_trainer(make_mole, text, tmp_path):
    model = make_mole(dedup="micro").train()
    rows = [{"input_ids": row, "labels": row} for row in text[:320].view(40, 8)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=12, per_device_train_batch_size=8, learning_rate=1e-2,
        report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no", logging_steps=1,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert losses[-1] < 0.8 * losses[0]


class Letters:
    eos_token_id = 0

    def __call__(self, text, add_special_tokens):
        return type("Ids", (), {"input_ids": [ord(c) - 96 for c in text]})


def test_text_and_ids_are_read(tmp_path):
    (tmp_path / "a.txt").write_text("abc")
    (tmp_path / "b.jsonl").write_text('{"text": "de"}\n\n{"text": "f"}\n \n')
    numpy.save(tmp_path / "c.npy", numpy.array([9, 8]))
    paths = [tmp_path / name for name in ("a.txt", "b.jsonl", "c.npy")]
    assert load_tokens(paths, 30, Letters()).tolist() == [1, 2, 3, 0, 4, 5, 0, 6, 0, 9, 8]
    with pytest.raises(ValueError, match=r"ids must be between 0 and 5, .* got 8 to 9"):
        load_tokens(paths[2:], 6)
    with pytest.raises(ValueError, match="`tokenizer` must be given to read text"):
        load_tokens(paths, 30)
    for line in ("[]", '{"text": 5}', "{"):
        (tmp_path / "b.jsonl").write_text('{"text": "de"}\n' + line)
        with pytest.raises(ValueError, match=r"b\.jsonl, line 2: must be a JSON object"):
            load_tokens(paths[1:], 30, Letters())
    for wrong, message in (([1.5, 2], "must hold integers"), ([2**32 + 1], "got 4294967297")):
        numpy.save(tmp_path / "c.npy", numpy.array(wrong))
        with pytest.raises(ValueError, match=message):
            load_tokens(paths[2:], 30)
    with pytest.raises(ValueError, match="at least one file"):
        load_tokens([], 30)
