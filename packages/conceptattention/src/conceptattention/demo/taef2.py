"""TAEF2, the tiny autoencoder of FLUX.2's latent space, from weights that the user has.

Plain convolutions, written from a description of the layers. Eight times smaller in height and
width, 32 channels.

Source: Ollin Boer Bohan, madebyollin/taesd (MIT), `taef2_encoder.pth` and `taef2_decoder.pth`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor, nn

WIDTH, CHANNELS = 64, 32


class _Block(nn.Module):
    """Three convolutions around a residual; a pooled block first adds a normalised bottleneck."""

    def __init__(self, pooled: bool = False) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            _conv(WIDTH, WIDTH), nn.ReLU(), _conv(WIDTH, WIDTH), nn.ReLU(), _conv(WIDTH, WIDTH)
        )
        self.pool = None
        if pooled:
            self.pool = nn.Sequential(
                nn.Conv2d(WIDTH, 4 * WIDTH, 1, bias=False),
                nn.GroupNorm(4, 4 * WIDTH),
                nn.ReLU(),
                nn.Conv2d(4 * WIDTH, WIDTH, 1, bias=False),
            )

    def forward(self, x: Tensor) -> Tensor:
        if self.pool is not None:
            x = x + self.pool(x)
        result: Tensor = (self.conv(x) + x).relu()
        return result


class _Clamp(nn.Module):
    """Hold latents within ±3."""

    def forward(self, x: Tensor) -> Tensor:
        return (x / 3).tanh() * 3


def _conv(inputs: int, outputs: int, *, stride: int = 1, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=bias)


def _half() -> nn.Conv2d:
    return _conv(WIDTH, WIDTH, stride=2, bias=False)


def _double() -> list[nn.Module]:
    return [nn.Upsample(scale_factor=2), _conv(WIDTH, WIDTH, bias=False)]


def _blocks(*, pooled: bool = False) -> list[nn.Module]:
    return [_Block(pooled) for _ in range(3)]


class TinyAutoencoder(ModelMixin, ConfigMixin):
    """TAEF2 behind the interface that Flux pipelines use; pictures are in [-1, 1]."""

    @register_to_config
    def __init__(
        self,
        latent_channels: int = CHANNELS,
        block_out_channels: Sequence[int] = (WIDTH,) * 4,  # pipelines read the factor 8 from it
        scaling_factor: float = 1.0,
        shift_factor: float = 0.0,
    ) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            _conv(3, WIDTH), _Block(),
            _half(), *_blocks(), _half(), *_blocks(), _half(), *_blocks(pooled=True),
            _conv(WIDTH, CHANNELS),
        )  # fmt: skip
        self.decoder = nn.Sequential(
            _Clamp(), _conv(CHANNELS, WIDTH), nn.ReLU(), *_blocks(pooled=True),
            *_double(), *_blocks(), *_double(), *_blocks(), *_double(), _Block(),
            _conv(WIDTH, 3),
        )  # fmt: skip

    def encode(self, image: Float[Tensor, "batch 3 height width"]) -> SimpleNamespace:
        """Return latents (batch, 32, height / 8, width / 8), wrapped as a distribution's mode."""
        latents = self.encoder((image + 1) / 2)
        return SimpleNamespace(latent_dist=SimpleNamespace(mode=lambda: latents))

    def decode(
        self, latents: Float[Tensor, "batch 32 height width"], return_dict: bool = False
    ) -> tuple[Tensor]:
        """Return pictures eight times as high and wide."""
        return (2 * self.decoder(latents).clamp(0, 1) - 1,)


def load_taef2(folder: str | os.PathLike[str]) -> TinyAutoencoder:
    """Return TAEF2 in float32.

    Args:
        folder: Holds encoder.safetensors and perhaps decoder.safetensors; without the latter the
            decoder stays random.

    Raises:
        ValueError: The encoder is missing or a file holds other weights.
    """
    model: TinyAutoencoder = TinyAutoencoder()
    for part, module in (("encoder", model.encoder), ("decoder", model.decoder)):
        path = Path(folder) / f"{part}.safetensors"
        if part == "decoder" and not path.exists():
            continue
        try:
            module.load_state_dict({k: v.float() for k, v in load_file(path).items()})
        except Exception as error:
            raise ValueError(
                f"`folder` must hold TAEF2's {part}.safetensors; {str(folder)!r} does not: {error}."
            ) from error
    model.eval().requires_grad_(False)
    return model
