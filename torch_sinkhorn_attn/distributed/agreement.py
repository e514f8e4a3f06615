"""All ranks of a group make the same call, or all raise: one small all-gather before anything is sent.

Each rank sends a digest of what must be alike, how many lines its shards have, and how many each of its tensors has
along the sequence. Where digests differ the descriptions themselves are exchanged, and the error names both values.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from torch_sinkhorn_attn.distributed.wire import Wire

ABSENT, SHARDED, WHOLE, EITHER, WRONG = range(5)  # how a tensor lies along the sequence, as far as one rank can tell
_ABSENT = -1  # a size


class Agreed(NamedTuple):
    """What the ranks found of each other."""

    rows: list[int]  # queries of each rank
    cols: list[int]  # keys of each rank
    sharded: dict[str, bool]  # of the tensors given along the sequence: shards, or one value for all tokens


class Along(NamedTuple):
    """A tensor that may lie along the sequence: its size there, None where it is not given."""

    size: int | None
    of_rows: bool  # whether along the queries


def agree(
    wire: Wire,
    description: Mapping[str, str],
    counts: tuple[int, int | None],
    along: Mapping[str, Along],
    error: Exception | None,
    device: torch.device,
    total: int | None = None,
) -> Agreed:
    """Compare with the other ranks.

    Args:
        description: what must be alike, by name.
        counts: queries and keys here; None where nothing tells how many keys are this rank's, `total` being all.
        along: every tensor that may lie along the sequence, in one order on all ranks.
        error: what this rank has found wrong by itself; raised here, and named by the others.

    Raises:
        ValueError: on every rank, where some disagree.
    """
    told = "" if error is None else f"{type(error).__name__}: {error}"
    digest = hashlib.blake2b(repr((sorted(description.items()), told)).encode(), digest_size=7).digest()
    sizes = [_ABSENT if x.size is None else x.size for x in along.values()]
    own = [int.from_bytes(digest, "little"), int(error is not None), counts[0], counts[1] or 0, *sizes]
    every = wire.numbers(own, device)
    if any(x[:2] != every[0][:2] for x in every) or every[0][1]:
        _raise(wire.objects((dict(description), told)), error)
    of_ranks = {name: [x[4 + k] for x in every] for k, name in enumerate(along)}
    rows, cols = [x[2] for x in every], [x[3] for x in every]
    if counts[1] is None and total is not None:
        cols = _blocks_of_keys([of_ranks[name] for name, x in along.items() if not x.of_rows], total, wire.size)
    sharded = {}
    for name, x in along.items():
        layouts = [_layout(n, own) for n, own in zip(of_ranks[name], rows if x.of_rows else cols, strict=True)]
        if WRONG in layouts or {SHARDED, WHOLE} <= {*layouts}:
            raise ValueError(
                f"{name}: every rank passes its shard along the sequence, or all pass one value (size 1) for all "
                f"tokens; the ranks have {_words(layouts)}, with {rows} queries and {cols} keys."
            )
        sharded[name] = SHARDED in layouts or (EITHER in layouts and WHOLE not in layouts)
    return Agreed(rows, cols, sharded)


def _layout(size: int, own: int) -> int:
    """How a dimension of that size lies along a sequence of which a rank has `own` tokens."""
    if size == _ABSENT:
        return ABSENT
    if size == own:
        return EITHER if own == 1 else SHARDED
    return WHOLE if size == 1 else WRONG


def _blocks_of_keys(sizes: Sequence[Sequence[int]], total: int, ranks: int) -> list[int]:
    """How many of all keys are each rank's: as many as its tensors along the keys have, and without any as
    `torch.tensor_split` has it."""
    for of_ranks in sizes:
        if sum(of_ranks) == total and _ABSENT not in of_ranks:
            return list(of_ranks)
    return [total // ranks + (r < total % ranks) for r in range(ranks)]


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
