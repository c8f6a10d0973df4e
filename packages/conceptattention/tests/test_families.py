"""Every family: bit-identical latents, and concept vectors equal to the masked stock model's."""

import dataclasses

import diffusers
import pytest
import torch
import torch.nn.functional as F

from conceptattention import ConceptAttention, segment
from conceptattention.adapters import Call, adapter_for
from conceptattention.testing import ORACLE_ERROR, hooks
from conceptattention.tiny import FAMILIES, TEXT, Dense, normal, tiny_vae

diffusers.utils.logging.set_verbosity_error()
WORDS = ["a", "b", "c"]
EMBEDS = normal(3, TEXT, seed=5)
SD35 = {"dual_attention_layers": (0, 1), "qk_norm": "rms_norm"}
VARIANTS = [
    *((name, {}) for name in FAMILIES),
    ("sd3", SD35),
    ("flux", {"guidance_embeds": False}),
    ("cogvideox", {"use_rotary_positional_embeddings": False}),
]
IDS = [name + ("-variant" if config else "") for name, config in VARIANTS]
DUAL = [case for case in VARIANTS if case[0] != "z-image"]  # test_zimage.py compares that one
DUAL_IDS = [name + ("-variant" if config else "") for name, config in DUAL]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("name", "config"), VARIANTS, ids=IDS)
def test_latents_are_bit_identical(name, config, dtype):
    family = FAMILIES[name]
    pipe = family.build(dtype, **config)
    before = hooks(pipe)
    for guided in (False, True) if family.guidance else (False,):
        plain = family.run(pipe, guided)
        with ConceptAttention(pipe, WORDS, concept_embeds=EMBEDS, layers="all") as observer:
            seen = family.run(pipe, guided)
        assert plain.isfinite().all()
        assert torch.equal(plain, seen)
        maps = observer.heatmaps()
        assert maps.values.shape[:2] == (2, 3)
        assert maps.counts == [6]  # 3 layers, 2 steps; the unconditional pass does not count
        assert set(maps.coverage.values()) == {1.0}
        totals = maps.values.sum(1)
        torch.testing.assert_close(totals, torch.ones_like(totals))
        assert maps.values.shape[2:] == family.grid
    assert hooks(pipe) == before


def first_call(family, pipe):
    """Return the arguments with which the pipeline first calls its transformer."""
    seen = []

    def record(module, args, kwargs):
        if not seen:
            seen.append(kwargs)

    handle = pipe.transformer.register_forward_pre_hook(record, with_kwargs=True)
    family.run(pipe)
    handle.remove()
    return seen[0]


SINGLE = ("flux", "flux2", "longcat", "bria")
CASES = [
    *((name, config, False) for name, config in DUAL), *((name, {}, True) for name in SINGLE)
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "config", "single"), CASES, ids=[*DUAL_IDS, *(f"{name}-single" for name in SINGLE)]
)
def test_concept_outputs_equal_the_masked_stock_model(name, config, single, monkeypatch):
    family = FAMILIES[name]
    pipe = family.build(**config)
    model, adapter = pipe.transformer, adapter_for(pipe.transformer)
    arguments = first_call(family, pipe)
    if name == "flux":  # concepts have a zero pooled vector
        arguments["pooled_projections"] = torch.zeros_like(arguments["pooled_projections"])
    for key in ("attention_mask", "encoder_hidden_states_mask", "encoder_attention_mask"):
        if arguments.get(key) is not None:  # the oracle brings its own mask: no padding here
            arguments[key] = torch.ones_like(arguments[key]) if name[:3] == "hun" else None
    if name == "hunyuan-image":
        arguments |= {"encoder_hidden_states_2": None, "encoder_attention_mask_2": None}
    batch = len(arguments["encoder_hidden_states"])
    pipe._guidance_scale = 1.0
    with ConceptAttention(
        pipe, WORDS, concept_embeds=EMBEDS, layers="all", single_stream=single,
        vectors=["concept_output", "image_output"],
    ) as observer, torch.no_grad():  # fmt: skip
        model(**arguments)
    with torch.no_grad():
        call = Call(arguments, model.config)
        starts = adapter.start(model, call, EMBEDS.expand(batch, -1, -1))
        if "txt_ids" in arguments:
            ids = arguments["txt_ids"]
            room = torch.zeros(*ids.shape[:-2], 3, ids.shape[-1], dtype=ids.dtype)
            arguments["txt_ids"] = torch.cat([room, ids], dim=-2)
        if name == "qwen":  # concepts take the first text position

            def same_place(module, args, output):
                image, text = output
                return image, torch.cat([text[:1].expand(3, -1), text[:-3]])

            model.pos_embed.register_forward_hook(same_place)
        whole = name == "cogvideox"  # it splits by the length of its argument
        if whole:
            texts = [EMBEDS.expand(batch, -1, -1), arguments["encoder_hidden_states"]]
            arguments["encoder_hidden_states"] = torch.cat(texts, dim=1)
        if whole and config:  # text has no position there: zeros for the concepts too
            embedder = model.patch_embed
            table, find = embedder.pos_embedding, embedder._get_positional_embeddings
            pad = (0, 0, 3, 0)
            embedder.pos_embedding = F.pad(table, pad)
            embedder._get_positional_embeddings = lambda *a, **k: F.pad(find(*a, **k), pad)
        text_first = not name.startswith(("sd3", "hunyuan"))
        dense = Dense(
            monkeypatch, adapter, model, starts, text_first, extend=not whole, single_stream=single
        )
        model(**arguments)
    assert len(dense.outputs) == 3 + single
    for layer, expected in enumerate(dense.outputs):
        ours = observer.vectors("concept_output", layer=layer)
        assert (ours - expected).abs().max() < ORACLE_ERROR


