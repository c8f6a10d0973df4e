"""The second data set: cut-outs on textures, in a latent space."""

import io
import json
import zipfile

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

from conceptattention.demo import natural
from conceptattention.demo.evaluate import encode_pictures, segment_scenes, summarise
from conceptattention.demo.taef2 import TinyAutoencoder, load_taef2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Five cut-outs of four names, two textures, and an autoencoder with random weights."""
    from PIL import Image

    root = tmp_path_factory.mktemp("natural")

    def write(name, mode, rows):
        with zipfile.ZipFile(root / name, "w") as archive:
            lines = []
            for index, (word, size, colour) in enumerate(rows):
                data = io.BytesIO()
                Image.new(mode, size, colour).save(data, "PNG")
                archive.writestr(f"{index}.png", data.getvalue())
                lines.append(json.dumps({"file": f"{index}.png", "name": word}))
            archive.writestr("metadata.jsonl", "\n".join(lines))

    cutouts = [
        ("red apple", (20, 40), (200, 0, 0, 255)), ("Frog", (40, 40), (0, 200, 0, 255)),
        ("Frog", (30, 40), (0, 160, 0, 255)), ("box", (40, 20), (90, 60, 0, 255)),
        ("orb", (16, 16), (0, 0, 250, 255)),
    ]  # fmt: skip
    write("cutouts.zip", "RGBA", cutouts)
    textures = [("tiles of black and white", (50, 30), (90,) * 3), ("sky", (600, 300), (150,) * 3)]
    write("textures.zip", "RGB", textures)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = TinyAutoencoder()
    save_file(
        {k: v.half() for k, v in model.encoder.state_dict().items()}, root / "encoder.safetensors"
    )
    return root


@pytest.fixture(scope="module")
def bank(folder):
    return natural.load_bank(folder)


@pytest.fixture(scope="module")
def pipe(bank, folder):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return natural.build_natural_pipeline(bank.vocabulary, folder)


def test_bank(bank):
    assert bank.words == ("tiles-of-black-and-white", "sky", "box", "frog", "orb", "red-apple")
    assert bank.held_out.tolist() == [False, False, True, False, False]
    assert bank.textures.shape == (2, 3, 256, 256)
    # The longer side fills the square, the picture is in the middle.
    apple = bank.cutouts[0, 3]
    assert apple[:, 63].min() == 255
    assert apple[:, :31].max() == 0


def test_scenes_show_what_their_captions_say(bank, pipe):
    scenes = natural.sample_natural(bank, 24, torch.Generator().manual_seed(0), plain_captions=True)
    tokens = pipe.tokenizer_2(
        scenes.captions(), padding="max_length", max_length=12, return_tensors="pt"
    ).input_ids
    assert torch.equal(tokens, scenes.tokens)
    for index, caption in enumerate(scenes.captions()):
        assert set(scenes.words(index)) == {*caption.split()} - {"on"}
        for word in set(scenes.words(index)) - {"sky", "tiles-of-black-and-white"}:
            inside = scenes.labels[index] == scenes.names.index(word)
            colour = scenes.images[index][:, inside].mean(1)
            main = {"red-apple": 0, "box": 0, "frog": 1, "orb": 2}[word]
            assert colour.argmax() == main


def test_held_out_cutouts_are_not_drawn_in_training(bank):
    scenes = natural.sample_natural(bank, 8, torch.Generator().manual_seed(0), held_out=True)
    assert {word for i in range(8) for word in scenes.words(i)[:-1]} == {"frog"}
    green = torch.stack([image[1].max() for image in scenes.images])
    lit = natural.sample_natural(bank, 64, torch.Generator().manual_seed(1))
    frogs = [(lit.labels[i] == lit.names.index("frog")) for i in range(64)]
    shown = [float(lit.images[i][1][f].median()) for i, f in enumerate(frogs) if f.any()]
    assert green.max() < 160 / 255 * 1.16
    assert min(shown) > 200 / 255 * 0.84  # the other frog, at its darkest


def test_autoencoder(folder, bank):
    model = load_taef2(folder)
    picture = torch.rand(1, 3, 32, 48)
    latents = model.encode(2 * picture - 1).latent_dist.mode()
    assert latents.shape == (1, 32, 4, 6)
    assert model.decode(latents)[0].shape == picture.shape
    assert sum(p.numel() for p in model.encoder.parameters()) == pytest.approx(1.34e6, rel=0.01)
    with pytest.raises(ValueError, match="must hold TAEF2's encoder"):
        load_taef2(folder / "missing")
    with pytest.raises(ValueError, match="must hold cutouts"):
        natural.load_bank(folder / "missing")


def test_maps_and_metrics(bank, pipe):
    scenes = natural.held_out_natural(bank, 3, held_out=False)
    assert scenes.labels.shape == (3, 64, 64)
    assert encode_pictures(pipe, scenes.images[:1]).shape == (1, 256, 128)
    found = segment_scenes(pipe, scenes, t=0.5)
    row = summarise(found, scenes, space="output")
    assert found[0][2]["output"].values.shape[-2:] == (16, 16)
    assert row["miou_paper"] == pytest.approx(row["accuracy"] / (2 - row["accuracy"]), abs=1e-4)
    assert row["miou_interval"][0] <= row["miou"] <= row["miou_interval"][1]
    assert 0 < row["ap"] < 1


@pytest.mark.slow
def test_training_script(folder, tmp_path):
    from conceptattention.demo.train_natural import main

    result = CliRunner().invoke(
        main,
        ["--data", str(folder), "--taef2", str(folder), "--output", str(tmp_path), "--steps", "2",
         "--batch", "2", "--evaluation-scenes", "2", "--device", "cpu", "--no-compile"],
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "natural.json").read_text())
    assert {row["data"] for row in report["evaluation"]["segmentation"]} == {
        "compositions", "pictures"
    }  # fmt: skip
    assert (tmp_path / "maps.png").exists()
    assert natural.load_natural_pipeline(tmp_path, folder).tokenizer_2("red-apple").input_ids
