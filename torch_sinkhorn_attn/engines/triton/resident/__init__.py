"""Kernels that keep the plan of one problem in registers for the whole solve."""
