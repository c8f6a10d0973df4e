"""What training the picture models shares: rectified flow, its schedule, checkpoints and log."""

from __future__ import annotations

import copy
import csv
import hashlib
import json
import logging
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor, nn

from fourfold_common import environment_report, seed_everything

from .model import DemoPipeline, encode_tokens, save_weights

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Recipe:
    """Settings of one run.

    Args:
        batch: Scenes per step.
        rate: Peak learning rate.
        seed: Of weights, scenes and noise.
        noise_shift: Noise levels are the sigmoid of a normal with this mean. Words only matter
            where the picture is hidden: draw more noise than a plain logit-normal does.
        pooled_dropped: Share of scenes with a zero pooled vector. Concepts are modulated with a
            zero one, and a pooled vector that is always there lets the model read the caption from
            it instead of from the tokens: with 10 % dropped, swapping it raised the loss by 6 % at
            t = 0.6, swapping all tokens by 1 %.
    """

    batch: int
    rate: float = 1e-3
    seed: int = 0
    noise_shift: float = 0.7
    pooled_dropped: float = 0.9


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
    """Model, averaged weights and optimiser of one run.

    Args:
        build: Makes the pipeline, with random weights.
        draw: Returns scenes for a share of the run, in [0, 1], as packed latents
            (batch, patches, channels) and captions (batch, tokens).
        device: Where to train.
        recipe: Settings.
        compiled: Compile the blocks of the transformer.
    """

    def __init__(
        self,
        build: Callable[[], DemoPipeline],
        draw: Callable[[float, torch.Generator], tuple[Tensor, Tensor]],
        device: torch.device,
        recipe: Recipe,
        *,
        compiled: bool,
    ) -> None:
        seed_everything(recipe.seed)
        self.device, self.recipe, self.draw = device, recipe, draw
        self.pipe = build()
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
            lr=recipe.rate, betas=(0.9, 0.95), fused=device.type == "cuda",
        )  # fmt: skip
        self.generator = torch.Generator(device).manual_seed(recipe.seed)
        self.step = self.scenes = 0
        if compiled:
            torch._dynamo.config.suppress_errors = True  # what cannot be compiled runs eagerly
            # One static graph for each size of picture beats one graph of any size.
            self.model.compile_repeated_blocks(dynamic=False)

    def loss(self, clean: Tensor, tokens: Tensor) -> Tensor:
        """Return the rectified-flow loss at logit-normal noise levels."""
        with torch.no_grad():
            side = math.isqrt(clean.shape[1])
            draw: dict[str, Any] = {"generator": self.generator, "device": self.device}
            t = (torch.randn(len(clean), 1, 1, **draw) + self.recipe.noise_shift).sigmoid()
            noise = torch.randn(clean.shape, **draw)
            noised = (1 - t) * clean + t * noise
            keep = (torch.rand(len(clean), 1, **draw) >= self.recipe.pooled_dropped).float()
        with torch.autocast(self.device.type, torch.bfloat16):
            states, pooled = encode_tokens(self.text, tokens)
            velocity = self.model(
                hidden_states=noised,
                timestep=t[:, 0, 0],
                pooled_projections=pooled * keep,
                encoder_hidden_states=states,
                txt_ids=torch.zeros(tokens.shape[1], 3, device=self.device),
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
        rate = self.recipe.rate * warm * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
        for group in self.optimiser.param_groups:
            group["lr"] = max(rate, 1e-6)
        with torch.no_grad():
            clean, tokens = self.draw(progress, self.generator)
        loss = self.loss(clean, tokens)
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.weights, 1.0)
        self.optimiser.step()
        keep = min(0.999, (self.step + 1) / (self.step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(self.averages, self.weights, 1 - keep)
        self.step += 1
        self.scenes += len(clean)
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


def training_options(*, minutes: float, batch: int, unit: str, note: str = "") -> Any:
    """Return a decorator that adds the options of all training scripts to a command.

    Args:
        minutes: Default of `--minutes`.
        batch: Default of `--batch`.
        unit: What a batch is made of.
        note: Ends the help of `--batch`.
    """

    def add(command: Any) -> Any:
        for option in reversed((
            click.option(
                "--output", type=click.Path(path_type=Path, file_okay=False), required=True,
                help="Folder to write.",
            ),
            click.option(
                "--minutes", default=minutes, help="Time for training, compilation included."
            ),
            click.option(
                "--steps", default=10**9, help="Stop, and end the schedule, after so many steps."
            ),
            click.option(
                "--batch", default=batch, help=f"{unit.capitalize()} per step{note}."
            ),
            click.option("--rate", default=1e-3, help="Peak learning rate."),
            click.option("--seed", default=0, help=f"Seed of weights, {unit} and noise."),
            click.option("--device", default="auto", help="Where to train."),
            click.option(
                "--compile/--no-compile", "compiled", default=True, help="Use torch.compile."
            ),
        )):  # fmt: skip
            command = option(command)
        return command

    return add


def begin(output: Path, name: str) -> None:
    """Make the folder, log to the screen, and set what every training run on a GPU needs.

    Args:
        output: Folder to write.
        name: Logger of the script, beside the package's.
    """
    logging.basicConfig(
        level=logging.WARNING, format="%(asctime)s %(message)s", datefmt="%H:%M:%S",
        stream=sys.stdout,
    )  # fmt: skip
    for one in (name, "conceptattention"):
        logging.getLogger(one).setLevel(logging.INFO)
    torch.backends.cuda.matmul.allow_tf32 = True
    # cuDNN's attention backward read illegal memory on an H200 (torch 2.11, 5 heads of 32).
    torch.backends.cuda.enable_cudnn_sdp(False)
    output.mkdir(parents=True, exist_ok=True)


def fit(
    trainer: Trainer,
    output: Path,
    *,
    minutes: float,
    steps: int,
    resume: bool = False,
    probe: Callable[[float], None] = lambda progress: None,
    saved: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Train until the time or the steps are over, write the averaged weights, return a report.

    The learning rate follows the clock from the first step on, which compiles, or the steps.

    Args:
        trainer: What to train.
        output: Folder for checkpoint.pt, training_log.csv and the weights.
        minutes: Time for training, compilation included.
        steps: Stop, and end the schedule, after so many steps.
        resume: Continue from the folder's checkpoint.
        probe: Called about every 90 seconds with the share of the run.
        saved: Called after weights were written.

    Raises:
        RuntimeError: The loss is not finite.
    """
    started = time.monotonic()
    checkpoint, log = output / "checkpoint.pt", output / "training_log.csv"
    before = trainer.load(checkpoint) if resume else 0.0
    setting_up: float | None = 0.0 if resume else None

    def elapsed() -> float:
        return before + time.monotonic() - started

    rows: list[dict[str, Any]] = []
    losses: list[Tensor] = []
    last_scenes, last_time, last_saved = trainer.scenes, time.monotonic(), time.monotonic()

    def store() -> Path:
        trainer.save(checkpoint, elapsed())
        weights = save_weights(trainer.average, output)
        write_log(log, rows)
        saved()
        return weights

    while trainer.step < steps:
        lost = elapsed() if setting_up is None else setting_up
        clock = (elapsed() - lost) / max(60 * minutes - lost, 1e-9)
        progress = max(clock, trainer.step / steps)
        if progress >= 1 or elapsed() >= 60 * minutes:
            break
        losses.append(trainer.update(progress))
        if setting_up is None:
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
                "step %d, %.0f s, loss %.4f, %.0f images/s", trainer.step, elapsed(), loss, speed
            )
            if not math.isfinite(loss):
                raise RuntimeError(f"the loss is {loss} at step {trainer.step}")
            if now - last_saved > 90:
                last_saved = now
                probe(progress)
                store()
    seconds = elapsed()
    weights = store()
    return {
        "steps": trainer.step,
        "scenes_seen": trainer.scenes,
        "seconds": round(seconds, 1),
        "seconds_before_second_step": round(setting_up or 0.0, 1),
        "final_loss": rows[-1]["loss"] if rows else None,
        "sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
        "environment": environment_report(),
    }


def write_report(path: Path, report: dict[str, Any]) -> None:
    """Write a report as JSON, whole or not at all."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def write_log(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write the rows of the training log as CSV."""
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["step", "seconds", "loss", "rate", "images_per_second"])
        writer.writeheader()
        writer.writerows(rows)
    os.replace(temporary, path)
