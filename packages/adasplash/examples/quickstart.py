"""Attention with exact zeros on random input: how many weights vanish as scores grow."""

import torch

from adasplash import adasplash, entmax15

torch.manual_seed(0)
q, k, v = torch.randn(3, 1, 4, 256, 32).unbind(0)
for gain in (1.0, 4.0, 16.0):
    output = adasplash(gain * q, k, v, is_causal=False)
    weights = entmax15(gain * q @ k.mT * 32**-0.5)
    error = (output - weights @ v).abs().max()
    print(f"gain {gain:4}: {(weights == 0).float().mean():.1%} zeros, error {error:.1e}")
