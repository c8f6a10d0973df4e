"""What users choose: concepts, layers and steps, checked and turned into indices."""

from __future__ import annotations

import math
from collections.abc import Sequence

Selection = str | int | float | slice | Sequence[int | float]
MAX_CONCEPTS = 512


def check_concepts(
    concepts: Sequence[str] | Sequence[Sequence[str]],
) -> tuple[str, ...] | tuple[tuple[str, ...], ...]:
    """Return the concepts as tuples.

    Raises:
        TypeError: Not a sequence of strings or of sequences of strings.
        ValueError: Empty, repeated, too many, or lists of unequal length.
    """
    if isinstance(concepts, str) or not isinstance(concepts, Sequence):
        raise TypeError(f"`concepts` must be a list of words; got {concepts!r}.")
    if not concepts:
        raise ValueError("`concepts` must hold at least one word; got none.")
    if not isinstance(concepts[0], str) and isinstance(concepts[0], Sequence):
        lists = tuple(check_concepts(row) for row in concepts)  # type: ignore[arg-type]
        lengths = [len(row) for row in lists]
        if len(set(lengths)) > 1:
            raise ValueError(f"`concepts` must hold lists of one length; got lengths {lengths}.")
        return lists  # type: ignore[return-value]
    for word in concepts:
        if not isinstance(word, str):
            raise TypeError(f"`concepts` must hold strings; got {word!r}.")
        if not word.strip():
            raise ValueError(f"`concepts` must hold words; got {word!r}.")
    repeated = [word for word in dict.fromkeys(concepts) if list(concepts).count(word) > 1]
    if repeated:
        raise ValueError(f"`concepts` must differ from each other; got {repeated[0]!r} twice.")
    if len(concepts) > MAX_CONCEPTS:
        raise ValueError(f"`concepts` must hold at most {MAX_CONCEPTS} words; got {len(concepts)}.")
    return tuple(str(word) for word in concepts)


def select_layers(layers: Selection, count: int, default: Sequence[int]) -> tuple[int, ...]:
    """Return the selected layers in order.

    Args:
        layers: As in `ConceptAttention`.
        count: How many layers there are.
        default: What "default" stands for.

    Raises:
        ValueError: None is selected, or one that is not there.
    """
    if layers == "default":
        return tuple(default)
    if isinstance(layers, str) and layers.startswith("last:") and layers[5:].isdigit():
        layers = slice(max(count - int(layers[5:]), 0), None)
    chosen = resolve("layers", layers, count)
    if not chosen:
        raise ValueError(f"`layers` must select at least one of {count} layers; got {layers!r}.")
    return tuple(sorted(chosen))


def check_steps(steps: Selection) -> None:
    """Check a selection of steps as far as it can be checked before the run."""
    if isinstance(steps, str) and steps != "all":
        raise ValueError(f"`steps` must be 'all', an index, a slice or indices; got {steps!r}.")
    if not isinstance(steps, (str, int, float, slice)) and not list(steps):
        raise ValueError("`steps` must select at least one step; got none.")


def resolve_steps(steps: Selection, total: int) -> set[int]:
    """Return the selected steps of a run of `total` steps."""
    return resolve("steps", steps, total)


def resolve(name: str, selection: Selection, total: int) -> set[int]:
    """Return a selection as indices.

    Raises:
        ValueError: It selects an index out of range, or is of no known form.
    """
    if isinstance(selection, str):
        if selection == "all":
            return set(range(total))
        raise ValueError(f"`{name}` must be 'all', indices or a slice; got {selection!r}.")
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
