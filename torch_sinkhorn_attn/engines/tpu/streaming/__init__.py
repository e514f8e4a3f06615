"""Kernels that stream the inputs through a TPU core in every half-step."""
