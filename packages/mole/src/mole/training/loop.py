"""The training loop: one optimiser step over all processes' micro-batches, resumable.

Gradients are averaged over processes once a step, whatever `dedup` is, so `"step"` works on any
number of them. With `sharded`, every process keeps its share of weights, gradients and optimiser
state only (FSDP2). Data and dropout of a step are a function of seed and step alone: an interrupted
run goes on as if it had not been interrupted, and the number of processes only changes the order of
summation. A checkpoint holds whole tensors by name, so that it fits any number of processes.
"""

import json
import math
import shutil
import time
import warnings
import zlib
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from jaxtyping import Int
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule, fully_shard
from tqdm.auto import tqdm

from ..lookup import StepBank, distinct_ids

_CHECKPOINT, _STATE, _LOG = "checkpoint", "training_state.pt", "training_log.jsonl"
_FINAL_LR_SHARE = 0.1
_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)
_PADDING = 512  # distinct ids of a micro-batch are padded to a multiple of this
_BUCKET = 2**25  # elements averaged over processes at a time


@dataclass(frozen=True)
class TrainSettings:
    """What decides the result, next to model and data.

    Attributes:
        steps: Optimiser steps.
        batch: Sequences in a step, over all processes.
        micro_batch: Sequences in one forward pass of one process.
        context: Tokens in a sequence.
        lr: Peak learning rate; linear warm-up, then cosine to a tenth.
        expert_lr: That of routers and lookup experts, if it is another: new ones in a model that
            is trained already have further to go.
        warmup: Share of the steps that warm up.
        weight_decay: Decay of matrices; norms are left alone.
        clip: Largest norm of the gradient.
        seed: Seed of the data order and of dropout.

    Raises:
        ValueError: A value is out of its range.
    """

    steps: int = 1000
    batch: int = 64
    micro_batch: int = 8
    context: int = 512
    lr: float = 6e-4
    expert_lr: float | None = None
    warmup: float = 0.01
    weight_decay: float = 0.1
    clip: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Check every value."""
        least = {"steps": 1, "batch": 1, "micro_batch": 1, "context": 2, "lr": 0.0,
                 "expert_lr": 0.0, "warmup": 0.0, "weight_decay": 0.0, "clip": 0.0}  # fmt: skip
        for name, bound in least.items():
            value = getattr(self, name)
            if value is not None and not bound <= value < math.inf:
                raise ValueError(f"`{name}` must be at least {bound:g} and finite; got {value}.")
        if self.warmup > 1:
            raise ValueError(f"`warmup` must be a share of the steps, 0 to 1; got {self.warmup}.")
        if not self.clip:
            raise ValueError("`clip` must be more than 0: nothing would be learned; got 0.")

    def schedule(self, step: int) -> float:
        """Return a step's share of the peak learning rate."""
        warmup = max(1, round(self.warmup * self.steps))
        if step < warmup:
            return (step + 1) / warmup
        done = (step - warmup) / max(1, self.steps - warmup)
        return _FINAL_LR_SHARE + (1 - _FINAL_LR_SHARE) * (1 + math.cos(math.pi * done)) / 2

    def crops(self, step: int, total: int) -> Int[Tensor, " batch"]:
        """Return where the sequences of a step begin among `total` tokens."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        return torch.randint(total - self.context + 1, (self.batch,), generator=generator)


def train(
    model: Any,
    tokens: Int[Tensor, " total"],
    output: str | Path,
    settings: TrainSettings,
    *,
    tokenizer: Any = None,
    resume: bool = True,
    save_every: int = 500,
    log_every: int = 10,
    stop_after: int | None = None,
    mixed_precision: str | None = None,
    compiled: bool = False,
    sharded: bool = False,
    progress: bool = True,
) -> Any:
    """Train a model on one row of tokens and return it; the result is saved to `output`.

    Works in one process and under `accelerate launch`. With `dedup="step"` the experts of a lookup
    model run once a step.

    Args:
        model: A causal language model of this package.
        tokens: All training tokens, on the CPU.
        output: Folder for the model, the checkpoint of an unfinished run, and the log. A folder
            with a finished model is refused unless `resume` is false.
        settings: What decides the result.
        tokenizer: Saved beside the model.
        resume: Go on from the checkpoint in `output`, if there is one.
        save_every: Steps between checkpoints.
        log_every: Steps between lines of the log.
        stop_after: Stop, with a checkpoint, after this step; the schedule stays that of
            `settings.steps`.
        mixed_precision: `"no"` or `"bf16"`; if None bf16 on a GPU that has it.
        compiled: Compile the layers, while they are trained.
        sharded: Split weights, gradients and optimiser state over the processes (FSDP2). Needs at
            least two, and `dedup` `"off"` or `"micro"`. The model that is returned is split, the
            saved one whole.
        progress: Show a progress bar with tokens/s, loss and learning rate.

    Raises:
        ValueError: The model is in table form, the text is shorter than a sequence, `batch` cannot
            be shared out, `output` holds a finished model, the checkpoint is of other settings or
            another text, or the loss is no longer finite.
    """
    if getattr(model.config, "lookup_form", None) == "table":
        raise ValueError("`model` must be in expert form; what is trained does not reach a table.")
    if min(save_every, log_every, 1 if stop_after is None else stop_after) < 1:
        raise ValueError(
            "`save_every`, `log_every` and `stop_after` must be at least 1; "
            f"got {save_every}, {log_every} and {stop_after}."
        )
    if mixed_precision is None:
        mixed_precision = "bf16" if _has_bf16() else "no"
    if mixed_precision not in ("no", "bf16"):
        raise ValueError(f"`mixed_precision` must be 'no' or 'bf16'; got {mixed_precision!r}.")
    accelerator = Accelerator(mixed_precision=mixed_precision)
    _check(tokens, settings, accelerator.num_processes)
    if sharded and (accelerator.num_processes < 2 or _by_step(model)):
        raise ValueError(
            "`sharded` needs at least two processes and `dedup` 'off' or 'micro'; got "
            f"{accelerator.num_processes} and {getattr(model.config, 'dedup', None)!r}."
        )
    output = Path(output)
    if resume and (output / "config.json").exists() and not (output / _CHECKPOINT).exists():
        raise ValueError(
            f"`output` must be a new folder or that of an unfinished run; {output} holds a "
            "finished model. `resume=False` (`--no-resume`) trains anew and replaces it."
        )
    kind = type(model)
    model = _prepared(model, accelerator, compiled, sharded)
    optimizer = _optimizer(model, settings)
    peaks = [group["lr"] for group in optimizer.param_groups]
    text: Any = tokens.int().contiguous().numpy()
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    decisive = asdict(settings) | {"text": zlib.crc32(text), "trained weights": trained}
    first = _resume(model, optimizer, output, decisive) if resume else 0
    last = settings.steps if stop_after is None else min(settings.steps, stop_after)
    main = accelerator.is_main_process
    report = _Report(output, settings, first, main, progress)
    for step in range(first, last):
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * settings.schedule(step)
        torch.manual_seed((settings.seed * 1_000_003 + step) * 1009 + accelerator.process_index)
        loss = _step(accelerator, model, optimizer, tokens, settings, step)
        report.advance()
        done = step + 1
        saving = done < settings.steps and (done % save_every == 0 or done == last)
        if saving or done % log_every == 0 or done == last:
            value = accelerator.reduce(loss, "mean").item()
            if not math.isfinite(value):
                raise ValueError(
                    f"the loss is {value} at step {done}; lower `lr` and resume from the last "
                    "checkpoint."
                )
            report.write(done, value)
        if saving:
            # Every process takes part in gathering, one writes.
            state = {
                "model": get_model_state_dict(model, options=_WHOLE),
                "optimizer": get_optimizer_state_dict(model, optimizer, options=_WHOLE),
                "step": done,
                "settings": decisive,
            }
            if main:
                _save(state, output)
    report.close()
    if compiled:
        for layer in model.model.layers:  # what comes next has shapes of its own
            layer._compiled_call_impl = None
    accelerator.wait_for_everyone()
    if last == settings.steps:
        # Every process takes part in gathering what is split, one writes.
        weights = get_model_state_dict(model, options=_WHOLE) if sharded else None
        if main:
            _write_result(model, kind, weights, output, tokenizer)
    accelerator.wait_for_everyone()
    return model


class _Report:
    """The log and the bar of a run, kept by its first process.

    Args:
        output: Folder of the log; made if missing.
        settings: The run's.
        first: Steps that were done before; later lines of the log are dropped.
        main: Whether this is the first process.
        progress: Whether to show the bar.
    """

    def __init__(
        self, output: Path, settings: TrainSettings, first: int, main: bool, progress: bool
    ) -> None:
        self._path, self._settings, self._main = output / _LOG, settings, main
        if main:
            output.mkdir(parents=True, exist_ok=True)
            _cut_log(self._path, first)
        self._bar = tqdm(
            total=settings.steps, initial=first, desc="training", unit="step",
            disable=not (progress and main),
        )  # fmt: skip
        self._clock, self._steps = time.perf_counter(), 0

    def advance(self) -> None:
        """Count a step."""
        self._steps += 1
        self._bar.update()

    def write(self, step: int, loss: float) -> None:
        """Write a line about the steps since the last one."""
        size = self._settings.batch * self._settings.context
        now = time.perf_counter()
        speed = self._steps * size / (now - self._clock)
        self._clock, self._steps = now, 0
        lr = self._settings.lr * self._settings.schedule(step - 1)
        self._bar.set_postfix_str(f"{speed:,.0f} tok/s, loss {loss:.3f}, lr {lr:.1e}")
        line = {"step": step, "tokens": step * size, "loss": loss, "lr": lr,
                "tokens_per_second": speed}  # fmt: skip
        if self._main:
            with open(self._path, "a", encoding="utf-8") as log:
                log.write(json.dumps(line) + "\n")

    def close(self) -> None:
        """Leave the bar as it is."""
        self._bar.close()


def _prepared(model: Any, accelerator: Accelerator, compiled: bool, sharded: bool) -> Any:
    """Return the model where it is trained: with the first process's weights, perhaps split."""
    model = model.to(accelerator.device).train()
    _synchronise(accelerator, model)
    if compiled:
        # Layers share their code; it is compiled in a version for each number of distinct ids.
        torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
        for layer in model.model.layers:
            layer.compile(dynamic=False)
    if sharded:
        _shard(model)
    return model


