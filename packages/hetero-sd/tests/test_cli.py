import json
import os
import shutil
import subprocess
import sys

import pytest
from click.testing import CliRunner

from hetero_sd import __version__
from hetero_sd.cli import main


def call(*arguments):
    return CliRunner().invoke(main, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def folders(tokenizers, models, tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for kind in ("byte-level", "sentencepiece"):
        models[kind].save_pretrained(root / kind)
        tokenizers[kind].save_pretrained(root / kind)
    return root / "byte-level", root / "sentencepiece"


def test_help_names_the_commands():
    result = call("--help")
    assert result.exit_code == 0
    for command in ("env", "demo", "generate", "inspect-vocab", "bench", "verify"):
        assert command in result.output
        help_text = call(command, "--help").output
        assert help_text.startswith("Usage: ")


def test_env_prints_version_and_place():
    result = call("env", "--json")
    report = json.loads(result.output)
    assert report["version"] == __version__
    assert report["location"].endswith("hetero_sd")
    assert f"version: {__version__}" in call("env").output


def test_a_wrong_type_or_device_is_named(folders):
    pair = "--target", folders[0], "--drafter", folders[1], "--prompt", "a"
    for option, value in (("dtype", "int3"), ("device", "tpu")):
        result = call("generate", *pair, f"--{option}", value)
        assert result.exit_code == 2
        assert f"Error: `{option}` must be" in result.output


def test_generate_continues_a_text(folders):
    target, drafter = folders
    texts = [
        call(
            "generate",
            "--target",
            target,
            "--drafter",
            drafter,
            "--prompt",
            "the cat",
            "--method",
            method,
            "--max-new-tokens",
            8,
        )
        for method in ("tli", "slem")
    ]
    assert [result.exit_code for result in texts] == [0, 0]
    assert texts[0].stdout == texts[1].stdout
    assert "tokens a target pass" in texts[0].stderr


def test_inspect_vocab_prints_a_table(folders, tmp_path):
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("the cat sat\non a mat\n", encoding="utf-8")
    result = call(
        "inspect-vocab", "--target", folders[0], "--drafter", folders[1], "--corpus", corpus
    )
    assert result.exit_code == 0
    assert "| target kind | byte-level |" in result.output
    assert "| drafter kind | sentencepiece |" in result.output
    report = call("inspect-vocab", "--target", folders[0], "--drafter", folders[1], "--json")
    assert json.loads(report.output)["drafter_kind"] == "sentencepiece"


def test_generate_prints_json_and_streams(folders):
    pair = ["--target", folders[0], "--drafter", folders[1]]
    start = ["generate", *pair, "--prompt", "the cat", "--max-new-tokens", 6, "--lookahead", 2]
    made = json.loads(call(*start, "--method", "slem", "--json").stdout)
    assert len(made["tokens"][0]) == 6
    streamed = call(*start, "--method", "slem", "--stream")
    assert streamed.exit_code == 0
    assert streamed.stdout.rstrip("\n") == made["texts"][0].rstrip("\n")
    assert "6 tokens" in streamed.stderr
    read = CliRunner().invoke(main, [*map(str, start), "--prompt", "-"], input="the cat")
    assert read.stdout == streamed.stdout
    several = call(*start, "--temperature", 1, "--min-p", 0.1, "--sequences", 3, "--json")
    assert len(json.loads(several.stdout)["texts"]) == 3


def test_verify_and_its_verdicts(folders, monkeypatch):
    pair = ["--target", folders[0], "--drafter", folders[0], "--limit", 1, "--tokens", 6]
    options = ["--methods", "tli", "--lookaheads", "2", "--draws", 60]
    result = call("verify", *pair, *options, "--json")
    checks = json.loads(result.stdout)
    kinds = [check["kind"] for check in checks]
    assert kinds == ["greedy", "sampled", "control"]
    assert [check["passed"] for check in checks[:2]] == [True, True]
    from hetero_sd import decoder

    honest = decoder.Rounds._append
    monkeypatch.setattr(
        decoder.Rounds, "_append", lambda self, row, tokens: honest(self, row, [5] * len(tokens))
    )
    wrong = call("verify", *pair, *options[:4], "--draws", 0)
    assert wrong.exit_code == 1
    assert "Error: 1 of 1 checks failed" in wrong.stderr
    assert "FAILED tli 2, greedy: 0 of 1 prompts identical" in wrong.stdout


def test_bench_takes_sets_of_prompts_and_a_size(folders, tmp_path):
    chat = tmp_path / "chat.jsonl"
    rows = [{"turns": [f"the {w} sat"], "category": w} for w in ("cat", "dog", "mat", "dog")]
    chat.write_text("".join(json.dumps(row) + "\n" for row in rows))
    code = tmp_path / "code.txt"
    code.write_text("the hill and the dog ran over a mat\n")
    result = call(
        "bench",
        *("--target", folders[0], "--drafter", folders[1], "--output", tmp_path / "out"),
        *("--methods", "slem", "--lookaheads", 2, "--tokens", 5, "--repeats", 1, "--no-peers"),
        *("--prompts", chat, "--prompts", code, "--category", "dog", "--prompt-tokens", 3),
        *("--temperatures", "0,0.7:0.9", "--draws", 0, "--inflate", "2e5", "--no-progress"),
    )
    assert result.exit_code == 0
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {"bench.json", "bench.md", "bench.png", "speedup.png"}
    content = json.loads((tmp_path / "out" / "bench.json").read_text())
    cases = content["cases"]
    assert {case["provider"] for case in cases} == {"transformers", "plain", "slem 2"}
    settings = {(c["parameters"]["prompts"], c["parameters"]["decoding"]) for c in cases}
    decodings = "greedy", "temperature 0.7, top-p 0.9"
    assert settings == {(p, d) for p in ("chat dog", "code dog") for d in decodings}
    assert cases[0]["parameters"]["target"] == "byte-level, inflated to 0.00 B"
    tested = {c["median"] for c in cases if c["metric"] == "tested"}
    assert tested == {"2 of 2 texts identical", "1 of 1 texts identical"}
    assert "--inflate 200000 --prompts chat.jsonl --prompts code.txt" in content["command"]
    assert str(tmp_path) not in content["command"]
    assert "| slem 2" in result.stdout


def test_bench_needs_room_for_prompts(folders):
    pair = "--target", folders[0], "--drafter", folders[1]
    result = call("bench", *pair, "--tokens", 200)
    assert result.exit_code == 2
    assert result.stderr.endswith("--tokens 200 leaves no room for a prompt of 256 in all.\n")


def test_prompt_files(tmp_path):
    import gzip

    from hetero_sd.pairs import read_prompts

    path = tmp_path / "prompts.jsonl.gz"
    with gzip.open(path, "wt") as file:
        file.writelines(json.dumps({"turns": [f"question {i}", "more"]}) + "\n" for i in range(9))
    assert read_prompts(path, 3) == ["question 0", "question 3", "question 6"]
    text = tmp_path / "prompts.txt"
    text.write_text("one\n\ntwo\n")
    assert read_prompts(text) == ["one", "two"]
    mixed = tmp_path / "mixed.jsonl"
    rows = [{"question": "q", "category": "a"}, {"text": "t"}, {"prompt": "p", "category": "b"}]
    mixed.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_prompts(mixed) == ["q", "t", "p"]
    assert read_prompts(mixed, categories=["b"]) == ["t", "p"]
    mixed.write_text(json.dumps(rows[0]) + "\n")
    with pytest.raises(ValueError, match=r"mixed.jsonl holds no prompt of these categories"):
        read_prompts(mixed, categories=["b"])
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "a"}\n{"story": "b"}\n')
    with pytest.raises(
        ValueError, match=r"line 2 of bad.jsonl must be an object with `prompt`, `turns`"
    ):
        read_prompts(bad)
    bad.write_text("\n")
    with pytest.raises(ValueError, match=r"bad.jsonl holds no prompt"):
        read_prompts(bad)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "--tokens", "0"], "Invalid value for '--tokens': 0 is not in the range x>=1"),
        (["generate"], "Missing option '--prompt'"),
        (["generate", "--prompt", "a", "--target", "."], "give `--drafter` with `--target`"),
        (["generate", "--prompt", "a", "--lookahead", "-2"], "'-2' is neither 'auto' nor an"),
        (["generate", "--prompt", "a", "--stream", "--json"], "--stream writes one text"),
        (["generate", "--prompt", "a", "--sequences", "2"], "--sequences needs --temperature"),
        (["generate", "--prompt", ""], "--prompt must not be empty"),
        (["generate", "--prompt", "a", "--small-target", "--target", "."], "leave out --target"),
        (["serve", "--api-key", ""], "--api-key must not be empty"),
        (["bench", "--methods", "best"], "'best' is not one of auto, tli"),
        (["bench", "--temperatures", "0,1:2"], "'1:2' is no temperature, or temperature:top-p"),
        (["bench", "--small-target", "--inflate", "9"], "parameters, more than 9"),
        (["verify", "--lookaheads", "0"], "'0' is no list of numbers of 1 or more"),
        (["fly"], "No such command 'fly'"),
        (["inspect-vocab", "--target", "/none", "--drafter", "/none"], "does not exist"),
        (["inspect-vocab", "--target", "a/b/c", "--drafter", "x"], "no name on the hub like owner"),
        (["generate", "--prompt", "a", "--system", "b"], "--system is for --chat"),
    ],
)
def test_mistakes_are_one_line_and_status_2(arguments, message):
    result = call(*arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith("Error: ")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_folder_without_a_model_is_one_line(tmp_path):
    pair = "--target", tmp_path, "--drafter", tmp_path
    for command, what in ((["generate", "--prompt", "a"], "model"), (["inspect-vocab"], "token")):
        result = call(*command, *pair)
        assert result.exit_code == 2
        assert result.stderr.startswith(f"Error: no {what}")
        assert f"could be read from '{tmp_path}'" in result.stderr
        assert result.stderr.count("\n") == 1


def test_chats_take_a_system_message_where_the_target_has_a_template(folders):
    pair = "--target", folders[0], "--drafter", folders[1]
    start = "generate", *pair, "--prompt", "the cat", "--chat", "--max-new-tokens", 4
    refused = call(*start)
    assert refused.exit_code == 2
    assert "the target has no chat template" in refused.stderr
    demo = "generate", "--small-target", *start[5:], "--lookahead", 0
    texts = [call(*demo, *more).stdout for more in ((), ("--system", "You bark. Woof woof."))]
    assert texts[0] != texts[1]


def test_a_decoder_from_folders(folders):
    from hetero_sd import HeteroSpeculativeDecoder

    settings = {"dtype": "float32", "device": "cpu", "method": "slem", "lookahead": 2}
    decoder = HeteroSpeculativeDecoder.from_pretrained(*folders, **settings)
    pair = "--target", folders[0], "--drafter", folders[1]
    printed = call("generate", *pair, "--prompt", "the cat", "--max-new-tokens", 6).stdout
    assert decoder.generate("the cat", max_new_tokens=6).text == printed.rstrip("\n")
    with pytest.raises(ValueError, match=r"'/none' does not exist"):
        HeteroSpeculativeDecoder.from_pretrained("/none", folders[1])


def test_names_on_the_hub_are_read_from_its_cache(folders, tmp_path):
    """As its client lays it out; nothing is asked of the network."""
    for name, folder in zip(("big", "small"), folders, strict=True):
        home = tmp_path / f"models--owner--{name}"
        (home / "refs").mkdir(parents=True)
        (home / "refs" / "main").write_text("1" * 40)
        shutil.copytree(folder, home / "snapshots" / ("1" * 40))
    command = [sys.executable, "-m", "hetero_sd", "generate", "--prompt", "the cat"]
    command += ["--target", "owner/big", "--drafter", "owner/small", "--max-new-tokens", "5"]
    cached = {"HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(command, env=os.environ | cached, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    local = "--target", folders[0], "--drafter", folders[1], "--max-new-tokens", 5
    assert run.stdout == call("generate", "--prompt", "the cat", *local).stdout


def test_import_is_light():
    code = (
        "import sys, hetero_sd; "
        "heavy = {'torch', 'triton', 'transformers', 'tokenizers', 'matplotlib'} & set(sys.modules)"
        "; assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=dict(os.environ))


def test_public_names_exist():
    import hetero_sd

    for name in hetero_sd.__all__:
        assert getattr(hetero_sd, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = hetero_sd.nothing
