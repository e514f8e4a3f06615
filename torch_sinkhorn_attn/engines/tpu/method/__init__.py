"""The solve and its adjoint in JAX, the same for every lowering."""