def _write_result(
    model: Any, kind: Any, weights: dict[str, Any] | None, output: Path, tokenizer: Any
) -> None:
    """Write the trained model and its tokenizer; the checkpoint goes when they are there.

    Args:
        model: The model.
        kind: Its class before it was split.
        weights: All its weights, whole, if they are split over the processes; else None.
        output: Folder to write.
        tokenizer: Saved beside the model, unless it is None.
    """
    if weights is None:
        model.save_pretrained(output)
    else:
        with torch.device("meta"):
            plain = kind(model.config)
        tied = plain.all_tied_weights_keys
        whole = {name: value for name, value in weights.items() if name not in tied}
        plain.save_pretrained(output, state_dict=whole)
    if tokenizer is not None:
        tokenizer.save_pretrained(output)
    shutil.rmtree(output / _CHECKPOINT, ignore_errors=True)


def _step(
    accelerator: Accelerator,
    model: Any,
    optimizer: torch.optim.Optimizer,
    tokens: Tensor,
    settings: TrainSettings,
    step: int,
) -> Tensor:
    """Run one optimiser step; return this process's mean loss."""
    crops = settings.crops(step, len(tokens))
    crops = crops[accelerator.process_index :: accelerator.num_processes]
    host = tokens[crops[:, None] + torch.arange(settings.context)].long()
    device = accelerator.device
    ids = host.to(device)
    # Found on the host, distinct ids make nothing wait; padded, they have few shapes.
    given: list[dict[str, Any]] = [{} for _ in host.split(settings.micro_batch)]
    if getattr(model.config, "dedup", None) == "micro":
        for number, batch in enumerate(host.split(settings.micro_batch)):
            found = distinct_ids(batch, model.config.vocab_size, _PADDING)
            given[number]["distinct"] = tuple(part.to(device) for part in found)
    total = torch.zeros((), device=device)
    with accelerator.autocast(), StepBank(model, ids) if _by_step(model) else nullcontext():
        for batch, distinct in zip(ids.split(settings.micro_batch), given, strict=True):
            share = len(batch) / len(ids)
            loss = share * model(input_ids=batch, labels=batch, use_cache=False, **distinct).loss
            loss.backward()
            total += loss.detach()
    if accelerator.num_processes > 1 and not isinstance(model, FSDPModule):
        _average(accelerator, [p.grad for p in model.parameters() if p.grad is not None])
    torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return total


