"""Lookup experts for a language model that is trained already.

Routers and experts are added so that they give nothing at first: the new model's logits equal the
old one's until it is trained further.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GgufConfig

from .config import DenseConfig, MoleConfig, plain_errors
from .modeling import DenseForCausalLM, MoleForCausalLM, register

_FIELDS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
           "num_attention_heads", "num_key_value_heads", "hidden_act", "max_position_embeddings",
           "initializer_range", "rms_norm_eps", "tie_word_embeddings", "pad_token_id",
           "bos_token_id", "eos_token_id")  # fmt: skip


def find_base(base: str | Path, gguf: str | None = None) -> tuple[Path, str | None]:
    """Return the folder of a base model and the name of the GGUF file in it, if it is one.

    Args:
        base: Folder of a model, or a GGUF file.
        gguf: Name of a GGUF file in that folder.

    Raises:
        ValueError: There is no such folder or file, or the file is no GGUF file.
    """
    folder = Path(base)
    if gguf is None and folder.is_file():
        folder, gguf = folder.parent, folder.name
    found = folder if gguf is None else folder / gguf
    if not (found.is_dir() if gguf is None else found.is_file() and found.suffix == ".gguf"):
        raise ValueError(f"`base` must be the folder of a model or a .gguf file; got {found}.")
    return folder, gguf


def load_base(base: str | Path, gguf: str | None = None) -> Any:
    """Return a model that can be upcycled or trained on and saved: plain weights in float32.

    Args:
        base: Folder of a model that transformers loads, or a GGUF file, whose weights are
            unpacked; needs the package `gguf`.
        gguf: Name of a GGUF file in that folder.

    Raises:
        ValueError: There is no such folder or file.
    """
    folder, gguf = find_base(base, gguf)
    register()
    if gguf is None:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        gguf_file=gguf,
        quantization_config=GgufConfig(dequantize=True),
    )
    # Nothing about it is quantised any more, but transformers would refuse to save it.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model


def upcycle(
    base: Any,
    experts: int = 4,
    inner: int | None = None,
    layers: list[int] | None = None,
    freeze_backbone: bool = False,
) -> MoleForCausalLM:
    """Return a lookup model in expert form with a dense model's weights and the same logits.

    Args:
        base: A `DenseForCausalLM` or a Llama-type model of transformers (`LlamaForCausalLM`, also
            one loaded from a GGUF file), whose weights are shared, not copied.
        experts: Lookup experts in a layer.
        inner: Inner width of an expert; that of the base's feed-forward blocks if None.
        layers: Layers that get lookup experts; all if None.
        freeze_backbone: Train routers and experts only.

    Raises:
        TypeError: `base` is of a type that is not supported.
        ValueError: It has biases, scaled rotary positions, or heads of another width; there are
            fewer than one expert, or no such layers.

    Source: own; zero initial output as in Hu et al. 2021 (arXiv 2106.09685).
    """
    config = base.config
    llama = getattr(config, "model_type", "") == "llama"
    if not (llama or isinstance(base, DenseForCausalLM)):
        raise TypeError(
            "`base` must be a DenseForCausalLM or a Llama-type model; "
            f"got {type(base).__name__} ({getattr(config, 'model_type', 'no configuration')})."
        )
    fields = {name: getattr(config, name) for name in _FIELDS}
    fields |= _rotary(config) if llama else {
        "rope_theta": config.rope_theta,
        "partial_rotary_factor": config.partial_rotary_factor,
        "mlp_type": config.mlp_type,
    }  # fmt: skip
    if llama:
        _check_llama(config)
        fields["mlp_type"] = "swiglu"
    with plain_errors():
        mole = MoleConfig(
            **fields,
            num_lookup_experts=experts,
            lookup_intermediate_size=inner,
            lookup_layers=layers,
        )
    weight = base.get_input_embeddings().weight
    model: Any = MoleForCausalLM(mole).to(weight.device, weight.dtype)
    rotary: Any = model.model.rotary
    rotary.inv_freq = rotary.frequencies().to(weight.device)
    given = {
        name: value
        for name, value in base.state_dict(keep_vars=True).items()
        if not name.endswith("inv_freq")
    }
    missing, superfluous = model.load_state_dict(given, strict=False, assign=True)
    wrong = [name for name in missing if ".lookup." not in name and name != "lm_head.weight"]
    if superfluous or wrong:
        raise ValueError(f"`base` must have a Llama's weights; differing: {superfluous or wrong}.")
    model.tie_weights()
    with torch.no_grad():
        for layer in model.model.layers:
            if layer.lookup is not None:
                layer.lookup.down_t.zero_()
    if freeze_backbone:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(".lookup." in name)
    model.generation_config = base.generation_config
    upcycled: MoleForCausalLM = model.train(base.training)
    return upcycled


def _rotary(config: Any) -> dict[str, Any]:
    """Return the rotary fields of a Llama configuration, old or new style."""
    found = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kind = found.get("rope_type", found.get("type", "default"))
    if kind != "default":
        raise ValueError(f"`base` must have plain rotary positions; its `rope_type` is {kind!r}.")
    theta = found.get("rope_theta", getattr(config, "rope_theta", DenseConfig.rope_theta))
    return {"rope_theta": float(theta)}


def _check_llama(config: Any) -> None:
    """Raise an error for what the backbone does not have."""
    for name in ("attention_bias", "mlp_bias"):
        if getattr(config, name, False):
            raise ValueError(f"`base` must have no biases; its `{name}` is true.")
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if head * config.num_attention_heads != config.hidden_size:
        raise ValueError(
            f"`base` must have heads of width {config.hidden_size // config.num_attention_heads}, "
            f"its `hidden_size` shared out; got {head}."
        )


__all__ = ["find_base", "load_base", "upcycle"]
