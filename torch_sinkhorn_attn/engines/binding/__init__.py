"""What the bindings of the JAX programs in `engines/tpu` to torch's libraries for TPUs share.

A binding takes a problem of tensors, has one of the pure functions of `functions` run on them by its library, and gives
tensors back. `engine` is all of an engine but that; what it asks of a library is `library.Binding`.
"""