def _by_step(model: Any) -> bool:
    """Return whether the experts run once a step."""
    return getattr(model.config, "dedup", None) == "step"


def _shard(model: Any) -> None:
    """Split every layer's parameters over the processes, and then the rest."""
    # A layer's output is a view, which is right as long as nothing changes it in place.
    warnings.filterwarnings("ignore", message=".*returned a view tensor", category=UserWarning)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)


def _average(accelerator: Accelerator, grads: list[Tensor]) -> None:
    """Replace gradients by their mean over all processes, many at a time."""
    while grads:
        some: list[Tensor] = []
        size = 0
        while grads and (not some or size + grads[-1].numel() <= _BUCKET):
            some.append(grads.pop())
            size += some[-1].numel()
        flat = torch.cat([grad.flatten() for grad in some])
        flat = accelerator.reduce(flat, "mean")
        for grad, mean in zip(some, flat.split([g.numel() for g in some]), strict=True):
            grad.copy_(mean.view_as(grad))


def _synchronise(accelerator: Accelerator, model: Any) -> None:
    """Give all processes the weights of the first."""
    if accelerator.num_processes > 1:
        from accelerate.utils import broadcast

        for parameter in model.parameters():
            parameter.data.copy_(broadcast(parameter.data))


def _optimizer(model: Any, settings: TrainSettings) -> torch.optim.Optimizer:
    """Return AdamW over groups of weights by what decays, and by learning rate if there are two."""
    kinds: dict[tuple[float, float], list[Tensor]] = {}
    for name, weight in model.named_parameters():
        lr = settings.lr
        if settings.expert_lr is not None and ".lookup." in name:
            lr = settings.expert_lr
        decay = settings.weight_decay if weight.dim() > 1 else 0.0
        kinds.setdefault((lr, decay), []).append(weight)
    groups = [{"params": p, "lr": lr, "weight_decay": d} for (lr, d), p in kinds.items()]
    fused = next(model.parameters()).is_cuda
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8, fused=fused)


