"""The small video model: its moving scenes, its training and how its maps are scored over time."""

import copy
import json

import pytest
import torch
from click.testing import CliRunner

from conceptattention import ConceptAttention
from conceptattention.demo import train_video, video
from conceptattention.demo.scenes import BACKGROUNDS, ITEMS, LABELS

SMALL = {"num_layers": 2, "num_attention_heads": 2}


def clips(count=4, **settings):
    return video.sample_clips(count, torch.Generator().manual_seed(0), **settings)


@pytest.fixture(scope="module")
def pipe():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return video.build_video_pipeline(SMALL)


def test_clips_follow_from_the_seed_and_move():
    one, two = clips(objects=1), clips(objects=1)
    assert torch.equal(one.videos, two.videos)
    assert one.videos.shape == (4, 6, 3, 24, 24)
    assert one.labels.shape == (4, 6, 24, 24)
    grid = torch.stack(torch.meshgrid(*[torch.arange(24.0)] * 2, indexing="ij"))
    for index in range(4):
        item = LABELS.index(one.words(index)[0])
        masks = (one.labels[index] == item).float()
        assert (masks.sum((1, 2)) > 10).all()  # in the picture in every frame
        places = (masks[:, None] * grid).sum((2, 3)) / masks.sum((1, 2))[:, None]
        assert (places[1:] - places[:-1]).norm(dim=1).min() > 0.3
    away = one.labels != one.labels[:, :1]
    assert (one.videos - one.videos[:, :1]).abs().mean(2)[away].mean() > 0.1


def test_captions_name_what_is_there():
    some = clips(16, plain_captions=True)
    for index in range(16):
        words = some.words(index)
        seen = {LABELS[i] for i in some.labels[index].unique().tolist()}
        assert seen <= set(words)
        tokens = [video.VOCABULARY[t] for t in some.tokens[index].tolist() if t]
        assert tokens == [*words[:-1], "on", words[-1]]
    kept = (clips(200, size=16, frames=1).tokens > 0).any(1).float().mean()
    assert 0.8 < kept < 0.97  # a tenth has no caption


def test_pipeline_is_bit_identical_and_maps_keep_their_frames(pipe):
    def run():
        return pipe(
            "a fish on grass", height=24, width=24, num_frames=6, num_inference_steps=2,
            output_type="latent", generator=torch.Generator().manual_seed(0), guidance_scale=3.0,
        ).frames  # fmt: skip

    plain = run()
    with ConceptAttention(pipe, ["fish", "grass"]) as observer:
        assert torch.equal(plain, run())
    assert observer.heatmaps().values.shape == (1, 2, 6, 12, 12)


def test_weights_in_eight_bits_come_back(pipe, tmp_path):
    path = video.save_video_weights(pipe, tmp_path)
    loaded = video.load_video_pipeline(tmp_path)
    for name, tensor in video._tensors(pipe).items():
        other = video._tensors(loaded)[name]
        step = tensor.abs().amax() / 127 if tensor.ndim > 1 else tensor.abs().amax() / 1000
        assert (tensor - other).abs().max() <= 0.51 * step + 1e-6, name
    path.write_bytes(b"no weights")
    with pytest.raises(ValueError, match=r"must hold config\.json and weights\.safetensors"):
        video.load_video_pipeline(tmp_path)


def perfect(some):
    """Return maps that know the masks, at half the size."""
    maps = []
    for index in range(len(some.videos)):
        numbers = [LABELS.index(word) for word in some.words(index)]
        maps.append(torch.stack([(some.labels[index] == number).float() for number in numbers]))
    return torch.stack(maps)


def test_scores_tell_following_maps_from_still_ones():
    some = clips(12, objects=2)
    maps = perfect(some)
    assert train_video.object_iou(train_video.count_pixels(maps, some)) == 1
    still = maps.mean(2, keepdim=True).expand_as(maps)
    noise = torch.rand(maps.shape, generator=torch.Generator().manual_seed(0))
    scores = [train_video.object_iou(train_video.count_pixels(m, some)) for m in (still, noise)]
    assert 0.05 < scores[1] < scores[0] < 0.7


def test_object_iou_by_hand():
    counts = torch.zeros(1, 1, len(LABELS), len(LABELS), dtype=torch.int64)
    fish, bee = (len(BACKGROUNDS) + ITEMS.index(word) for word in ("fish", "bee"))
    counts[0, 0, fish, fish], counts[0, 0, fish, 0], counts[0, 0, 0, fish] = 6, 2, 4
    counts[0, 0, bee, 0] = 5
    assert train_video.object_iou(counts) == pytest.approx((6 / 12 + 0) / 2)


def test_maps_are_of_the_noised_clips(pipe):
    some = clips(3, objects=2, plain_captions=True)
    found = train_video.observe(pipe, some, 600)
    assert set(found) == set(train_video.SPACES)
    assert found["output"].values.shape == (3, 3, 6, 12, 12)
    again = train_video.observe(pipe, some, 600)["output"].values
    assert torch.equal(found["output"].values, again)
    assert not torch.equal(again, train_video.observe(pipe, some, 900)["output"].values)


def test_training_fits_one_batch_of_clips(pipe):
    trained = copy.deepcopy(pipe)
    train_video.initialise(trained)
    trainer = train_video.Trainer(
        trained, batch=1, rate=4e-3, seed=0, compiled=False, small_share=1.0
    )
    trainer.step = 200  # behind the warm-up

    def loss():
        trainer.generator.manual_seed(1)
        return float(trainer.loss(video.sample_clips(3, trainer.generator, size=16)))

    with torch.no_grad():
        before = loss()
    for _ in range(25):
        trainer.generator.manual_seed(1)
        trainer.update(0.1)
    with torch.no_grad():
        after = loss()
    assert after < 0.8 * before, (before, after)
    assert trainer.clips == 25 * 3
    away = [(a - w).abs().max() for a, w in zip(trainer.averages, trainer.weights, strict=True)]
    assert max(away) > 0


def test_maps_of_the_trained_model_follow_the_objects():
    rows = train_video.evaluate(video.load_video_pipeline(), 24, times=[400])["rows"]
    found = {row["space"]: row for row in rows if row["layer"] is None}
    assert found["output"]["object_iou"] > 2 * found["chance"]["object_iou"]
    assert found["output"]["object_iou"] > found["still"]["object_iou"]
    for frame in range(video.FRAMES):
        assert found["output"]["by_frame"][frame] > 1.5 * found["chance"]["by_frame"][frame]


@pytest.mark.slow
def test_the_script_writes_weights_and_figures(tmp_path):
    result = CliRunner().invoke(
        train_video.main,
        ["--output", str(tmp_path), "--steps", "2", "--batch", "2", "--no-compile", "--device",
         "cpu", "--evaluation-clips", "2", "--layers", "1"],
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "training.json").read_text())
    assert report["steps"] == 2
    assert report["bytes"] < 3e6
    assert {row["space"] for row in report["evaluation"]["rows"]} == {
        *train_video.SPACES, "still", "chance",
    }  # fmt: skip
    assert all(len(row["by_frame"]) == 6 for row in report["evaluation"]["rows"])
    assert (tmp_path / "samples.png").stat().st_size > 1000
