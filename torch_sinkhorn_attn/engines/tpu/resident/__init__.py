"""Kernels that hold one problem in the memory of a TPU core for all its iterations."""
