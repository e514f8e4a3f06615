"""Which process group the sequence is sharded over: an argument, or `sequence_parallel` around the call.

Imported with every call, so it imports little of torch.distributed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def _keep_no_group() -> None:
    """Import torch.distributed.nn before there is a group, which its functions' defaults would keep: imported later, by
    torch's compiler or its optimisers, it holds the default group beyond destroy_process_group, and gloo's threads,
    which run on, now and then abort the process as it ends."""
    from torch import distributed

    if distributed.is_available() and not distributed.is_initialized():
        import torch.distributed.nn  # noqa: F401


_keep_no_group()

_active: Any = None  # of the process, not of a thread: recomputation runs in the threads of autograd


@contextmanager
def sequence_parallel(mesh_or_group: Any) -> Iterator[None]:
    """Within it, `sinkhorn_attention` and `SinkhornMultiheadAttention` take local shards along the sequence and give
    local shards: rank r holds the r-th block of queries and the r-th block of keys and values. So do `sinkhorn_plan`,
    `sinkhorn_plan_band`, `sinkhorn_matches` and `certify`; the other functions refuse.

    Args:
        mesh_or_group: a `ProcessGroup`, or a `DeviceMesh` of one dimension, as `mesh["cp"]`. None: no sharding, within
            another `sequence_parallel`.

    It holds for the process, whatever the thread: where activations are recomputed (checkpointing), run the backward
    inside it too. Calls with `sequence_group=` do not ask it.

    Raises:
        TypeError, ValueError: for anything else, or a mesh of several dimensions.
    """
    global _active
    before, _active = _active, None if mesh_or_group is None else as_group(mesh_or_group)
    try:
        yield
    finally:
        _active = before


def group_of(sequence_group: Any, query: Any = None) -> Any:
    """The process group of a call: the one given, or that over which the query's tokens are sharded, or that of the
    context; None without."""
    group = _active if sequence_group is None else as_group(sequence_group)
    if type(query).__name__ != "DTensor":
        return group
    from torch_sinkhorn_attn.distributed.dtensors import sharding_of

    sharding = sharding_of(query, group)
    return group if sharding is None else sharding.group


def as_group(given: Any) -> Any:
    """A process group, from one or from a mesh of one dimension."""
    from torch import distributed

    if not distributed.is_available() or not distributed.is_initialized():
        raise ValueError(
            "sequence_group: torch.distributed is not initialised; call torch.distributed.init_process_group first."
        )
    if isinstance(given, distributed.ProcessGroup):
        return given
    from torch.distributed.device_mesh import DeviceMesh

    if not isinstance(given, DeviceMesh):
        raise TypeError(f"sequence_group must be a ProcessGroup or a DeviceMesh of one dimension, got {given!r}.")
    if given.ndim != 1:
        raise ValueError(
            f"sequence_group is a DeviceMesh of {given.ndim} dimensions, {given.mesh_dim_names}; pass the one that "
            'shards the sequence, as mesh["cp"].'
        )
    return given.get_group()


def refuse_local() -> None:
    """ValueError where a function that knows no other rank is called within `sequence_parallel`: on a shard alone it
    would compute another problem."""
    if _active is not None:
        raise ValueError(
            "Within sequence_parallel this function would see the local shard alone, which is another problem. "
            "sinkhorn_attention, SinkhornMultiheadAttention, sinkhorn_plan, sinkhorn_plan_band, sinkhorn_matches and "
            "certify know the other ranks; to compute on the shard alone, call it within sequence_parallel(None)."
        )


def check_module(module: Any, nested: bool) -> None:
    """ValueError for what does not go with tokens that are sharded: of a module, and of nested tensors."""
    refused = {
        "nested tensors": nested and "pad them and pass key_padding_mask in shards",
        "add_bias_kv": module.bias_k is not None and "its key would be added on every rank",
        "add_zero_attn": module.add_zero_attn and "its key would be added on every rank",
    }
    for name, reason in refused.items():
        if reason:
            raise ValueError(f"{name} does not go with a sequence sharded over a process group: {reason}.")
