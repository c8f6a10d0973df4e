"""Fused kernels, one folder for each operation."""
