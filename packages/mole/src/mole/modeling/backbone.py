"""The three models without output layer: embeddings, decoder layers, final norm."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers import initialization as init
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MoeModelOutputWithPast
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from ..config import DenseConfig, MoeConfig, MoleConfig
from ..kernels.combine import dispatch
from ..lookup import Lookup, Repeats, StepBank, distinct_ids
from ..lut import LutRows, LutStore
from ..lut.format import LayerRows
from .attention import Attention, RotaryEmbedding
from .feedforward import Mlp, SparseMlp
from .linear import ResidualLinear


class DecoderLayer(GradientCheckpointingLayer):
    """Attention, feed-forward block and, in a lookup model, lookup experts."""

    def __init__(self, config: DenseConfig, layer_idx: int) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = Attention(config, layer_idx)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = SparseMlp(config) if isinstance(config, MoeConfig) else Mlp(config)
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
        each token's. `rows` are values, scales and index of the table; with `repeats`, a bank's
        values and its gradient buffer.
        """
        attended = hidden + self.self_attn(self.input_layernorm(hidden), rotary, **kwargs)[0]
        x = self.post_attention_layernorm(attended)
        if isinstance(self.mlp, SparseMlp):
            output, logits = self.mlp(x)
            return attended + output, logits
        output = attended + self.mlp(x)
        if self.lookup is None:
            return output, None
        logits = nn.functional.linear(x, self.lookup.router.weight)
        if repeats is None:
            own = rows or (self.lookup.values(embeddings).flatten(0, 1), None, None)
            values, scales, index = own
            return dispatch(logits, values, output, scales, index), logits
        values, bank, _ = rows or (self.lookup.values(embeddings), None, None)
        flat = logits.flatten(0, 1), output.flatten(0, 1)
        return self.lookup.mixed(*flat, values, repeats, bank).view_as(output), logits


class MolePreTrainedModel(PreTrainedModel):
    """What the three models share: initial weights and the features transformers asks about."""

    config_class = DenseConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ("DecoderLayer",)
    _skip_keys_device_placement = ("past_key_values",)
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": DecoderLayer, "attentions": Attention}  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Draw normal weights; those that write into the residual stream smaller."""
        std = self.config.initializer_range
        small = std * (2 * self.config.num_hidden_layers) ** -0.5
        if isinstance(module, nn.Linear):
            init.normal_(module.weight, std=small if isinstance(module, ResidualLinear) else std)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=std)
        elif isinstance(module, nn.RMSNorm):
            init.ones_(module.weight)
        elif isinstance(module, RotaryEmbedding):
            init.copy_(module.inv_freq, module.frequencies())
        if isinstance(getattr(module, "down_t", None), nn.Parameter):
            init.normal_(module.up, std=std)
            init.normal_(module.down_t, std=small)


class Backbone(MolePreTrainedModel):
    """The backbone: embeddings, decoder layers, final norm."""

    def __init__(self, config: DenseConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(
            DecoderLayer(config, index) for index in range(config.num_hidden_layers)
        )
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary = RotaryEmbedding(config)
        self.post_init()

    def _sources(
        self,
        ids: Tensor | None,
        embeds: Tensor,
        lut_rows: LutRows | None,
        distinct: tuple[Tensor, Tensor] | None,
    ) -> tuple[Tensor, Repeats | None, Iterable[LayerRows | None]]:
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


class DenseModel(Backbone):
    """The dense backbone without output layer."""

    config_class = DenseConfig


class MoeModel(Backbone):
    """The mixture-of-experts twin without output layer."""

    config_class = MoeConfig


class MoleModel(Backbone):
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
    ) -> tuple[Tensor, Repeats | None, Iterable[LayerRows | None]]:
        if self.config.lookup_form == "table" and lut_rows is not None:
            return embeds, None, self._layer_rows(lut_rows, embeds.dtype)
        if lut_rows is not None:
            raise ValueError("`lut_rows` needs a model whose `lookup_form` is 'table'.")
        if ids is None:
            raise ValueError("`lookup_ids` must be given along with `inputs_embeds`; got None.")
        if self.config.lookup_form == "experts":
            none: list[LayerRows | None] = [None] * len(self.layers)
            if self.bank is not None:
                pairs = [self.bank.layer(index) for index in range(len(self.layers))]
                filled = [None if pair is None else (*pair, None) for pair in pairs]
                return embeds, self.bank.repeats(ids), filled
            if self.config.dedup != "off" or distinct is not None:
                few, inverse = distinct or distinct_ids(ids, self.config.vocab_size)
                return self.embed_tokens(few), Repeats.of(inverse, len(few)), none
            return self.embed_tokens(ids), None, none
        if self.lut is None:
            raise ValueError(
                "This model is in table form and has no table yet: load it with "
                "`MoleForCausalLM.from_pretrained(folder)` or call `open_lut(path)`."
            )
        return embeds, None, self._layer_rows(self.lut.fetch(ids), embeds.dtype)

    def _layer_rows(self, rows: LutRows, dtype: torch.dtype) -> Iterator[LayerRows | None]:
        """Yield the rows of every layer, None for layers without lookup experts."""
        found = iter(rows.layers(dtype))
        for layer in self.layers:
            yield None if layer.lookup is None else next(found)


__all__ = ["DenseModel", "MoeModel", "MoleModel", "MolePreTrainedModel"]
