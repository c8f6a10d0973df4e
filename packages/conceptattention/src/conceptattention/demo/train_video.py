"""Train the small video model on moving scenes drawn on the device, and score its maps over time.

    python -m conceptattention.demo.train_video --output OUT

The run is time-boxed: the learning rate follows the clock, or the step count with `--steps`.
"""

from __future__ import annotations

import copy
import json
import logging
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor, nn

from fourfold_common import environment_report, pick_device, seed_everything

from ..evaluation import Confusion, bootstrap_interval
from ..maps import ConceptMaps
from ..observer import ConceptAttention
from ..stream import Space
from .scenes import BACKGROUNDS, LABELS, VOCABULARY, _draw
from .training import begin, training_options
from .video import (
    FRAMES,
    PIXELS,
    Clips,
    VideoDemoPipeline,
    build_video_pipeline,
    load_video_pipeline,
    sample_clips,
    save_video_weights,
    turns,
)

_logger = logging.getLogger(__name__)
SMALL_PIXELS = 16
HELD_OUT_SEED = 2**41
SPACES: tuple[Space, ...] = ("output", "cross_attention", "prompt_attention", "daam")
TIMES = (400, 600, 800)  # of the scheduler's 1000, noisiest last
PROMPTS = ("a bee and an apple on snow", "a fish on grass", "a wheel and a moon on water")


def initialise(pipe: VideoDemoPipeline) -> None:
    """Start every block as the identity: modulations and the last projection are zero."""
    model = pipe.transformer
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
            if name == "proj_out" or name.endswith(("norm1.linear", "norm2.linear")):
                nn.init.zeros_(module.weight)


