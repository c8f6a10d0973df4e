import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from conceptattention import segment
from conceptattention.cli import main
from conceptattention.demo import evaluate, scenes
from conceptattention.demo.model import (
    ASSETS,
    READING,
    build_tokenizer,
    encode_tokens,
    load_pipeline,
    save_weights,
)
from conceptattention.demo.run import content_words
from conceptattention.demo.scenes import LABELS, VOCABULARY, allowed_pairs, sample_scenes


def sample(count=64, seed=0, **kwargs):
    return sample_scenes(count, torch.Generator().manual_seed(seed), **kwargs)


def test_padding_tells_nothing(demo_pipe):
    """A padded place that knew the words could stand in for them; concepts have none."""
    tokens = torch.zeros(2, 6, dtype=torch.long)
    tokens[0, :2] = torch.tensor([VOCABULARY.index("apple"), VOCABULARY.index("grass")])
    states, pooled = encode_tokens(demo_pipe.text_encoder_2, tokens)
    assert states[0, :2].abs().min(dim=1).values.gt(0).any()
    assert not states[0, 2:].any()
    assert not states[1].any()
    assert not pooled[1].any()
    short, _ = encode_tokens(demo_pipe.text_encoder_2, tokens[:1, :2])
    torch.testing.assert_close(states[:1, :2], short)


def test_scenes_follow_from_the_seed():
    first, again, other = sample(8), sample(8), sample(8, seed=1)
    assert torch.equal(first.images, again.images)
    assert torch.equal(first.tokens, again.tokens)
    assert not torch.equal(first.images, other.images)
    assert first.images.min() >= 0
    assert first.images.max() <= 1


def test_captions_and_tokenizer_agree():
    batch = sample(200)
    tokens = build_tokenizer()(
        batch.captions(), padding="max_length", max_length=scenes.MAX_TOKENS, return_tensors="pt"
    ).input_ids
    assert torch.equal(tokens, batch.tokens)
    plain = build_tokenizer()("A red box, an apple and the Zebra").input_ids
    assert [VOCABULARY[i] for i in plain] == ["red", "box", "apple", "<unk>"]


def test_plain_captions_name_what_the_mask_shows():
    batch = sample(200, plain_captions=True, held_out_pairs=True)
    for index, caption in enumerate(batch.captions()):
        named = set(content_words(caption))
        assert set(batch.words(index)) <= named
        # An object may hide nothing but a background sliver: all objects must be visible.
        objects = {LABELS[8 + i] for i in batch.items[index].tolist() if i >= 0}
        assert objects <= set(batch.words(index))


def test_training_never_shows_held_out_pairs():
    pairs, colours = allowed_pairs()
    assert 0.05 < 1 - pairs.float().mean() < 0.15
    assert 0.05 < 1 - colours.float().mean() < 0.15

    def held_out(batch):
        count = 0
        for items, grounds, paints in zip(
            batch.items.tolist(), batch.backgrounds.tolist(), batch.colours.tolist(), strict=True
        ):
            for item, paint in zip(items, paints, strict=True):
                if item >= 0:
                    count += sum(not pairs[item, ground] for ground in grounds)
                if paint >= 0:
                    count += not colours[item - 12, paint]
        return count

    assert held_out(sample(300)) == 0
    assert held_out(sample(300, held_out_pairs=True)) > 20


def test_objects_do_not_overlap():
    present = torch.arange(4).expand(200, 4) < 3
    centres, radii = scenes.place_objects(present, torch.Generator().manual_seed(0))
    distance = (centres[:, :, None] - centres[:, None]).norm(dim=-1) + 9 * torch.eye(4)
    apart = distance >= radii[:, :, None] + radii[:, None] - 1e-5
    assert apart[:, :3, :3].all()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [({"count": 0}, "`count` must be at least 1; got 0"), ({"size": 15}, "`size` must be an even")],
)
def test_scene_errors(kwargs, message):
    with pytest.raises(ValueError, match=message):
        sample(**kwargs)


