"""Helpers that the kernels share: choice of the backend, the CPU compiler, ahead-of-time compilation."""
