"""What observing costs: time and memory of forward passes, on random weights of real shapes.

    python benchmarks/bench_overhead.py --output results.json                  # one GPU
    python benchmarks/bench_overhead.py --shapes tiny --device cpu --runs 3    # smoke run

Contenders alternate within every round: the plain model, the observer by torch, the observer by
Triton, and keeping every layer's vectors as the reference implementation does. A sample is a number
of passes one after the other, launched without waiting as pipelines do; its time is divided by that
number. Before timing, the model's output must be the same bits under each contender, and the
kernels' maps those of torch. Shapes that end in "-cfg" are guided steps as pipelines make them, two
rows of which the conditional one is observed. With `--compiled` the plain model and the observed
one follow once more with their blocks under torch.compile, one after the other and the plain one at
both ends; it promises no same bits: the largest difference of the outputs is in the rows.
"""

import argparse
import gc
import json
import math
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


def flux2(side, text, **config):
    """Return model class, configuration and arguments of Flux.2."""
    arguments = flux(side, text, in_channels=128, joint_attention_dim=15360)[2]
    del arguments["pooled_projections"]
    zero = torch.zeros(side * side, 1)
    arguments["img_ids"] = torch.cat([arguments["img_ids"], zero], 1)[None]
    arguments["txt_ids"] = torch.cartesian_prod(*[torch.zeros(1)] * 3, torch.arange(text * 1.0))[
        None
    ]
    return "Flux2Transformer2DModel", config, arguments


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
    "sd35-large-1024-cfg": lambda: sd35(64, 333),
    "cogvideox-5b-13-frames": lambda: cogvideox(4, 60, 90),
    "cogvideox-5b-13-frames-cfg": lambda: cogvideox(4, 60, 90),
    "flux2-1024": lambda: flux2(64, 512),
    "tiny": lambda: flux(
        8, 16, in_channels=16, num_layers=3, num_single_layers=2, attention_head_dim=32,
        num_attention_heads=4, joint_attention_dim=32, pooled_projection_dim=32,
        axes_dims_rope=(8, 12, 12),
    ),
}  # fmt: skip
PLAIN = "plain"
KEEP = "keep everything"


def to_device(value, device, dtype):
    """Return a tensor, or a tuple of them, on the device."""
    if isinstance(value, tuple):
        return tuple(part.to(device) for part in value)
    keep = value.shape[-1] in (3, 4) or value.ndim == 1  # ids and times
    return value.to(device) if keep else value.to(device, dtype)


def build(name, device):
    """Return a transformer with random weights made on the device, and its arguments."""
    import diffusers

    kind, config, _ = SHAPES[name]()
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    with torch.device("meta"):
        model = getattr(diffusers, kind)(**config).to(dtype).eval()
    empty = {key: buffer for key, buffer in model.named_buffers() if buffer.is_meta}
    if empty:  # tables that the constructor computes
        with torch.device(device):
            filled = dict(getattr(diffusers, kind)(**{**config, "num_layers": 1}).named_buffers())
    model = model.to_empty(device=device)
    for key in empty:
        owner, _, last = key.rpartition(".")
        setattr(model.get_submodule(owner), last, filled[key].to(device))
    torch.manual_seed(0)
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if weight.ndim > 1:
                weight.normal_(std=1 / math.sqrt(weight[0].numel()))
            else:
                weight.fill_(1.0 if key.endswith("weight") else 0.0)
    return model, build_arguments(name, device)


