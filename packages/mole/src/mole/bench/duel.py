"""A decoder timed against the dense one, in rounds that take turns."""

import time
from collections.abc import Callable
from typing import Any

import torch

from fourfold_common import Results

from ..decode import Decoder
from ..lut import CachedStore
from .shapes import zipf_ids

ROUNDS = 12
_FILL = 2**16  # tokens that fill a cache before those that count


def _steps(decoder: Decoder, position: int, fed: torch.Tensor) -> float:
    """Return the time of a step, in ms, averaged over the steps that the fed ids are for."""
    decoder.position.fill_(position)
    decoder.step()
    count = len(fed)
    if decoder.device.type != "cuda":
        begin = time.perf_counter()
        for ids in fed:
            decoder.ids.copy_(ids)
            decoder.step()
        return (time.perf_counter() - begin) * 1e3 / count
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    for ids in fed:
        decoder.ids.copy_(ids)
        decoder.step()
    last.record()
    last.synchronize()
    elapsed: float = first.elapsed_time(last)
    return elapsed / count


def _device_bytes(decoder: Decoder, kind: str) -> int:
    """Return what weights, cache of keys and values, and rows take on the device."""
    tensors = [*decoder.model.parameters(), *decoder.model.buffers()]
    tensors += [t for layer in decoder.layers for t in layer if isinstance(t, torch.Tensor)]
    if decoder.store is not None:
        tensors.append(decoder.staging)
        tensors += [decoder.store.table] if isinstance(decoder.store, CachedStore) else []
        tensors += [decoder.store.table] if kind == "device" else []
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def _check(decoder: Decoder, prompts: torch.Tensor, new_tokens: int) -> float:
    """Return the share of decoded ids that the model itself finds likeliest, or nearly so.

    A choice counts as found where its logit is within 2 % of the spread of the model's best.
    """
    found = decoder.generate(prompts, new_tokens)
    with torch.no_grad():
        logits = decoder.model(found[:, :-1], use_cache=False).logits[:, prompts.shape[1] - 1 :]
    logits = logits.float()
    picked = logits.gather(-1, found[:, prompts.shape[1] :, None]).squeeze(-1)
    gap = (logits.amax(-1) - picked) / logits.std(-1)
    return float((gap <= 0.02).float().mean())


class Duel:
    """Timed rounds of a decoder against the dense one, which take turns.

    Args:
        results: Where figures go.
        say: Prints a line.
        dense: The dense decoder.
        prompts: What is decoded to see whether a decoder is right.
        steps: Steps in a round.
    """

    def __init__(
        self,
        results: Results,
        say: Callable[[str], None],
        dense: Decoder,
        prompts: torch.Tensor,
        steps: int,
    ) -> None:
        self.results, self.say, self.dense, self.steps = results, say, dense, steps
        self.prompts, self.batch = prompts, dense.batch
        share = _check(dense, prompts, 24)
        say(f"dense, batch {self.batch}: {100 * share:.1f} % of decoded ids are the model's choice")

    def run(
        self,
        name: str,
        decoder: Decoder,
        before_round: Callable[[], None] = lambda: None,
        kind: str = "",
        **parameters: Any,
    ) -> tuple[float, float]:
        """Add a decoder's times, and those of the dense one beside it; return both medians in ms.

        Args:
            name: What the figures call the decoder.
            decoder: The decoder.
            before_round: Called before every round.
            kind: Where its rows are.
            **parameters: What the figures say about the case.
        """
        share = _check(decoder, self.prompts, 24)
        # Ids that repeat as in prose; what a random model writes repeats itself too soon.
        fill = _FILL if isinstance(decoder.store, CachedStore) else 0
        vocab = self.dense.config.vocab_size
        ids = zipf_ids((fill + ROUNDS * self.steps * self.batch,), vocab, seed=1)
        if isinstance(decoder.store, CachedStore):
            for part in ids[:fill].split(1024):
                decoder.store.read(part)
            decoder.store.hits = decoder.store.misses = 0
        times: dict[str, list[float]] = {"dense": [], name: []}
        half = decoder.length // 2
        for given in ids[fill:].view(ROUNDS, self.steps, self.batch).to(self.dense.device):
            before_round()
            times["dense"].append(_steps(self.dense, half, given))
            times[name].append(_steps(decoder, half, given))
        if isinstance(decoder.store, CachedStore):
            hits, misses = decoder.store.hits, decoder.store.misses
            parameters["hit_rate"] = round(hits / (hits + misses), 3)
        parameters |= {"batch": self.batch, "length": decoder.length}
        found = {key: torch.tensor(value) for key, value in times.items()}
        ratios = found[name] / found["dense"]
        low, middle, high = (float(ratios.quantile(q)) for q in (0.2, 0.5, 0.8))
        for key, value in found.items():
            self.results.add(
                key if key == name else f"dense beside {name}",
                "decode",
                float(value.median()),
                "ms/token",
                p20=float(value.quantile(0.2)),
                p80=float(value.quantile(0.8)),
                n=ROUNDS * self.steps,
                error=1 - share if key == name else None,
                **parameters,
            )
        self.results.add(name, "over dense", middle, "x", p20=low, p80=high, n=ROUNDS, **parameters)
        memory = (_device_bytes(decoder, kind) - _device_bytes(self.dense, kind)) / 2**20
        self.results.add(name, "device memory over dense", memory, "MiB", **parameters)
        medians = float(found[name].median()), float(found["dense"].median())
        self.say(
            f"{name}, batch {self.batch}: {medians[0]:.4f} ms, dense {medians[1]:.4f} ms, ratio "
            f"{middle:.3f} [{low:.3f}, {high:.3f}], {memory:.1f} MiB over dense; "
            f"{100 * share:.1f} % of ids are the model's choice"
        )
        return medians


__all__ = ["ROUNDS", "Duel"]
