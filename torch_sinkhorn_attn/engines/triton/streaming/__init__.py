"""Kernels that make tiles of the plan again in every half-step: any size and any option."""
