"""What observing costs: time and memory of one forward pass, on random weights of real shapes.

    python benchmarks/bench_overhead.py --output results.json                  # one GPU
    python benchmarks/bench_overhead.py --shapes tiny --device cpu --runs 3    # smoke run

Contenders alternate within every round: the plain model, the observer by torch, the observer by
Triton, and keeping every layer's vectors as the reference implementation does. Before timing, the
model's output must be the same bits under each of them, and the kernels' maps those of torch.
"""

import argparse
import gc
import json
import statistics
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import torch

from conceptattention import ConceptAttention
from fourfold_common import environment_report


def flux(side, text, **config):
    """Return model class, configuration and arguments of Flux.1."""
    ids = torch.zeros(side * side, 3)
    ids[:, 1], ids[:, 2] = torch.arange(side * side) // side, torch.arange(side * side) % side
    width = config.get("joint_attention_dim", 4096)
    arguments = {
        "hidden_states": torch.randn(1, side * side, config.get("in_channels", 64)),
        "encoder_hidden_states": torch.randn(1, text, width),
        "pooled_projections": torch.randn(1, config.get("pooled_projection_dim", 768)),
        "timestep": torch.full((1,), 0.5), "guidance": torch.full((1,), 3.5),
        "img_ids": ids, "txt_ids": torch.zeros(text, 3),
    }  # fmt: skip
    return "FluxTransformer2DModel", {"guidance_embeds": True, **config}, arguments


def flux2(side, text):
    """Return model class, configuration and arguments of Flux.2."""
    arguments = flux(side, text, in_channels=128, joint_attention_dim=15360)[2]
    del arguments["pooled_projections"]
    zero = torch.zeros(side * side, 1)
    arguments["img_ids"] = torch.cat([arguments["img_ids"], zero], 1)[None]
    arguments["txt_ids"] = torch.cartesian_prod(*[torch.zeros(1)] * 3, torch.arange(text * 1.0))[
        None
    ]
    return "Flux2Transformer2DModel", {}, arguments


def sd35(side, text):
    """Return model class, configuration and arguments of Stable Diffusion 3.5 Large."""
    config = {
        "num_layers": 38, "num_attention_heads": 38, "attention_head_dim": 64,
        "joint_attention_dim": 4096, "caption_projection_dim": 2432, "pooled_projection_dim": 2048,
        "pos_embed_max_size": 192, "qk_norm": "rms_norm",
    }  # fmt: skip
    return "SD3Transformer2DModel", config, {
        "hidden_states": torch.randn(1, 16, 2 * side, 2 * side),
        "encoder_hidden_states": torch.randn(1, text, 4096),
        "pooled_projections": torch.randn(1, 2048), "timestep": torch.full((1,), 500.0),
    }  # fmt: skip