@pytest.mark.parametrize("kind", ["Kontext", "Fill", "Control"])
def test_flux_with_reference_tokens_and_channels(kind, tiny):
    from PIL import Image

    wide = {"Kontext": 16, "Fill": 16 + 16 + 4 * 4, "Control": 32}[kind]
    parts = dict(tiny(guidance=True, channels=wide).components)
    pipe = getattr(diffusers, f"Flux{kind}Pipeline")(**{
        name: parts[name] for name in parts if name not in ("image_encoder", "feature_extractor")
    })  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    picture = Image.new("RGB", (24, 16), "red")
    given = {"control_image": picture} if kind == "Control" else {"image": picture}
    if kind == "Fill":
        given["mask_image"] = Image.new("L", (24, 16), 255)
    if kind == "Kontext":
        given |= {"max_area": 16 * 24, "_auto_resize": False}

    def run():
        return pipe(
            prompt=["a cat", "a dog"], height=16, width=24, num_inference_steps=2,
            output_type="latent", max_sequence_length=16,
            generator=torch.Generator().manual_seed(0), **given,
        ).images  # fmt: skip

    plain = run()
    with ConceptAttention(pipe, ["cat", "sky"], layers="all") as observer:
        seen = run()
    assert torch.equal(plain, seen)
    assert observer.heatmaps().values.shape == (2, 2, 4, 6)


@pytest.mark.parametrize(
    "name", ["WanTransformer3DModel", "PixArtTransformer2DModel", "UNet2DConditionModel"]
)
def test_cross_attention_models_are_refused(name):
    model = type(name, (torch.nn.Module,), {})()
    with pytest.raises(ValueError, match=f"class {name}, in which text enters by cross-attention"):
        adapter_for(model)


def test_word_lists_per_image_under_batched_guidance():
    family = FAMILIES["sd3"]
    pipe = family.build()
    with ConceptAttention(pipe, WORDS, concept_embeds=EMBEDS) as observer:
        family.run(pipe, guided=True)
        family.run(pipe, guided=False)
    first, second = observer.heatmaps(run=0), observer.heatmaps(run=1)
    assert first.values.shape == second.values.shape == (2, 3, 2, 3)
    with ConceptAttention(pipe, WORDS, concept_embeds=EMBEDS, steps=[0]) as observer:
        family.run(pipe, guided=True)
        family.run(pipe, guided=False)
    # In step 0 guidance has changed nothing yet: the conditional half is the plain run.
    first, second = observer.heatmaps(run=0), observer.heatmaps(run=1)
    torch.testing.assert_close(first.values, second.values)


@pytest.mark.parametrize("name", ["flux", "flux2", "chroma", "cogvideox", "sd3"])
def test_fused_projections_give_the_same_maps(name):
    family = FAMILIES[name]
    pipe = family.build()  # diffusers cannot run SD3.5's second attention fused
    with ConceptAttention(pipe, WORDS, concept_embeds=EMBEDS, layers="all") as observer:
        family.run(pipe)
    pipe.transformer.fuse_qkv_projections()
    plain = family.run(pipe)
    with ConceptAttention(pipe, WORDS, concept_embeds=EMBEDS, layers="all") as fused:
        seen = family.run(pipe)
    assert torch.equal(plain, seen)
    torch.testing.assert_close(observer.heatmaps().values, fused.heatmaps().values)


