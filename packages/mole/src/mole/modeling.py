"""The lookup-expert language model, and its dense and mixture-of-experts twins.

Importing this module registers the three with transformers' Auto classes.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    Cache,
    DynamicCache,
    GenerationMixin,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .config import DenseConfig, MoeConfig, MoleConfig
from .kernels.combine import dispatch
from .lookup import Lookup, Repeats, StepBank, distinct_ids
from .lut import LutRows, LutStore, copy_lut, open_lut

LayerRows = tuple[Tensor, Tensor | None]


class _ResidualLinear(nn.Linear):
    """A linear layer that writes into the residual stream; initialised smaller."""


class _RotaryEmbedding(nn.Module):
    """Cosines and sines of the rotary positions."""

    inv_freq: Tensor

    def __init__(self, config: DenseConfig) -> None:
        super().__init__()
        self.dim, self.base = config.rotary_dim, config.rope_theta
        self.register_buffer("inv_freq", self.frequencies(), persistent=False)

    def frequencies(self) -> Tensor:
        """Return the angle per position of every pair of channels."""
        return self.base ** (-torch.arange(0, self.dim, 2, dtype=torch.float32) / self.dim)

    def forward(
        self, positions: Int[Tensor, "batch seq_q"], dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        angles = positions[:, None, :, None].float() * self.inv_freq
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos().to(dtype), angles.sin().to(dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return `x` with its first channels, as many as `cos` has, rotated in pairs (i, i + half)."""
    dim = cos.shape[-1]
    if dim == 0:
        return x
    part = x if dim == x.shape[-1] else x[..., :dim]
    first, second = part.chunk(2, dim=-1)
    rotated = part * cos + torch.cat((-second, first), dim=-1) * sin
    return rotated if dim == x.shape[-1] else torch.cat((rotated, x[..., dim:]), dim=-1)