def build_arguments(name, device):
    """Return the arguments of one forward pass, of two rows for guided shapes."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch.manual_seed(1)
    arguments = SHAPES[name]()[2]
    arguments = {key: to_device(value, device, dtype) for key, value in arguments.items()}
    if name.endswith("-cfg"):
        arguments = {
            key: value if isinstance(value, tuple) else torch.cat([value, value])
            for key, value in arguments.items()
        }
    return {**arguments, "return_dict": False}


def contenders(pipe, width, concepts, device):
    """Return a context for each contender, by name."""
    embeds = torch.randn(concepts, width, device=device)
    words = [str(i) for i in range(concepts)]

    def observer(**settings):
        return lambda: ConceptAttention(pipe, words, concept_embeds=embeds, **settings)

    vectors = ["concept_output", "image_output"]
    found = {
        PLAIN: nullcontext,
        "torch": observer(kernels="torch"),
        "triton": observer(kernels="triton"),
        KEEP: observer(kernels="torch", layers="all", vectors=vectors),
    }
    if device != "cuda":
        del found["triton"]
    return found


def measure(name, concepts, runs, passes, device, *, built, details):
    """Return one row of results per contender."""
    model, arguments = built
    pipe = SimpleNamespace(
        transformer=model, scheduler=None, guidance_scale=4.5 if name.endswith("-cfg") else 1.0
    )
    ways = contenders(pipe, arguments["encoder_hidden_states"].shape[-1], concepts, device)
    if not details:
        ways = {key: make for key, make in ways.items() if key != KEEP}
    gpu = device == "cuda"

    def call():
        return model(**arguments)[0]

    plain, maps, times, memory, host, detail = None, {}, {}, {}, {}, {}
    thread = {}  # what the Python thread computed, without waiting for cores that others use
    with torch.no_grad():
        for key, make in ways.items():
            with make() as watched:
                call()  # compiles the kernels
                if gpu:
                    torch.cuda.synchronize()
                    torch.cuda.reset_peak_memory_stats()
                out = call()
                if gpu:
                    memory[key] = torch.cuda.max_memory_allocated() / 2**20
            plain = out if plain is None else plain
            if not torch.equal(out, plain):
                raise RuntimeError(f"{name}: {key} changed the output")
            if not plain.isfinite().all():
                raise RuntimeError(f"{name}: the random model overflows")
            if key in ("torch", "triton"):
                maps[key] = watched.heatmaps().with_reduce("raw").values
            times[key], host[key], thread[key] = [], [], []
        error = 0.0
        if gpu:
            ours, twin = maps["triton"], maps["torch"]
            error = float((ours - twin).abs().max() / twin.abs().max())
            if error > 2e-2:
                raise RuntimeError(f"{name}: the kernels' maps differ from torch by {error}")
        for _ in range(runs):
            for key, make in ways.items():
                with make():
                    start = time.perf_counter()
                    if gpu:
                        marks = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
                        torch.cuda.synchronize()
                        start, own = time.perf_counter(), time.thread_time()
                        marks[0].record()
                        for _ in range(passes):
                            call()
                        marks[1].record()
                        host[key].append(1000 * (time.perf_counter() - start) / passes)
                        thread[key].append(1000 * (time.thread_time() - own) / passes)
                        torch.cuda.synchronize()
                        times[key].append(marks[0].elapsed_time(marks[1]) / passes)
                    else:
                        for _ in range(passes):
                            call()
                        times[key].append(1000 * (time.perf_counter() - start) / passes)
        if gpu and details:
            looked = {key: make for key, make in ways.items() if key != KEEP}
            detail = {key: look(call, make) for key, make in looked.items()}
            extra = {key: subtract(detail[key], detail[PLAIN]) for key in maps}
            for key, table in extra.items():
                print_table(name, key, concepts, table)
    rows = []
    base = statistics.median(times[PLAIN])
    for key, values in times.items():
        middle = statistics.median(values)
        # Each round is one pair, so slow drift of the clock cancels.
        ratios = [a / b for a, b in zip(values, times[PLAIN], strict=True)]
        rows.append({
            "shape": name, "contender": key, "concepts": concepts, "median_ms": middle,
            "quartiles_ms": quartiles(values),
            "overhead_percent": 100 * (statistics.median(ratios) - 1),
            "overhead_quartiles_percent": [100 * (ratio - 1) for ratio in quartiles(ratios)],
            "overhead_of_medians_percent": 100 * (middle / base - 1),
            "runs": runs, "passes": passes,
            "extra_memory_mib": memory.get(key, 0.0) - memory.get(PLAIN, 0.0),
            "host_ms": statistics.median(host[key]) if host[key] else None,
            "host_thread_ms": statistics.median(thread[key]) if thread[key] else None,
            "layers": {"dual": len(model.transformer_blocks)},
            "kernel_error": error, "bit_identical": True,
            **({name: detail[key][name] for name in ("syncs", "launches", "busy_ms", "span_ms")}
               if key in detail else {}),
            **({"extra_gpu_kernels": extra[key][:16]} if detail and key in maps else {}),
        })  # fmt: skip
        print(
            f"{name:24} r={concepts:2} {key:16} {middle:8.2f} ms "
            f"{rows[-1]['overhead_percent']:+7.2f} % "
            f"[{', '.join(f'{x:+.2f}' for x in rows[-1]['overhead_quartiles_percent'])}]  "
            f"{rows[-1]['extra_memory_mib']:+8.1f} MiB  host {rows[-1]['host_ms'] or 0:7.2f} ms "
            f"(thread {rows[-1]['host_thread_ms'] or 0:7.2f})  "
            f"syncs {rows[-1].get('syncs')}  launches {rows[-1].get('launches')}  "
            f"busy {rows[-1].get('busy_ms', 0):.2f} of {rows[-1].get('span_ms', 0):.2f}",
            flush=True,
        )  # fmt: skip
    print(f"{name:24} same bits; kernels against torch {error:.1e}", flush=True)
    return rows


def measure_compiled(name, concepts, runs, passes, device, built):
    """Return rows of the plain and the observed model, each with its blocks compiled."""
    model, arguments = built
    pipe = SimpleNamespace(
        transformer=model, scheduler=None, guidance_scale=4.5 if name.endswith("-cfg") else 1.0
    )
    ways = contenders(pipe, arguments["encoder_hidden_states"].shape[-1], concepts, device)
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    rows, base = [], None
    order = [key for key in (PLAIN, "torch", "triton") if key in ways]
    with torch.no_grad():
        for key in [*order, PLAIN]:  # the plain model last once more: what drift there was
            torch.compiler.reset()
            with ways[key]() as watched:  # compiled inside, as users must
                model.compile_repeated_blocks()
                first = time.perf_counter()
                out = model(**arguments)[0]
                wait()
                first = time.perf_counter() - first
                for _ in range(3):  # strides differ from those of the first pass
                    model(**arguments)
                wait()
                values = []
                for _ in range(runs):
                    start = time.perf_counter()
                    for _ in range(passes):
                        model(**arguments)
                    wait()
                    values.append(1000 * (time.perf_counter() - start) / passes)
                if key != PLAIN and min(watched.heatmaps().coverage.values()) < 1:
                    raise RuntimeError(f"{name}: maps of the compiled model are incomplete")
            for block in model.modules():
                block._compiled_call_impl = None
            middle = statistics.median(values)
            again = ", again" if key == PLAIN and base else ""
            base = base or (middle, out)
            rows.append({
                "shape": name, "contender": f"{key}, compiled{again}", "concepts": concepts,
                "median_ms": middle, "quartiles_ms": quartiles(values), "runs": runs,
                "overhead_percent": 100 * (middle / base[0] - 1), "passes": passes,
                "first_pass_s": first, "output_difference": float((out - base[1]).abs().max()),
            })  # fmt: skip
            print(
                f"{name:24} r={concepts:2} {rows[-1]['contender']:22} {middle:8.2f} ms "
                f"{rows[-1]['overhead_percent']:+7.2f} %  first pass {first:.1f} s  "
                f"difference {rows[-1]['output_difference']:.1e}",
                flush=True,
            )
    return rows


def quartiles(values):
    """Return the first and the third quartile."""
    return statistics.quantiles(values, n=4)[::2] if len(values) > 1 else [*values, *values]


def look(call, make):
    """Return synchronisations, launches and GPU time, whole and by kernel, of one forward pass."""
    import warnings

    from torch.profiler import ProfilerActivity, profile

    with make():
        call()
        torch.cuda.synchronize()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            call()
            torch.cuda.set_sync_debug_mode("default")
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            call()
            torch.cuda.synchronize()
    kernels, spans = {}, []
    for event in seen.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            spans.append((event.time_range.start, event.time_range.end))
            count, total = kernels.get(event.name, (0, 0.0))
            kernels[event.name] = count + 1, total + event.time_range.elapsed_us()
    return {
        "syncs": sum("synchroniz" in str(warning.message) for warning in caught),
        "launches": sum(count for count, _ in kernels.values()), "kernels": kernels,
        "busy_ms": union(spans) / 1000,
        "span_ms": (max(end for _, end in spans) - min(start for start, _ in spans)) / 1000,
    }  # fmt: skip


def union(spans):
    """Return the length of the union of intervals."""
    total, until = 0.0, -math.inf
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


def subtract(observed, plain):
    """Return (kernel, further launches, further microseconds), the longest first."""
    rows = []
    for name, (count, total) in observed["kernels"].items():
        before, less = plain["kernels"].get(name, (0, 0.0))
        if count != before:
            # Of a kernel that both use, the plain model's launches cost what they cost there.
            rows.append((name[:90], count - before, total - less))
    return sorted(rows, key=lambda row: -row[2])


def print_table(name, key, concepts, table):
    """Print what one contender adds on the GPU."""
    count, total = (sum(row[place] for row in table) for place in (1, 2))
    print(f"{name} r={concepts} {key}: {count} further launches, {total:.0f} us on the GPU")
    for kernel, launches, micro in table[:14]:
        print(f"    {micro:8.1f} us {launches:5}x {micro / max(launches, 1):7.2f}  {kernel[:80]}")


def main():
    """Run the benchmark and write its rows as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default="flux1-1024,sd35-large-1024,cogvideox-5b-13-frames")
    parser.add_argument("--concepts", default="5", help="numbers, separated by commas")
    parser.add_argument("--runs", type=int, default=12, help="samples of each contender")
    parser.add_argument("--passes", type=int, default=3, help="forward passes of a sample")
    parser.add_argument("--compiled", action="store_true", help="and with compiled blocks")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--output", type=Path, default=None)
    given = parser.parse_args()
    rows, built, names = [], None, given.shapes.split(",")
    for index, name in enumerate(names):
        if built is None or name.removesuffix("-cfg") != names[index - 1].removesuffix("-cfg"):
            built = None
            gc.collect()
            if given.device == "cuda":
                torch.cuda.empty_cache()
        start = time.perf_counter()
        if built is None:
            built = build(name, given.device)
        else:
            built = built[0], build_arguments(name, given.device)
        print(f"{name}: made in {time.perf_counter() - start:.1f} s", flush=True)
        for place, concepts in enumerate(given.concepts.split(",")):
            rows += measure(
                name, int(concepts), given.runs, given.passes, given.device, built=built,
                details=place == 0,
            )  # fmt: skip
            save(rows, given.output)
            if given.compiled:
                rows += measure_compiled(
                    name, int(concepts), given.runs, given.passes, given.device, built
                )
                save(rows, given.output)


def save(rows, path):
    """Write the rows so far with the environment, if there is a file for them."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        report = {"environment": environment_report(), "rows": rows}
        path.write_text(json.dumps(report, indent=1, default=str))


if __name__ == "__main__":
    main()