def test_first_block_cache_lowers_the_coverage_and_changes_nothing():
    family = FAMILIES["flux"]
    pipe = family.build()
    pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=10.0))
    plain = family.run(pipe, num_inference_steps=4)
    with ConceptAttention(pipe, WORDS, concept_embeds=EMBEDS, layers="all") as observer:
        seen = family.run(pipe, num_inference_steps=4)
    assert torch.equal(plain, seen)
    coverage = observer.heatmaps().coverage
    assert coverage[0] == 1.0
    assert coverage[2] < 1.0


def test_segment_of_stable_diffusion_3():
    family = dataclasses.replace(FAMILIES["sd3"], vae=tiny_vae)
    pipe = family.build()
    texts = family.texts(2)
    prompt, pooled = texts["prompt_embeds"], texts["pooled_prompt_embeds"]
    pipe.encode_prompt = lambda *a, **k: (prompt, None, pooled, None)
    picture = torch.rand(2, 3, 8, 12, generator=torch.Generator().manual_seed(0))
    settings = {"concept_embeds": EMBEDS, "layers": [1]}
    maps = segment(pipe, picture, WORDS, t=0.4, **settings)
    assert maps.values.shape == (2, 3, 4, 6)
    config = pipe.vae.config
    with torch.no_grad():
        clean = pipe.vae.encode(2 * picture - 1).latent_dist.mode()
        clean = (clean - config.shift_factor) * config.scaling_factor
        noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
        with ConceptAttention(pipe, WORDS, **settings) as observer:
            pipe.transformer(
                hidden_states=0.6 * clean + 0.4 * noise, timestep=torch.full((2,), 400.0),
                encoder_hidden_states=prompt, pooled_projections=pooled,
            )  # fmt: skip
    torch.testing.assert_close(maps.values, observer.heatmaps().values)


def test_sequential_offload_gives_the_same_latents_and_maps():
    from accelerate import cpu_offload

    family = FAMILIES["flux"]
    pipe = family.build()
    with ConceptAttention(pipe, WORDS, concept_embeds=EMBEDS, layers="all") as observer:
        plain = family.run(pipe)
    cpu_offload(pipe.transformer, execution_device=torch.device("cpu"))
    with ConceptAttention(pipe, WORDS, concept_embeds=EMBEDS, layers="all") as moved:
        seen = family.run(pipe)
    assert torch.equal(plain, seen)
    assert torch.equal(observer.heatmaps().values, moved.heatmaps().values)


@pytest.mark.parametrize(("name", "config"), DUAL, ids=DUAL_IDS)
def test_prompt_attention_is_what_the_model_computed(name, config, monkeypatch):
    family = FAMILIES[name]
    pipe = family.build(**config)
    if name == "hunyuan-image":
        with pytest.raises(ValueError, match="HunyuanImage has no 'prompt_attention' yet"):
            ConceptAttention(pipe, WORDS, space="prompt_attention", prompt_tokens=[[0], [1], [2]])
        return
    arguments = first_call(family, pipe)
    batch, text = arguments["encoder_hidden_states"].shape[:2]
    seen = []
    real = F.scaled_dot_product_attention

    def record(query, key, value, attn_mask=None, **kwargs):
        seen.append((query, key))
        return real(query, key, value, attn_mask=attn_mask, **kwargs)

    spots = [[0], [1, 2], [4]]
    pipe._guidance_scale = 1.0
    with ConceptAttention(
        pipe, WORDS, concept_embeds=EMBEDS, layers="all", store="layers",
        space="prompt_attention", prompt_tokens=spots, kernels="torch",
        single_stream=name in SINGLE,
    ) as observer, torch.no_grad():  # fmt: skip
        monkeypatch.setattr(F, "scaled_dot_product_attention", record)
        pipe.transformer(**arguments)
    monkeypatch.undo()
    maps = observer.heatmaps().with_reduce("raw")
    patches = maps.values[0, 0].numel()
    # The model's own joint attentions: all tokens at once, in the order of its layers.
    joint = [pair for pair in seen if pair[0].shape[2] == text + patches]
    image_first = name.startswith(("sd3", "hunyuan"))
    for layer in range(3 + (name in SINGLE)):
        query, key = joint[layer]
        words, places = (slice(patches, None), slice(0, patches))
        if not image_first:
            words, places = (slice(0, text), slice(text, None))
        query, key = query[:, :, words], key[:, :, places]
        logits = (query @ key.mT).mean(1) / query.shape[-1] ** 0.5
        expected = torch.stack([logits[:, rows].mean(1) for rows in spots], 1)
        ours = maps.select(layers=[layer]).values.flatten(2)
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-4)
    assert batch == len(maps.values)


