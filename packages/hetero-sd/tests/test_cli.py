import json
import os
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
    for command in ("env", "demo", "generate", "inspect-vocab"):
        assert command in result.output


def test_env_prints_version_and_place():
    result = call("env", "--json")
    report = json.loads(result.output)
    assert report["version"] == __version__
    assert report["location"].endswith("hetero_sd")
    assert f"version: {__version__}" in call("env").output


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "--tokens", "0"], "Invalid value for '--tokens': 0 is not in the range x>=1"),
        (["generate", "--prompt", "a"], "Missing option '--target'"),
        (["fly"], "No such command 'fly'"),
        (["inspect-vocab", "--target", "/none", "--drafter", "/none"], "does not exist"),
    ],
)
def test_mistakes_are_one_line_and_status_2(arguments, message):
    result = call(*arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith("Error: ")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_folder_without_a_model_is_one_line(tmp_path):
    result = call("generate", "--target", tmp_path, "--drafter", tmp_path, "--prompt", "a")
    assert result.exit_code == 2
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1


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
