"""Configurations of the lookup-expert model and of its dense and mixture-of-experts twins."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, no_type_check

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig


@contextmanager
def plain_errors() -> Iterator[None]:
    """Turn the error of a configuration that does not fit into the `ValueError` behind it."""
    try:
        yield
    except StrictDataclassError as error:
        raise ValueError(str(error.__cause__ or error)) from None


@strict
@no_type_check  # `strict` checks the fields itself
class DenseConfig(PreTrainedConfig):
    """Configuration of the dense backbone: a pre-norm decoder with rotary positions and no biases.

    Args:
        vocab_size: Number of token ids.
        hidden_size: Width of the residual stream.
        intermediate_size: Inner width of the feed-forward block.
        num_hidden_layers: Number of decoder layers.
        num_attention_heads: Number of query heads; must divide `hidden_size`.
        num_key_value_heads: Number of key and value heads; the query heads' number if None.
        hidden_act: Activation of the feed-forward blocks; the method's is the exact GELU.
        mlp_type: `"plain"`, the method's, or `"swiglu"`, a Llama's gated block. Lookup experts
            are plain in either.
        max_position_embeddings: Longest sequence the model is meant for, in tokens.
        rope_theta: Base of the rotary frequencies.
        partial_rotary_factor: Share of every head's channels that rotates (1.0 in the published
            code, 0.25 in the paper's text).
        initializer_range: Standard deviation of initial weights; matrices that write into the
            residual stream get `1 / sqrt(2 num_hidden_layers)` of it.
        rms_norm_eps: Added to the mean square in every RMSNorm.
        use_cache: Keep keys and values while generating.
        tie_word_embeddings: Share the input embedding with the output layer.
        attention_dropout: Dropout of the attention weights while training.

    Raises:
        StrictDataclassError: Sizes do not fit each other, or a value is of another type or out of
            range: huggingface_hub's error for all configurations.

    Source: Jie et al. 2025 (arXiv 2503.15798), section 4.1.
    """

    model_type = "mole_dense"
    keys_to_ignore_at_inference = ("past_key_values",)

    vocab_size: int = 50304
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_key_value_heads: int | None = None
    hidden_act: str = "gelu"
    mlp_type: str = "plain"
    max_position_embeddings: int = 2048
    rope_theta: float = 10000.0
    partial_rotary_factor: float = 1.0
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-5
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = False
    attention_dropout: float = 0.0

    def __post_init__(self, **kwargs: Any) -> None:
        """Fill in the derived defaults."""
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        super().__post_init__(**kwargs)

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def rotary_dim(self) -> int:
        """Channels of one attention head that rotate; even."""
        return 2 * int(self.head_dim * self.partial_rotary_factor / 2)

    def validate_architecture(self) -> None:
        """Check that the sizes fit each other; called on construction."""
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        if self.hidden_size % heads:
            raise ValueError(
                f"`hidden_size` must be a multiple of `num_attention_heads` {heads}; "
                f"got {self.hidden_size}."
            )
        if kv_heads and heads % kv_heads:
            raise ValueError(
                f"`num_key_value_heads` must divide `num_attention_heads` {heads}; got {kv_heads}."
            )
        if self.mlp_type not in ("plain", "swiglu"):
            raise ValueError(f"`mlp_type` must be 'plain' or 'swiglu'; got {self.mlp_type!r}.")
        if not 0.0 <= self.partial_rotary_factor <= 1.0:
            raise ValueError(
                "`partial_rotary_factor` must be between 0 and 1; "
                f"got {self.partial_rotary_factor}."
            )


@strict
@no_type_check  # `strict` checks the fields itself
class MoeConfig(DenseConfig):
    """Configuration of the mixture-of-experts twin: top-k routing, no shared expert.

    Args:
        num_experts: Number of routed experts in every layer.
        num_experts_per_tok: Experts that every token runs through.
        moe_intermediate_size: Inner width of one expert; half of `intermediate_size` if None, so
            that two experts cost what the dense block does.
        router_z_loss_coef: Weight of the mean squared log-sum-exp of the router's logits.
        router_aux_loss_coef: Weight of the load-balance loss.

    Source: Jie et al. 2025 (arXiv 2503.15798), section 4.1.
    """

    model_type = "mole_moe"

    num_experts: int = 10
    num_experts_per_tok: int = 2
    moe_intermediate_size: int | None = None
    router_z_loss_coef: float = 0.001
    router_aux_loss_coef: float = 0.01

    def __post_init__(self, **kwargs: Any) -> None:
        """Fill in the derived defaults."""
        if self.moe_intermediate_size is None:
            self.moe_intermediate_size = self.intermediate_size // 2
        super().__post_init__(**kwargs)

    def validate_architecture(self) -> None:
        """Check that the sizes fit each other; called on construction."""
        super().validate_architecture()
        if not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise ValueError(
                f"`num_experts_per_tok` must be between 1 and `num_experts` {self.num_experts}; "
                f"got {self.num_experts_per_tok}."
            )


@strict
@no_type_check  # `strict` checks the fields itself
class MoleConfig(DenseConfig):
    """Configuration of a Mixture of Lookup Experts model.

    Args:
        num_lookup_experts: Number of lookup experts in every lookup layer.
        lookup_intermediate_size: Inner width of one lookup expert; `intermediate_size` if None.
        lookup_layers: Layers that have lookup experts, ascending; all layers if None.
        lookup_form: `"experts"` (feed-forward networks, to train) or `"table"` (a lookup table, to
            deploy).
        dedup: `"off"` runs the experts on every token, `"micro"` once on every distinct id of the
            batch, `"step"` once on every distinct id of an optimiser step inside a `StepBank` (as
            `"micro"` outside). All give the same values and gradients up to the order of summation.
        lut: Where the table of a `"table"` model is and what it holds: `path` (relative to the
            model's folder), `format` and `fingerprint`.

    Source: Jie et al. 2025 (arXiv 2503.15798), section 3.
    """

    model_type = "mole"

    num_lookup_experts: int = 4
    lookup_intermediate_size: int | None = None
    lookup_layers: list[int] | None = None
    lookup_form: str = "experts"
    dedup: str = "off"
    lut: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        """Fill in the derived defaults."""
        if self.lookup_intermediate_size is None:
            self.lookup_intermediate_size = self.intermediate_size
        if self.lookup_layers is None:
            self.lookup_layers = list(range(self.num_hidden_layers))
        super().__post_init__(**kwargs)

    def validate_architecture(self) -> None:
        """Check that the sizes fit each other; called on construction."""
        super().validate_architecture()
        if self.num_lookup_experts < 1:
            raise ValueError(
                f"`num_lookup_experts` must be at least 1; got {self.num_lookup_experts}."
            )
        layers = self.lookup_layers or []
        if sorted(set(layers)) != layers or any(
            not 0 <= layer < self.num_hidden_layers for layer in layers
        ):
            raise ValueError(
                "`lookup_layers` must be ascending layer numbers between 0 and "
                f"{self.num_hidden_layers - 1}; got {layers}."
            )
        choices = {"lookup_form": ("experts", "table"), "dedup": ("off", "micro", "step")}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"`{name}` must be one of {', '.join(map(repr, allowed))}; "
                    f"got {getattr(self, name)!r}."
                )


__all__ = ["DenseConfig", "MoeConfig", "MoleConfig", "plain_errors"]
