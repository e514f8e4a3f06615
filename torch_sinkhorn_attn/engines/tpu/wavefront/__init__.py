"""Kernels that work on all iterations of a band at once, in one pass over the sequence: for any length."""
