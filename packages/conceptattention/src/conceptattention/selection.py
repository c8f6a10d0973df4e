"""Selections of layers and steps: words, indices, slices, and shares of a run."""

from __future__ import annotations

import math
from collections.abc import Sequence

Selection = str | int | float | slice | Sequence[int | float]


def check_steps(steps: Selection) -> None:
    """Check a selection of steps as far as it can be checked before the run.

    Raises:
        ValueError: It is of no known form, or empty.
    """
    if isinstance(steps, str) and steps != "all" and noise_range(steps) is None:
        raise ValueError(
            f"`steps` must be 'all', 'noise:LOW-HIGH', an index, a slice or indices; got {steps!r}."
        )
    if not isinstance(steps, (str, int, float, slice)) and not list(steps):
        raise ValueError("`steps` must select at least one step; got none.")


def noise_range(steps: Selection) -> tuple[float, float] | None:
    """Return the bounds of "noise:LOW-HIGH", or None for a selection of another form.

    Raises:
        ValueError: They are no numbers in order between 0 and 1.
    """
    if not isinstance(steps, str) or not steps.startswith("noise:"):
        return None
    try:
        low, high = map(float, steps.removeprefix("noise:").split("-"))
    except ValueError:
        low, high = 1.0, 0.0
    if not 0 <= low <= high <= 1:
        raise ValueError(f"`steps` must be like 'noise:0.3-0.7', within 0 to 1; got {steps!r}.")
    return low, high


def resolve_layers(layers: Selection, count: int, default: Sequence[int]) -> tuple[int, ...]:
    """Return the selected layers of a model of `count` layers, in order.

    Args:
        layers: "default", "all", "last:N", an index, a slice, or indices.
        count: Number of layers.
        default: What "default" stands for.

    Raises:
        ValueError: It selects no layer or one out of range, or is of no known form.
    """
    if layers == "default":
        return tuple(default)
    if isinstance(layers, str) and layers.startswith("last:") and layers[5:].isdigit():
        layers = slice(max(count - int(layers[5:]), 0), None)
    chosen = resolve("layers", layers, count)
    if not chosen:
        raise ValueError(f"`layers` must select at least one of {count} layers; got {layers!r}.")
    return tuple(sorted(chosen))


def resolve(name: str, selection: Selection, total: int) -> set[int]:
    """Return a selection out of `total` as indices.

    Raises:
        ValueError: It selects an index out of range, or is of no known form.
    """
    if isinstance(selection, str):
        if selection == "all":
            return set(range(total))
        words = "'default', 'all', 'last:N'" if name == "layers" else "'all'"
        raise ValueError(f"`{name}` must be {words}, indices or a slice; got {selection!r}.")
    if isinstance(selection, slice):
        start, stop = (
            math.ceil(bound * total) if isinstance(bound, float) else bound
            for bound in (selection.start, selection.stop)
        )
        return set(range(total)[start : stop : selection.step])
    chosen = set()
    for index in [selection] if isinstance(selection, (int, float)) else selection:
        if isinstance(index, float):
            if not 0 <= index <= 1:
                raise ValueError(f"`{name}` as shares must be between 0 and 1; got {index}.")
            index = min(int(index * total), total - 1)
        if not -total <= index < total:
            raise ValueError(f"`{name}` must be between {-total} and {total - 1}; got {index}.")
        chosen.add(index % total)
    return chosen
