import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from conceptattention import ConceptAttention, ConceptMaps, cli


@pytest.fixture
def small(demo_pipe, monkeypatch):
    """Commands that use a small random model in place of the embedded one."""
    monkeypatch.setattr(cli, "load", lambda model, device, **_: demo_pipe)


def run(*arguments):
    return CliRunner().invoke(cli.main, list(arguments))


def test_generate_writes_picture_and_maps(small, tmp_path):
    result = run(
        "generate", "--prompt", "a fish on water", "--concepts", "fish, water", "--steps", "2",
        "--output", str(tmp_path),
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    maps = ConceptMaps.load(tmp_path / "maps.npz")
    assert maps.concepts == ("fish", "water")
    picture = Image.open(tmp_path / "image.png")
    assert Image.open(tmp_path / "maps.png").size[0] == 3 * 192
    assert picture.size == (64, 64)
    overlay = np.asarray(Image.open(tmp_path / "overlays" / "fish.png"))
    assert (overlay == np.asarray(maps["fish"].overlay(picture))).all()


def test_guidance_changes_the_picture(small, tmp_path):
    found = []
    for guidance in ((), ("--guidance", "1"), ("--guidance", "9")):
        result = run(
            "generate", "--prompt", "a fish on water", "--concepts", "fish, water", "--steps", "2",
            "--output", str(tmp_path), *guidance,
        )  # fmt: skip
        assert result.exit_code == 0, result.output
        found.append(np.asarray(Image.open(tmp_path / "image.png")))
    assert (found[1] != found[2]).any()
    three = run(
        "generate", "--prompt", "a fish on water", "--concepts", "fish, water", "--steps", "2",
        "--output", str(tmp_path), "--guidance", "3",
    )  # fmt: skip
    assert three.exit_code == 0
    assert (np.asarray(Image.open(tmp_path / "image.png")) == found[0]).all()


def test_guidance_is_given_as_the_model_was_trained(demo_pipe):
    from conceptattention.cli_options import guided
    from conceptattention.testing import tiny_cogvideox, tiny_flux

    assert guided(tiny_flux(guidance=True), 3.5) == {"guidance_scale": 3.5}
    assert guided(tiny_cogvideox(), 6.0) == {"guidance_scale": 6.0}
    assert guided(demo_pipe, 3.0) == {"true_cfg_scale": 3.0, "negative_prompt": ""}
    assert guided(demo_pipe, 1.0) == guided(demo_pipe, None) == {}


def test_weights_are_offloaded_from_a_gpu_alone():
    result = run(
        "generate", "--prompt", "a", "--concepts", "a, b", "--offload", "model", "--device", "cpu"
    )
    assert result.exit_code == 2
    assert "`--offload` needs a CUDA device; `--device` is 'cpu'" in result.output


def test_segment_reports_shares(small, tmp_path):
    path = tmp_path / "in.png"
    Image.fromarray(np.full((80, 90, 3), 99, np.uint8)).save(path)
    result = run(
        "segment", "--image", str(path), "--concepts", "fish,water", "--output", str(tmp_path)
    )
    assert result.exit_code == 0, result.output
    shares = [int(line.split()[-4][:-1]) for line in result.output.splitlines()[:2]]
    assert abs(sum(shares) - 100) <= 1
    assert ConceptMaps.load(tmp_path / "maps.npz").values.shape == (1, 2, 32, 32)


def test_large_pictures_are_scaled_down(small, tmp_path):
    path = tmp_path / "in.png"
    Image.fromarray(np.full((120, 240, 3), 99, np.uint8)).save(path)
    given = ("--image", str(path), "--concepts", "fish,water", "--output", str(tmp_path))
    result = run("segment", "--model", "a/b", *given, "--size", "80")
    assert result.exit_code == 0, result.output
    assert ConceptMaps.load(tmp_path / "maps.npz").values.shape == (1, 2, 20, 40)
    assert Image.open(tmp_path / "overlays" / "fish.png").size == (80, 40)


@pytest.mark.parametrize(
    ("given", "order"),
    [((), "mean_softmax"), (("--reduce", "softmax_mean"), "softmax_mean")],
)
def test_the_small_model_is_read_as_suits_it(small, tmp_path, given, order):
    path = tmp_path / "in.png"
    Image.fromarray(np.full((64, 64, 3), 99, np.uint8)).save(path)
    common = ("--concepts", "fish,water", "--output", str(tmp_path), *given)
    drawn = ("generate", "--prompt", "a fish", "--steps", "1")
    for command in (drawn, ("segment", "--image", str(path))):
        result = run(*command, *common)
        assert result.exit_code == 0, result.output
        assert ConceptMaps.load(tmp_path / "maps.npz").reduce == order


def test_user_errors_are_one_line(small, tmp_path):
    result = run("generate", "--prompt", "a", "--concepts", " , ", "--output", str(tmp_path))
    assert result.exit_code == 2
    assert "`concepts` must hold at least one word" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--layers", "last:x"), "`layers` must be 'default', 'all', 'last:N', indices or a slice"),
        (("--layers", "0,99"), "`layers` must be between -2 and 1; got 99"),
    ],
)
def test_layers_may_be_numbers(small, tmp_path, arguments, message):
    given = ("generate", "--prompt", "a fish", "--concepts", "fish, water", "--steps", "1")
    assert run(*given, "--layers", "0, 1", "--output", str(tmp_path)).exit_code == 0
    assert ConceptMaps.load(tmp_path / "maps.npz").coverage == {0: 1.0, 1: 1.0}
    result = run(*given, *arguments, "--output", str(tmp_path))
    assert result.exit_code == 2
    assert message in result.output


