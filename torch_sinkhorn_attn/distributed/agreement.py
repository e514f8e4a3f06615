"""All ranks of a group make the same call, or all raise: one small all-gather before anything is sent.

Each rank sends a digest of what must be alike, how many lines its shards have, and how each of its tensors lies along
the sequence. Where digests differ the descriptions themselves are exchanged, and the error names both values.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from torch_sinkhorn_attn.distributed.wire import Wire

ABSENT, SHARDED, WHOLE, EITHER, WRONG = range(5)  # how a tensor lies along the sequence, as far as one rank can tell


class Agreed(NamedTuple):
    """What the ranks found of each other."""

    rows: list[int]  # queries of each rank
    cols: list[int]  # keys of each rank
    sharded: dict[str, bool]  # of the tensors given along the sequence: shards, or one value for all tokens


def layout(last: int, own: int) -> int:
    """How a dimension of size `last` lies along a sequence of which this rank has `own` tokens."""
    if last == own:
        return EITHER if own == 1 else SHARDED
    return WHOLE if last == 1 else WRONG


def agree(
    wire: Wire,
    description: Mapping[str, str],
    counts: tuple[int, int],
    layouts: Mapping[str, int],
    error: Exception | None,
    device: torch.device,
) -> Agreed:
    """Compare with the other ranks.

    Args:
        description: what must be alike, by name.
        counts: queries and keys here.
        layouts: of every tensor that may lie along the sequence, in one order on all ranks.
        error: what this rank has found wrong by itself; raised here, and named by the others.

    Raises:
        ValueError: on every rank, where some disagree.
    """
    told = "" if error is None else f"{type(error).__name__}: {error}"
    digest = hashlib.blake2b(repr((sorted(description.items()), told)).encode(), digest_size=7).digest()
    own = [int.from_bytes(digest, "little"), int(error is not None), *counts, *layouts.values()]
    every = wire.numbers(own, device)
    if any(x[:2] != every[0][:2] for x in every) or every[0][1]:
        _raise(wire.objects((dict(description), told)), error)
    sharded = {}
    for name, of_ranks in zip(layouts, zip(*(x[4:] for x in every), strict=True), strict=True):
        if WRONG in of_ranks or {SHARDED, WHOLE} <= {*of_ranks}:
            raise ValueError(
                f"{name}: every rank passes its shard along the sequence, or all pass one value (size 1) for all "
                f"tokens; "
                f"the ranks have {_words(of_ranks)}, with {[x[2] for x in every]} queries and {[x[3] for x in every]} "
                f"keys."
            )
        sharded[name] = SHARDED in of_ranks or (EITHER in of_ranks and WHOLE not in of_ranks)
    return Agreed([x[2] for x in every], [x[3] for x in every], sharded)


def _words(layouts: Sequence[int]) -> str:
    names = {ABSENT: "none", SHARDED: "a shard", WHOLE: "one value", EITHER: "a shard of one", WRONG: "neither"}
    return ", ".join(names[x] for x in layouts)


def _raise(every: Sequence[tuple[Mapping[str, str], str]], error: Exception | None) -> None:
    if error is not None:
        raise error
    for rank, (_, told) in enumerate(every):
        if told:
            raise ValueError(f"Rank {rank} of the sequence's group refused its arguments: {told}")
    first = every[0][0]
    for rank, (other, _) in enumerate(every):
        differing = [name for name in {**first, **other} if first.get(name) != other.get(name)]
        if differing:
            pairs = (
                f"{x}={first.get(x, 'absent')} on rank 0, {x}={other.get(x, 'absent')} on rank {rank}"
                for x in differing
            )
            raise ValueError(
                f"The ranks of the sequence's group disagree: {'; '.join(pairs)}. All must make the same call, on "
                f"their "
                "own shards."
            )
    raise AssertionError("digests differ where descriptions do not")