@pytest.mark.parametrize("fused", [False, True], ids=["", "fused"])
@pytest.mark.parametrize(("name", "config"), VARIANTS, ids=IDS)
def test_daam_is_what_the_model_attended_to(name, config, fused, monkeypatch):
    family = FAMILIES[name]
    pipe = family.build(**config)
    spots = [[0], [1, 2], [4]]
    settings = {"space": "daam", "prompt_tokens": spots, "concept_embeds": EMBEDS}
    if name in ("qwen", "chroma", "hunyuan-video", "hunyuan-image", "z-image"):
        with pytest.raises(ValueError, match="has no 'daam' yet"):
            ConceptAttention(pipe, WORDS, **settings)
        return
    if fused:
        if not hasattr(pipe.transformer, "fuse_qkv_projections") or config is SD35:
            pytest.skip("diffusers cannot fuse this family")
        pipe.transformer.fuse_qkv_projections()
    arguments = first_call(family, pipe)
    text = arguments["encoder_hidden_states"].shape[1]
    seen = []
    real = F.scaled_dot_product_attention

    def record(query, key, value, attn_mask=None, **kwargs):
        seen.append((query, key, attn_mask))
        return real(query, key, value, attn_mask=attn_mask, **kwargs)

    pipe._guidance_scale = 1.0
    with ConceptAttention(
        pipe, WORDS, layers="all", store="layers", single_stream=name in SINGLE, **settings
    ) as observer, torch.no_grad():  # fmt: skip
        monkeypatch.setattr(F, "scaled_dot_product_attention", record)
        pipe.transformer(**arguments)
    monkeypatch.undo()
    maps = observer.heatmaps().with_reduce("raw")
    patches = maps.values[0, 0].numel()
    joint = [entry for entry in seen if entry[0].shape[2] == text + patches]
    words, places = slice(0, text), slice(text, None)
    if name == "sd3":
        words, places = slice(patches, None), slice(0, patches)
    for layer in range(3 + (name in SINGLE)):
        query, key, mask = joint[layer]
        assert mask is None or bool((mask == (0 if mask.is_floating_point() else 1)).all())
        logits = query[:, :, places] @ key[:, :, words].mT / query.shape[-1] ** 0.5
        shares = logits.softmax(-1).mean(1)  # [batch, patches, text]
        expected = torch.stack([shares[..., rows].mean(-1) for rows in spots], 1)
        ours = maps.select(layers=[layer]).values.flatten(2)
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", SINGLE)
@pytest.mark.parametrize("fused", [False, True])
def test_single_stream_layers_are_bit_identical(name, fused):
    family = FAMILIES[name]
    pipe = family.build(num_single_layers=2)
    if fused:
        if not hasattr(pipe.transformer, "fuse_qkv_projections"):
            pytest.skip("diffusers cannot fuse this family")
        pipe.transformer.fuse_qkv_projections()
    guided = bool(family.guidance)
    plain = family.run(pipe, guided)
    with ConceptAttention(
        pipe, WORDS, concept_embeds=EMBEDS, layers="all", single_stream=True, store="layers",
        space=["output", "prompt_attention"], prompt_tokens=[[0], [1, 2], [4]],
    ) as observer:  # fmt: skip
        seen = family.run(pipe, guided)
    assert torch.equal(plain, seen)
    maps = observer.heatmaps()
    assert [layer for layer, _ in maps.keys] == [0, 1, 2, 3, 4]
    assert set(maps.coverage.values()) == {1.0}
    assert maps.values.shape[2:] == family.grid
    assert observer.heatmaps(space="prompt_attention").raw.shape == maps.raw.shape


def test_families_without_single_stream_mode_say_so():
    with pytest.raises(ValueError, match="CogVideoX has no single-stream mode yet"):
        ConceptAttention(FAMILIES["cogvideox"].build(), WORDS, single_stream=True)
