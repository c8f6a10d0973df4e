"""Triton kernels, each with a PyTorch twin."""
