"""Train the demo model: rectified flow on procedural scenes drawn on the device.

Reproduces the package's assets:

    python -m conceptattention.demo.train --output OUT

The run is time-boxed: the learning rate follows the clock, or the step count with `--steps`.
Figures go to training.json and training_log.csv; everything the package ships is also packed into
assets.tar, rewritten at every checkpoint, so a crash loses minutes only.
"""

from __future__ import annotations

import copy
import csv
import hashlib
import json
import logging
import math
import os
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor, nn

from fourfold_common import environment_report, pick_device, seed_everything

from . import scenes as scene_module
from .evaluate import SPACES, held_out_scenes, noun_swap, predict, score, segment_scenes
from .model import PIXELS, DemoPipeline, build_pipeline, encode_tokens, load_pipeline, save_weights
from .scenes import Scenes, patchify, sample_scenes

_logger = logging.getLogger(__name__)
POOLED_DROPPED = 0.9
SMALL_PIXELS = 32
# Words only matter where the picture is hidden: draw more noise than a plain logit-normal does.
NOISE_SHIFT = 0.7
NOISE_LEVELS = (0.2, 0.4, 0.6, 0.8)
SAMPLE_PROMPTS = (
    "a red box and a fish on grass", "an apple on wood", "a bee and a flower on grass under clouds",
    "a moon under night", "a blue ball on sand under clouds", "a shell on sand",
    "a star and a yellow kite on water", "a mushroom on grass under night",
    "a wheel and a coin on brick", "a leaf on snow", "a purple flag on snow under clouds",
    "a tile and a green ball on wood",
)  # fmt: skip


def initialise(pipe: DemoPipeline) -> None:
    """Start every block as the identity: modulations and the last projection are zero.

    Source: Peebles and Xie 2023 (arXiv 2212.09748), adaLN-Zero.
    """
    model = pipe.transformer
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    for name, module in model.named_modules():
        if name.split(".")[-2:] in (["norm1", "linear"], ["norm1_context", "linear"]) or (
            name.endswith(("norm.linear", "norm_out.linear"))
        ):
            nn.init.zeros_(module.weight)
    nn.init.zeros_(model.proj_out.weight)