def _eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Return attention output and weights, computed step by step."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class _Attention(nn.Module):
    """Causal multi-head attention with rotary positions."""

    def __init__(self, config: DenseConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.is_causal = True
        self.head_dim = config.head_dim
        self.scaling = self.head_dim**-0.5
        kv_heads = config.num_key_value_heads or config.num_attention_heads
        self.num_key_value_groups = config.num_attention_heads // kv_heads
        kv_dim = kv_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_dim, bias=False)
        self.o_proj = _ResidualLinear(config.hidden_size, config.hidden_size, bias=False)

    def forward(
        self,
        hidden: Float[Tensor, "batch seq_q dim"],
        rotary: tuple[Tensor, Tensor],
        attention_mask: Any = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        shape = (*hidden.shape[:-1], -1, self.head_dim)
        query, key, value = (
            projection(hidden).view(shape).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = _rotate(query, *rotary), _rotate(key, *rotary)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, _eager_attention
        )
        output, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.config.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return self.o_proj(output.reshape(*hidden.shape[:-1], -1)), weights


class _Mlp(nn.Module):
    """The dense feed-forward block, or the shared expert: `W_down act(W_up x)`."""

    def __init__(self, config: DenseConfig) -> None:
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.gate_proj = None
        if config.mlp_type == "swiglu":
            self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = _ResidualLinear(config.intermediate_size, config.hidden_size, bias=False)
        self.act = ACT2FN[config.hidden_act]

    def forward(self, x: Float[Tensor, "batch seq_q dim"]) -> Float[Tensor, "batch seq_q dim"]:
        up = self.up_proj(x)
        inner = self.act(up) if self.gate_proj is None else self.act(self.gate_proj(x)) * up
        output: Tensor = self.down_proj(inner)
        return output


class _SparseMlp(nn.Module):
    """Top-k routed experts; the weights of the chosen are a softmax over their logits."""

    def __init__(self, config: MoeConfig) -> None:
        super().__init__()
        self.num_experts, self.top_k = config.num_experts, config.num_experts_per_tok
        inner = self.num_experts * int(config.moe_intermediate_size or 0)
        self.router = nn.Linear(config.hidden_size, self.num_experts, bias=False)
        self.up = nn.Parameter(torch.empty(inner, config.hidden_size))
        self.down_t = nn.Parameter(torch.empty(inner, config.hidden_size))
        self.act = ACT2FN[config.hidden_act]

    def forward(self, x: Float[Tensor, "batch seq_q dim"]) -> tuple[Tensor, Tensor]:
        """Return the output and the router's logits, float32 `[batch, seq_q, experts]`."""
        logits = self.router(x).float()
        top, chosen = logits.topk(self.top_k, dim=-1)
        gates = torch.softmax(top, dim=-1)
        few = x.shape[0] * x.shape[1] * self.top_k <= self.num_experts
        output = self._chosen(x, gates, chosen) if few else self._all(x, gates, chosen)
        return output, logits

    def _chosen(self, x: Tensor, gates: Tensor, chosen: Tensor) -> Tensor:
        """Run only the chosen experts: reads the fewest weights, for decoding."""
        up = self.up.view(self.num_experts, -1, x.shape[-1])[chosen]
        down = self.down_t.view(self.num_experts, -1, x.shape[-1])[chosen]
        inner = self.act((up @ x[..., None, :, None]).squeeze(-1))
        outputs = (inner[..., None, :] @ down).squeeze(-2)
        mixed: Tensor = gates.to(outputs.dtype)[..., None, :] @ outputs
        return mixed.squeeze(-2)

    def _all(self, x: Tensor, gates: Tensor, chosen: Tensor) -> Tensor:
        """Run all experts and weigh those not chosen by zero: static shapes, two products."""
        weights = torch.zeros(*x.shape[:2], self.num_experts, dtype=gates.dtype, device=x.device)
        weights = weights.scatter(-1, chosen, gates)
        inner = self.act(nn.functional.linear(x, self.up)).unflatten(-1, (self.num_experts, -1))
        inner = inner * weights.to(inner.dtype)[..., None]
        return nn.functional.linear(inner.flatten(-2), self.down_t.t())


class _DecoderLayer(GradientCheckpointingLayer):
    """Attention, feed-forward block and, in a lookup model, lookup experts."""

    def __init__(self, config: DenseConfig, layer_idx: int) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = _Attention(config, layer_idx)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = _SparseMlp(config) if isinstance(config, MoeConfig) else _Mlp(config)
        has_lookup = isinstance(config, MoleConfig) and layer_idx in (config.lookup_layers or ())
        self.lookup = Lookup(config) if has_lookup else None

    def forward(
        self,
        hidden: Float[Tensor, "batch seq_q dim"],
        embeddings: Tensor,
        repeats: Repeats | None,
        rows: LayerRows | None,
        rotary: tuple[Tensor, Tensor],
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the new hidden states and the router's logits.

        The lookup block reads `rows` of the table or of a bank, or else runs its experts on
        `embeddings`: those of every token, or of the distinct ids when `repeats` tells which one is
        each token's. `rows` with `repeats` are a bank's values and its gradient buffer.
        """
        attended = hidden + self.self_attn(self.input_layernorm(hidden), rotary, **kwargs)[0]
        x = self.post_attention_layernorm(attended)
        if isinstance(self.mlp, _SparseMlp):
            output, logits = self.mlp(x)
            return attended + output, logits
        output = attended + self.mlp(x)
        if self.lookup is None:
            return output, None
        logits = nn.functional.linear(x, self.lookup.router.weight)
        flat = logits.flatten(0, 1), output.flatten(0, 1)
        if repeats is not None:
            values, bank = rows or (self.lookup.values(embeddings), None)
            mixed = self.lookup.mixed(*flat, values, repeats, bank)
        else:
            values, scales = rows or (self.lookup.values(embeddings).flatten(0, 1), None)
            mixed = dispatch(flat[0], values, flat[1], scales)
        return mixed.view_as(output), logits


class MolePreTrainedModel(PreTrainedModel):
    """What the three models share: initial weights and the features transformers asks about."""

    config_class = DenseConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ("_DecoderLayer",)
    _skip_keys_device_placement = ("past_key_values",)
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": _DecoderLayer, "attentions": _Attention}  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Draw normal weights; those that write into the residual stream smaller."""
        std = self.config.initializer_range
        small = std * (2 * self.config.num_hidden_layers) ** -0.5
        if isinstance(module, nn.Linear):
            init.normal_(module.weight, std=small if isinstance(module, _ResidualLinear) else std)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=std)
        elif isinstance(module, nn.RMSNorm):
            init.ones_(module.weight)
        elif isinstance(module, _RotaryEmbedding):
            init.copy_(module.inv_freq, module.frequencies())
        if isinstance(getattr(module, "down_t", None), nn.Parameter):
            init.normal_(module.up, std=std)
            init.normal_(module.down_t, std=small)


class _Decoder(MolePreTrainedModel):
    """The backbone: embeddings, decoder layers, final norm."""

    def __init__(self, config: DenseConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(
            _DecoderLayer(config, index) for index in range(config.num_hidden_layers)
        )
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary = _RotaryEmbedding(config)
        self.post_init()

    def _sources(
        self,
        ids: Tensor | None,
        embeds: Tensor,
        lut_rows: LutRows | None,
        distinct: tuple[Tensor, Tensor] | None,
    ) -> tuple[Tensor, Repeats | None, list[LayerRows | None]]:
        """Return embeddings, the repeats among them, and every layer's rows, for the lookup."""
        return embeds, None, [None] * len(self.layers)

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Int[Tensor, "batch seq_q"] | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        lookup_ids: Int[Tensor, "batch seq_q"] | None = None,
        lut_rows: LutRows | None = None,
        distinct: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> MoeModelOutputWithPast:
        """Return the last hidden states, the cache, and every router's logits.

        Args:
            input_ids: Token ids.
            attention_mask: 1 for tokens, 0 for padding.
            position_ids: Positions; counted on from the cache if None.
            past_key_values: Cache of earlier keys and values.
            inputs_embeds: Embeddings, instead of `input_ids`; a lookup model then needs
                `lookup_ids`.
            use_cache: Return a cache.
            lookup_ids: Ids that the lookup experts see; `input_ids` if None.
            lut_rows: Rows of the table for these ids, fetched beforehand.
            distinct: What `distinct_ids` gives for these ids, computed beforehand.
            **kwargs: Passed on to the attention implementation.

        Raises:
            ValueError: Not exactly one of `input_ids` and `inputs_embeds` is given, or a lookup
                model has no ids to look up.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Exactly one of `input_ids` and `inputs_embeds` must be given.")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            seen = past_key_values.get_seq_length() if past_key_values is not None else 0
            steps = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device)
            position_ids = (steps + seen)[None]
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        ids = input_ids if lookup_ids is None else lookup_ids
        embeddings, repeats, rows = self._sources(ids, inputs_embeds, lut_rows, distinct)
        rotary = self.rotary(position_ids, inputs_embeds.dtype)
        hidden, routers = inputs_embeds, []
        for layer, layer_rows in zip(self.layers, rows, strict=True):
            hidden, logits = layer(
                hidden,
                embeddings,
                repeats,
                layer_rows,
                rotary,
                attention_mask=mask,
                past_key_values=past_key_values,
                **kwargs,
            )
            if logits is not None:
                routers.append(logits)
        return MoeModelOutputWithPast(
            last_hidden_state=self.norm(hidden),
            past_key_values=past_key_values,
            router_logits=tuple(routers) or None,
        )


class DenseModel(_Decoder):
    """The dense backbone without output layer."""

    config_class = DenseConfig


class MoeModel(_Decoder):
    """The mixture-of-experts twin without output layer."""

    config_class = MoeConfig


class MoleModel(_Decoder):
    """The lookup-expert model without output layer."""

    config_class = MoleConfig

    def __init__(self, config: MoleConfig) -> None:
        super().__init__(config)
        self.bank: StepBank | None = None
        self.lut: LutStore | None = None  # outside the state dict and the device map, on purpose

    def _sources(
        self,
        ids: Tensor | None,
        embeds: Tensor,
        lut_rows: LutRows | None,
        distinct: tuple[Tensor, Tensor] | None,
    ) -> tuple[Tensor, Repeats | None, list[LayerRows | None]]:
        if self.config.lookup_form == "table" and lut_rows is not None:
            return embeds, None, self._layer_rows(lut_rows, embeds.dtype)
        if lut_rows is not None:
            raise ValueError("`lut_rows` needs a model whose `lookup_form` is 'table'.")
        if ids is None:
            raise ValueError("`lookup_ids` must be given along with `inputs_embeds`; got None.")
        if self.config.lookup_form == "experts":
            none: list[LayerRows | None] = [None] * len(self.layers)
            if self.bank is not None:
                filled = [self.bank.layer(index) for index in range(len(self.layers))]
                return embeds, self.bank.repeats(ids), list(filled)
            if self.config.dedup != "off" or distinct is not None:
                few, inverse = distinct or distinct_ids(ids, self.config.vocab_size)
                return self.embed_tokens(few), Repeats.of(inverse, len(few)), none
            return self.embed_tokens(ids), None, none
        if self.lut is None:
            raise ValueError(
                "This model is in table form and has no table yet: load it with "
                "`MoleForCausalLM.from_pretrained(folder)` or call `open_lut(path)`."
            )
        return embeds, None, self._layer_rows(self.lut.rows(ids), embeds.dtype)

    def _layer_rows(self, rows: LutRows, dtype: torch.dtype) -> list[LayerRows | None]:
        """Return the rows of every layer, None for layers without lookup experts."""
        found = iter(rows.layers(dtype))
        return [None if layer.lookup is None else next(found) for layer in self.layers]


class _ForCausalLM(MolePreTrainedModel, GenerationMixin):
    """A decoder with an output layer over the vocabulary."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    _model_class: type[_Decoder]

    def __init__(self, config: DenseConfig) -> None:
        super().__init__(config)
        self.model = self._model_class(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Int[Tensor, "batch seq_q"] | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Int[Tensor, "batch seq_q"] | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> MoeCausalLMOutputWithPast:
        """Return the logits and, for `labels`, the next-token cross-entropy in nats.

        Args:
            input_ids: Token ids.
            attention_mask: 1 for tokens, 0 for padding.
            position_ids: Positions; counted on from the cache if None.
            past_key_values: Cache of earlier keys and values.
            inputs_embeds: Embeddings, instead of `input_ids`.
            labels: Ids to predict, not shifted; -100 where nothing is to be predicted.
            use_cache: Return a cache.
            logits_to_keep: Number of last positions to return logits for; 0 for all.
            **kwargs: Passed on to the backbone (`lookup_ids`, `lut_rows`) and the attention.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, keep, :])
        loss = aux_loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **kwargs)
            if self.training:
                aux_loss = self._auxiliary_loss(outputs.router_logits)
                loss = loss if aux_loss is None else loss + aux_loss
        return MoeCausalLMOutputWithPast(
            loss=loss,
            aux_loss=aux_loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
        )

    def _auxiliary_loss(self, router_logits: tuple[Tensor, ...] | None) -> Tensor | None:
        """Return what is added to the loss while training, if anything."""
        return None


class DenseForCausalLM(_ForCausalLM):
    """The dense language model: the twin that a lookup model's latency is compared with."""

    config_class = DenseConfig
    _model_class = DenseModel


class MoeForCausalLM(_ForCausalLM):
    """The mixture-of-experts language model, Mixtral-like, with auxiliary losses in training."""

    config_class = MoeConfig
    _model_class = MoeModel

    def _auxiliary_loss(self, router_logits: tuple[Tensor, ...] | None) -> Tensor | None:
        config, loss = self.config, None
        for logits in router_logits or ():
            chosen = logits.topk(config.num_experts_per_tok, dim=-1).indices
            counts = nn.functional.one_hot(chosen, config.num_experts).float().mean(dim=(0, 1, 2))
            shares = torch.softmax(logits, dim=-1).mean(dim=(0, 1))
            balance = config.num_experts * (counts * shares).sum()
            z = torch.logsumexp(logits, dim=-1).square().mean()
            term = config.router_aux_loss_coef * balance + config.router_z_loss_coef * z
            loss = term if loss is None else loss + term
        return None if loss is None else loss / len(router_logits or ())


class MoleForCausalLM(_ForCausalLM):
    """The Mixture of Lookup Experts language model, in expert form or in table form."""

    config_class = MoleConfig
    _model_class = MoleModel
    _lut_folder: Path | None = None

    @property
    def lut(self) -> LutStore | None:
        """The open lookup table of a model in table form."""
        store: LutStore | None = self.model.lut
        return store

    def open_lut(self, path: str | Path, store: str = "mmap", cache: int = 0) -> None:
        """Open a lookup table and use it from now on.

        Args:
            path: Folder that holds `lut.json`.
            store: Where the rows are kept, as `mole.open_lut` has it; for the model's device.
            cache: Recently used rows to keep on the model's device.

        Raises:
            ValueError: The model is in expert form, or `store` is unknown.
            LutError: The table is damaged, or does not fit this model.
        """
        if self.config.lookup_form != "table":
            raise ValueError(
                "`open_lut` needs a model with `lookup_form` 'table'; this one is in the form "
                f"{self.config.lookup_form!r}: convert it first."
            )
        table = open_lut(path, store=store, device=self.device, cache=cache)
        table.meta.check_fits(self.config)
        self.model.lut, self._lut_folder = table, Path(path)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        inputs_embeds: Tensor | None = None,
        lookup_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Return the inputs of one step; in table form with the rows of its ids.

        `generate` may compile the forward pass, but not this: rows are fetched here.

        Args:
            input_ids: All ids so far.
            inputs_embeds: Embeddings of the prompt, instead of its ids.
            lookup_ids: The ids that belong to them.
            **kwargs: What transformers' method takes.

        Raises:
            ValueError: Exactly one of `lookup_ids` and `inputs_embeds` is given.
        """
        if (lookup_ids is None) != (inputs_embeds is None):
            raise ValueError(
                "`lookup_ids` and `inputs_embeds` must be given together; got one without the "
                "other."
            )
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(
            input_ids, inputs_embeds=inputs_embeds, **kwargs
        )
        ids = inputs.get("input_ids")
        if inputs.get("inputs_embeds") is not None:
            ids = inputs["lookup_ids"] = lookup_ids
        if self.lut is not None and ids is not None:
            inputs["lut_rows"] = self.lut.rows(ids)
        return inputs

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Save a model; in table form with its table, linked where the file system can.

        Args:
            save_directory: Folder to write.
            *args: Passed on to transformers.
            **kwargs: Passed on to transformers.
        """
        super().save_pretrained(save_directory, *args, **kwargs)
        if self._lut_folder is not None and self.config.lut and kwargs.get("is_main_process", True):
            copy_lut(self._lut_folder, Path(save_directory) / self.config.lut["path"])

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *args: Any, lut_store: str = "mmap", **kwargs: Any
    ) -> Any:
        """Load a model; in table form, open the table that its configuration names.

        Args:
            pretrained_model_name_or_path: Folder; or name on the hub, whose table is not fetched
                (download the whole repository and give its folder).
            *args: Passed on to transformers.
            lut_store: Where the rows are kept, as `mole.open_lut` has it.
            **kwargs: Passed on to transformers.
        """
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        folder = Path(str(pretrained_model_name_or_path)) / kwargs.get("subfolder", "")
        if model.config.lookup_form == "table" and model.config.lut and folder.is_dir():
            model.open_lut(folder / model.config.lut["path"], store=lut_store)
        return loaded


def register() -> None:
    """Make the three models known to transformers' Auto classes; safe to call again."""
    for config, base, causal in (
        (DenseConfig, DenseModel, DenseForCausalLM),
        (MoeConfig, MoeModel, MoeForCausalLM),
        (MoleConfig, MoleModel, MoleForCausalLM),
    ):
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModel.register(config, base, exist_ok=True)
        AutoModelForCausalLM.register(config, causal, exist_ok=True)


register()

__all__ = [
    "DenseForCausalLM",
    "DenseModel",
    "MoeForCausalLM",
    "MoeModel",
    "MoleForCausalLM",
    "MoleModel",
    "MolePreTrainedModel",
    "register",
]
