"""Runs: which calls of the transformer belong to which call of the pipeline, and which count."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .adapters import Adapter, Block, Call
from .concepts import PromptWords
from .selection import Selection, noise_range, resolve
from .stream import ConceptStream, Record, Recording


class StopForward(Exception):
    """Raised inside the model once every needed layer has been seen; `segment` catches it."""


@dataclass
class Run(Record):
    """One call of the pipeline.

    Args:
        timesteps: The scheduler's; every call of the pipeline makes a new list.
        images: Number of pictures; guided batches hold twice as many rows.
        step: Number of the present step.
        call: The latest conditional forward pass.
        index: What the scheduler counted at that pass.
        chosen: Steps within the selected noise levels, once they were looked for.
    """

    timesteps: Any = None
    images: int = 0
    step: int = 0
    call: Call | None = None
    index: int | None = None
    chosen: set[int] | None = None
    _places: tuple[Tensor, tuple[int, ...]] | None = None

    def places(self, adapter: Adapter) -> tuple[Tensor, tuple[int, ...]]:
        """Return which tokens belong to the picture, and the grid they fill; may synchronise."""
        if self._places is None:
            if self.call is None:
                raise RuntimeError("a run without a forward pass has no picture")
            self._places = adapter.positions(self.call)
        return self._places

    def close(self, adapter: Adapter) -> None:
        """Let go of the model's inputs, once no further pass of this run can come."""
        if self.means:
            self.places(adapter)
        self.call = self.timesteps = None


class Router:
    """Sorts forward passes into runs, and carries the concepts through those that count.

    It is what the taps report to. A scheduler makes a new list of timesteps for every run and
    counts its steps in Python, so none of this reads the device. Within a step the first call is
    the conditional one.

    Args:
        pipe: The pipeline.
        model: Its transformer.
        adapter: Of the model family.
        steps: Which steps count.
        recording: What is recorded.
        prompt: Where the concepts stand in the prompt, for `PROMPT_SPACES`.
    """

    def __init__(
        self,
        pipe: Any,
        model: nn.Module,
        adapter: Adapter,
        steps: Selection,
        recording: Recording,
        prompt: PromptWords | None,
    ) -> None:
        self.pipe, self.model, self.adapter = pipe, model, adapter
        self.steps, self.recording, self.prompt = steps, recording, prompt
        self.embeds: Tensor | None = None
        self.runs: list[Run] = []
        self.direct = False  # the transformer is called by us, not by the pipeline
        self.stop_early = False
        self._stream: ConceptStream | None = None

    @property
    def listening(self) -> bool:
        """Whether this forward pass counts, and none of its modules runs for the concepts."""
        return self._stream is not None and not self._stream.busy

    def begin(self, call: Call) -> None:
        """Decide whether a forward pass counts: the conditional one of a selected step."""
        self._stream = None
        if self.embeds is None or not self._counts(call):
            return
        run = self.runs[-1]
        self._stream = ConceptStream(
            self.model, self.adapter, call, run.images, self.embeds, self.prompt,
            self.recording, run, run.step,
        )  # fmt: skip

    def start(self, inputs: Tensor, text: Tensor) -> None:
        """Start the concept stream where the prompt enters the model."""
        if self._stream is not None:
            self._stream.start(inputs, text)

    def layer(
        self, block: Block, taps: Mapping[str, Tensor] | None, arguments: Mapping[str, Any]
    ) -> None:
        """Carry the concepts through one layer."""
        if self._stream is not None:
            self._stream.layer(block, taps, arguments)
        if self.stop_early and block.index == self.recording.layers[-1]:
            raise StopForward

    def end(self) -> None:
        """Forget the forward pass."""
        self._stream = None

    def _counts(self, call: Call) -> bool:
        scheduler = getattr(self.pipe, "scheduler", None)
        timesteps = getattr(scheduler, "timesteps", None)
        index = getattr(scheduler, "step_index", None)
        text = call.arguments.get("encoder_hidden_states")
        run = self.runs[-1] if self.runs else None
        if run is None or run.timesteps is not timesteps:
            if run is not None:
                run.close(self.adapter)
            guided = not self.direct and self.adapter.guided(self.pipe)
            rows = self.adapter.rows(call)
            run = Run(timesteps=timesteps, images=rows // 2 if guided else rows)
            self.runs.append(run)
        elif (
            index == run.index
            and run.call is not None
            and text is not run.call.arguments.get("encoder_hidden_states")
        ):
            return False
        else:
            run.step += 1
        run.call, run.index = call, index
        if run.step not in self._chosen(run):
            return False
        run.steps.add(run.step)
        return True

    def _chosen(self, run: Run) -> set[int]:
        """Return the selected steps of a run; noise levels are read from the device once a run."""
        bounds, length = noise_range(self.steps), self._length(run)
        if bounds is None:
            return resolve("steps", self.steps, length)
        if run.chosen is None:
            if run.timesteps is None:
                raise ValueError("`steps` as noise levels needs a pipeline with a scheduler.")
            most = self.pipe.scheduler.config.num_train_timesteps
            levels = [float(time) / most for time in run.timesteps][-length:]
            run.chosen = {i for i, t in enumerate(levels) if bounds[0] <= t <= bounds[1]}
            if not run.chosen:
                made = ", ".join(f"{t:.2f}" for t in levels)
                raise ValueError(f"`steps` {self.steps!r} holds none of this run's levels: {made}.")
        return run.chosen

    def _length(self, run: Run) -> int:
        """Return the number of steps of a run.

        Pipelines that start from a picture use the end of the scheduler's list alone, and say how
        many of its entries they use.
        """
        listed = 0 if run.timesteps is None else len(run.timesteps)
        used = getattr(self.pipe, "_num_timesteps", None)
        length = used if isinstance(used, int) and 0 < used <= listed else listed
        return max(run.step + 1, length)
