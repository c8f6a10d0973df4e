"""The command line: what it prints, and one clear line for every mistake."""

import json
import math
import re
import shutil

import pytest
import torch
from click.testing import CliRunner
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from mole import DenseForCausalLM, MoleForCausalLM, __version__, to_upstream
from mole.cli import main


@pytest.fixture
def run():
    def invoke(*arguments):
        return CliRunner().invoke(main, [str(a) for a in arguments])

    return invoke


@pytest.fixture
def saved(make_mole, tmp_path):
    """A model and a tokenizer of single letters in one folder."""
    letters = {chr(65 + i): i for i in range(58)} | {"<end>": 58, "<?>": 59}
    folder = tmp_path / "experts"
    make_mole().save_pretrained(folder)
    words = Tokenizer(models.BPE(letters, [], unk_token="<?>"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>").save_pretrained(folder)
    return folder


def test_help_names_the_commands(run):
    done = run("--help")
    assert done.exit_code == 0
    for command in (
        "env",
        "demo",
        "convert",
        "generate",
        "verify",
        "train",
        "upcycle",
        "eval",
        "bench",
    ):
        assert command in done.output
        assert run(command, "--help").exit_code == 0


def test_version(run):
    assert __version__ in run("--version").output


def test_env_says_what_this_is(run):
    report = json.loads(run("env", "--json").stdout)
    assert report["version"] == __version__
    assert "not the PyPI project" in report["origin"]
    assert report["location"].endswith("mole")
    assert "torch" in report["packages"]
    assert f"version: {__version__}" in run("env").output.splitlines()


def test_a_checkpoint_of_the_authors_is_a_model(run, saved, make_mole, tmp_path):
    theirs = to_upstream(make_mole(), tmp_path / "theirs")
    done = run("convert", theirs, tmp_path / "table", "--format", "fp32", "--no-progress")
    assert done.exit_code == 0, done.output
    assert run("verify", tmp_path / "table", "--model", saved).exit_code == 0
    shutil.copyfile(saved / "tokenizer.json", theirs / "tokenizer.json")
    (tmp_path / "text.txt").write_text("HELLOWORLD" * 9)
    losses = [
        json.loads(run("eval", folder, tmp_path / "text.txt").stdout)["nats"]
        for folder in (saved, theirs)
    ]
    assert losses[0] == losses[1]


def test_experts_alone_are_trained(run, saved, make_config, tmp_path):
    (tmp_path / "text.txt").write_text("HELLOWORLD" * 50)
    command = ("train", tmp_path / "text.txt", "--steps", 4, "--batch", 2, "--micro-batch", 1,
               "--context", 16, "--no-progress", "--output", tmp_path / "out")  # fmt: skip
    for more in (("--stop-after", 2), ()):  # and go on
        done = run(*command, "--model", saved, "--experts-only", *more)
        assert done.exit_code == 0, done.output
    before, after = (
        MoleForCausalLM.from_pretrained(folder).state_dict() for folder in (saved, tmp_path / "out")
    )
    same = {name for name, value in before.items() if torch.equal(value, after[name])}
    assert same == {name for name in before if ".lookup." not in name}
    DenseForCausalLM(make_config("dense")).save_pretrained(tmp_path / "dense")
    done = run(*command, "--model", tmp_path / "dense", "--tokenizer", saved, "--experts-only")
    assert done.exit_code == 2
    assert "`--experts-only` needs a model with lookup experts; upcycle it first" in done.stderr


def test_convert_verify_generate(run, saved, tmp_path):
    table = tmp_path / "table"
    done = run("convert", saved, table, "--format", "int8", "--chunk", 7)
    assert done.exit_code == 0, done.output
    assert "60 ids" in done.output
    assert "60/60" in done.stderr
    for target in (table, table / "lut"):
        done = run("verify", target, "--model", saved)
        assert done.exit_code == 0, done.output
        assert "is intact: 9 checksums, format int8" in done.output
    done = run("verify", table, "--model", table)
    assert done.exit_code == 2
    assert "`model` must be in expert form; a table's origin is not in a table" in done.stderr
    plain = [
        run("generate", "ABBA", "--model", m, "--temperature", 0, "--new-tokens", 5).output
        for m in (saved, table)
    ]
    assert plain[0] == plain[1]
    for store in ("mmap", "disk", "pinned", "device"):
        done = run("generate", "ABBA", "--model", table, "--temperature", 0, "--new-tokens", 5,
                   "--store", store, "--cache", 4, "--device", "cpu")  # fmt: skip
        assert done.output == plain[0], done.output
    assert plain[0].startswith("A B B A")  # this tokenizer has no decoder
    sampled = [
        run("generate", "ABBA", "--model", table, "--new-tokens", 20, "--seed", seed).output
        for seed in (1, 1, 2)
    ]
    assert sampled[0] == sampled[1] != sampled[2]


def test_quiet_conversion_shows_no_bar(run, saved, tmp_path):
    done = run("convert", saved, tmp_path / "table", "--no-progress")
    assert "60/60" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "No such command 'nothing'"),
        (["convert", "{tmp}/no", "{tmp}/t"], "it has no config.json"),
        (["convert", "{saved}", "{tmp}/t", "--format", "nf2"], "'nf2' is not one of 'fp32'"),
        (["convert", "{saved}", "{tmp}/t", "--chunk", "0"], "0 is not in the range x>=1"),
        (["convert", "{saved}", "{saved}"], "that would be lost"),
        (["verify", "{tmp}/no"], "lut.json"),
        (["generate", ""], "`PROMPT` must hold at least one character"),
        (["generate", "A", "--model", "{saved}", "--new-tokens", "99"], "must fit into 64 tokens"),
        (["generate", "A", "--model", "{saved}", "--store", "disk"], "need a model in table form"),
        (["generate", "A", "--model", "{saved}", "--chat"], "`--chat` needs a tokenizer with a"),
        (["generate", "A", "--model", "{dense}"], "must hold a lookup model (type 'mole')"),
        (["convert", "{dense}", "{tmp}/t"], "its type is 'mole_dense'"),
        (["eval", "{dense}", "{saved}/config.json"], "must hold a tokenizer; it has no"),
        (
            ["train", "{saved}/config.json", "--config", "{tmp}/no", "--output", "{tmp}/t"],
            "does not exist",
        ),
        (["generate", "A", "--model", "{saved}", "--store", "tape"], "'tape' is not one of 'mmap'"),
        (["train", "{saved}/config.json", "--output", "{tmp}/t"], "Exactly one of `--model` and"),
        (["upcycle", "{saved}", "{tmp}/t"], "`base` must be a DenseForCausalLM or a Llama-type"),
        (["upcycle", "{saved}", "{tmp}/t", "--layers", "a"], "`--layers` must be numbers"),
        (
            ["upcycle", "{dense}", "{tmp}/t", "--layers", "3"],
            "layer numbers between 0 and 2; got [3]",
        ),
        (["upcycle", "{dense}", "{tmp}/t", "--experts", "0"], "must be at least 1; got 0"),
        (["upcycle", "{dense}", "{dense}"], "`OUTPUT` must be a new folder; "),
        (["upcycle", "{dense}/config.json", "{tmp}/t"], "folder of a model or a .gguf file; got"),
        (["upcycle", "{dense}", "{tmp}/t", "--gguf", "no.gguf"], "or a .gguf file; got"),
        (["convert", "{unfinished}", "{tmp}/t"], "no config.json: its training is not finished"),
        (["convert", "{saved}", "{tmp}/t", "--device", "tpu"], "`--device` must be 'auto' or"),
        (
            ["eval", "{saved}", "{saved}/config.json", "--context", "65"],
            "`--context` must be at most 64, the model's; got 65",
        ),
        (["eval", "{saved}", "{saved}"], "File '{saved}' is a directory"),
        (
            ["train", "{saved}/config.json", "--model", "{saved}", "--output", "{odd}"],
            "Directory '{odd}' is a file",
        ),
        (
            [
                "train",
                "{dense}/config.json",
                "--model",
                "{dense}",
                "--output",
                "{tmp}/t",
                "--dedup",
                "step",
            ],
            "`--dedup` needs a model with lookup experts; got one of type 'mole_dense'",
        ),
        (
            ["train", "{dense}/config.json", "--config", "{odd}", "--output", "{tmp}/t"],
            "`hidden_size` must be a multiple of `num_attention_heads` 4; got 30",
        ),
        (["bench", "quant", "--shape", "tiny"], "`--shape` does not go with 'quant'"),
        (["demo", "--new-tokens", "0"], "0 is not in the range"),
    ],
)
def test_mistakes_end_in_one_line_and_status_2(
    run, saved, make_config, tmp_path, arguments, message
):
    dense, odd = tmp_path / "dense", tmp_path / "odd.json"
    (tmp_path / "unfinished" / "checkpoint").mkdir(parents=True)
    if any("{dense}" in a or "{odd}" in a for a in arguments):
        DenseForCausalLM(make_config("dense")).save_pretrained(dense)
        odd.write_text(json.dumps(json.loads((dense / "config.json").read_text()) | {
            "hidden_size": 30}))  # fmt: skip
    names = {"saved": saved, "tmp": tmp_path, "dense": dense, "odd": odd,
             "unfinished": tmp_path / "unfinished"}  # fmt: skip
    filled = [a.format(**names) for a in arguments]
    done = run(*filled)
    assert done.exit_code == 2, done.output
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("Error: ")
    assert message.format(**names) in line


