"""The three language models: a backbone with an output layer over the vocabulary."""

from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from jaxtyping import Int
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, Cache, GenerationMixin
from transformers.modeling_outputs import MoeCausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from ..config import DenseConfig, MoeConfig, MoleConfig
from ..lut import LutStore, copy_lut, open_lut
from .backbone import Backbone, DenseModel, MoeModel, MoleModel, MolePreTrainedModel

_HUB = ("cache_dir", "force_download", "local_files_only", "revision", "token")


class _ForCausalLM(MolePreTrainedModel, GenerationMixin):
    """A decoder with an output layer over the vocabulary."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    _model_class: type[Backbone]

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
            inputs["lut_rows"] = self.lut.fetch(ids)
        return inputs

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Save a model; in table form with its table, linked where the file system can.

        Args:
            save_directory: Folder to write.
            *args: Passed on to transformers.
            **kwargs: Passed on to transformers.

        Raises:
            ValueError: `push_to_hub` is asked for of a table, which would be left behind.
        """
        if self._lut_folder is not None and kwargs.get("push_to_hub"):
            raise ValueError(
                "`push_to_hub` must be a call of its own for a model in table form: "
                "`model.push_to_hub(name)` takes the table along."
            )
        super().save_pretrained(save_directory, *args, **kwargs)
        if self._lut_folder is not None and self.config.lut and kwargs.get("is_main_process", True):
            copy_lut(self._lut_folder, Path(save_directory) / self.config.lut["path"])

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Any,
        *args: Any,
        lut_store: str = "mmap",
        lut_cache: int = 0,
        **kwargs: Any,
    ) -> Any:
        """Load a model; in table form, open the table that its configuration names.

        Args:
            pretrained_model_name_or_path: Folder, or name on the hub.
            *args: Passed on to transformers.
            lut_store: Where the rows are kept, as `mole.open_lut` has it.
            lut_cache: Recently used rows to keep on the model's device.
            **kwargs: Passed on to transformers.
        """
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if model.config.lookup_form == "table" and model.config.lut:
            inside = Path(kwargs.get("subfolder", ""), model.config.lut["path"])
            folder = Path(str(pretrained_model_name_or_path))
            if not folder.is_dir():
                chosen = {name: kwargs[name] for name in _HUB if name in kwargs}
                name, files = str(pretrained_model_name_or_path), f"{inside.as_posix()}/*"
                folder = Path(snapshot_download(name, allow_patterns=files, **chosen))
            model.open_lut(folder / inside, store=lut_store, cache=lut_cache)
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


__all__ = ["DenseForCausalLM", "MoeForCausalLM", "MoleForCausalLM", "register"]