@pytest.mark.parametrize("name", ["no-such-folder", "./no/folder", "/no-such-folder", "a/b/c"])
def test_models_that_are_no_folder_are_named(name):
    result = run("generate", "--model", name, "--prompt", "a", "--concepts", "a, b")
    assert result.exit_code == 2
    assert f"`--model` must be a folder, a hub name like owner/name, or demo; got '{name}'" in (
        result.output
    )


def test_a_full_gpu_is_reported_in_one_line(small, demo_pipe, tmp_path, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.")

    monkeypatch.setattr(type(demo_pipe), "__call__", full)
    result = run("generate", "--prompt", "a", "--concepts", "a, b", "--output", str(tmp_path))
    assert result.exit_code == 2
    assert "Error: out of GPU memory: try `--offload model`" in result.output


def test_devices_that_are_missing_are_named():
    result = run("generate", "--device", "moon", "--prompt", "a", "--concepts", "a, b")
    assert result.exit_code == 2
    assert "`--device` must be 'auto' or a torch device" in result.output


def test_data_sets_that_are_not_known_are_named():
    result = run("eval", "--dataset", "moon")
    assert result.exit_code == 2
    assert "`--dataset` must be one of" in result.output


def test_one_concept_alone_is_warned_of(demo_pipe, caplog):
    ConceptAttention(demo_pipe, ["fish"])
    assert "the map of fish alone is 1 everywhere" in caplog.text


def test_defaults_load_the_embedded_model():
    options = {option.name: option.default for option in cli.generate.params}
    pipe = cli.load(options["model"], options["device"])
    assert type(pipe).__name__ == "DemoPipeline"


def test_segment_names_a_file_that_is_no_picture(small, tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    result = run("segment", "--image", str(tmp_path / "text.png"), "--concepts", "fish, water")
    assert result.exit_code == 2
    assert "`--image` must be a picture" in result.output


def test_models_lists_every_family():
    result = run("models")
    assert result.exit_code == 0
    for name in ("Flux.1", "Flux.2", "Stable Diffusion 3", "CogVideoX", "Qwen-Image", "Chroma"):
        assert name in result.output


def test_video_writes_every_frame(tmp_path):
    given = (
        "video", "--model", "tiny-video", "--prompt", "a cat on grass", "--concepts", "cat, grass",
        "--steps", "1", "--frames", "9", "--width", "48", "--height", "32", "--device", "cpu",
        "--output", str(tmp_path),
    )  # fmt: skip
    result = run(*given)
    assert result.exit_code == 0, result.output
    maps = ConceptMaps.load(tmp_path / "maps.npz")
    assert maps.values.shape == (1, 2, 3, 2, 3)
    for name in ("video", "maps", "cat", "grass"):
        with Image.open(tmp_path / f"{name}.gif") as film:
            assert film.n_frames == 9
    assert len(list((tmp_path / "cat").glob("*.png"))) == 9
    assert Image.open(tmp_path / "grass" / "0008.png").size == (48, 32)
    frame = np.asarray(Image.open(tmp_path / "cat" / "0008.png"))
    assert (frame != np.asarray(Image.open(tmp_path / "grass" / "0008.png"))).any()


def test_video_of_the_small_model(tmp_path):
    result = run(
        "video", "--prompt", "a fish and a bee", "--concepts", "fish, bee", "--steps", "1",
        "--no-pictures", "--device", "cpu", "--output", str(tmp_path),
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert ConceptMaps.load(tmp_path / "maps.npz").values.shape == (1, 2, 6, 12, 12)
    with Image.open(tmp_path / "fish.gif") as film:
        assert film.n_frames == 6


def test_video_refuses_picture_models(small, tmp_path):
    result = run(
        "video", "--prompt", "a fish", "--concepts", "fish", "--steps", "1",
        "--output", str(tmp_path),
    )  # fmt: skip
    assert result.exit_code == 2
    assert "makes pictures, not videos" in result.output


def test_generate_writes_videos_of_words_with_slashes(tmp_path):
    result = run(
        "generate", "--model", "tiny-video", "--prompt", "a cat", "--concepts", "cat/dog, sky",
        "--steps", "1", "--device", "cpu", "--output", str(tmp_path),
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert {path.name for path in tmp_path.iterdir()} == {"cat-dog.gif", "sky.gif", "maps.npz"}
