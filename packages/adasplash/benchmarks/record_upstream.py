"""Record what the package adasplash 0.2.2 computes on small inputs, for tests/test_compat.py.

Run with that package in PYTHONPATH instead of ours, on a GPU:
`python packages/adasplash/benchmarks/record_upstream.py FILE.npz`. Inputs are drawn on the CPU from
a seed and stored with the outputs and gradients, in float32; its kernels are compiled in one of
their configurations each instead of being tuned.
"""

from __future__ import annotations

import sys
from importlib.metadata import version

import numpy as np
import torch
from triton.runtime.autotuner import Autotuner

LENGTH, DIM = 128, 16  # a power of two, as it demands, and the smallest head size that it takes
ATTENTION = {
    "v2": ("adasplash_v2", {"niter": 10}),
    "v2 varlen": ("adasplash_v2", {"niter": 10, "varlen": [128, 70]}),
    "v1": ("adasplash_v1", {}),
    "v1 alpha 1.25": ("adasplash_v1", {"alpha": 1.25, "niter": 20}),
}
DENSE = {
    "entmax15": ("triton_entmax15", {"n_iter": 10}),
    "sparsemax": ("triton_sparsemax", {"n_iter": 10}),
    "entmax 1.25": ("triton_entmax_v1", {"alpha": 1.25, "n_iter": 20}),
}


def inputs(name: str) -> dict[str, torch.Tensor]:
    """Return the inputs of a case, and the gradient of its output."""
    generator = torch.Generator().manual_seed(len(name))
    if name in DENSE:
        x, grad = torch.randn(2, 4, 200, generator=generator)
        return {"x": 2 * x, "grad": grad}
    batch = len(ATTENTION[name][1].get("varlen", [0]))
    shape = (4, batch, 1, LENGTH, DIM)
    q, k, v, grad = torch.randn(shape, generator=generator)
    return {"q": 3 * q, "k": k, "v": v, "grad": grad}


def main() -> None:
    assert version("adasplash") == "0.2.2", version("adasplash")
    import adasplash

    def first(self: Autotuner, *arguments: object, **options: object) -> object:
        self.configs = self.configs[-1:]
        return run(self, *arguments, **options)

    run, Autotuner.run = Autotuner.run, first
    found: dict[str, torch.Tensor] = {}
    for name, (function, options) in {**ATTENTION, **DENSE}.items():
        given = inputs(name)
        found |= {f"{name}/{key}": x for key, x in given.items()}
        on_gpu = {key: x.cuda() for key, x in given.items()}
        grad = on_gpu.pop("grad")
        leaves = [x.requires_grad_() for x in on_gpu.values()]
        if "varlen" in options:
            options = {**options, "varlen": torch.tensor(options["varlen"], device="cuda")}
        try:
            output = getattr(adasplash, function)(*leaves, **options)
            made = torch.autograd.grad(output, leaves, grad)
        except Exception as reason:  # what it cannot do on this device is left out
            print(f"{name}: {type(reason).__name__}: {str(reason)[:300]}", flush=True)
            continue
        found[f"{name}/output"] = output.detach().cpu().contiguous()
        for key, x in zip(on_gpu, made, strict=True):
            found[f"{name}/d{key}"] = x.cpu().contiguous()
        print(f"{name}: recorded", flush=True)
        np.savez_compressed(sys.argv[1], **{key: x.numpy() for key, x in found.items()})


if __name__ == "__main__":
    main()