def cogvideox(frames, height, width):
    """Return model class, configuration and arguments of CogVideoX-5b."""
    config = {
        "num_attention_heads": 48, "num_layers": 42, "use_rotary_positional_embeddings": True
    }  # fmt: skip
    angle = torch.randn(frames * height * width // 4, 32).repeat_interleave(2, dim=1)
    return "CogVideoXTransformer3DModel", config, {
        "hidden_states": torch.randn(1, frames, 16, height, width),
        "encoder_hidden_states": torch.randn(1, 226, 4096), "timestep": torch.full((1,), 500.0),
        "image_rotary_emb": (angle.cos(), angle.sin()),
    }  # fmt: skip


SHAPES = {
    "flux1-1024": lambda: flux(64, 512),
    "sd35-large-1024": lambda: sd35(64, 333),
    "cogvideox-5b-13-frames": lambda: cogvideox(4, 60, 90),
    "flux2-1024": lambda: flux2(64, 512),
    "tiny": lambda: flux(
        8, 16, in_channels=16, num_layers=3, num_single_layers=2, attention_head_dim=32,
        num_attention_heads=4, joint_attention_dim=32, pooled_projection_dim=32,
        axes_dims_rope=(8, 12, 12),
    ),
}  # fmt: skip


def to_device(value, device, dtype):
    """Return a tensor, or a tuple of them, on the device."""
    if isinstance(value, tuple):
        return tuple(part.to(device) for part in value)
    keep = value.shape[-1] in (3, 4) or value.ndim == 1  # ids and times
    return value.to(device) if keep else value.to(device, dtype)


def measure(name, concepts, runs, device):
    """Return one row of results per contender."""
    import diffusers

    kind, config, arguments = SHAPES[name]()
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    with torch.device(device):
        model = getattr(diffusers, kind)(**config).eval()
    torch.set_default_dtype(torch.float32)
    arguments = {key: to_device(value, device, dtype) for key, value in arguments.items()}
    arguments["return_dict"] = False
    pipe = SimpleNamespace(transformer=model, scheduler=None)
    width = arguments["encoder_hidden_states"].shape[-1]
    embeds = torch.randn(concepts, width, device=device)
    words = [str(i) for i in range(concepts)]

    def observer(**settings):
        return ConceptAttention(pipe, words, concept_embeds=embeds, **settings)

    vectors = ["concept_output", "image_output"]
    contenders = {
        "plain": nullcontext,
        "torch": lambda: observer(kernels="torch"),
        "triton": lambda: observer(kernels="triton"),
        "torch, all layers": lambda: observer(kernels="torch", layers="all"),
        "triton, all layers": lambda: observer(kernels="triton", layers="all"),
        "keep everything": lambda: observer(kernels="torch", layers="all", vectors=vectors),
    }
    if device != "cuda":
        contenders = {key: value for key, value in contenders.items() if "triton" not in key}

    def call():
        return model(**arguments)[0]

    plain, maps, times, memory, host = None, {}, {}, {}, {}
    with torch.no_grad():
        for key, make in contenders.items():
            with make() as watched:
                call()  # compiles the kernels
                if device == "cuda":
                    torch.cuda.synchronize()
                    torch.cuda.reset_peak_memory_stats()
                out = call()
                if device == "cuda":
                    memory[key] = torch.cuda.max_memory_allocated() / 2**20
            plain = out if plain is None else plain
            if not torch.equal(out, plain):
                raise RuntimeError(f"{name}: {key} changed the output")
            if key not in ("plain", "keep everything"):
                maps[key] = watched.heatmaps().with_reduce("raw").values
            times[key], host[key] = [], []
        error = 0.0
        if device == "cuda":
            for plan in ("", ", all layers"):
                ours, twin = maps[f"triton{plan}"], maps[f"torch{plan}"]
                error = max(error, float((ours - twin).abs().max() / twin.abs().max()))
            if error > 2e-2:
                raise RuntimeError(f"{name}: the kernels' maps differ from torch by {error}")
        for _ in range(runs):
            for key, make in contenders.items():
                with make():
                    start = time.perf_counter()
                    if device == "cuda":
                        marks = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
                        torch.cuda.synchronize()
                        start = time.perf_counter()
                        marks[0].record()
                        call()
                        marks[1].record()
                        host[key].append(1000 * (time.perf_counter() - start))
                        torch.cuda.synchronize()
                        times[key].append(marks[0].elapsed_time(marks[1]))
                    else:
                        call()
                        times[key].append(1000 * (time.perf_counter() - start))
        syncs = None if device != "cuda" else count_syncs(call, contenders["torch"])
    rows = []
    base = statistics.median(times["plain"])
    for key, values in times.items():
        middle = statistics.median(values)
        # Each round is one pair, so slow drift of the clock cancels.
        ratios = [a / b for a, b in zip(values, times["plain"], strict=True)]
        rows.append({
            "shape": name, "contender": key, "concepts": concepts, "median_ms": middle,
            "p20_ms": statistics.quantiles(values, n=5)[0] if runs > 1 else middle,
            "p80_ms": statistics.quantiles(values, n=5)[3] if runs > 1 else middle,
            "overhead_percent": 100 * (statistics.median(ratios) - 1),
            "overhead_of_medians_percent": 100 * (middle / base - 1), "runs": runs,
            "extra_memory_mib": memory.get(key, 0.0) - memory.get("plain", 0.0),
            "host_ms": statistics.median(host[key]) if host[key] else None,
            "syncs_plain_and_observed": syncs, "kernel_error": error, "bit_identical": True,
        })  # fmt: skip
        print(
            f"{name:24} {key:20} {middle:9.2f} ms  {rows[-1]['overhead_percent']:+7.2f} %  "
            f"{rows[-1]['extra_memory_mib']:+8.1f} MiB  host {rows[-1]['host_ms'] or 0:7.2f} ms"
        )
    print(f"{name:24} same bits; kernels against torch {error:.1e}; syncs {syncs}", flush=True)
    return rows


def count_syncs(call, make):
    """Return the number of device synchronisations of a plain and of an observed forward pass."""
    import warnings

    counts = []
    for context in (nullcontext, make):
        with context():
            call()
            torch.cuda.synchronize()
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                torch.cuda.set_sync_debug_mode("warn")
                call()
                torch.cuda.set_sync_debug_mode("default")
        counts.append(sum("synchroniz" in str(warning.message) for warning in caught))
    return counts


def main():
    """Run the benchmark and write its rows as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default="flux1-1024,sd35-large-1024,cogvideox-5b-13-frames")
    parser.add_argument("--concepts", type=int, default=5)
    parser.add_argument("--runs", type=int, default=12)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--output", type=Path, default=None)
    given = parser.parse_args()
    rows = []
    for name in given.shapes.split(","):
        rows += measure(name, given.concepts, given.runs, given.device)
        gc.collect()
        if given.device == "cuda":
            torch.cuda.empty_cache()
        if given.output is not None:
            given.output.parent.mkdir(parents=True, exist_ok=True)
            report = {"environment": environment_report(), "rows": rows}
            given.output.write_text(json.dumps(report, indent=1, default=str))


if __name__ == "__main__":
    main()
