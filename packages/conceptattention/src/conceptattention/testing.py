"""Tiny random pipelines and independent oracles, shared by tests and benchmarks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

ORACLE_ERROR = 1e-5  # largest float32 error of a concept output against a dense computation


def tiny_flux(
    *,
    guidance: bool = False,
    layers: int = 3,
    single_layers: int = 1,
    channels: int = 16,
    seed: int = 0,
) -> Any:
    """Return a stock `FluxPipeline` with tiny random CLIP, T5, autoencoder and transformer.

    Args:
        guidance: Give the transformer a guidance embedding, as Flux.1 dev has.
        layers: Dual-stream layers.
        single_layers: Single-stream layers.
        channels: Input channels; more than 16 for pipelines that add pictures as channels.
        seed: Seed of the weights; the global generator is left as it was.
    """
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        FluxPipeline,
        FluxTransformer2DModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = FluxTransformer2DModel(
            in_channels=channels, out_channels=16, num_layers=layers,
            num_single_layers=single_layers,
            attention_head_dim=16, num_attention_heads=2, joint_attention_dim=24,
            pooled_projection_dim=20, guidance_embeds=guidance, axes_dims_rope=(4, 6, 6),
        )  # fmt: skip
        clip = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=40, hidden_size=20, intermediate_size=20, num_hidden_layers=1,
                num_attention_heads=2, max_position_embeddings=16, projection_dim=20,
                bos_token_id=0, eos_token_id=2, pad_token_id=1,
            )
        )  # fmt: skip
        t5 = T5EncoderModel(
            T5Config(
                vocab_size=40, d_model=24, d_kv=8, d_ff=24, num_layers=1, num_heads=2,
                decoder_start_token_id=1, pad_token_id=1,
            )
        )  # fmt: skip
        vae = AutoencoderKL(
            in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(4, 4),
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
            layers_per_block=1, norm_num_groups=1, sample_size=32, use_quant_conv=False,
            use_post_quant_conv=False, shift_factor=0.1, scaling_factor=1.5,
        )  # fmt: skip
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae.eval(),
        text_encoder=clip.eval(),
        tokenizer=_word_tokenizer(16),
        text_encoder_2=t5.eval(),
        tokenizer_2=_word_tokenizer(64),
        transformer=transformer.eval(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_cogvideox(seed: int = 0) -> Any:
    """Return a stock `CogVideoXPipeline` with tiny random T5, autoencoder and transformer.

    Args:
        seed: Seed of the weights; the global generator is left as it was.
    """
    from diffusers import (
        AutoencoderKLCogVideoX,
        CogVideoXDDIMScheduler,
        CogVideoXPipeline,
        CogVideoXTransformer3DModel,
    )
    from transformers import T5Config, T5EncoderModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = CogVideoXTransformer3DModel(
            num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4,
            time_embed_dim=8, text_embed_dim=24, num_layers=2, sample_width=6, sample_height=4,
            sample_frames=9, max_text_seq_length=226,
        )  # fmt: skip
        t5 = T5EncoderModel(
            T5Config(
                vocab_size=40, d_model=24, d_kv=8, d_ff=24, num_layers=1, num_heads=2,
                decoder_start_token_id=1, pad_token_id=1,
            )
        )  # fmt: skip
        vae = AutoencoderKLCogVideoX(
            latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1,
            norm_num_groups=2, sample_height=32, sample_width=48,
            down_block_types=("CogVideoXDownBlock3D",) * 4,
            up_block_types=("CogVideoXUpBlock3D",) * 4,
        )  # fmt: skip
    pipe = CogVideoXPipeline(
        tokenizer=_word_tokenizer(226),
        text_encoder=t5.eval(),
        vae=vae.eval(),
        transformer=transformer.eval(),
        scheduler=CogVideoXDDIMScheduler(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _word_tokenizer(length: int) -> Any:
    """Return a word-level tokenizer that ends every text with an end token."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = [
        "<s>",
        "<pad>",
        "</s>",
        "<unk>",
        *["a", "on", "cat", "dog", "grass", "sky", "snow", "tree"],
    ]
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="</s>",
        model_max_length=length,
    )


def hooks(pipe: Any) -> int:
    """Return how many hooks hang on the modules of a pipeline's transformer."""
    kinds = "_forward_hooks", "_forward_pre_hooks", "_backward_hooks"
    modules = pipe.transformer.modules()
    return sum(len(getattr(module, kind)) for module in modules for kind in kinds)


def flux_arguments(pipe: Any, *, batch: int = 2, rows: int = 3, columns: int = 5) -> dict[str, Any]:
    """Return random arguments of a Flux transformer whose pooled vector is zero."""
    config = pipe.transformer.config
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return {
        "hidden_states": normal(batch, rows * columns, config.in_channels),
        "encoder_hidden_states": normal(batch, 7, config.joint_attention_dim),
        "pooled_projections": torch.zeros(batch, config.pooled_projection_dim),
        "timestep": torch.full((batch,), 0.6),
        "guidance": torch.full((batch,), 3.5) if config.guidance_embeds else None,
        "img_ids": pipe._prepare_latent_image_ids(batch, rows, columns, "cpu", torch.float32),
        "txt_ids": torch.zeros(7, 3),
        "return_dict": False,
    }


def dense_concept_outputs(pipe: Any, arguments: dict[str, Any], embeds: Tensor) -> list[Tensor]:
    """Return every layer's concept outputs from the stock model, run densely under a mask.

    The concepts are put before the prompt. The mask lets them see each other and the image, and
    lets nothing else see them: the definition of the method, computed by diffusers alone. Holds for
    a zero pooled vector, where concepts and prompt share their modulation.

    Args:
        pipe: A Flux pipeline.
        arguments: As returned by `flux_arguments`.
        embeds: Text vectors of the concepts, (concepts, dim_text).
    """
    count, batch = len(embeds), len(arguments["hidden_states"])
    prompt = arguments["encoder_hidden_states"]
    text, total = count + prompt.shape[1], count + prompt.shape[1] + arguments["img_ids"].shape[0]
    mask = torch.ones(total, total, dtype=torch.bool)
    mask[:count, count:text] = False
    mask[count:, :count] = False
    outputs: list[Tensor] = []

    def keep(module: Any, args: tuple[Tensor]) -> None:
        outputs.append(args[0][:, :count])

    handles = [
        block.attn.to_add_out.register_forward_pre_hook(keep)
        for block in pipe.transformer.transformer_blocks
    ]
    with torch.no_grad():
        pipe.transformer(
            **{
                **arguments,
                "encoder_hidden_states": torch.cat([embeds.expand(batch, -1, -1), prompt], dim=1),
                "txt_ids": torch.zeros(text, 3),
                "joint_attention_kwargs": {"attention_mask": mask[None, None]},
            }
        )
    for handle in handles:
        handle.remove()
    return outputs