class Trainer:
    """Model, averaged weights, optimiser and scene stream of one run.

    Args:
        device: Where to train.
        batch: Scenes per step.
        rate: Peak learning rate.
        seed: Seed of weights, scenes and noise.
        compiled: Compile the blocks of the transformer.
        small_share: Share of the run that is drawn at `SMALL_PIXELS`, a quarter of the tokens.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        batch: int,
        rate: float,
        seed: int,
        compiled: bool,
        small_share: float = 0.65,
    ) -> None:
        seed_everything(seed)
        self.device, self.batch, self.rate = device, batch, rate
        self.pipe = build_pipeline()
        initialise(self.pipe)
        self.average = copy.deepcopy(self.pipe).to(device)
        self.pipe.to(device)
        self.model, self.text = self.pipe.transformer, self.pipe.text_encoder_2
        self.model.train()
        self.text.train()
        self.weights = [*self.model.parameters(), *self.text.parameters()]
        self.averages = [
            *self.average.transformer.parameters(), *self.average.text_encoder_2.parameters()
        ]  # fmt: skip
        decay = [p for p in self.weights if p.ndim > 1]
        plain = [p for p in self.weights if p.ndim < 2]
        self.optimiser = torch.optim.AdamW(
            [{"params": decay, "weight_decay": 0.01}, {"params": plain, "weight_decay": 0.0}],
            lr=rate, betas=(0.9, 0.95), fused=device.type == "cuda",
        )  # fmt: skip
        self.generator = torch.Generator(device).manual_seed(seed)
        self.step, self.scenes, self.small_share = 0, 0, small_share
        self.text_ids = torch.zeros(scene_module.MAX_TOKENS, 3, device=device)
        if compiled:
            # Two picture sizes: one static graph each beats one graph of any size.
            # The renderer stays eager: a tenth of a step, and its one large kernel compiles long.
            torch._dynamo.config.suppress_errors = True  # what cannot be compiled runs eagerly
            self.model.compile_repeated_blocks(dynamic=False)

    def loss(self, scenes: Scenes) -> Tensor:
        """Return the rectified-flow loss at logit-normal noise levels."""
        with torch.no_grad():
            clean = patchify(scenes.images)
            side = scenes.images.shape[-1] // 2
            draw: dict[str, Any] = {"generator": self.generator, "device": self.device}
            t = (torch.randn(len(clean), 1, 1, **draw) + NOISE_SHIFT).sigmoid()
            noise = torch.randn(clean.shape, **draw)
            noised = (1 - t) * clean + t * noise
            # Concepts are modulated with a zero pooled vector, and a pooled vector that is always
            # there lets the model read the caption from it instead of from the tokens: with 10 %
            # dropped, swapping it raised the loss by 6 % at t = 0.6, swapping all tokens by 1 %.
            keep = (torch.rand(len(clean), 1, **draw) >= POOLED_DROPPED).float()
        with torch.autocast(self.device.type, torch.bfloat16):
            states, pooled = encode_tokens(self.text, scenes.tokens)
            velocity = self.model(
                hidden_states=noised,
                timestep=t[:, 0, 0],
                pooled_projections=pooled * keep,
                encoder_hidden_states=states,
                txt_ids=self.text_ids,
                img_ids=self.pipe._prepare_latent_image_ids(
                    1, side, side, self.device, torch.float32
                ),
                return_dict=False,
            )[0]
        loss: Tensor = (velocity.float() - (noise - clean)).square().mean()
        return loss

    def update(self, progress: float) -> Tensor:
        """Make one step at a share `progress` of the run; return the loss, on the device."""
        warm = min(1.0, (self.step + 1) / 200)
        rate = self.rate * warm * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
        for group in self.optimiser.param_groups:
            group["lr"] = max(rate, 1e-6)
        # Words bind to pictures within so many scenes, not so many pixels: begin with small ones.
        small = progress < self.small_share
        scenes = sample_scenes(
            (2 if small else 1) * self.batch,
            self.generator,
            size=SMALL_PIXELS if small else PIXELS,
        )
        loss = self.loss(scenes)
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.weights, 1.0)
        self.optimiser.step()
        keep = min(0.999, (self.step + 1) / (self.step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(self.averages, self.weights, 1 - keep)
        self.step += 1
        self.scenes += len(scenes)
        return loss.detach()

    def save(self, path: Path, seconds: float) -> None:
        """Write everything that resuming needs, whole or not at all."""
        state = {
            "weights": [p.data for p in self.weights],
            "averages": [p.data for p in self.averages],
            "optimiser": self.optimiser.state_dict(),
            "generator": self.generator.get_state(),
            "step": self.step,
            "scenes": self.scenes,
            "seconds": seconds,
        }
        temporary = path.with_suffix(".tmp")
        torch.save(state, temporary)
        os.replace(temporary, path)

    def load(self, path: Path) -> float:
        """Continue from `save`; return the seconds trained so far."""
        state = torch.load(path, map_location=self.device, weights_only=True)
        with torch.no_grad():
            for name, tensors in (("weights", self.weights), ("averages", self.averages)):
                for mine, stored in zip(tensors, state[name], strict=True):
                    mine.copy_(stored)
        self.optimiser.load_state_dict(state["optimiser"])
        self.generator.set_state(state["generator"].cpu())
        self.step, self.scenes = state["step"], state["scenes"]
        return float(state["seconds"])


def count_flops(pipe: DemoPipeline) -> float:
    """Return the floating-point operations of one forward pass of one picture."""
    from torch.utils.flop_counter import FlopCounterMode

    scenes = held_out_scenes(1)
    with FlopCounterMode(display=False) as counter:
        predict(pipe, patchify(scenes.images), scenes.tokens, 0.5)
    return float(counter.get_total_flops())


def check_observer(pipe: DemoPipeline) -> dict[str, Any]:
    """Return whether pictures are the same bits with the observer attached, and its cost."""
    from .. import ConceptAttention

    def generate() -> Any:
        generator = torch.Generator().manual_seed(0)
        return pipe(
            ["a red box on grass"] * 4, num_inference_steps=8, output_type="pt",
            generator=generator, negative_prompt=[""] * 4, true_cfg_scale=2.0,
        ).images  # fmt: skip

    def timed() -> tuple[Any, float]:
        started = time.perf_counter()
        images = generate()
        images.sum().item()
        return images, time.perf_counter() - started

    if pipe.device.type == "cpu":
        return {}
    generate()
    plain, plain_seconds = min((timed() for _ in range(3)), key=lambda pair: pair[1])
    with ConceptAttention(pipe, ["box", "grass", "fish"]) as observer:
        generate()
        seen, seen_seconds = min((timed() for _ in range(3)), key=lambda pair: pair[1])
        observer.heatmaps()
    return {
        "bit_identical": torch.equal(plain, seen),
        "seconds_plain": round(plain_seconds, 4),
        "seconds_observed": round(seen_seconds, 4),
    }


def evaluate(pipe: DemoPipeline, count: int) -> dict[str, Any]:
    """Return the held-out figures: mIoU by space, noise level, protocol and layer; noun swap."""
    scenes = held_out_scenes(count)
    layers = range(len(pipe.transformer.transformer_blocks))
    default = [layer for layer in layers if layer >= len(layers) // 2]
    rows = []
    for captions in (True, False):
        for t in NOISE_LEVELS:
            found = segment_scenes(
                pipe, scenes, t=t, captions=captions, layers="all", store="layers"
            )
            for space in SPACES:
                for chosen in [default, *([layer] for layer in layers if captions)]:
                    row: dict[str, Any] = {
                        "t": t, "caption": captions, "space": space, "layers": chosen,
                    }  # fmt: skip
                    for protocol in ("binary", "argmax"):
                        result = score(found, scenes, layers=chosen, space=space, protocol=protocol)
                        row[protocol] = {
                            "accuracy": round(result.accuracy, 4),
                            "miou": round(result.miou, 4),
                            "fg_iou": round(result.fg_iou, 4),
                        }
                    rows.append(row)
            mine = {
                r["space"]: r
                for r in rows
                if (r["t"], r["caption"], r["layers"]) == (t, captions, default)
            }
            _logger.info(
                "t=%.1f caption=%s %s", t, captions,
                " ".join(
                    f"{space}: binary {r['binary']['miou']:.3f} argmax {r['argmax']['miou']:.3f}"
                    for space, r in mine.items()
                ),
            )  # fmt: skip
    swaps = {str(t): noun_swap(pipe, scenes, t) for t in NOISE_LEVELS}
    _logger.info("noun swap %s", {t: round(swap["rise"], 3) for t, swap in swaps.items()})
    return {"scenes": count, "segmentation": rows, "noun_swap": swaps}


def draw_samples(pipe: DemoPipeline, path: Path) -> None:
    """Write a grid of generated pictures: three rows of guidance 1, 2 and 4."""
    from PIL import Image

    rows = []
    for guidance in (1.0, 2.0, 4.0):
        pictures = pipe(
            list(SAMPLE_PROMPTS), num_inference_steps=28, output_type="pt",
            generator=torch.Generator().manual_seed(0), true_cfg_scale=guidance,
            negative_prompt=[""] * len(SAMPLE_PROMPTS),
        ).images  # fmt: skip
        rows.append(torch.cat(list(pictures.float().cpu()), dim=2))
    grid = (torch.cat(rows, dim=1).permute(1, 2, 0) * 255).round().to(torch.uint8)
    picture = Image.fromarray(grid.numpy())
    picture.resize((2 * picture.width, 2 * picture.height), Image.Resampling.NEAREST).save(path)


def pack(folder: Path) -> None:
    """Write assets.tar with everything the package ships, whole or not at all."""
    temporary = folder / "assets.tar.tmp"
    names = (
        "weights.safetensors", "config.json", "training.json", "training_log.csv", "samples.png",
    )  # fmt: skip
    with tarfile.open(temporary, "w") as tar:
        for name in names:
            if (folder / name).exists():
                tar.add(folder / name, arcname=name)
    os.replace(temporary, folder / "assets.tar")


def write_log(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write the rows of the training log as CSV."""
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["step", "seconds", "loss", "rate", "images_per_second"])
        writer.writeheader()
        writer.writerows(rows)
    os.replace(temporary, path)


