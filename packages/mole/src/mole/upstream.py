"""Checkpoints in the layout that the authors' code publishes: read, and written back.

Their files name each expert's matrices apart, and their table form keeps the table as one embedding
`[vocab, layers * experts * dim]`. The configuration may call itself a Llama; what decides is the
weights. Rotary positions turn all channels, as that code does.
"""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from .config import MoleConfig
from .modeling import MoleForCausalLM

_EXPERT = re.compile(r"model\.layers\.(\d+)\.experts\.(\d+)\.(up|down)_proj\.weight")
_TABLE = "model.moe_table.weight"
_SAME = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
         "num_attention_heads", "num_key_value_heads", "max_position_embeddings", "rope_theta",
         "initializer_range", "rms_norm_eps", "tie_word_embeddings", "pad_token_id",
         "bos_token_id", "eos_token_id")  # fmt: skip


def from_upstream(folder: str | Path, dtype: torch.dtype | None = None) -> MoleForCausalLM:
    """Return the model of a checkpoint in the authors' layout, in expert form.

    Args:
        folder: Folder with `config.json` and weights, `.safetensors` or `pytorch_model*.bin`.
        dtype: Type of the weights; that of the file if None.

    Raises:
        ValueError: The weights are not those of a lookup-expert model in expert form, or contradict
            the configuration.
        OSError: A file is missing.
    """
    folder = Path(folder)
    fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    weights = _read(folder)
    if _TABLE in weights:
        raise ValueError(
            f"{folder} is in table form, whose experts are gone; give the checkpoint it was made "
            "from, and convert that."
        )
    found = [match for name in weights if (match := _EXPERT.fullmatch(name))]
    if not found:
        raise ValueError(f"{folder} holds no lookup experts (`model.layers.0.experts.0...`).")
    experts = 1 + max(int(match[2]) for match in found)
    layers = sorted({int(match[1]) for match in found})
    if fields.get("num_experts", experts) != experts:
        raise ValueError(
            f"{folder}: `num_experts` must be {experts}, the number of experts in the weights; "
            f"got {fields['num_experts']}."
        )
    first = weights[f"model.layers.{layers[0]}.experts.0.up_proj.weight"]
    config = MoleConfig(
        **{name: fields[name] for name in _SAME if fields.get(name) is not None},
        hidden_act=fields.get("mole_hidden_act", "gelu"),
        num_lookup_experts=experts,
        lookup_intermediate_size=first.shape[0],
        lookup_layers=layers,
    )
    ours = _to_ours(weights, layers, experts)
    with torch.device("meta"):
        model: Any = MoleForCausalLM(config)
    if config.tie_word_embeddings:
        ours.setdefault("lm_head.weight", ours["model.embed_tokens.weight"])
    ours = {name: value.to(dtype or value.dtype) for name, value in ours.items()}
    expected = {name: value.shape for name, value in model.state_dict().items()}
    _compare(folder, {name: value.shape for name, value in ours.items()}, expected)
    model.load_state_dict(ours, assign=True)
    model.tie_weights()
    rotary: Any = model.model.rotary
    rotary.inv_freq = rotary.frequencies().to("cpu")
    found_model: MoleForCausalLM = model.eval()
    return found_model


def to_upstream(model: MoleForCausalLM, folder: str | Path) -> Path:
    """Write a model in expert form in the authors' layout and return its folder.

    Raises:
        ValueError: The model is in table form, or has settings that their code does not know.
    """
    config = model.config
    if config.lookup_form != "experts":
        raise ValueError("`model` must be in expert form; this one is in table form.")
    if config.partial_rotary_factor != 1.0 or config.hidden_act != "gelu":
        raise ValueError(
            "`model` must turn all channels and use 'gelu', as the authors' code does; got "
            f"{config.partial_rotary_factor} and {config.hidden_act!r}."
        )
    folder = Path(folder)
    weights = {}
    for name, value in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        base, _, last = name.partition(".lookup.")
        if not last:
            weights[name] = value.contiguous()
        elif last == "router.weight":
            weights[f"{base}.router.weight"] = value.contiguous()
        elif last == "norm.weight":
            weights[f"{base}.expert_layernorm.weight"] = value.contiguous()
        else:
            for number, part in enumerate(value.chunk(config.num_lookup_experts)):
                kind, part = ("up", part) if last == "up" else ("down", part.t())
                key = f"{base}.experts.{number}.{kind}_proj.weight"
                weights[key] = part.clone(memory_format=torch.contiguous_format)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_file(weights, partial / "model.safetensors", metadata={"format": "pt"})
    fields = {name: getattr(config, name) for name in _SAME}
    fields |= {"model_type": "llama", "num_experts": config.num_lookup_experts}
    (partial / "config.json").write_text(json.dumps(fields, indent=1) + "\n", encoding="utf-8")
    folder.mkdir(parents=True, exist_ok=True)
    for file in partial.iterdir():
        file.replace(folder / file.name)
    partial.rmdir()
    return folder


def _read(folder: Path) -> dict[str, Tensor]:
    """Return all weights of a folder."""
    weights: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            weights |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if not weights:
        for path in sorted(folder.glob("pytorch_model*.bin")):
            weights |= torch.load(path, map_location="cpu", weights_only=True)
    if not weights:
        raise OSError(f"{folder} holds no .safetensors and no pytorch_model*.bin file.")
    return weights


def _to_ours(weights: dict[str, Tensor], layers: list[int], experts: int) -> dict[str, Tensor]:
    """Return the weights under our names; each layer's experts become two matrices."""
    ours = {}
    for name, value in weights.items():
        if _EXPERT.fullmatch(name) or name.endswith("rotary_emb.inv_freq"):
            continue
        name = name.replace(".expert_layernorm.", ".lookup.norm.")
        ours[re.sub(r"^(model\.layers\.\d+)\.router\.", r"\1.lookup.router.", name)] = value
    for layer in layers:
        base = f"model.layers.{layer}"
        try:
            up = [weights[f"{base}.experts.{j}.up_proj.weight"] for j in range(experts)]
            down = [weights[f"{base}.experts.{j}.down_proj.weight"].t() for j in range(experts)]
        except KeyError as error:
            raise ValueError(f"the weights must hold {error.args[0]}; it is missing.") from None
        ours[f"{base}.lookup.up"] = torch.cat(up)
        ours[f"{base}.lookup.down_t"] = torch.cat(down)
    return ours


def _compare(folder: Path, found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Raise an error that names a weight that is missing, superfluous or of another shape."""
    for name in sorted(set(found) | set(expected)):
        if found.get(name) != expected.get(name):
            raise ValueError(
                f"{folder}: `{name}` must have shape "
                f"{tuple(expected[name]) if name in expected else 'none at all'}; got "
                f"{tuple(found[name]) if name in found else 'nothing'}."
            )


__all__ = ["from_upstream", "to_upstream"]
