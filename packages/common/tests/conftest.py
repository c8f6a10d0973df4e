"""Kernels are interpreted where there is no GPU; the variable must be set before any import."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