def test_weights_round_trip(demo_pipe, tmp_path):
    folder = tmp_path / "weights"
    path = save_weights(demo_pipe, folder)
    again = load_pipeline(folder)
    for name, tensor in again.transformer.state_dict().items():
        stored = demo_pipe.transformer.state_dict()[name]
        assert torch.equal(tensor, stored.bfloat16().float()), name
    first = again(
        "a red box", num_inference_steps=1, generator=torch.Generator().manual_seed(0)
    ).images[0]
    assert first.size == (64, 64)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="must hold config"):
        load_pipeline(folder)
    path.write_bytes(whole)
    config = json.loads((folder / "config.json").read_text())
    config["transformer"]["num_layers"] += 1
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="holds other weights than its"):
        load_pipeline(folder)
    config["vocabulary"] = ["<pad>"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="another vocabulary"):
        load_pipeline(folder)
    with pytest.raises(ValueError, match="missing"):
        load_pipeline(tmp_path / "missing")


def test_evaluation_of_perfect_maps():
    """Maps made from the masks score 100 %; shifted words score far less."""
    from conceptattention import ConceptMaps

    batch = evaluate.held_out_scenes(6)
    found = []
    for index in range(len(batch)):
        words = batch.words(index)
        ids = torch.tensor([LABELS.index(word) for word in words])
        perfect = (batch.labels[index, None] == ids[:, None, None]).float()[None, None]
        maps = ConceptMaps(perfect, perfect, (tuple(words),), [(-1, -1)], [1], {0: 1.0})
        found.append(([index], [words], {"output": maps}))
    for protocol in ("binary", "argmax"):
        result = evaluate.score(found, batch, protocol=protocol)
        assert result.miou == 1.0
        assert result.accuracy == 1.0
    rolled = [(i, [w[0][1:] + w[0][:1]], m) for i, w, m in found]
    assert evaluate.score(rolled, batch, protocol="argmax").accuracy < 0.5


def test_noun_swap_changes_nouns_only(demo_pipe):
    batch = evaluate.held_out_scenes(3)
    result = evaluate.noun_swap(demo_pipe, batch, 0.5)
    assert set(result) == {"true", "swapped", "rise"}
    assert result["rise"] == pytest.approx(result["swapped"] / result["true"] - 1)


@pytest.fixture
def weights(demo_pipe, tmp_path):
    save_weights(demo_pipe, tmp_path / "weights")
    return tmp_path / "weights"


def test_demo_writes_pictures_and_results(weights, tmp_path):
    out = tmp_path / "out"
    result = CliRunner().invoke(
        main,
        ["demo", "--assets", str(weights), "--output", str(out), "--steps", "2", "--scenes", "2",
         "--concepts", "box, grass", "--prompt", "a red box on grass", "--no-progress"],
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "cross_attention" in result.output
    names = {path.name for path in out.iterdir()}
    for stem in ("generated", "segmented"):
        assert {f"{stem}.png", f"{stem}-segmentation.png", f"{stem}-overview.png"} <= names
    assert {"generated-heatmap-box.png", "generated-overlay-grass.png", "results.json"} <= names
    cases = json.loads((out / "results.json").read_text())["cases"]
    assert {case["provider"] for case in cases} == {"output", "cross_attention", "random"}
    assert all(0 <= case["median"] <= 100 for case in cases)


def test_demo_segments_a_given_picture(weights, tmp_path):
    from PIL import Image

    picture = tmp_path / "picture.png"
    Image.new("RGB", (90, 70), (30, 120, 30)).save(picture)
    common = ["demo", "--assets", str(weights), "--output", str(tmp_path / "o"), "--steps", "1",
              "--scenes", "1", "--no-progress"]  # fmt: skip
    result = CliRunner().invoke(main, [*common, "--image", str(picture)])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "o" / "segmented-heatmap-bee.png").exists()
    picture.write_text("nothing")
    result = CliRunner().invoke(main, [*common, "--image", str(picture)])
    assert result.exit_code == 2
    assert "`image` must be a picture" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "--concepts", "zebra"], "must be words of the demo model; got 'zebra'"),
        (["demo", "--prompt", "nothing"], "`prompt` must name something the demo model knows"),
        (["demo", "--steps", "0"], "0 is not in the range x>=1"),
        (["demo", "--image", "missing.png"], "'missing.png' does not exist"),
        (["nothing"], "No such command 'nothing'"),
    ],
)
def test_mistakes_end_in_one_line(arguments, message):
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2
    assert result.output.count("\n") == 1
    assert message in result.output


