"""What a JAX user calls: arguments in, a problem of the kernels out."""