class Trainer:
    """Model, averaged weights, optimiser and stream of clips of one run.

    Args:
        pipe: With the weights to train.
        batch: Clips of full size per step; small ones come three times as many.
        rate: Peak learning rate.
        seed: Seed of clips and noise.
        compiled: Compile the blocks and the renderer.
        small_share: Share of the run that is drawn at `SMALL_PIXELS`.
    """

    def __init__(
        self,
        pipe: VideoDemoPipeline,
        *,
        batch: int,
        rate: float,
        seed: int,
        compiled: bool,
        small_share: float,
    ) -> None:
        self.pipe, self.batch, self.rate, self.small_share = pipe, batch, rate, small_share
        self.model, self.text = pipe.transformer, pipe.text_encoder
        self.device = self.model.device
        self.average = copy.deepcopy(pipe)
        self.weights = [*self.model.parameters(), *self.text.parameters()]
        self.averages = [
            *self.average.transformer.parameters(), *self.average.text_encoder.parameters()
        ]  # fmt: skip
        self.optimiser = torch.optim.AdamW(
            self.weights, lr=rate, betas=(0.9, 0.95), weight_decay=0.01,
            fused=self.device.type == "cuda",
        )  # fmt: skip
        self.generator = torch.Generator(self.device).manual_seed(seed)
        self.signal = pipe.scheduler.alphas_cumprod.float().to(self.device)
        self.turns = {size: turns(pipe, size, FRAMES) for size in (SMALL_PIXELS, PIXELS)}
        self.step = self.clips = 0
        self.renderer = torch.compile(_draw, dynamic=False) if compiled else _draw
        self.model.train()
        self.text.train()
        if compiled:
            for block in self.model.transformer_blocks:
                block.compile(fullgraph=True, dynamic=False)

    def loss(self, clips: Clips) -> Tensor:
        """Return the squared error of the velocity at uniform steps of the scheduler."""
        clean = 2 * clips.videos - 1
        count = len(clean)
        draw: dict[str, Any] = {"generator": self.generator, "device": self.device}
        steps = torch.randint(0, len(self.signal), (count,), **draw)
        noise = torch.randn(clean.shape, **draw)
        level = self.signal[steps].view(-1, 1, 1, 1, 1)
        noised = level.sqrt() * clean + (1 - level).sqrt() * noise
        target = level.sqrt() * noise - (1 - level).sqrt() * clean
        with torch.autocast(self.device.type, torch.bfloat16):
            velocity = self.model(
                hidden_states=noised,
                encoder_hidden_states=self.text(input_ids=clips.tokens).last_hidden_state,
                timestep=steps,
                image_rotary_emb=self.turns[clean.shape[-1]],
                return_dict=False,
            )[0]
        loss: Tensor = (velocity.float() - target).square().mean()
        return loss

    def update(self, progress: float) -> Tensor:
        """Make one step at a share `progress` of the run; return the loss, on the device."""
        warm = min(1.0, (self.step + 1) / 200)
        rate = self.rate * warm * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
        for group in self.optimiser.param_groups:
            group["lr"] = max(rate, 1e-6)
        small = progress < self.small_share
        count, size = (3 * self.batch, SMALL_PIXELS) if small else (self.batch, PIXELS)
        with torch.no_grad():
            clips = sample_clips(count, self.generator, size=size, renderer=self.renderer)
        loss = self.loss(clips)
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.weights, 1.0)
        self.optimiser.step()
        keep = min(0.995, (self.step + 1) / (self.step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(self.averages, self.weights, 1 - keep)
        self.step += 1
        self.clips += count
        return loss.detach()


@torch.no_grad()
def observe(
    pipe: VideoDemoPipeline,
    clips: Clips,
    step: int,
    noise_seed: int = 0,
) -> dict[str, ConceptMaps]:
    """Return maps by space, with every layer kept, of the words of noised clips.

    Args:
        pipe: The pipeline.
        clips: As many words in every clip.
        step: Noise level, of the scheduler's 1000 steps.
        noise_seed: Of the noise, drawn on the CPU.
    """
    device, count, size = pipe.transformer.device, len(clips.videos), clips.videos.shape[-1]
    words = [clips.words(index) for index in range(count)]
    texts = [" ".join(VOCABULARY[token] for token in row if token) for row in clips.tokens.tolist()]
    level = float(pipe.scheduler.alphas_cumprod[step])
    noise = torch.randn(clips.videos.shape, generator=torch.Generator().manual_seed(noise_seed))
    noised = level**0.5 * (2 * clips.videos.cpu() - 1) + (1 - level) ** 0.5 * noise
    with ConceptAttention(pipe, words, space=SPACES, prompt=texts, store="layers") as observer:
        observer.router.direct = True
        pipe.transformer(
            hidden_states=noised.to(device),
            encoder_hidden_states=pipe.text_encoder(
                input_ids=clips.tokens.to(device)
            ).last_hidden_state,
            timestep=torch.full((count,), step, device=device),
            image_rotary_emb=turns(pipe, size, clips.videos.shape[1]),
            return_dict=False,
        )
    return {space: observer.heatmaps(space=space) for space in SPACES}


def count_pixels(values: Tensor, clips: Clips) -> Tensor:
    """Return counts (clip, frame, truth, guess) of the strongest word against the labels.

    Args:
        values: Maps of the words of `Clips.words`, (clip, word, frame, height, width).
        clips: As many objects in every clip.
    """
    size = clips.labels.shape[-1]
    count, frames = clips.labels.shape[:2]
    numbers = torch.tensor([[LABELS.index(w) for w in clips.words(i)] for i in range(count)])
    best = nn.functional.interpolate(values.argmax(1).double(), (size, size), mode="nearest").long()
    truth = clips.labels.cpu()
    chosen = numbers.gather(1, best.flatten(1)).view_as(truth)
    counts = torch.zeros(count, frames, len(LABELS), len(LABELS), dtype=torch.int64)
    for clip in range(count):
        for frame in range(frames):
            confusion = Confusion(len(LABELS))
            confusion.add(chosen[clip, frame], truth[clip, frame])
            counts[clip, frame] = confusion.counts
    return counts


def object_iou(counts: Tensor) -> float:
    """Return the mean over object classes of intersection over union, of pooled counts."""
    pooled = counts.reshape(-1, *counts.shape[-2:]).sum(0).double()
    inside = pooled.diagonal()
    union = pooled.sum(0) + pooled.sum(1) - inside
    objects = torch.arange(len(LABELS)) >= len(BACKGROUNDS)
    seen = objects & (pooled.sum(1) > 0)
    return float((inside[seen] / union[seen]).mean())


def evaluate(pipe: VideoDemoPipeline, count: int, times: Sequence[int] = TIMES) -> dict[str, Any]:
    """Return how well the strongest word follows two objects through held-out clips.

    Beside the spaces stand `still`, the output space's maps averaged over time, which cannot follow
    anything, and `chance`, maps of noise.
    """
    generator = torch.Generator().manual_seed(HELD_OUT_SEED)
    clips = sample_clips(count, generator, objects=2, plain_captions=True)
    rows: list[dict[str, Any]] = []

    def add(step: int, space: str, layer: int | None, values: Tensor) -> None:
        counts = count_pixels(values, clips)
        low, high = bootstrap_interval(counts.sum(1), "miou", samples=500)
        pooled = Confusion(len(LABELS))
        pooled.counts = counts.sum((0, 1))
        frames = range(counts.shape[1])
        rows.append(
            {
                "step": step, "space": space, "layer": layer,
                "object_iou": round(object_iou(counts), 4),
                "by_frame": [round(object_iou(counts[:, frame]), 4) for frame in frames],
                "miou": round(float(pooled.miou), 4),
                "miou_interval": [round(float(low), 4), round(float(high), 4)],
            }
        )  # fmt: skip

    for step in times:
        found = observe(pipe, clips, step)
        values = {space: maps.values for space, maps in found.items()}
        mean = values["output"].mean(2, keepdim=True).expand_as(values["output"])
        values |= {"still": mean, "chance": torch.rand(mean.shape, generator=generator)}
        for space, maps in values.items():
            add(step, space, None, maps)
            _logger.info("step %d %s: object IoU %.3f", step, space, rows[-1]["object_iou"])
        for layer, _ in found["output"].keys:
            add(step, "output", layer, found["output"].select(layers=[layer]).values)
    return {"clips": count, "objects": 2, "rows": rows}


def draw_samples(pipe: VideoDemoPipeline, path: Path) -> None:
    """Write a sheet: every prompt's frames, and under them the maps of its concepts."""
    from PIL import Image

    from .run import content_words

    side, rows = 4 * PIXELS, []
    for prompt in PROMPTS:
        words = content_words(prompt)
        with ConceptAttention(pipe, words) as observer:
            frames = pipe(
                prompt, height=PIXELS, width=PIXELS, num_frames=FRAMES, num_inference_steps=25,
                guidance_scale=3.0, generator=torch.Generator().manual_seed(0),
            ).frames[0]  # fmt: skip
        maps = observer.heatmaps()
        large = [frame.resize((side, side), Image.Resampling.NEAREST) for frame in frames]
        rows += [large, *(maps[word].frames(large) for word in words)]
    sheet = Image.new("RGB", (side * FRAMES, side * len(rows)))
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            sheet.paste(picture, (x * side, y * side))
    sheet.save(path)


@click.command()
@training_options(minutes=3.5, batch=128, unit="clips", note="; small ones three times as many")
@click.option("--small-share", default=0.6, help="Share of the run with small pictures.")
@click.option("--evaluation-clips", default=256, help="Held-out clips of the evaluation.")
@click.option("--layers", default=6, help="Layers of the transformer.")
def main(
    output: Path,
    minutes: float,
    steps: int,
    batch: int,
    rate: float,
    seed: int,
    device: str,
    compiled: bool,
    small_share: float,
    evaluation_clips: int,
    layers: int,
) -> None:
    """Train the video model and write weights, figures and samples."""
    begin(output, __name__)
    started = time.monotonic()
    seed_everything(seed)
    pipe = build_video_pipeline({"num_layers": layers})
    initialise(pipe)
    pipe.to(pick_device(device)[0])
    trainer = Trainer(
        pipe, batch=batch, rate=rate, seed=seed, compiled=compiled, small_share=small_share
    )
    losses: list[Tensor] = []
    log: list[dict[str, float]] = []
    while trainer.step < steps:
        progress = max((time.monotonic() - started) / (60 * minutes), trainer.step / steps)
        if progress >= 1:
            break
        losses.append(trainer.update(progress))
        if trainer.step % 100 == 0 or trainer.step in (10, steps):
            loss = float(torch.stack(losses).mean())
            losses = []
            log.append(
                {
                    "step": trainer.step, "clips": trainer.clips, "loss": round(loss, 5),
                    "seconds": round(time.monotonic() - started, 1),
                }
            )  # fmt: skip
            _logger.info("%s", log[-1])
            if not math.isfinite(loss):
                raise click.ClickException(f"the loss is {loss} at step {trainer.step}")
    seconds = time.monotonic() - started
    weights = save_video_weights(trainer.average, output)
    report: dict[str, Any] = {
        "settings": {
            "batch": batch, "rate": rate, "seed": seed, "minutes": minutes, "layers": layers,
            "small_share": small_share, "pixels": PIXELS, "frames": FRAMES,
        },
        "parameters": sum(weight.numel() for weight in trainer.weights),
        "bytes": weights.stat().st_size, "steps": trainer.step, "clips_seen": trainer.clips,
        "seconds": round(seconds, 1), "log": log, "environment": environment_report(),
    }  # fmt: skip
    place = trainer.device
    del trainer
    trained = load_video_pipeline(output).to(place)  # the figures are those of the stored weights
    report["evaluation"] = evaluate(trained, evaluation_clips)
    (output / "training.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    draw_samples(trained, output / "samples.png")
    _logger.info("done after %.0f s", time.monotonic() - started)


if __name__ == "__main__":
    main()