def test_env_and_help():
    result = CliRunner().invoke(main, ["env", "--json"])
    report = json.loads(result.output)
    assert report["package"] == "conceptattention"
    assert "2502.04320" in report["origin"]
    assert "version: " in CliRunner().invoke(main, ["env"]).output
    assert "demo" in CliRunner().invoke(main, ["--help"]).output


def test_trainer_learns_and_resumes(tmp_path):
    from conceptattention.demo.model import build_pipeline
    from conceptattention.demo.train import SceneSource
    from conceptattention.demo.training import Recipe, Trainer

    def trainer():
        return Trainer(
            build_pipeline, SceneSource(2, 0.5), torch.device("cpu"), Recipe(2), compiled=False
        )

    first = trainer()
    before = first.averages[0].clone()
    losses = [float(first.update(0.0)) for _ in range(2)]
    assert all(0 < loss < 3 for loss in losses)
    assert not torch.equal(before, first.averages[0])
    first.save(tmp_path / "checkpoint.pt", 12.0)
    second = trainer()
    assert second.load(tmp_path / "checkpoint.pt") == 12.0
    assert float(second.update(0.0)) == pytest.approx(float(first.update(0.0)), rel=1e-4)


class TestShippedWeights:
    def test_files(self):
        assert sum(path.stat().st_size for path in ASSETS.iterdir()) < 12.5e6
        report = json.loads((ASSETS / "training.json").read_text())
        assert report["settings"]["scenes"] == scenes.VERSION
        import hashlib

        stored = hashlib.sha256((ASSETS / "weights.safetensors").read_bytes()).hexdigest()
        assert stored == report["sha256"]

    def test_captions_matter(self):
        """Other nouns make the picture harder to predict: the model reads its caption."""
        result = evaluate.noun_swap(load_pipeline(), evaluate.held_out_scenes(12), 0.9)
        assert result["rise"] > 0.15

    def test_output_maps_find_objects_better_than_cross_attention(self):
        """The paper's claim, on the shipped weights; noise scores 0.30."""
        scenes = evaluate.held_out_scenes(16)
        found = evaluate.segment_scenes(load_pipeline(), scenes, t=0.4, **READING)
        output, attention = (
            evaluate.score(found, scenes, space=space).miou
            for space in ("output", "cross_attention")
        )
        assert output > attention + 0.05
        assert output > 0.7

    def test_maps_are_those_of_the_weights(self):
        """Maps of one scene, as they were when the weights came in."""
        golden = torch.from_numpy(np.load(Path(__file__).parent / "golden_maps.npz")["maps"])
        batch = evaluate.held_out_scenes(1)
        maps = segment(load_pipeline(), batch.images, batch.words(0), batch.captions(), t=0.4)
        assert (maps.values[0] - golden).abs().mean() < 1e-3

    def test_loss_agrees_with_the_training_report(self):
        report = json.loads((ASSETS / "training.json").read_text())
        stored = report["evaluation"]["noun_swap"]["0.8"]["true"]
        measured = evaluate.noun_swap(load_pipeline(), evaluate.held_out_scenes(12), 0.8)["true"]
        assert measured == pytest.approx(stored, rel=0.25)
