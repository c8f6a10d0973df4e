"""One folder per operator: the public function, its Triton kernels, its plain PyTorch reference."""