def test_upcycle_train_convert_eval(run, saved, make_config, tmp_path):
    base, text = tmp_path / "base", tmp_path / "text.txt"
    shutil.copytree(saved, base)
    DenseForCausalLM(make_config("dense")).save_pretrained(base)
    text.write_text("ABRACADABRA" * 40)
    (tmp_path / "cloze.jsonl").write_text(json.dumps({"text": "ABRA CAD ABRA"}) + "\n")
    done = run("upcycle", base, tmp_path / "more", "--experts", 2, "--layers", "0,2")
    assert done.exit_code == 0, done.output
    done = run(
        "train", text, "--model", tmp_path / "more", "--output", tmp_path / "trained", "--dedup",
        "step", "--steps", 20, "--batch", 4, "--micro-batch", 2, "--context", 16, "--lr", 1e-2,
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert re.search(r"\d tok/s, loss \d\.\d{3}, lr \d\.\de-\d\d", done.stderr)
    run("convert", tmp_path / "trained", tmp_path / "table", "--format", "fp32")
    found = {}
    for name in ("more", "trained", "table"):
        done = run("eval", tmp_path / name, text, "--context", 32)
        assert done.exit_code == 0, done.output
        found[name] = json.loads(done.stdout)
    assert found["trained"]["nats"] < found["more"]["nats"] - 1
    assert found["table"]["nats"] == pytest.approx(found["trained"]["nats"], abs=1e-5)
    done = run("eval", tmp_path / "table", tmp_path / "cloze.jsonl", "--task", "cloze")
    assert json.loads(done.stdout)["passages"] == 1, done.output


@pytest.mark.parametrize("end", [None, [1, 2]])
def test_a_model_with_no_end_of_text_or_several(run, make_mole, tmp_path, end):
    folder = tmp_path / "model"
    make_mole(eos_token_id=end).save_pretrained(folder)
    words = Tokenizer(models.BPE({chr(65 + i): i for i in range(60)}, []))
    words = PreTrainedTokenizerFast(tokenizer_object=words)
    words.chat_template = "{{ messages }}"
    words.save_pretrained(folder)
    done = run("convert", folder, tmp_path / "table", "--format", "fp32", "--no-progress")
    assert done.exit_code == 0, done.output
    table = tmp_path / "table"
    assert PreTrainedTokenizerFast.from_pretrained(table).chat_template == words.chat_template
    (tmp_path / "text.txt").write_text("ABRACADABRA" * 4)
    done = run("eval", table, tmp_path / "text.txt", "--context", 11)
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["tokens"] == 40
    assert found["bits_per_byte"] == pytest.approx(found["nats"] / math.log(2))
    done = run("generate", "ABBA", "--model", table, "--temperature", 0, "--new-tokens", 5)
    assert done.exit_code == 0, done.output


def test_a_chat_shows_the_answer_alone(run, saved):
    words = PreTrainedTokenizerFast.from_pretrained(saved)
    words.chat_template = "{% for m in messages %}Q{{ m['content'] }}{% endfor %}A"
    words.save_pretrained(saved)
    given = ("--model", saved, "--temperature", 0, "--new-tokens", 4)
    plain, chat = run("generate", "QBBA", *given), run("generate", "BB", "--chat", *given)
    assert plain.exit_code == chat.exit_code == 0, chat.output
    assert plain.stdout == "Q B B A " + chat.stdout  # the letters are tokens of their own


def test_a_full_gpu_is_reported_in_one_line(run, saved, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.")

    monkeypatch.setattr(MoleForCausalLM, "generate", full)
    done = run("generate", "A", "--model", saved, "--new-tokens", 5)
    assert done.exit_code == 2
    assert done.stderr == "Error: out of GPU memory: take smaller batches or `--device cpu`.\n"
    monkeypatch.setattr(MoleForCausalLM, "generate", lambda *_, **__: 1 / 0)
    done = run("generate", "A", "--model", saved, "--new-tokens", 5)
    assert isinstance(done.exception, ZeroDivisionError)


def test_damage_is_reported_in_one_line(run, saved, tmp_path):
    table = tmp_path / "table"
    run("convert", saved, table)
    path = table / "lut" / "lut.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    done = run("verify", table)
    assert done.exit_code == 2
    assert "bytes; got" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_loaded_model_is_float32_or_what_is_asked_for(run, saved):
    from mole.folders import load_lookup

    model = MoleForCausalLM.from_pretrained(saved).to(torch.bfloat16)
    model.save_pretrained(saved)
    assert load_lookup(saved).dtype == torch.float32
    assert load_lookup(saved, "bfloat16").dtype == torch.bfloat16
    done = run("generate", "ABBA", "--model", saved, "--new-tokens", 2, "--dtype", "bfloat16")
    assert done.exit_code == 0, done.output
    run("convert", saved, saved.parent / "table")
    assert load_lookup(saved.parent / "table", "auto").dtype == torch.bfloat16
