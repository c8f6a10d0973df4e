"""Llama-shaped models in a forward pass of our own, over a static cache with rows of any length.

Reads the weights of the user's model where they are; it changes and copies none of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from .linear import few_rows_linear

_SHAPED = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
_reasons: WeakKeyDictionary[Any, str] = WeakKeyDictionary()
_CHUNK = 512  # Longest stretch of a prompt in one pass.


def why_not_llama(model: Any) -> str:
    """Return why a model cannot run by `LlamaRunner`; "" if it can.

    The last word has a comparison with the model's own `forward` on a few ids.
    """
    if model not in _reasons:
        _reasons[model] = _shape_mismatch(model) or _value_mismatch(model)
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
    error = float((torch.cat(found) - wanted).abs().max())
    unit = {torch.float64: 1e-9, torch.float32: 1e-4}.get(next(model.parameters()).dtype, 5e-2)
    limit = unit * (1 + float(wanted.abs().max()))
    return "" if error <= limit else f"its logits differ by {error:.2g}, more than {limit:.2g}"


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


def _linear(x: Tensor, module: nn.Linear) -> Tensor:
    y = few_rows_linear(x, module.weight)
    return y if module.bias is None else y + module.bias


def _norm(x: Tensor, module: Any) -> Tensor:
    return functional.rms_norm(x, x.shape[-1:], module.weight, module.variance_epsilon)


class LlamaBody:
    """The layers of a Llama-shaped model as a function of ids, positions and a cache.

    Args:
        model: Such a model of `transformers`.
    """

    def __init__(self, model: Any) -> None:
        config, inner = model.config, model.model
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
        groups = self.heads // self.kv_heads
        cos, sin = table[0][places][:, :, None], table[1][places][:, :, None]
        line = torch.arange(rows, device=ids.device)[:, None]
        seen = torch.arange(extent, device=ids.device) <= places[:, :, None]
        mask = torch.zeros(seen.shape, dtype=self.weight.dtype, device=ids.device)
        mask = mask.masked_fill_(~seen, float("-inf"))[:, None, None]
        scale = self.dim_head**-0.5
        x = functional.embedding(ids, self.weight).view(rows * width, -1)
        for index, layer in enumerate(self.layers):
            h = _norm(x, layer.before)
            q = _linear(h, layer.q).view(rows, width, self.heads, self.dim_head)
            k = _linear(h, layer.k).view(rows, width, self.kv_heads, self.dim_head)
            v = _linear(h, layer.v).view(rows, width, self.kv_heads, self.dim_head)
            if layer.q_norm is not None:
                q, k = _norm(q, layer.q_norm), _norm(k, layer.k_norm)
            both = torch.cat([q, k], dim=2)
            both = both * cos + both.roll(self.dim_head // 2, dims=-1) * sin
            q, k = both[:, :, : self.heads], both[:, :, self.heads :]
            keys[index, line, :, places] = k
            values[index, line, :, places] = v
            old_k, old_v = keys[index, :, :, :extent], values[index, :, :, :extent]
            # Heads that share keys are rows of one product.
            q = q.view(rows, width, self.kv_heads, groups, self.dim_head).permute(0, 2, 3, 1, 4)
            q = q.reshape(rows, self.kv_heads, groups * width, self.dim_head)
            scores = (q @ old_k.transpose(-1, -2)) * scale
            scores = scores.view(rows, self.kv_heads, groups, width, extent) + mask
            weights = scores.softmax(dim=-1, dtype=_at_least_float32(x.dtype)).to(x.dtype)
            mixed = weights.view(rows, self.kv_heads, groups * width, extent) @ old_v
            mixed = mixed.view(rows, self.kv_heads, groups, width, self.dim_head)
            mixed = mixed.permute(0, 3, 1, 2, 4).reshape(rows * width, -1)
            x = x + _linear(mixed, layer.out)
            h = _norm(x, layer.between)
            h = functional.silu(_linear(h, layer.gate)) * _linear(h, layer.up)
            x = x + _linear(h, layer.down)
        return _norm(x, self.norm).view(rows, width, -1)


class LlamaRunner:
    """Runs a Llama-shaped model by `LlamaBody`; see `Runner`.

    Args:
        model: A model that `why_not_llama` has nothing against.
        rows: Number of rows, 1 or more.
    """

    def __init__(self, model: Any, rows: int = 1) -> None:
        self.lengths = [0] * rows
        self._body = LlamaBody(model)
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
        states = body(ids, places, self._keys, self._values, extent, table)
        for row, feed in enumerate(feeds):
            self.lengths[row] += len(feed)
        wanted = [
            states[row, len(feed) - k : len(feed)]
            for row, (feed, k) in enumerate(zip(feeds, keep, strict=True))
        ]
        if not most:
            return wanted
        weight = body.head.weight if head is None else head
        logits = few_rows_linear(torch.cat(wanted), weight)
        if head is None and body.head.bias is not None:
            logits = logits + body.head.bias
        return list(logits.to(_at_least_float32(logits.dtype)).split(list(keep)))

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
