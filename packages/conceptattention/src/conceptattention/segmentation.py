"""Saliency maps of pictures that exist already, from single noised forward passes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from .adapters import adapter_for
from .adapters.base import execution_device
from .maps import ConceptMaps
from .modular import standard
from .observer import ConceptAttention
from .runs import StopForward
from .stream import PROMPT_SPACES


def segment(
    pipe: Any,
    image: Any,
    concepts: Sequence[str] | Sequence[Sequence[str]],
    prompt: str | Sequence[str] = "",
    *,
    t: float = 0.5,
    samples: int = 1,
    seed: int = 0,
    **settings: Any,
) -> ConceptMaps | dict[str, ConceptMaps]:
    """Return saliency maps of concepts in a picture.

    The picture is encoded, noised to level `t`, and passed once through the transformer up to the
    last layer that is needed.

    Args:
        pipe: A diffusers pipeline whose transformer belongs to a registered family.
        image: A PIL picture, a list of them (one size), an array (height, width, 3) of bytes, or a
            tensor (batch, 3, height, width) in [0, 1]. It is scaled down to whole patches of the
            pipeline, so that the maps cover all of it.
        concepts: Words, or one list of words per picture.
        prompt: Caption of the picture, or one per picture; may stay empty.
        t: Noise level, above 0 and at most 1; the paper uses 0.5.
        samples: Number of noise draws to average, at least 1.
        seed: Seed of the noise, which is drawn on the CPU.
        **settings: Further arguments of `ConceptAttention`, such as `layers` or `space`.

    Returns:
        The maps; for several spaces, one entry per space.

    Raises:
        ValueError: An argument is out of range.
        TypeError: `image` is no picture.

    Source: Helbling et al. 2025, section 5 (real images).
    """
    if not 0 < t <= 1:
        raise ValueError(f"`t` must be above 0 and at most 1; got {t}.")
    if samples < 1:
        raise ValueError(f"`samples` must be at least 1; got {samples}.")
    if "steps" in settings:
        raise ValueError("`steps` has no meaning for `segment`, which makes `samples` passes.")
    adapter = adapter_for(getattr(pipe, "transformer", None) or getattr(pipe, "unet", None))
    if adapter.films:
        raise ValueError(f"`pipe` makes videos ({adapter.family}); `segment` takes pictures alone.")
    pipe = standard(pipe, adapter)
    patch = adapter.patch(pipe)
    pixels = _pixels(pipe, image, patch)
    prompts = [prompt] * len(pixels) if isinstance(prompt, str) else list(prompt)
    if len(prompts) != len(pixels):
        raise ValueError(
            f"`prompt` must be one text or {len(pixels)} of them, one per picture; "
            f"got {len(prompts)}."
        )
    space = settings.get("space", "output")
    if set(PROMPT_SPACES) & {*((space,) if isinstance(space, str) else space)}:
        settings.setdefault("prompt", None if "prompt_tokens" in settings else prompts)
    observer = ConceptAttention(pipe, concepts, **settings)
    observer.router.direct = True
    # An exception leaves offloading half done, so offloaded models run to their end.
    observer.router.stop_early = not any(map(_offloaded, pipe.transformer.modules()))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad(), _uncached(pipe.transformer), observer:
        device, dtype = execution_device(pipe), pipe.transformer.dtype
        vae_dtype = getattr(getattr(pipe, "vae", None), "dtype", dtype)  # often wider
        clean = adapter.encode_image(pipe, pixels.to(device, vae_dtype)).to(dtype)
        grid = (pixels.shape[-2] // patch, pixels.shape[-1] // patch)
        arguments = adapter.arguments(pipe, clean, grid, prompts, t)
        for _ in range(samples):
            noise = torch.randn(clean.shape, generator=generator).to(clean)
            arguments[adapter.latents_argument] = (1 - t) * clean + t * noise
            with suppress(StopForward):
                pipe.transformer(**arguments, return_dict=False)
    maps = {space: observer.heatmaps(space=cast(Any, space)) for space in observer.spaces}
    return maps if len(maps) > 1 else maps[observer.spaces[0]]


def _offloaded(module: Any) -> bool:
    """Return whether accelerate or diffusers moves the module's weights around its forward pass."""
    registry = getattr(module, "_diffusers_hook", None)
    return hasattr(module, "_hf_hook") or "group_offloading" in getattr(registry, "hooks", ())


@contextmanager
def _uncached(model: Any) -> Iterator[None]:
    """Switch diffusers' caches off: between single passes there is nothing to take over."""
    config = getattr(model, "_cache_config", None)
    if config is None:
        yield
        return
    model.disable_cache()
    try:
        yield
    finally:
        model.enable_cache(config)


def _pixels(pipe: Any, image: Any, patch: int) -> Tensor:
    """Return pictures as a tensor (batch, 3, height, width) in [-1, 1], scaled to whole patches."""
    import numpy as np
    from PIL import Image

    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 3:
        image = Image.fromarray(image)
    if isinstance(image, Image.Image):
        image = [image]
    if isinstance(image, Tensor):
        if image.ndim != 4 or image.shape[1] != 3 or not len(image):
            raise ValueError(
                f"`image` must have shape (batch, 3, height, width); got {tuple(image.shape)}."
            )
        if not image.is_floating_point() or image.min() < 0 or image.max() > 1:
            raise ValueError("`image` must hold floating-point colours between 0 and 1.")
        pixels = 2 * image - 1
    elif isinstance(image, Sequence) and image and all(isinstance(i, Image.Image) for i in image):
        sizes = {picture.size for picture in image}
        if len(sizes) > 1:
            raise ValueError(f"`image` must hold pictures of one size; got {sorted(sizes)}.")
        pixels = pipe.image_processor.pil_to_numpy([picture.convert("RGB") for picture in image])
        pixels = 2 * torch.from_numpy(pixels).permute(0, 3, 1, 2) - 1
    else:
        raise TypeError(
            "`image` must be a PIL picture, a list of them, an array of bytes or a tensor; "
            f"got {type(image).__name__}."
        )
    height, width = (side // patch * patch for side in pixels.shape[-2:])
    if not height or not width:
        raise ValueError(
            f"`image` must be at least {patch} pixels high and wide; "
            f"got {tuple(pixels.shape[-2:])}."
        )
    if (height, width) == tuple(pixels.shape[-2:]):
        return pixels
    return F.interpolate(
        pixels.float(), (height, width), mode="bilinear", align_corners=False, antialias=True
    )
