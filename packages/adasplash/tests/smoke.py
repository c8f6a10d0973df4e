"""Run outside the checkout, where only this wheel and fourfold-common are installed."""

import subprocess

import torch

from adasplash import adasplash, entmax15

q, k, v = torch.randn(3, 1, 2, 40, 16).unbind(0)
output = adasplash(6 * q, k, v)
assert output.shape == q.shape
assert output.isfinite().all()
assert (entmax15(torch.tensor([3.0, 0.0, -3.0])) == 0).any()
help_text = subprocess.run(["adasplash", "--help"], capture_output=True, text=True, check=True)
assert "demo" in help_text.stdout
print("adasplash: attention and command line work")
