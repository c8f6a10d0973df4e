"""Llama-shaped models in a forward pass of our own, over a static cache with rows of any length.

Reads the weights of the user's model where they are; it changes and copies none of them.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from .devices import on
from .kernels.decode import pick_steps

_logger = logging.getLogger(__name__)
_SHAPED = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
_reasons: WeakKeyDictionary[Any, str] = WeakKeyDictionary()
_CHUNK = 512  # Longest stretch of a prompt in one pass.


def why_not_llama(model: Any) -> str:
    """Return why a model cannot run by `LlamaRunner`; "" if it can.

    The last word has a comparison with the model's own `forward` on a few ids.
    """
    if model not in _reasons:
        reason = _shape_mismatch(model)
        if not reason and (reason := _value_mismatch(model)):
            _logger.warning("%s runs by its own forward, slower: %s", type(model).__name__, reason)
        _reasons[model] = reason
    return _reasons[model]


def _shape_mismatch(model: Any) -> str:
    name = type(model).__name__
    if name not in _SHAPED or not type(model).__module__.startswith("transformers."):
        return f"{name} is not among {', '.join(_SHAPED)}"
    config = model.config
    if config.rope_parameters.get("rope_type", "default") not in ("default", "llama3", "linear"):
        return "its rotary positions depend on the length"
    window = getattr(config, "sliding_window", None)
    if window and getattr(config, "use_sliding_window", True):
        return "its attention has a sliding window"
    if config.hidden_act not in ("silu", "swish"):
        return f"its activation is {config.hidden_act!r}"
    weights = list(model.parameters())
    if len({(w.dtype, w.device) for w in weights}) > 1 or weights[0].device.type == "meta":
        return "its weights are of several types or on several devices"
    for module in model.modules():
        if hasattr(module, "_hf_hook") or module._forward_hooks or module._forward_pre_hooks:
            return "it has hooks"
        if module.__class__.__name__.startswith("Linear") and type(module) is not nn.Linear:
            return "its linear layers are quantised or adapted"
    return ""


def _value_mismatch(model: Any) -> str:
    size = model.config.vocab_size
    ids = [(7 * i + 3) % size for i in range(8)]
    runner = LlamaRunner(model, 1)
    with torch.no_grad():
        wanted = model(input_ids=torch.tensor([ids], device=model.device), use_cache=False)
        found = runner.extend([ids[:5]], [5]) + runner.extend([ids[5:]], [3])
    wanted = wanted.logits[0].float()
    # Of all logits together: the worst of them is off by more than a twentieth of the largest where
    # a model rounds to bfloat16, and so are transformers' own.
    error = float((torch.cat(found) - wanted).pow(2).mean().sqrt() / wanted.std())
    half = next(model.parameters()).dtype in (torch.float16, torch.bfloat16)
    limit = 0.15 if half else 1e-3
    return "" if error <= limit else f"its logits differ by {error:.2g} of their spread"


class _Layer:
    """The weights of one layer, by reference."""

    def __init__(self, layer: Any) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.before = layer.input_layernorm
        self.between = layer.post_attention_layernorm
        self.q, self.k, self.v = attention.q_proj, attention.k_proj, attention.v_proj
        self.out = attention.o_proj
        self.q_norm = getattr(attention, "q_norm", None)
        self.k_norm = getattr(attention, "k_norm", None)
        self.gate, self.up, self.down = mlp.gate_proj, mlp.up_proj, mlp.down_proj


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


class LlamaBody:
    """The layers of a Llama-shaped model as a function of ids, positions and a cache.

    Args:
        model: Such a model of `transformers`.
        backend: As for `kernels.decode.pick_steps`.
    """

    def __init__(self, model: Any, backend: str = "auto") -> None:
        config, inner = model.config, model.model
        weight = inner.embed_tokens.weight
        self.steps = pick_steps(weight.device, weight.dtype, backend)
        self.heads = config.num_attention_heads
        self.kv_heads = config.num_key_value_heads
        self.dim_head = getattr(config, "head_dim", None) or config.hidden_size // self.heads
        self.layers = [_Layer(layer) for layer in inner.layers]
        self.embedding, self.norm = inner.embed_tokens, inner.norm
        self.head = model.lm_head
        self._rotary = inner.rotary_emb
        self._table: tuple[Tensor, Tensor] | None = None

    @property
    def weight(self) -> Tensor:
        """A weight, for its type and device."""
        weight: Tensor = self.embedding.weight
        return weight

    def rotary_table(self, length: int) -> tuple[Tensor, Tensor]:
        """Return cosines, and sines signed for a rolled vector; shape `(length or more, dim)`."""
        if self._table is None or len(self._table[0]) < length:
            places = torch.arange(max(length, 256), device=self.weight.device)[None]
            cos, sin = self._rotary(self.weight[:1], places)
            half = self.dim_head // 2
            sin = torch.cat([-sin[0, :, :half], sin[0, :, half:]], dim=-1)
            self._table = cos[0].clone(), sin
        return self._table

    def __call__(
        self,
        ids: Int[Tensor, "rows width"],
        places: Int[Tensor, "rows width"],
        keys: Float[Tensor, "layers rows kv_heads capacity dim"],
        values: Float[Tensor, "layers rows kv_heads capacity dim"],
        extent: int,
        table: tuple[Tensor, Tensor],
    ) -> Float[Tensor, "rows width hidden"]:
        """Return the last hidden states, after the final norm; write keys and values.

        Args:
            ids: Ids, padded at the end of each row.
            places: Their positions. Each attends to its row's entries up to its own position.
            keys: The cache, written at `places`.
            values: The same.
            extent: Entries to look at; above all positions.
            table: A `rotary_table` that reaches all positions.
        """
        rows, width = ids.shape
        steps = self.steps
        cos, sin = table
        places = places.contiguous()  # As the kernels read them.
        x = functional.embedding(ids, self.weight).view(rows * width, -1)
        x, h = steps.add_rms_norm(x, None, *_norm(self.layers[0].before))
        for index, layer in enumerate(self.layers):
            q, k, v = self._linears(h, layer.q, layer.k, layer.v)
            q = q.view(rows, width, self.heads, self.dim_head)
            k = k.view(rows, width, self.kv_heads, self.dim_head)
            v = v.view(rows, width, self.kv_heads, self.dim_head)
            if layer.q_norm is not None and layer.k_norm is not None:
                q = functional.rms_norm(q, (self.dim_head,), *_norm(layer.q_norm))
                k = functional.rms_norm(k, (self.dim_head,), *_norm(layer.k_norm))
            q = steps.rope_store(q, k, v, cos, sin, places, keys[index], values[index])
            mixed = steps.attend(q, keys[index], values[index], places, extent)
            o = self._linear(mixed.reshape(rows * width, -1), layer.out)
            x, h = steps.add_rms_norm(x, o, *_norm(layer.between))
            h = self._gated(h, layer.gate, layer.up)
            after = self.layers[index + 1].before if index + 1 < len(self.layers) else self.norm
            x, h = steps.add_rms_norm(x, self._linear(h, layer.down), *_norm(after))
        return h.view(rows, width, -1)

    def _linear(self, x: Tensor, module: nn.Linear) -> Tensor:
        y = self.steps.linear(x, module.weight)
        return y if module.bias is None else y + module.bias

    def _linears(self, x: Tensor, *modules: nn.Linear) -> list[Tensor]:
        found = self.steps.linears(x, tuple(module.weight for module in modules))
        return [
            y if module.bias is None else y + module.bias
            for y, module in zip(found, modules, strict=True)
        ]

    def _gated(self, x: Tensor, gate: nn.Linear, up: nn.Linear) -> Tensor:
        if gate.bias is None and up.bias is None:
            return self.steps.gated(x, gate.weight, up.weight)
        return functional.silu(self._linear(x, gate)) * self._linear(x, up)

    def logits(
        self, states: Float[Tensor, "tokens hidden"], head: Tensor | None = None
    ) -> Float[Tensor, "tokens kept"]:
        """Return logits in float32 or wider.

        Args:
            states: Hidden states, as `__call__` returns them.
            head: Rows of the head to compute; all if missing.
        """
        out = self.raw_logits(states, head)
        return out.to(_at_least_float32(out.dtype))

    def raw_logits(
        self, states: Float[Tensor, "tokens hidden"], head: Tensor | None = None
    ) -> Float[Tensor, "tokens kept"]:
        """Return the same in the type of the weights, for kernels that widen them."""
        if head is None:
            head, bias = self.head.weight, self.head.bias
        else:
            bias = None
        out = self.steps.linear(states, head)
        return out if bias is None else out + bias


def _norm(module: Any) -> tuple[Tensor, float]:
    return module.weight, module.variance_epsilon


class LlamaRunner:
    """Runs a Llama-shaped model by `LlamaBody`; see `Runner`.

    Args:
        model: A model that `why_not_llama` has nothing against.
        rows: Number of rows, 1 or more.
        backend: As for `kernels.decode.pick_steps`.
    """

    def __init__(self, model: Any, rows: int = 1, backend: str = "auto") -> None:
        self.lengths = [0] * rows
        self._body = LlamaBody(model, backend)
        self._keys = self._values = self._room(rows, 0)

    def _room(self, rows: int, capacity: int) -> Tensor:
        body = self._body
        shape = len(body.layers), rows, body.kv_heads, capacity, body.dim_head
        return torch.zeros(shape, dtype=body.weight.dtype, device=body.weight.device)

    def _reserve(self, capacity: int) -> None:
        held = self._keys.shape[3]
        if capacity <= held:
            return
        capacity = max(capacity, 2 * held, 128)
        for name in ("_keys", "_values"):
            wider = self._room(len(self.lengths), capacity)
            wider[:, :, :, :held] = getattr(self, name)
            setattr(self, name, wider)

    def extend(
        self, feeds: Sequence[Sequence[int]], keep: Sequence[int], head: Tensor | None = None
    ) -> list[Tensor]:
        """See `Runner`."""
        width, most = max(map(len, feeds)), max(keep)
        if not width:
            return [torch.empty(0) for _ in feeds]
        if width > _CHUNK + most:  # A long prompt in stretches, which need no logits.
            cut = [min(_CHUNK, max(len(feed) - most, 0)) for feed in feeds]
            self.extend([f[:c] for f, c in zip(feeds, cut, strict=True)], [0] * len(feeds))
            return self.extend([f[c:] for f, c in zip(feeds, cut, strict=True)], keep, head)
        body, device = self._body, self._body.weight.device
        extent = max(self.lengths) + width
        self._reserve(extent)
        padded = [[*feed, *[0] * (width - len(feed))] for feed in feeds]
        starts = torch.tensor(self.lengths)[:, None]
        places = (starts + torch.arange(width)).to(device)
        ids = torch.tensor(padded, device=device)
        table = body.rotary_table(extent)
        with on(device):
            states = body(ids, places, self._keys, self._values, extent, table)
            for row, feed in enumerate(feeds):
                self.lengths[row] += len(feed)
            wanted = [
                states[row, len(feed) - k : len(feed)]
                for row, (feed, k) in enumerate(zip(feeds, keep, strict=True))
            ]
            if not most:
                return wanted
            return list(body.logits(torch.cat(wanted), head).split(list(keep)))

    def crop(self, lengths: Sequence[int]) -> None:
        """See `Runner`."""
        self.lengths = [min(a, b) for a, b in zip(self.lengths, lengths, strict=True)]

    def select(self, rows: Sequence[int]) -> None:
        """See `Runner`."""
        if list(rows) == list(range(len(self.lengths))):
            return
        index = torch.tensor(list(rows), device=self._keys.device)
        self._keys, self._values = self._keys[:, index], self._values[:, index]
        self.lengths = [self.lengths[row] for row in rows]
