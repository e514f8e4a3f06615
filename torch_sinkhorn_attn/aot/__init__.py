"""Plan a TPU run on a machine without a TPU: `python -m torch_sinkhorn_attn.aot --help`.

    environment   what has to be set before jax or torch_xla is imported
    chips         generations, topologies, and the figures of a chip that a projection needs
    bundles       compile a JAX function for a topology; its memory and the static cost of its kernels
    loops         the reader of the compiler's listings
    failures      the compiler's errors in a line
    child         a function of this package in a process of its own, under that environment
    attention     one attention, forward and backward
    flash         JAX's own flash attention, to compare with
    exported      what a binding hands on, a function that jax.export has written
    step          a training step of torch_xla, on all devices of a slice
    report, cli   the tables and the command line

`bundles` may be imported by other programs, benchmarks among them; it needs jax and libtpu and no torch.
"""
