"""Kernels of our own for GPUs, in Triton, each beside the plain torch code that it stands for."""