@click.command()
@click.option("--output", type=click.Path(path_type=Path), required=True, help="Folder to write.")
@click.option("--minutes", default=7.4, help="Time for training, compilation included.")
@click.option("--steps", default=10**9, help="Stop, and end the schedule, after so many steps.")
@click.option("--batch", default=256, help="Scenes per step.")
@click.option("--rate", default=1e-3, help="Peak learning rate.")
@click.option("--seed", default=0, help="Seed of weights, scenes and noise.")
@click.option("--device", default="auto", help="Where to train.")
@click.option("--compile/--no-compile", "compiled", default=True, help="Use torch.compile.")
@click.option("--small-share", default=0.65, help="Share of the run with small pictures.")
@click.option("--evaluation-scenes", default=200, help="Held-out scenes of the evaluation.")
@click.option("--resume", is_flag=True, help="Continue from OUTPUT's checkpoint.")
@click.option("--data", default=None, help="Unused; the scenes are procedural.")
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
    evaluation_scenes: int,
    resume: bool,
    data: str | None,
) -> None:
    """Train the demo model and write its assets and figures."""
    logging.basicConfig(
        level=logging.WARNING, format="%(asctime)s %(message)s", datefmt="%H:%M:%S",
        stream=sys.stdout,
    )  # fmt: skip
    _logger.setLevel(logging.INFO)
    torch.backends.cuda.matmul.allow_tf32 = True
    # cuDNN's attention backward read illegal memory on an H200 (torch 2.11, 5 heads of 32).
    torch.backends.cuda.enable_cudnn_sdp(False)
    output.mkdir(parents=True, exist_ok=True)
    place, reason = pick_device(device)
    started = time.monotonic()
    trainer = Trainer(
        place,
        batch=batch,
        rate=rate,
        seed=seed,
        compiled=compiled,
        small_share=small_share,
    )
    checkpoint = output / "checkpoint.pt"
    before = trainer.load(checkpoint) if resume else 0.0
    flops = count_flops(trainer.average)
    observer = check_observer(copy.deepcopy(trainer.average).to(torch.bfloat16))
    with torch.no_grad():
        for mine, weight in zip(trainer.averages, trainer.weights, strict=True):
            if not resume:
                mine.copy_(weight)
    _logger.info(
        "%s (%s), %.2f GFLOP per forward, observer %s", place.type, reason, flops / 1e9, observer
    )

    def elapsed() -> float:
        return before + time.monotonic() - started

    probes = [held_out_scenes(128, size) for size in (PIXELS, SMALL_PIXELS)]
    rows: list[dict[str, Any]] = []
    losses: list[Tensor] = []
    last_scenes, last_time, saved = trainer.scenes, time.monotonic(), time.monotonic()
    settings = {
        "scenes": scene_module.VERSION, "batch": batch, "rate": rate, "seed": seed,
        "minutes": minutes, "compiled": compiled,
        "pooled_dropped": POOLED_DROPPED, "small_share": small_share, "noise_shift": NOISE_SHIFT,
    }  # fmt: skip
    setting_up = 0.0  # the schedule starts after the first step, which compiles
    while trainer.step < steps:
        clock = (elapsed() - setting_up) / (60 * minutes - setting_up)
        progress = max(clock, trainer.step / steps)
        if progress >= 1:
            break
        losses.append(trainer.update(progress if setting_up or resume else 0.0))
        if not setting_up and not resume:
            losses[0].item()
            setting_up = elapsed()
        every = 10 if trainer.step <= 50 else 100
        if trainer.step % every == 0 or trainer.step == steps:
            loss = float(torch.stack(losses).mean())
            now = time.monotonic()
            speed = (trainer.scenes - last_scenes) / (now - last_time)
            losses, last_scenes, last_time = [], trainer.scenes, now
            rows.append(
                {
                    "step": trainer.step, "seconds": round(elapsed(), 1), "loss": round(loss, 5),
                    "rate": f"{trainer.optimiser.param_groups[0]['lr']:.3e}",
                    "images_per_second": round(speed),
                }
            )  # fmt: skip
            _logger.info(
                "step %d, %.0f s, loss %.4f, %.0f images/s", trainer.step, elapsed(), loss, speed,
            )  # fmt: skip
            if not math.isfinite(loss):
                raise click.ClickException(f"the loss is {loss} at step {trainer.step}")
            if now - saved > 90:
                saved = now
                rise = noun_swap(trainer.average, probes[progress < small_share], 0.6)["rise"]
                _logger.info("another noun raises the loss by %.1f %%", 100 * rise)
                trainer.save(checkpoint, elapsed())
                save_weights(trainer.average, output)
                write_log(output / "training_log.csv", rows)
                pack(output)
    trained = elapsed()
    trainer.save(checkpoint, trained)
    weights = save_weights(trainer.average, output)
    write_log(output / "training_log.csv", rows)
    pack(output)
    report: dict[str, Any] = {
        "settings": settings,
        "steps": trainer.step,
        "scenes_seen": trainer.scenes,
        "seconds": round(trained, 1),
        "forward_flops": flops,
        "final_loss": rows[-1]["loss"] if rows else None,
        "observer_on_device": observer,
        "sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
        "environment": environment_report(),
    }
    del trainer
    pipe = load_pipeline(output, device=place)
    report["evaluation"] = evaluate(pipe, evaluation_scenes)
    temporary = output / "training.tmp"
    temporary.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, output / "training.json")
    draw_samples(pipe, output / "samples.png")
    pack(output)
    _logger.info("done after %.0f s", elapsed())


if __name__ == "__main__":
    main()