def _check(tokens: Tensor, settings: TrainSettings, processes: int) -> None:
    """Raise an error if the text is too short, or a step's sequences cannot be shared out."""
    if len(tokens) < settings.context:
        raise ValueError(
            f"`tokens` must hold at least one sequence of `context` tokens; got {len(tokens)} "
            f"tokens and context {settings.context}."
        )
    if settings.batch % processes:
        raise ValueError(
            f"`batch` must be a multiple of the number of processes, {processes}; "
            f"got {settings.batch}."
        )


def _has_bf16() -> bool:
    cuda = torch.cuda.is_available()
    return cuda and torch.cuda.is_bf16_supported(including_emulation=False)


def _save(state: dict[str, Any], output: Path) -> None:
    """Write a checkpoint, whole or not at all: the old one stays until the new one is there."""
    path = output / _CHECKPOINT / _STATE
    path.parent.mkdir(exist_ok=True)
    partial = path.with_name(path.name + ".tmp")
    torch.save(state, partial)
    partial.replace(path)


def _cut_log(path: Path, step: int) -> None:
    """Drop the log's lines after a step: they are of a run that did not get to its checkpoint."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except ValueError:  # torn when the run was killed
            break
    partial = path.with_name(path.name + ".tmp")
    partial.write_text("".join(kept), encoding="utf-8")
    partial.replace(path)


def _resume(
    model: Any, optimizer: torch.optim.Optimizer, output: Path, settings: dict[str, Any]
) -> int:
    """Load the checkpoint, if any; return the number of steps that are done."""
    path = output / _CHECKPOINT / _STATE
    if not path.is_file():
        return 0
    state = torch.load(path, map_location="cpu", weights_only=True)
    changed = [name for name, value in settings.items() if state["settings"].get(name) != value]
    if changed:
        raise ValueError(
            f"{path.parent} was written with other settings ({', '.join(changed)}); give the same, "
            "another `output`, or `resume=False` (`--no-resume`)."
        )
    set_model_state_dict(model, state["model"], options=_WHOLE)
    set_optimizer_state_dict(model, optimizer, state["optimizer"], options=_WHOLE)
    step: int = state["step"]
    return step


__all__ = ["TrainSettings", "train"]
