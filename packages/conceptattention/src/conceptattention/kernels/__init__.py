"""The side computation as Triton kernels, each with a torch twin."""
