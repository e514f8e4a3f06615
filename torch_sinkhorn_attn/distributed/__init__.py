"""Transport over a sequence longer than a device: queries, keys and values sharded along it over a process group.

Rows are solved where their queries live. What is new beside one device is one verb: to complete a vector of the
columns, to which every rank has added its own rows. `wire` moves tensors, `columns` completes, and the tiles,
half-steps and adjoint are those of the tiled engine (`tiles`) or of Triton's streaming kernels (`streams`).
`preparation` sees the whole problem, in vectors, and cuts each rank's `share`; Q and P never move. `calls` is what the
public functions call, and `compiled` what a program of torch.compile calls in its place.
"""

from torch_sinkhorn_attn.distributed.context import sequence_parallel

__all__ = ["sequence_parallel"]
