"""Triton kernels: what eager operations would read and write several times on a GPU."""
